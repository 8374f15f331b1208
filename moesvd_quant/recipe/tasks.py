"""Tasks of lm-eval that may be named, and the local files that some of them are read from under published names."""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
    "humaneval": [("HumanEval.jsonl", "humaneval/test.jsonl")],
    "mbpp": [("mbpp.jsonl", "mbpp/test.jsonl")],
}
RUN_CODE = ("humaneval", "mbpp")  # of those


class Tasks(NamedTuple):
    """What is to be measured by lm-eval. names: of its tasks, `zero-shot` for the seven; data: folder of local files,
    None: from the hub; limit: only the first so many documents of each; run_code: programs that the model writes may be
    run, where a task does that."""

    names: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    run_code: bool = False


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


@cache
def lm_eval_tasks() -> dict[str, Any]:
    """lm-eval's index of tasks, groups and tags by name: it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def leaves(name: str) -> Iterator[str]:
    """The tasks of a group or tag of lm-eval, or the task itself."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = lm_eval_tasks()[name]
    if entry.tags and not entry.yaml_path:
        yield from (leaf for tagged in sorted(entry.tags) for leaf in leaves(tagged))
        return
    members = load_yaml(entry.yaml_path, resolve_func=False).get("task") if entry.yaml_path else None
    if not isinstance(members, list):
        yield name
        return
    for member in members:
        named = member if isinstance(member, str) else member.get("task", member.get("group"))
        yield from leaves(named) if named in lm_eval_tasks() else ()


def running_code(wanted: Iterable[str]) -> list[str]:
    """Those of the tasks that run programs that the model writes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    unsure = [name for name in task_names(wanted) if name not in FILES]
    files = {leaf: lm_eval_tasks()[leaf].yaml_path for name in unsure for leaf in leaves(name)}
    unsafe = {leaf for leaf, file in files.items() if file and load_yaml(file, resolve_func=False).get("unsafe_code")}
    return [n for n in task_names(wanted) if n in RUN_CODE or (n in unsure and unsafe & set(leaves(n)))]


def require_allowed(wanted: Iterable[str], run_code: bool) -> None:
    """ValueError for tasks that run programs of the model, where that was not allowed."""
    if not run_code and (found := running_code(wanted)):
        raise ValueError(
            f"{', '.join(found)}: runs programs that the model writes, with your rights on this machine. Where they "
            "can do no harm, for example in a container without network, allow it: --run-code (evaluate.run_code=true)"
        )


def require_known(wanted: Iterable[str]) -> None:
    """ValueError for names that are no tasks. Names other than the paper's take lm-eval's own list: seconds."""
    unsure = [name for name in task_names(wanted) if name not in FILES]
    if not unsure:
        return
    known = lm_eval_tasks()
    if unknown := [name for name in unsure if name not in known]:
        raise ValueError(
            f"{', '.join(unknown)}: no task of lm-eval; give zero-shot, {', '.join(FILES)}, or see `lm_eval ls`"
        )


def require_files(wanted: Iterable[str], folder: str | None) -> None:
    """FileNotFoundError for a task of FILES whose files are not in the folder of local files, if there is one."""
    for name in task_names(wanted) if folder else ():
        for names in FILES.get(name, []):
            find_file(str(folder), names)
