"""lm-eval says things on standard error that are not for users of ours: its bars become ours, the rest is left out."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from unittest.mock import patch

import tqdm

Report = Callable[[str, int, int], None]
# {a word of what lm-eval's bars are called: what ours are}; bars of other names are not shown.
NAMES = {"loglikelihood": "answers judged", "generate_until": "answers written", "rolling": "texts judged"}
NAMES |= {"Generating": "prompts"}


class Bar(tqdm.tqdm):
    """A bar that is drawn by `report`, and not at all where there is none. A bar without a name is of prompts."""

    report: Report | None = None

    def __init__(self, *given, **named):
        super().__init__(*given, **named | {"file": io.StringIO(), "mininterval": 0.2})

    def display(self, *given, **named):
        known = [ours for theirs, ours in NAMES.items() if theirs in (self.desc or "")]
        if self.total and Bar.report and (known or not self.desc):
            Bar.report(f"tasks: {known[0] if known else 'prompts'}", self.n, self.total)

    def close(self):
        if not self.disable:
            self.display()
        super().close()


@contextmanager
def bars_of_ours(progress: Report) -> Iterator[None]:
    """Within it lm-eval reports by `progress(what, done, total)`. It asks neither git nor pip about the machine, which
    takes seconds and fails aloud outside of a repository: nothing reads the answers."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from lm_eval import evaluator

    theirs = [m for name, m in sys.modules.items() if name.startswith("lm_eval.") and vars(m).get("tqdm") is tqdm.tqdm]
    with ExitStack() as patched:
        patched.enter_context(redirect_stdout(io.StringIO()))  # RULER prints how it finds the length of its prompts
        patched.enter_context(patch.object(Bar, "report", staticmethod(progress)))
        for module in [tqdm, *theirs]:  # tqdm: for modules that are imported meanwhile
            patched.enter_context(patch.object(module, "tqdm", Bar))
        for name in ("add_env_info", "get_git_commit_hash"):
            patched.enter_context(patch.object(evaluator, name, lambda *given: None))
        if not are_progress_bars_disabled():  # of files that become data sets
            disable_progress_bars()
            patched.callback(enable_progress_bars)
        yield
