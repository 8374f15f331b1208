"""Any task of lm-eval on local files: its own prompts and scores, with a file for each split in place of the hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..recipe.tasks import FILES, leaves

FORMS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def localized(name: str, index: dict[str, Any], folder: str | None) -> str:
    """What lm-eval is to be asked for; in its `index` (`TaskManager.task_index`), tasks whose data lie in `folder` are
    replaced by the same with those files. Of a group or a tag, all tasks."""
    if folder is None:
        return name
    if name in FILES:
        return f"{name}_local"
    for leaf in leaves(name):
        if content := local_content(leaf, name, index[leaf], Path(folder)):
            index[leaf] = replace(index[leaf], yaml_path=None, cfg=content)
    return name


def local_content(name: str, asked: str, entry: Any, folder: Path) -> dict | None:
    """The content of a task with local files, from a sub-folder that has its name, that of the group or tag it was
    `asked` for by, or that of its dataset; None where there is none. FileNotFoundError for a split without a file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not entry.yaml_path:
        return None
    plain = load_yaml(entry.yaml_path, resolve_func=False)
    dataset = str(plain.get("dataset_path") or "").rpartition("/")[2]
    files = _files(folder, [name, asked, dataset], plain)
    if not files:
        return None
    form = next(form for ending, form in FORMS.items() if ending in Path(next(iter(files.values()))[0]).suffixes)
    local = {"dataset_path": form, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return load_yaml(entry.yaml_path) | local


def _files(folder: Path, names: list[str], content: dict[str, Any]) -> dict[str, list[str]]:
    """{split: files} from the first sub-folder of one of the names; nothing where there is none. In it, or in its
    sub-folder of the task's configuration, lie `test.jsonl`, `test.json` (.gz or not), `test.parquet`, or the parts
    that the hub keeps, `test-00000-of-00001.parquet`.

    FileNotFoundError for a split that the task needs and that has no file.
    """
    root = next((folder / name for name in names if name and (folder / name).is_dir()), None)
    if root is None:
        return {}
    configured = root / str(content.get("dataset_name"))
    root = configured if configured.is_dir() else root
    needed = [content.get("test_split") or content.get("validation_split")]
    if content.get("num_fewshot") and not (content.get("fewshot_config") or {}).get("samples"):
        needed.append(content.get("fewshot_split") or content.get("training_split") or content.get("validation_split"))
    found = {}
    for split in dict.fromkeys(filter(None, needed)):
        found[split] = split_files(root, split)
        if not found[split]:
            raise FileNotFoundError(f"{root}: has no {split}.jsonl, .json (or .gz) or .parquet")
    return found


def split_files(folder: Path, split: str) -> list[str]:
    """Files below a folder that have documents of a split."""
    return [str(path) for path in sorted(folder.rglob("*")) if _is_of(path.name, split)]


def _is_of(name: str, split: str) -> bool:
    """Whether a file of this name has documents of a split."""
    plain = name.removesuffix(".gz")
    return plain in {split + ending for ending in FORMS} or (name.startswith(f"{split}-") and name.endswith(".parquet"))
