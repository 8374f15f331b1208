"""Statistics by model, data and walk: computed once, reused for every ratio and width, under a size cap."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from ..errors import UsageError
from ..memory.files import write_json, write_tensors
from ..memory.limits import Memory, Sizes
from ..model.experts import find_experts
from ..model.headers import weight_files
from ..model.stream import StreamedModel, precision_on
from ..runtime.modeling_moesvd import file_digest
from . import effect
from .cache import cache_cap, cache_root, make_room, name_of, walk_folder
from .effect import measure_effects
from .fisher import fisher_bases, fisher_inputs
from .recording import BATCH_TOKENS, experts_at_once, head_gram, pass_on, record_layer, recorded_bytes, windows_at_once

WALK_VERSION = 5
EFFECT_BATCH = 8  # windows
FISHER_SEQUENCES = 1024  # of the calibration windows, as in D2-MoE
# What is kept of the Fisher information: one base (out, in) merged by it, or its sums (E, in) for each input.
FISHER = {"fisher": fisher_bases, "fisher-inputs": fisher_inputs}


def fingerprint(folder: Path) -> str:
    """sha256 over the contents of a model folder's config and weight files."""
    names = [(path.name, file_digest(path)) for path in [Path(folder) / "config.json", *weight_files(Path(folder))]]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


class Statistics:
    """Per-layer statistics of a model on token windows (n, length); layer by layer in order.

    key: digest of all they depend on. Above `cap_bytes` nothing is stored and each pass walks again.
    """

    def __init__(
        self, folder, model_digest, windows, device="cpu", cap_bytes=None, root=None, memory=None, shape=None,
        shared=False, balanced=False,
    ):  # fmt: skip
        """windows may be a function, called when they are needed; `shape` is theirs then. shared: whether shared
        experts count as experts; balanced: whether inner channels are balanced (`model/balance.py`)."""
        self.folder, self.device, self._make, self.shared = Path(folder), device, windows, shared
        self.balanced = balanced
        self.shape = tuple(shape or windows.shape)
        self.memory, self.model_digest = memory or Memory(), model_digest
        self.dtype = precision_on(device)
        self.batch_size = windows_at_once(self.shape[1])
        self.store = root or cache_root() / "statistics"
        meta = StreamedModel(folder, self.dtype, shared=shared)
        self.count, self.cap_bytes = len(meta.layer_names), cap_bytes or cache_cap()
        self.needed = recorded_bytes(meta.layers)
        self.stored = self.needed <= self.cap_bytes
        self.sizes = Sizes.of(meta, self.shape, self.batch_size)
        self._own: tempfile.TemporaryDirectory | None = None
        self._seconds: list[float] = []

    def __reduce__(self):
        """A worker reads the same store."""
        return Statistics, (
            self.folder, self.model_digest, self.windows, self.device, self.cap_bytes, self.store, self.memory, None,
            self.shared, self.balanced,
        )  # fmt: skip

    def model(self, folder: Path | None = None) -> StreamedModel:
        """The model that they are of, or another one, in the precision of the walk."""
        return StreamedModel(folder or self.folder, self.dtype, self.device, self.shared, balanced=self.balanced)

    @cached_property
    def windows(self) -> torch.Tensor:
        """(n, length) int64."""
        return self._make() if callable(self._make) else self._make

    @cached_property
    def key(self) -> str:
        described = {
            "model": self.model_digest,
            "windows": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
            "shape": list(self.shape),
            "walk": [WALK_VERSION, BATCH_TOKENS, str(self.dtype), torch.__version__, transformers.__version__],
            "device": torch.device(self.device).type,
            "threads": torch.get_num_threads(),
        } | {name: True for name in ("shared", "balanced") if getattr(self, name)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def root(self) -> Path:
        return self.store / self.key[:32]

    def path(self, name: str | int) -> Path:
        return self.root / (f"layer-{name:05d}.safetensors" if isinstance(name, int) else f"{name}.safetensors")

    @property
    def unmade(self) -> bool:
        """Whether the windows have yet to be made: the model has text to write."""
        return callable(self._make) and "windows" not in vars(self)

    def complete(self) -> bool:
        return not self.unmade and self.stored and all(self.path(i).is_file() for i in [*range(self.count), "outer"])

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Statistics of a layer that is stored, mapped from its file."""
        return load_file(self.path(index))

    def layers(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[dict]:
        """Statistics of each layer, {name: tensor}, in order; computed where the store lacks them.

        Tensors are mapped from files. `progress(done, total)` is called while a walk is under way. What is stored is
        all computed before the first is given, so that the walk's memory is free again.
        """
        if self.stored:
            self.ensure(progress)
            yield from (self.layer(index) for index in range(self.count))
            return
        for path in self._walk(progress):
            yield load_file(path)
            path.unlink()

    def take_seconds(self) -> list[float]:
        """Seconds of each layer of the walks since this was last asked; none where all was stored already."""
        found, self._seconds = self._seconds, []
        return found

    def ensure(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Walks where the store is not complete; for workers, who then read layers in any order.

        ValueError where the statistics are too large to be stored.
        """
        if not self.stored:
            raise UsageError(
                f"several workers share statistics on disk, and these take {self.needed / 1e9:.1f} GB of at most "
                f"{self.cap_bytes / 1e9:.1f}: set MOESVD_CACHE_SIZE, or use one worker"
            )
        if not self.complete():
            for _ in self._walk(progress):
                pass

    def _walk(self, progress: Callable[[int, int], None]) -> Iterator[Path]:
        """The files of all layers, as they are made."""
        with self._folder() as root:
            streamed, started = self.model(), time.perf_counter()
            for visit in streamed.walk(self.windows, self.batch_size, self.scratch(self.all_hidden(2))):
                path = root / self.path(visit.index).name
                if path.is_file():
                    pass_on(visit.layer, visit.outputs)
                else:
                    self.record(visit, path, visit.outputs)
                progress(visit.index + 1, self.count)
                self._seconds.append(round(time.perf_counter() - started, 3))
                yield path
                started = time.perf_counter()
            self.outer_gram = head_gram(streamed)
            self._write(self.path("outer"), {"gram": self.outer_gram})

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where the files of a walk go: the store, or a folder of this walk alone that is gone after it."""
        if self.stored:
            self._make_folder()
            yield self.root
            return
        with walk_folder(self.store) as folder:
            yield Path(folder)

    def all_hidden(self, copies: int) -> int:
        """Bytes of the hidden states of all windows, `copies` times."""
        return copies * self.shape[0] * self.shape[1] * self.sizes.row

    def scratch(self, needed: int) -> Path | None:
        """None where hidden states of `needed` bytes fit in memory beside two layers; else the folder for them."""
        return None if self.memory.holds(needed, self.sizes.layer) else self.store

    def record(self, visit, path: Path, run: Callable[[], Any]) -> None:
        """One layer's statistics while `run` takes all batches through it, as many experts at a time as memory
        allows; into a file."""
        at_once = experts_at_once(visit.layer, self.memory, self.sizes.activations)
        record_layer(visit.layer, path, run, at_once, self.store)

    def outer(self) -> torch.Tensor:
        """Gram matrix (hidden, hidden) of the inputs of lm_head; after a full pass over `layers`."""
        if self.path("outer").is_file():
            return load_file(self.path("outer"))["gram"]
        return self.outer_gram

    def kept(self, what: str, make: Callable[[], dict[str, torch.Tensor]], **depends) -> dict[str, torch.Tensor]:
        """make(), computed once and stored beside the statistics. depends: all else that it depends on."""
        path = self.path(name_of(what, **depends))
        if self.stored and path.is_file():
            return load_file(path)
        made = make()
        self._write(path, made)
        return made

    @staticmethod
    def effect_settings() -> dict[str, int]:
        """What `effects` depend on beside these statistics."""
        return effect.settings() | {"batch": EFFECT_BATCH}

    def effects(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict:
        """`measure_effects` of the model on these windows, computed once."""
        path = self.root / f"{name_of('effects', **self.effect_settings())}.json"
        if path.is_file():
            return {(full, name): value for full, name, value in json.loads(path.read_text())}
        streamed = self.model()
        found = measure_effects(streamed, self.windows, EFFECT_BATCH, progress, self.store)
        if self.stored:
            self._make_folder()
            write_json(path, [[*key, value] for key, value in found.items()])
        return found

    def by_fisher(self, what: str, full: str) -> dict[str, torch.Tensor]:
        """What the Fisher information says of an experts module, by projection; after `measure_fisher` of it."""
        return load_file(self._fisher_file(what, full))

    def _fisher_file(self, what: str, full: str) -> Path:
        if not self.stored and self._own is None:
            self._own = walk_folder(self.store)
        folder = self.root if self._own is None else Path(self._own.name)
        return folder / f"{name_of(f'{what}-{full}', sequences=FISHER_SEQUENCES)}.safetensors"

    def measure_fisher(self, what: str, progress: Callable[[int, int], None]) -> None:
        """One of FISHER for each projection of each layer, computed once."""
        streamed = self.model()
        rows = self.windows[:FISHER_SEQUENCES]
        scratch = self.scratch((self.count + 3) * rows.numel() * self.sizes.row + 2 * self.sizes.layer)
        paths = [f"{n}.{p}" for n, layer in zip(streamed.layer_names, streamed.layers) for p, _ in find_experts(layer)]
        if all(self._fisher_file(what, path).is_file() for path in paths):
            return
        if self.stored:
            self._make_folder()
        for full, found in FISHER[what](streamed, rows, progress, scratch):
            write_tensors(self._fisher_file(what, full), found)

    def _write(self, path: Path, tensors) -> None:
        if not self.stored:
            return
        self._make_folder()
        write_tensors(path, tensors)

    def _make_folder(self) -> None:
        """The folder of these statistics; when it is new, those written longest ago go until these fit the cap."""
        if self.root.is_dir():
            return
        make_room(self.store, self.needed, self.cap_bytes)
        self.root.mkdir(parents=True, exist_ok=True)
