"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import errno
import json
import math
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import ModelError, MoesvdError, UsageError

# In the order in which safetensors writes them.
NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHECKED = 2**24  # bytes that are compared at a time


class WriteError(MoesvdError, OSError):
    """A file that could not be written; what was finished before stays."""


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file, reads it back, and raises WriteError where a tensor differs.

    A checkpoint file that exists under its final name is therefore whole.
    """
    temporary = _temporary(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _guard(lambda: save_file(contiguous, temporary, metadata={"format": "pt"}), path)
    _sync(temporary)
    written = load_file(temporary)
    for name, tensor in contiguous.items():
        if not torch.equal(_bits(written[name]), _bits(tensor)):
            raise WriteError(f"{path}: {name} does not read back as written; the disk is not reliable")
    os.replace(temporary, path)


class TensorFile:
    """A safetensors file that is written tensor by tensor, or row by row, and is whole or absent like the others.

    shapes: {name: (shape, dtype)} of all that will be put. Used as a context; what was put must be complete.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[tuple, torch.dtype]]):
        self.path, self._temporary = path, _temporary(path)
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._header, self._left = 8 + len(text), header, end
        self._file = open(self._temporary, "w+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        _guard(lambda: self._file.write(len(text).to_bytes(8, "little") + text), path)

    def put(self, name: str, tensor: torch.Tensor, row: int | None = None) -> None:
        """Writes a tensor, or row `row` of it, and reads it back; WriteError where that differs."""
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        place = self._start + self._header[name]["data_offsets"][0] + (row or 0) * len(data)
        _guard(lambda: write_at(self._file.fileno(), data, place), self.path)
        for start in range(0, len(data), CHECKED):
            part = data[start : start + CHECKED]
            if os.pread(self._file.fileno(), len(part), place + start) != part:
                raise WriteError(f"{self.path}: {name} does not read back as written; the disk is not reliable")
        self._left -= len(data)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind, *_) -> None:
        self._file.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        if self._left:
            raise WriteError(f"{self.path}: {self._left} bytes were not written; this is a defect")
        _sync(self._temporary)
        os.replace(self._temporary, self.path)


def write_one_by_one(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file of tensors that may be views of each other: none but the one at hand is copied."""
    with TensorFile(path, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)


def write_at(handle: int, data: memoryview, place: int) -> None:
    """All of `data` at byte `place` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], place + done)


def advise(path: Path, names: list[str]) -> None:
    """Asks the system to read these tensors of a safetensors file into its cache, and does not wait for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in names:
            start, end = header[name]["data_offsets"]
            os.posix_fadvise(file.fileno(), 8 + length + start, end - start, os.POSIX_FADV_WILLNEED)


def read_json(file: Path) -> dict:
    """A mapping from a JSON file; ModelError where the file is damaged."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:  # no JSON, no UTF-8, not readable
        raise ModelError(f"{file}: damaged or not readable ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no mapping but {type(content).__name__}; copy the file again")
    return content


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    temporary = _temporary(path)
    _guard(lambda: temporary.write_text(text), path)
    _sync(temporary)
    os.replace(temporary, path)


def commit_folder(work: Path, final: Path) -> None:
    """Renames a finished work folder to its final name, with everything in it on disk before."""
    for leftover in work.glob(".*.tmp"):  # of a process that was killed
        leftover.unlink()
    for path in sorted(work.iterdir()):
        _sync(path)
    _sync(work)
    os.replace(work, final)
    _sync(final.parent)


def require_space(folder: Path, needed: int) -> None:
    """WriteError where the disk under `folder` has not `needed` bytes free (and a little)."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + 2**20:
        raise WriteError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room or choose "
            "another --out. Nothing that was finished is lost"
        )


def require_writable(folder: Path) -> None:
    """UsageError where a folder, or the one that it would be made in, cannot be written into."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error


def _temporary(path: Path) -> Path:
    """A name of this process alone: workers and other runs, also on other machines, may fill the same folder."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, so that NaN equals NaN."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _guard(action, path: Path) -> None:
    try:
        action()
    except Exception as error:  # safetensors raises its own class for a full disk
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full; make room and run the same command again" if full else str(error)
        raise WriteError(f"{path}: {why}. Nothing that was finished is lost") from error
