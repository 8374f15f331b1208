"""Which tensor on disk becomes which parameter of a model, and reading it when it is its turn."""

import math
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import logging as transformers_logging

from ..memory.files import advise
from .folder import ModelError, weight_files

# By the names that safetensors gives dtypes.
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
_BYTES |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1)


class WeightFiles:
    """The safetensors of a model folder, by the parameters that they go to.

    mapping: transformers' conversions of the model's class. ModelError where a file is missing or truncated.
    """

    def __init__(self, folder: Path, model: nn.Module, mapping: list):
        self.folder = folder
        self.targets = _targets(weight_files(folder), model, mapping)  # (parameter, tensor on disk, file name)
        for file in sorted({file for *_, file in self.targets}):  # before any work starts
            try:
                with safe_open(folder / file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{folder / file}: missing, truncated or damaged ({error})") from error

    def slices(self, *prefixes: str) -> dict[str, Any]:
        """{name on disk: slice that reads it} of all that goes under the prefixes."""
        state: dict = {}
        for file, keys in self._under(prefixes).items():
            handle = safe_open(self.folder / file, "pt")
            state |= {key: handle.get_slice(key) for key in keys}
        return state

    def read_ahead(self, prefix: str) -> None:
        """Asks the system to read the tensors under the prefix into its cache, while this process computes."""
        for file, keys in self._under((prefix,)).items():
            advise(self.folder / file, keys)

    def total_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        total = 0
        for file in {file for *_, file in self.targets}:
            with safe_open(self.folder / file, "pt") as opened:
                slices = [opened.get_slice(key) for key in opened.keys()]  # noqa: SIM118
                total += sum(math.prod(s.get_shape()) * _BYTES[s.get_dtype()] for s in slices)
        return total

    def _under(self, prefixes: tuple[str, ...]) -> dict[str, list[str]]:
        """{file name: names on disk}."""
        wanted: dict[str, list[str]] = {}
        for target, key, file in self.targets:
            if target.startswith(prefixes):
                wanted.setdefault(file, []).append(key)
        return wanted


def _targets(files: dict[str, str], model: nn.Module, mapping: list) -> list[tuple[str, str, str]]:
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    meta, prefix = model.state_dict(), model.base_model_prefix
    found = []
    for key in sorted(files, key=dot_natural_key):  # the order in which transformers renames: some rules need it
        target = rename_source_key(key, renamings, converters, prefix, meta)[0]
        if target not in meta and key in meta:
            target = rename_source_key(key, [], [], prefix, meta)[0]
        found.append((target, key, files[key]))
    return found


@contextmanager
def no_loading_bars():
    """transformers draws a bar per call, which is one per layer here."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def one_tensor_at_a_time():
    """transformers reads all tensors ahead by threads otherwise: one more layer in memory."""
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})
