"""lm-eval says things on standard error that are not for users of ours: its bars become ours, the rest is left out."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

Report = Callable[[str, int, int], None]
# {what lm-eval's bars are called: what ours are}; a bar without a name is of prompts that are made.
NAMES = {"loglikelihood": "answers judged", "generate_until": "answers written", "rolling": "texts judged"}


@contextmanager
def bars_of_ours(progress: Report) -> Iterator[None]:
    """Within it lm-eval reports by `progress(what, done, total)`. It asks neither git nor pip about the machine, which
    takes seconds and fails aloud outside of a repository: nothing reads the answers."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from lm_eval import evaluator
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *given, **named):
            super().__init__(*given, **named | {"file": io.StringIO(), "mininterval": 0.2})

        def display(self, *given, **named):
            known = [ours for theirs, ours in NAMES.items() if theirs in (self.desc or "")]
            if self.total and (known or not self.desc):
                progress(f"tasks: {known[0] if known else 'prompts'}", self.n, self.total)

        def close(self):
            if not self.disable:
                self.display()
            super().close()

    modules = [m for name, m in sys.modules.items() if name.startswith("lm_eval.") and vars(m).get("tqdm") is tqdm]
    with ExitStack() as patched:
        for module in modules:
            patched.enter_context(patch.object(module, "tqdm", Bar))
        for name in ("add_env_info", "get_git_commit_hash"):
            patched.enter_context(patch.object(evaluator, name, lambda *given: None))
        if not are_progress_bars_disabled():  # of files that become data sets
            disable_progress_bars()
            patched.callback(enable_progress_bars)
        yield
