"""The files beside the weights that make up a model: tokenizer, templates, processor, generation config, licence.

One rule serves carrying them into a checkpoint and downloading them.
"""

import hashlib
import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..memory.files import read_json
from ..runtime.modeling_moesvd import file_digest
from .headers import INDEX, SINGLE

# Patterns of names in the folder, and in the one folder below it that transformers reads.
CARRIED = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.txt", "LICEN[CS]E*", "NOTICE*",
    "*POLICY*", "*COPYING*", "additional_chat_templates/*.jinja",
)  # fmt: skip
# Of these the rule takes no account: what we write anew, what describes other weights, records, what holds weights.
LEFT = (
    "config.json", "moesvd.json", "*.index.json", "params.json", "adapter_*", "quantize_config.json",
    "quantization_config.json", "hf_quant_config.json", "eval.json", "speed.json", "run.json", "healing.json",
    "plan.json", "note-*.json", "trainer_state.json", "training_args.*", "requirements*.txt", "*results*.json",
)  # fmt: skip
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tekken.json", "*.model",
    "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip


def is_carried(name: str) -> bool:
    """Whether a file of a model folder (its path in the folder) goes where the model goes. Nothing that holds weights
    or code does."""
    if "/" in name and not name.startswith("additional_chat_templates/"):
        return False
    return _matches(name, CARRIED) and not _matches(name, LEFT) and not name.startswith(".")


def carried_files(folder: Path) -> list[str]:
    """The files of a model folder that its checkpoints carry, by their path in the folder."""
    found = [path.relative_to(folder).as_posix() for path in _files(folder)]
    return sorted(name for name in found if is_carried(name))


def carry_files(source: Path, folder: Path, before: dict[str, str] | None = None) -> dict[str, str]:
    """Copies them into another folder, where they are not there yet, and removes those of `before` that the source no
    longer has. Returns {path in the folder: sha256}."""
    found = {name: file_digest(source / name) for name in carried_files(source)}
    for name in {*(before or {})} - set(found):
        (folder / name).unlink(missing_ok=True)
    for name, digest in found.items():
        target = folder / name
        if not target.is_file() or file_digest(target) != digest:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target)
    return found


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the files of a folder that make up its tokenizer and its templates."""
    names = [path.relative_to(folder).as_posix() for path in _files(Path(folder))]
    found = [(name, file_digest(Path(folder) / name)) for name in sorted(names) if _matches(name, TOKENIZER)]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def wanted_from_hub(names: list[str]) -> list[str]:
    """Those files of a repository that a model is described by, all but its weights."""
    return [name for name in names if is_carried(name) or name in ("config.json", "README.md", INDEX)]


def weights_from_hub(folder: Path, names: list[str]) -> list[str]:
    """The weight files of a repository, of which `folder` has the index: one copy, as transformers chooses it."""
    if SINGLE in names or not (folder / INDEX).is_file():
        return [name for name in names if name == SINGLE]
    return sorted({Path(name).name for name in read_json(folder / INDEX).get("weight_map", {}).values()})


def _files(folder: Path) -> list[Path]:
    return [path for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")) if path.is_file()]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
