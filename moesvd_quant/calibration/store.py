"""Statistics by model, data and walk: computed once, reused for every ratio and width, under a size cap."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from ..checkpoint.files import write_json, write_tensors
from ..decompose.deltas import merge_base
from ..model.experts import expert_count, find_experts, find_linears, shapes_of
from ..model.modeling_moesvd import file_digest
from ..model.stream import StreamedModel
from .effect import measure_effects
from .fisher import expert_fisher
from .statistics import LayerRecorder

WALK_VERSION = 2
BATCH_SIZE = 8  # part of the result: sums run batch by batch
CAP_BYTES = 64 * 10**9
FISHER_SEQUENCES = 1024  # of the calibration windows, as in D2-MoE


def cache_root() -> Path:
    """Where statistics are kept: $MOESVD_CACHE, or .cache/moesvd_quant in the home folder."""
    return Path(os.environ.get("MOESVD_CACHE") or Path.home() / ".cache" / "moesvd_quant")


def fingerprint(folder: Path) -> str:
    """sha256 over the contents of a model folder's config and weights."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix == ".safetensors")
    names = [(path.name, file_digest(path)) for path in [Path(folder) / "config.json", *files]]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


class Statistics:
    """Per-layer statistics of a model on token windows (n, length); layer by layer in order.

    key: digest of all they depend on. Above `cap_bytes` nothing is stored and each pass walks again.
    """

    def __init__(self, folder, model_digest, windows, device="cpu", cap_bytes=CAP_BYTES, root=None):
        self.folder, self.windows, self.device = Path(folder), windows, device
        self.dtype = torch.float32 if str(device) == "cpu" else None
        described = {
            "model": model_digest,
            "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "shape": list(windows.shape),
            "walk": [WALK_VERSION, BATCH_SIZE, str(self.dtype), torch.__version__, transformers.__version__],
        }
        self.key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self.store = root or cache_root() / "statistics"
        self.root = self.store / self.key[:32]
        meta = StreamedModel(folder, self.dtype)
        self.count, self.cap_bytes = len(meta.layer_names), cap_bytes
        self.needed = self.forecast(meta)
        self.stored = self.needed <= cap_bytes
        self._bases: dict[str, torch.Tensor] = {}

    @staticmethod
    def forecast(meta: StreamedModel) -> int:
        """Bytes of all statistics (an upper bound: Gram matrices that linears share are counted apart)."""
        total = 0
        for layer in meta.decoder.layers:
            for _, experts in find_experts(layer):
                hidden, inner = shapes_of(experts)["down"]
                total += 4 * expert_count(experts) * (hidden**2 + inner**2 + hidden + inner)
            total += sum(4 * linear.in_features**2 for _, linear in find_linears(layer))
        return total

    def path(self, name: str | int) -> Path:
        return self.root / (f"layer-{name:05d}.safetensors" if isinstance(name, int) else f"{name}.safetensors")

    def complete(self) -> bool:
        return self.stored and all(self.path(i).is_file() for i in [*range(self.count), "outer"])

    def layers(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[dict]:
        """Statistics of each layer, {name: tensor}, in order; computed where the store lacks them.

        `progress(done, total)` is called while a walk is under way.
        """
        if self.complete():
            for index in range(self.count):
                yield load_file(self.path(index))
            return
        streamed = StreamedModel(self.folder, self.dtype, self.device)
        for visit in streamed.walk(self.windows, BATCH_SIZE):
            yield self._layer(visit)
            progress(visit.index + 1, self.count)
        self._outer(streamed)

    def _layer(self, visit) -> dict[str, torch.Tensor]:
        path = self.path(visit.index)
        if self.stored and path.is_file():
            return load_file(path)
        recorder = LayerRecorder(visit.layer)
        visit.outputs()
        tensors = {name: tensor.cpu() for name, tensor in recorder.detach().items()}
        tensors |= {f"{name}/alias": _text(other) for name, other in recorder.aliases.items()}
        self._write(path, tensors)
        return tensors

    def _outer(self, streamed: StreamedModel) -> None:
        """The Gram matrix of the inputs of lm_head."""
        flats = [streamed.decoder.norm(h).reshape(-1, h.shape[-1]).float() for h in streamed.hidden]
        total = sum((flat.T @ flat for flat in flats[1:]), flats[0].T @ flats[0])
        self.outer_gram = total.cpu()
        self._write(self.path("outer"), {"gram": self.outer_gram})

    def outer(self) -> torch.Tensor:
        """Gram matrix (hidden, hidden) of the inputs of lm_head; after a full pass over `layers`."""
        if self.path("outer").is_file():
            return load_file(self.path("outer"))["gram"]
        return self.outer_gram

    def effects(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict:
        """`measure_effects` of the model on these windows, computed once."""
        path = self.root / "effects.json"
        if path.is_file():
            return {(full, name): value for full, name, value in json.loads(path.read_text())}
        streamed = StreamedModel(self.folder, self.dtype, self.device)
        found = measure_effects(streamed, self.windows, BATCH_SIZE, progress)
        if self.stored:
            self._make_folder()
            write_json(path, [[*key, value] for key, value in found.items()])
        return found

    def fisher_base(self, full: str, projection: str, progress: Callable[[int, int], None]) -> torch.Tensor:
        """The base (out, in) of an experts module, merged by Fisher information; computed once for all layers."""
        path = self.root / "fisher-bases.safetensors"
        if not self._bases and path.is_file():
            self._bases = load_file(path)
        if not self._bases:
            streamed = StreamedModel(self.folder, self.dtype, self.device)
            rows = self.windows[:FISHER_SEQUENCES]
            for index, modules in expert_fisher(streamed, rows, progress):
                name = streamed.layer_names[index]
                for inner, projections in modules.items():
                    for key, (weights, fisher) in projections.items():
                        self._bases[f"{name}.{inner}/{key}"] = merge_base(weights, fisher).float().cpu()
            self._write(path, self._bases)
        return self._bases[f"{full}/{projection}"]

    def _write(self, path: Path, tensors) -> None:
        if not self.stored:
            return
        self._make_folder()
        write_tensors(path, tensors)

    def _make_folder(self) -> None:
        """The folder of these statistics; when it is new, those written longest ago go until these fit the cap."""
        if self.root.is_dir():
            return
        sizes = {
            folder: sum(file.stat().st_size for file in folder.iterdir())
            for folder in sorted(self.store.glob("*"), key=lambda path: path.stat().st_mtime)
        }
        for folder in list(sizes):
            if sum(sizes.values()) + self.needed > self.cap_bytes:
                shutil.rmtree(folder)
                del sizes[folder]
        self.root.mkdir(parents=True, exist_ok=True)


def linear_gram(statistics: dict, path: str) -> torch.Tensor:
    """Gram matrix (in, in) of a linear; KeyError where the walk never reached it."""
    alias = statistics.get(f"{path}/alias")
    return statistics[f"{bytes(alias.tolist()).decode() if alias is not None else path}/gram"]


def _text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)
