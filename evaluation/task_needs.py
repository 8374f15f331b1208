"""What RULER and IFEval need beside lm-eval: packages, nltk's sentence splitter, texts that RULER fetches itself."""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from ..recipe.tasks import FILES, find_file, leaves, lm_eval_tasks, task_names
from .local_tasks import split_files

PACKAGES = {"ruler": ("nltk", "wonderwords"), "ifeval": ("nltk", "langdetect", "immutabledict")}
INSTALL = "pip install 'moesvd-quant[tasks]' brings what single tasks need"
# RULER's tasks whose needles lie in essays, which are cut into sentences.
IN_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
ESSAYS = "baber/paul_graham_essays"
SENTENCES = "tokenizers/punkt_tab/english/"


def require_needs(wanted: Iterable[str], data: str | None) -> None:
    """Before any work: ImportError for a package that a task needs, LookupError for the sentence splitter, where it is
    neither in DATA/nltk_data, nor where nltk looks ($NLTK_DATA, home), nor to be had from the network."""
    for name in task_names(wanted):
        for leaf in leaves(name) if name not in FILES else ():
            folder = _folder(leaf)
            if missing := [package for package in PACKAGES.get(folder, ()) if find_spec(package) is None]:
                raise ImportError(f"{leaf}: needs {', '.join(missing)}")
            if folder == "ifeval" or leaf in IN_ESSAYS:
                _require_sentences(leaf, data)
            if folder == "ruler":
                _import_quietly()


def is_ruler(leaf: str) -> bool:
    return _folder(leaf) == "ruler"


def _folder(leaf: str) -> str:
    """The folder of lm-eval that a task is in."""
    return Path(lm_eval_tasks()[leaf].yaml_path or "x/x").parent.name


def _require_sentences(leaf: str, data: str | None) -> None:
    import nltk

    if data and (folder := str(Path(data, "nltk_data").absolute())) not in nltk.data.path:
        nltk.data.path.insert(0, folder)
    if _has_sentences():
        return
    with redirect_stderr(io.StringIO()):  # what went wrong is said below
        nltk.download("punkt_tab", quiet=True)
    if _has_sentences():
        return
    raise LookupError(
        f"{leaf}: needs nltk's sentence splitter: `python -m nltk.downloader punkt_tab` where there is network, or the "
        f"unpacked punkt_tab.zip of nltk_data as {data or 'FOLDER'}/nltk_data/tokenizers/punkt_tab, with --task-data "
        f"{data or 'FOLDER'}"
    )


def _has_sentences() -> bool:
    import nltk

    try:
        nltk.data.find(SENTENCES)
    except LookupError:
        return False
    return True


def _import_quietly() -> None:
    """RULER's module asks the network for the sentence splitter when it is imported, whether a task needs it or not,
    and prints that it has it."""
    import nltk

    with redirect_stdout(io.StringIO()), patch.object(nltk, "download", lambda *given, **named: True):
        import lm_eval.tasks.ruler.prepare_niah  # noqa: F401


@contextmanager
def fetched_from(data: str | None) -> Iterator[None]:
    """Within it RULER's essays come from DATA/paul_graham_essays (`train.jsonl` and so on, a column `text`), and its
    questions from the published files (`dev-v2.0.json`, `hotpot_dev_distractor_v1.json`, .gz or not) in DATA, where
    they are there; all else from where it did."""
    import datasets
    import requests

    load, get = datasets.load_dataset, requests.get

    def load_dataset(path, *given, **named):
        files = split_files(Path(data or "", "paul_graham_essays"), "train") if path == ESSAYS else []
        if not files:
            return load(path, *given, **named)
        form = "parquet" if files[0].endswith(".parquet") else "json"
        return load(form, data_files=files, split="train")

    def fetch(url, *given, **named):
        try:
            file = find_file(str(data), [url.rpartition("/")[2]])
        except FileNotFoundError:
            return get(url, *given, **named)
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: json.loads(content))

    with ExitStack() as patched:
        if data:
            patched.enter_context(patch.object(datasets, "load_dataset", load_dataset))
            patched.enter_context(patch.object(requests, "get", fetch))
        yield
