"""The original and its compressed copy side by side: what experts should give for what they will be given.

Statistics of the original show inputs that a compressed model never has: its earlier layers err. Here both models go
through the layers together, and each expert is fitted to give for the compressed inputs what the original gave for its
own (asymmetric calibration: Li et al., GPTAQ, 2025). Down is fitted last, on what the new gate and up give.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from ..decompose.whitening import energy, precise
from ..memory.files import TensorFile
from ..memory.lazy import LazySequence
from ..memory.limits import Batches
from ..model.experts import dense_weight, expert_count, find_experts, intermediate, pairs_of, route, shapes_of
from ..runtime.native_call import Routed
from ..runtime.routers import Sources
from .cache import walk_folder
from .store import Statistics

Pairs = Callable[[], Iterator[tuple[Routed, torch.Tensor]]]

# Of the mean variance of an input: how much a corrected weight is held to the original one.
RIDGE = 0.01


def corrected(weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """W' (out, in) that gives W x for the compressed input z of the same token, in the best of the inputs' precisions:
    argmin sum |W x - W' z|^2 + r |W - W'|^2 = (W C + r W) (G + r I)^-1 = W + W (C - G) (G + r I)^-1, r = RIDGE times
    the mean diagonal of G. Of the last form a small part alone is subject to rounding. W where every z is zero: gate
    and up of all experts may be gone.

    weight (out, in); gram G = sum z z^T, cross C = sum x z^T, both (in, in).
    """
    weight, gram, cross = precise(weight, gram, cross)
    if not gram.count_nonzero():
        return weight
    held = gram.clone()
    held.diagonal().add_(RIDGE * gram.diagonal().mean())
    root, failed = torch.linalg.cholesky_ex(held)
    if failed:  # sums in float32 of inputs that hardly differ
        root = torch.linalg.cholesky(held.double()).to(held)
    return weight + torch.cholesky_solve((weight @ (cross - gram)).T, root).T


@torch.no_grad()
def output_error(weight, approximation, original, gram, cross) -> float:
    """sum |W x - V z|^2 / sum |W x|^2 by the Gram matrices of x and z and their cross sum; 0 where W gives nothing."""
    weight, approximation, cross = precise(weight, approximation, cross)
    whole, given = energy(weight, original), energy(approximation, gram)
    common = float(((weight @ cross) * approximation).sum(dtype=torch.float64))
    return max(0.0, whole - 2 * common + given) / whole if whole > 0 else 0.0


class Sums(NamedTuple):
    """Of the compressed inputs z of each expert, and with those x that the original gave it, (E, n, n) float32 each;
    mapped from a file."""

    gram: torch.Tensor  # z z^T
    cross: torch.Tensor  # x z^T


class PairedExperts:
    """An experts module of the original, and the inputs that it and its compressed copy get for the same tokens.

    pairs: per batch the original's routing and the compressed inputs, again and again; at_once(n): how many experts'
    sums of (n, n) are made at a time; folder: for the files of sums. `gate_up`: sums of the inputs of gate and up.
    sources: the original experts of those that are compressed, one each, by which pairs are numbered.
    """

    def __init__(self, native: nn.Module, sources: Sources, pairs: Pairs, at_once: Callable[[int], int], folder: Path):
        self.native, self.pairs, self.at_once, self.folder = native, pairs, at_once, folder
        self.sources, self.count = sources, len(sources)
        self.device = next(native.parameters()).device
        hidden, self._inner = shapes_of(native)["down"]
        self.tokens = sum(torch.bincount(routed.expert, minlength=self.count)[: self.count] for routed, _ in pairs())
        self.tokens = self.tokens.cpu()
        self.gate_up = self._sums(hidden, lambda expert, x, z: (x, z))

    def weights(self, name: str) -> LazySequence:
        """The original's weights (out, in) by expert, float32."""
        return LazySequence(self.count, lambda expert: dense_weight(self.native, name, self.sources[expert][0]))

    def down(self, made: nn.Module) -> Sums:
        """Sums of down's inputs as gate and up of `made` give them."""

        def inner(expert, x, z):
            return intermediate(self.native, self.sources[expert][0], x), intermediate(made, expert, z)

        return self._sums(self._inner, inner)

    def targets(self, name: str, sums: Sums) -> LazySequence:
        """Corrected weights, float32, by expert; each is helped by as many of its layer's inputs as it has features."""
        share, weights = sums.gram.shape[-1] / self.tokens.sum(), self.weights(name)
        pooled = Sums(*(total.sum(0) * share for total in sums))

        def made(expert: int) -> torch.Tensor:
            own = (sums.gram[expert] + pooled.gram, sums.cross[expert] + pooled.cross)
            return corrected(weights[expert], *(matrix.to(self.device) for matrix in own))

        return LazySequence(self.count, made)

    def _sums(self, size: int, of: Callable) -> Sums:
        """Over all pairs, as many experts at a time as fit, into a file: the same bits for any number."""
        path, step = self.folder / "sums.safetensors", self.at_once(size)
        shape = (self.count, size, size), torch.float32
        with TensorFile(path, {"gram": shape, "cross": shape}) as file:
            for first in range(0, self.count, step):
                group = range(first, min(first + step, self.count))
                for name, values in zip(Sums._fields, self._group(group, size, of)):
                    for expert in group:
                        file.put(name, values[expert - first], expert)
        found = load_file(path)
        path.unlink()  # it is gone when it is no longer mapped
        return Sums(**found)

    def _group(self, group: range, size: int, of: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        gram = torch.zeros(len(group), size, size, device=self.device)
        cross = torch.zeros_like(gram)
        for routed, other in self.pairs():
            for expert, rows in pairs_of(routed.expert, self.count):
                if expert in group:
                    token = routed.token[rows]
                    x, z = (value.float() for value in of(expert, routed.x[token], other[token]))
                    gram[expert - group.start].addmm_(z.T, z)
                    cross[expert - group.start].addmm_(x.T, z)
        return gram, cross


class PairedWalk:
    """Takes windows through an original and a model that is compressed layer by layer.

    For each layer in order: `enter`, then `replace` as modules are made; `experts` sees what was replaced before.
    """

    def __init__(self, parent: Path, known: Statistics):
        """parent: folder of the input checkpoint; known: statistics of the original, whose windows are walked."""
        self.known, self.scratch = known, known.scratch(known.all_hidden(8))
        self._own = walk_folder(known.store)
        models = [known.model(folder) for folder in (known.folder, parent)]
        self._walks = [model.walk(known.windows, known.batch_size, self.scratch) for model in models]

    def enter(self) -> None:
        """Goes on to the next layer; the original's experts are observed on the way."""
        self.original, self.compressed = (next(walk) for walk in self._walks)
        with torch.no_grad():
            self._seen = self._observe(self.original, self.original.outputs)

    def replace(self, path: str, made: nn.Module) -> None:
        """Puts a copy of what a stage made into the compressed layer."""
        self.compressed.put_copy(path, made, self.known.dtype)

    def experts(self, path: str, sources: Sources) -> PairedExperts:
        """The module at a path of the layer, with the inputs it has now, for experts of these sources."""
        with torch.no_grad():
            given = self._observe(self.compressed, lambda: self.compressed.run(self.compressed.hidden))[path]
        mine = self._seen[path]

        def pairs():
            for x, token, expert, z in zip(*mine, given[0]):
                if same:
                    yield Routed(x, token, expert), z
                    continue
                mapped = own[expert.cpu()]
                chosen = (mapped >= 0).nonzero()[:, 0]
                ordered = chosen[mapped[chosen].argsort(stable=True)]
                yield Routed(x, token[ordered.to(token.device)], mapped[ordered].to(expert.device)), z

        native = self.original.layer.get_submodule(path)
        count = expert_count(native)
        same = sources == [[expert] for expert in range(count)]
        own = torch.full((count + 1,), -1)  # what an expert is called here; one past the last hands its input on
        for at, (expert, *_) in enumerate(sources):
            own[expert] = at

        def at_once(size: int) -> int:
            return self.known.memory.at_once(expert_count(native), 2 * 4 * size**2, self.known.sizes.activations)

        return PairedExperts(native, sources, pairs, at_once, Path(self._own.name))

    def _observe(self, visit, run: Callable[[], object]) -> dict[str, list[Batches]]:
        """{path: [inputs, token, expert of each pair]} per batch, of each experts module while `run` runs the layer."""
        seen: dict[str, list[Batches]] = {}
        hooks = []
        for path, module in find_experts(visit.layer):
            kept = seen[path] = [Batches(self.scratch, visit.hidden.device) for _ in range(3)]

            def keep(module, inputs, kept=kept):
                routed = route(module, *inputs)
                for batches, tensor in zip(kept, (routed.x, routed.token, routed.expert)):
                    batches.append(tensor)

            hooks.append(module.register_forward_pre_hook(keep))
        run()
        for hook in hooks:
            hook.remove()
        return seen
