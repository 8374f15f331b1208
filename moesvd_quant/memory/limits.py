"""How much memory there is, how much is used, and the file-backed cache that hidden states go to when it is short.

Limits are of *anonymous* memory: what a process owns and the system cannot read again from a file. Nothing here is
part of a result: a run with little memory gives the bits of one with plenty.
"""

import ctypes
import errno
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..errors import MoesvdError, UsageError
from ..recipe.budget import UNITS
from .files import write_at

# What configs call the number of experts that a token is sent to.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
FULL = "make room, set MOESVD_CACHE to a larger disk, or raise --memory. Nothing that was finished is lost"


class MemoryLimitError(MoesvdError, ValueError):
    """What cannot fit; the message says what would make it fit."""


def parse_bytes(text: str, what: str = "--memory") -> int:
    """Bytes of `16GB`, `512MiB`; ValueError, which names `what`, for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise UsageError(f"{what} {text!r}: write bytes with a unit (16GB, 512MiB)")
    return int(float(found[1]) * UNITS[found[2].upper()])


def anonymous_bytes() -> int:
    """Anonymous memory of this process; all resident memory where the system does not tell them apart."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def available_bytes() -> int:
    """What this process may still take: of the machine, and of its control group where that is less."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free
    return min(free, limit - used + int(cache.get("inactive_file", 0)))


class Memory:
    """The limit of a process in bytes of anonymous memory; without one, what the machine has free now."""

    def __init__(self, limit: int | None = None):
        self.limit = anonymous_bytes() + available_bytes() if limit is None else limit

    def share(self, workers: int) -> "Memory":
        """What each of several processes may take."""
        return Memory(self.limit // workers)

    def free(self) -> int:
        return self.limit - anonymous_bytes()

    def holds(self, needed: int, layer: int) -> bool:
        """Whether `needed` bytes of hidden states fit beside two layers of `layer` bytes."""
        return self.free() > needed + 2 * layer

    def at_once(self, count: int, each: int, reserve: int = 0) -> int:
        """How many of `count` things of `each` bytes fit, with `reserve` bytes left; at least one."""
        return max(1, min(count, (self.free() - reserve) // each))


def experts_of_a_token(config) -> int:
    """How many experts a token is sent to, as a config says it; 0 where it says nothing."""
    return max(getattr(config, name, None) or 0 for name in CHOSEN)


@dataclass(frozen=True)
class Sizes:
    """Bytes that a walk through a model has to do with."""

    item: int  # a weight
    layer: int  # weights of the largest decoder layer
    row: int  # hidden state of a token
    activations: int  # of a batch in a layer, at most

    @staticmethod
    def of(meta, shape: tuple[int, int], batch_size: int) -> "Sizes":
        """meta: a model on the meta device with `layers` and `config`; shape: windows, tokens in each."""
        config = meta.config.get_text_config(decoder=True)
        item = next(meta.layers.parameters()).dtype.itemsize
        layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in meta.layers]
        rows = min(batch_size, shape[0]) * shape[1]
        inner = max(p.shape[-1] for p in meta.layers.parameters())
        heads = getattr(config, "num_attention_heads", 1) if config._attn_implementation == "eager" else 0
        scores = 3 * heads * rows * shape[1]
        # Pairs of a token and an expert: their inputs, then their outputs, weighted and in the order of the tokens.
        chosen = 2 * experts_of_a_token(config)
        activations = 4 * (rows * ((8 + chosen) * config.hidden_size + 4 * inner) + scores)
        return Sizes(item, max(layers), config.hidden_size * item, activations)


class Batches:
    """Tensors in order, one per batch: in memory, or (with `folder`) in a file that has no name and so leaves no trace.

    A tensor read from the file is a copy: changing it changes nothing.
    """

    def __init__(self, folder: Path | None = None, device: torch.device | str = "cpu"):
        self.folder, self.device = folder, torch.device(device)
        self._held: list[torch.Tensor] = []
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        self._file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (lives as long as this)

    def like(self) -> "Batches":
        """An empty one that is kept in the same way."""
        return Batches(self.folder, self.device)

    def append(self, tensor: torch.Tensor) -> None:
        if self._file is None:
            self._held.append(tensor)
            return
        place = self._places[-1][0] + _size(*self._places[-1][1:]) if self._places else 0
        self._places.append((place, tensor.shape, tensor.dtype))
        whole = tensor.detach().cpu().contiguous()
        try:
            write_at(self._file.fileno(), _bytes_of(whole), place)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(error.errno, f"{self.folder}: the disk is full of hidden states; {FULL}") from error

    def __len__(self) -> int:
        return len(self._held) + len(self._places)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._file is None:
            return self._held[index]
        place, shape, dtype = self._places[index]
        made = torch.empty(shape, dtype=dtype)
        data, done = _bytes_of(made), 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], place + done)
        return made.to(self.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """What a contiguous tensor is stored in. Seen as an array of numpy's, it could never give its memory back."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _size(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


class PeakMeter:
    """The highest anonymous memory of this process while it is open, sampled: `with PeakMeter() as meter`."""

    def __init__(self, seconds: float = 0.005):
        self.seconds = seconds
        self.start = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(self.seconds):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> "PeakMeter":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
