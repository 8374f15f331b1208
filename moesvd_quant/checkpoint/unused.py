"""Tensors that a model's class does not use, such as layers for multi-token prediction: carried as they are."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import ModelError
from ..memory.files import NAMES, TensorFile
from ..model.headers import StoredTensor
from ..model.layered import LayeredModel

UNUSED_FILE = "model-unused.safetensors"


def require_carried(parent: LayeredModel) -> None:
    """ModelError where a checkpoint cannot hold the tensors of its input that the class does not use."""
    unused = parent.unused()
    if not unused:
        return
    advice = "leave them out: unused_tensors: leave_out"
    if parent.opened is not None and parent.opened.quantizer is not None:
        raise ModelError(
            f"{parent.folder}: {named(unused)} are not used by {type(parent.model).__name__} and are quantized as "
            f"published; a checkpoint without that quantization cannot hold them: {advice}"
        )
    if strange := [name for name, tensor in unused.items() if tensor.dtype not in NAMES]:
        raise ModelError(f"{parent.folder}: {strange[0]} has dtype {unused[strange[0]].dtype}; {advice}")


def named(tensors: dict[str, StoredTensor]) -> str:
    """A few words about tensors: how many, of how many bytes, under which names."""
    places = sorted({_place(name) for name in tensors})
    shown = ", ".join(places[:3]) + (" ..." if len(places) > 3 else "")
    return f"{len(tensors)} tensors ({sum(t.bytes for t in tensors.values()) / 1e6:.2f} MB: {shown})"


def unused_note(parent: LayeredModel) -> dict[str, str]:
    """What a plan says of them."""
    if parent.opened is None or not parent.opened.census.unused:
        return {}
    what = "left out" if parent.leave_out else "carried as they are"
    found = {name: parent.opened.tensors[name] for name in parent.opened.census.unused}
    return {"tensors that the model's class does not use": f"{what}: {named(found)}"}


def _place(name: str) -> str:
    """model.layers.46.mlp.gate.weight -> model.layers.46.*"""
    found = re.match(r"(.*?\.\d+\.|[^.]+\.)", name)
    return f"{found[0]}*" if found else name


def empty_tensors(unused: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The same on the meta device."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in unused.items()}


def write_unused(parent: LayeredModel, folder: Path) -> None:
    """Writes what the parent carries into UNUSED_FILE of a folder, bit for bit; no file where it carries nothing."""
    unused, order = parent.unused(), list(NAMES)
    if not unused:
        return
    names = sorted(unused, key=lambda name: (order.index(unused[name].dtype), name))
    with TensorFile(folder / UNUSED_FILE, {name: (unused[name].shape, unused[name].dtype) for name in names}) as file:
        for name in names:
            with safe_open(parent.folder / unused[name].file, "pt") as opened:
                file.put(name, opened.get_tensor(name))


def without_unused(config: dict[str, Any]) -> dict[str, Any]:
    """A config (also in its parts) that says there are no layers for multi-token prediction."""
    counts = {
        key for key in config if type(config[key]) is int and re.search("(nextn|mtp).*layer|layer.*mtp", str(key))
    }
    parts = {key: without_unused(value) for key, value in config.items() if isinstance(value, dict)}
    return config | parts | dict.fromkeys(counts, 0)
