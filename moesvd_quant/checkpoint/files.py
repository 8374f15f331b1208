"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class WriteError(OSError):
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


def _temporary(path: Path) -> Path:
    """A name of this process alone: two runs may fill one cache."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


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
