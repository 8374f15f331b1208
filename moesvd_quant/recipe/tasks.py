"""Zero-shot tasks that may be named, and the local files that those of the paper are read from."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# The seven tasks of the paper (Table 2) in its order and with its abbreviations; `zero-shot` stands for all.
SEVEN = {
    "openbookqa": "Openb.",
    "arc_easy": "ARC_e",
    "winogrande": "WinoG.",
    "hellaswag": "HellaS.",
    "arc_challenge": "ARC_c",
    "piqa": "PIQA",
    "mathqa": "MathQA",
}
# Files of each task, and for each the names that it is published under.
FILES: dict[str, list[tuple[str, ...]]] = {
    "openbookqa": [("openbookqa/test.jsonl",)],
    "arc_easy": [("ARC-Easy-Test.jsonl",)],
    "winogrande": [("winogrande/dev.jsonl",)],
    "hellaswag": [("hellaswag_val.jsonl", "hellaswag/val.jsonl")],
    "arc_challenge": [("ARC-Challenge-Test.jsonl",)],
    "piqa": [("piqa/valid.jsonl",), ("piqa/valid-labels.lst",)],
    "mathqa": [("mathqa/test.json",)],
    "wikitext": [("wiki.test.raw",)],
}


class Tasks(NamedTuple):
    """What is to be measured by lm-eval. names: of its tasks, `zero-shot` for the seven; data: folder of local files,
    None: from the hub; limit: only the first so many documents of each."""

    names: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None


NO_TASKS = Tasks()


def task_names(wanted: Iterable[str]) -> list[str]:
    """`zero-shot` is the seven tasks; any other name is lm-eval's."""
    return list(dict.fromkeys(name for given in wanted for name in (SEVEN if given == "zero-shot" else (given,))))


def data_folder(given: str | None) -> str | None:
    """Folder of local task files: the one given, or $MOESVD_TASK_DATA; None: lm-eval loads from the hub."""
    return given or os.environ.get("MOESVD_TASK_DATA")


def find_file(folder: str, names: Iterable[str]) -> Path:
    """The first file in a folder or its sub-folders that has one of the names, .gz or not; FileNotFoundError says what
    was looked for."""
    for name in names:
        parent, _, file = name.rpartition("/")
        for path in sorted(Path(folder).rglob(f"{file}*")):
            if path.name in (file, file + ".gz") and path.parent.name in (parent, parent or path.parent.name):
                return path
    raise FileNotFoundError(f"{folder}: has none of {', '.join(names)} (or .gz) in it")


def require_known(wanted: Iterable[str]) -> None:
    """ValueError for names that are no tasks. Names other than the paper's take lm-eval's own list: seconds."""
    unsure = [name for name in task_names(wanted) if name not in FILES]
    if not unsure:
        return
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    if unknown := [name for name in unsure if name not in known]:
        raise ValueError(
            f"{', '.join(unknown)}: no task of lm-eval; give zero-shot, {', '.join(FILES)}, or see `lm_eval ls`"
        )


def require_files(wanted: Iterable[str], folder: str | None) -> None:
    """FileNotFoundError for a task of the paper whose files are not in the folder of local files, if there is one."""
    for name in task_names(wanted) if folder else ():
        for names in FILES.get(name, []):
            find_file(str(folder), names)
