"""Names, shapes and dtypes of the tensors in a model folder, from the headers of its files alone."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from ..memory.files import NAMES, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {name: dtype for dtype, name in NAMES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
ROWS = 4096  # of a tensor that are compared at a time
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # that models compute with


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of a model folder."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, as transformers chooses them: one whole file, else the shards of the index.

    Raises ModelError where there is neither, and says what the folder has instead. Pickle files are not read.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder}: no {SINGLE} and no {INDEX}; {_instead(folder)}")
    return sorted({folder / name for name in _weight_map(folder).values()})


def _instead(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "this is an adapter (adapter_config.json): merge it into its model first and give the merged model"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"only safetensors are read, and {pickles[0]} is a pickle: convert it (`save_pretrained` does) first"
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return f"{found[0]} has no name that transformers reads: rename it, or give the index of its shards"
    return "only safetensors are read: copy the weights here"


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: has no weight_map of tensor and file names; copy the file again")
    return {key: Path(name).name for key, name in names.items()}


def signature(folder: Path) -> tuple:
    """What changes when a file of the folder does: name, size, time and inode of each file that says what it holds."""
    files = [folder / "config.json", *(path for path in (folder / INDEX,) if path.is_file()), *weight_files(folder)]
    found = [(path.name, path.stat()) for path in files if path.exists()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """{name: StoredTensor} of all tensors in the model's files.

    Raises ModelError for a file that is missing, truncated or damaged, a tensor in two files, an index that names
    tensors its files do not have, or a dtype that is not known.
    """
    return dict(_read_headers(Path(folder), signature(Path(folder))))


@lru_cache(maxsize=8)
def _read_headers(folder: Path, signature: tuple) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, tensor in _header(path):
            if name in found:
                raise ModelError(f"{folder}: {name} is in {found[name].file} and in {path.name}; keep one of them")
            found[name] = tensor
    if not (folder / SINGLE).is_file():
        for name, file in _weight_map(folder).items():
            if name not in found or found[name].file != file:
                where = f"it is in {found[name].file}" if name in found else "no file has it"
                raise ModelError(f"{folder / INDEX}: says that {name} is in {file}, and {where}; the index is stale")
    return found


def _header(path: Path):
    if not path.is_file():
        named = f"; {INDEX} names it" if (path.parent / INDEX).is_file() else ""
        raise ModelError(f"{path}: missing{named}. Copy it, or correct the index")
    try:
        with safe_open(path, "pt") as file:
            described = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 (it is no mapping)
            shapes = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in described]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: truncated or damaged ({error}); copy it again") from error
    for name, shape, kind in shapes:
        if kind not in DTYPES:
            raise ModelError(f"{path}: {name} has dtype {kind}, which is not supported")
        yield name, StoredTensor(path.name, shape, DTYPES[kind])


def same_on_disk(
    folder: Path, tensors: dict[str, StoredTensor], name: str, other: Path, others: dict[str, StoredTensor], second: str
) -> bool:
    """Whether two tensors in files have the same shape, dtype and bits."""
    one, two = tensors[name], others[second]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    with safe_open(folder / one.file, "pt") as first_file, safe_open(other / two.file, "pt") as second_file:
        if not one.shape:
            return same_bits(first_file.get_tensor(name), second_file.get_tensor(second))
        first, last = first_file.get_slice(name), second_file.get_slice(second)
        return all(same_bits(first[i : i + ROWS], last[i : i + ROWS]) for i in range(0, one.shape[0], ROWS))


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit; NaN equals NaN."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)] if one.numel() else []
    return not raw or torch.equal(*raw)
