"""The windows of tokens that a recipe's calibration asks for."""

from pathlib import Path

import torch

from ..memory.limits import Memory
from ..model.folder import ModelError
from ..model.positions import positions, usual_length
from ..model.tokenizer import load_tokenizer
from .text import calibration_windows
from .written import Progress, written_path, written_windows


def length_of(folder: Path, config, wanted: str | int, key: str) -> int:
    """Tokens per window: `auto`, or a number within the positions of the model. ModelError names `key`."""
    if wanted == "auto":
        return usual_length(config, load_tokenizer(folder))
    if int(wanted) > positions(config):
        raise ModelError(f"{key} {wanted} exceeds the {positions(config)} positions of the model")
    return int(wanted)


def must_write(calibration, folder: Path, digest: str, length: int, seed: int, device) -> bool:
    """Whether the model has text to write before the windows of a recipe's `calibration` are there: several walks."""
    shape = (written_count(calibration), length)
    return shape[0] > 0 and not written_path(folder, digest, shape, seed, device).is_file()


def written_count(calibration) -> int:
    """How many windows of a recipe's `calibration` the model writes itself."""
    return round(calibration.samples * calibration.self_written)


def windows_of(
    calibration, folder: Path, digest: str, length: int, seed: int, device, memory: Memory, progress: Progress
) -> torch.Tensor:
    """(samples, length) int64 of a recipe's `calibration`: text of its dataset, and of the model itself, shuffled."""
    tokenizer = load_tokenizer(folder)
    written = written_count(calibration)
    given = calibration.samples - written
    parts = []
    if given:
        parts.append(calibration_windows(calibration.dataset, tokenizer, given, length, seed))
    if written:
        parts.append(written_windows(folder, digest, tokenizer, (written, length), seed, device, memory, progress))
    windows = torch.cat(parts)
    return windows[_order(len(windows), seed)] if written else windows


def written_among(calibration, windows: torch.Tensor, seed: int) -> torch.Tensor:
    """Those of `windows_of` that the model wrote itself."""
    return windows[_order(len(windows), seed) >= len(windows) - written_count(calibration)]


def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
