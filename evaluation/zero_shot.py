"""Tasks by lm-eval, through its own model and task interfaces: multiple choice, and texts that models write."""

import logging
import os
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from ..errors import MoesvdError
from ..recipe.tasks import (
    FILES,
    data_folder,
    leaves,
    lm_eval_tasks,
    require_allowed,
    require_files,
    require_known,
    task_names,
)
from .lm_eval_output import Report, bars_of_ours
from .local_tasks import localized
from .task_figures import measured
from .task_needs import INSTALL, fetched_from, is_ruler, require_needs

LOCAL = tuple(FILES)  # tasks that have a YAML for local files here
FOLDER = Path(__file__).parent / "tasks"
LONG = 4096  # tokens of RULER's shortest prompts


class TaskError(MoesvdError, ValueError):
    """A task that is unknown, or whose data cannot be had."""


def require_tasks(wanted: Iterable[str], data: str | None, run_code: bool = False) -> None:
    """Before any work: TaskError for a task that is unknown, whose local files are not there, or that runs programs of
    the model where that was not allowed."""
    try:
        require_known(wanted)
        require_files(wanted, data_folder(data))
        require_allowed(wanted, run_code)
        require_needs(wanted, data_folder(data))
        for name in task_names(wanted):
            localized(name, dict(lm_eval_tasks()) if name not in FILES else {}, data_folder(data))
    except (ValueError, FileNotFoundError, LookupError) as error:
        raise TaskError(f"tasks: {error}") from error
    except ImportError as error:
        raise TaskError(f"tasks: {error}; {INSTALL}") from error


def zero_shot(
    model, tokenizer, tasks: list[str], data: str | None = None, limit: int | None = None, run_code: bool = False,
    batch_size: int = 16, progress: Report = lambda what, done, total: None,
) -> dict:  # fmt: skip
    """{"tasks": {name: {"acc", "acc_norm", "acc_stderr", ..., "metric", "n", "shots", "correct"}}, "mean": of acc,
    "protocol": how it was made}. Metrics have lm-eval's names, with a comma and its filter where it has several ways to
    read an answer. metric: the one that tables show, a share of answers that are right; correct: a digit for each
    document, 1 where its answer was right by it, so that two models can be compared in pairs.

    model, tokenizer: of transformers, in evaluation mode; tasks: names of lm-eval, or `zero-shot`. data: folder of
    local files ($MOESVD_TASK_DATA by default); without one lm-eval loads its own from the hub. limit: the first so
    many documents of each task. run_code: programs that the model writes may be run. TaskError where a task is unknown,
    its data cannot be had, or it is not allowed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = task_names(tasks)
    require_tasks(names, data, run_code)
    _require_long(names, model, tokenizer)
    data = data_folder(data)
    manager = _manager(data, tokenizer.name_or_path)
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        asked = {name: localized(name, manager.task_index, data) for name in names}
        with _code_allowed(run_code), bars_of_ours(progress), fetched_from(data):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(asked.values()),
                limit=limit,
                task_manager=manager,
                log_samples=True,
                confirm_run_unsafe_code=run_code,
            )
    except ImportError as error:
        raise TaskError(f"tasks: {error}; {INSTALL}") from error
    except (OSError, ValueError, LookupError) as error:
        hint = "; without network give --task-data FOLDER with local files (docs/evaluation.md says which)"
        raise TaskError(f"tasks: {error}{hint}") from error
    figures = {key: one for name, key in asked.items() for key, one in measured(found, name, key)}
    accuracies = [one["acc"] for one in figures.values() if "acc" in one]
    return {
        "tasks": figures,
        "mean": fmean(accuracies) if accuracies else None,
        "protocol": {
            "lm_eval": version("lm_eval"),
            "data": "local files" if data else "hub",
            "limit": limit,
            "batch_size": batch_size,
            "dtype": str(model.dtype),
        },
    }


@cache
def _manager(data: str | None, tokenizer: str):
    """lm-eval's tasks and ours, on local files where there is a folder of them. RULER's tasks make their prompts with
    the tokenizer."""
    from lm_eval.tasks import TaskManager

    metadata = {"tokenizer": tokenizer} | ({"data": data} if data else {})
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    manager.task_index.update(lm_eval_tasks())
    return manager


@contextmanager
def _code_allowed(allowed: bool):
    """lm-eval's own code tasks ask for this as well."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]


def _require_long(names: list[str], model, tokenizer) -> None:
    """TaskError for tasks on a model that takes fewer tokens than they need, and for RULER's on one whose tokenizer
    comes with code: lm-eval would run it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from ..model.positions import positions

    takes = positions(model.config)
    for name in names:
        for leaf in leaves(name) if name not in FILES else ():
            if is_ruler(leaf) and takes < LONG:
                raise TaskError(f"{name}: has prompts of {LONG} tokens, and the model takes {takes}")
            if is_ruler(leaf) and "auto_map" in getattr(tokenizer, "init_kwargs", {}):
                raise TaskError(f"{name}: the model's tokenizer comes with code of its own, which lm-eval would run")
            file = lm_eval_tasks()[leaf].yaml_path
            content = load_yaml(file, resolve_func=False) if file else {}
            written = (content.get("generation_kwargs") or {}).get("max_gen_toks", 0)
            if written >= takes:
                raise TaskError(f"{name}: has the model write {written} tokens, and the model takes {takes} in all")
