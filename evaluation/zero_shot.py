"""Zero-shot accuracy by lm-eval, through its own model and task interfaces."""

import logging
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from ..errors import MoesvdError
from ..recipe.tasks import FILES, data_folder, require_files, require_known, task_names

LOCAL = tuple(FILES)  # tasks that have a YAML for local files here
FOLDER = Path(__file__).parent / "tasks"


class TaskError(MoesvdError, ValueError):
    """A task that is unknown, or whose data cannot be had."""


def require_tasks(wanted: Iterable[str], data: str | None) -> None:
    """Before any work: TaskError for a task that is unknown, or whose local files are not there."""
    try:
        require_known(wanted)
        require_files(wanted, data_folder(data))
    except (ValueError, FileNotFoundError) as error:
        raise TaskError(f"zero-shot: {error}") from error


def zero_shot(
    model, tokenizer, tasks: list[str], data: str | None = None, limit: int | None = None, batch_size: int = 16
) -> dict:
    """{"tasks": {name: {"acc", "acc_norm", "acc_stderr", ..., "n", "correct"}}, "mean": of acc, "protocol": how it was
    made}; correct: a digit for each document, 1 where its answer was, so that two models can be compared in pairs.

    model, tokenizer: of transformers, in evaluation mode; tasks: names of lm-eval, or `zero-shot`. data: folder of
    local files ($MOESVD_TASK_DATA by default); without one lm-eval loads its own from the hub. limit: the first so
    many documents of each task. TaskError where a task is unknown or its data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = task_names(tasks)
    require_tasks(names, data)
    data = data_folder(data)
    known = {name: f"{name}_local" if data and name in LOCAL else name for name in names}
    manager = _manager(data)
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(known.values()),
            limit=limit,
            task_manager=manager,
            log_samples=True,
        )
    except (OSError, ValueError) as error:
        hint = "" if data else "; without network give --task-data FOLDER with local files"
        raise TaskError(f"zero-shot: {error}{hint}") from error
    measured = {name: _figures(found, key) for name, key in known.items()}
    accuracies = [figures["acc"] for figures in measured.values() if "acc" in figures]
    return {
        "tasks": measured,
        "mean": fmean(accuracies) if accuracies else None,
        "protocol": {
            "lm_eval": version("lm_eval"),
            "data": "local files" if data else "hub",
            "few_shot": 0,
            "limit": limit,
            "batch_size": batch_size,
            "dtype": str(model.dtype),
        },
    }


@cache
def _manager(data: str | None):
    """lm-eval's tasks and ours, on local files where there is a folder of them. It reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(FOLDER), metadata={"data": data} if data else {})


def _figures(found: dict, key: str) -> dict:
    """Metrics of a task without lm-eval's filter name: {"acc": ..., "n": documents, "correct": a digit for each}."""
    metrics = {
        name.removesuffix(",none"): value for name, value in found["results"][key].items() if name.endswith(",none")
    }
    samples = sorted(found["samples"][key], key=lambda sample: sample["doc_id"])
    correct = "".join(str(int(sample["acc"])) for sample in samples if "acc" in sample)
    return (
        {name: value for name, value in metrics.items() if isinstance(value, float)}
        | {"n": found["n-samples"][key]["effective"]}
        | ({"correct": correct} if correct else {})
    )
