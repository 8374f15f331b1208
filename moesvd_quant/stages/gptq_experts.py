"""The experts of stage `gptq`: every bank of their parts, packed."""

import hashlib
from collections.abc import Iterator

import torch

from ..memory.lazy import LazySequence, select
from ..model.experts import dense_weight
from ..planning.allocation import named
from ..planning.context import factorized
from ..quantize.codec import Codecs, PackedMatrix
from ..quantize.factors import quantize_factors
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.formats import Format
from ..runtime.parts import DensePart, Part, Projections


def quantize(codec: Codecs, where: str, weight, gram, form: Format) -> PackedMatrix:
    """A matrix (out, in) in a format, by the Gram matrix (in, in) of its inputs; `where` names it in messages."""
    with named(where):
        return codec.pack(weight, codec.inputs(gram, form), form)


def quantize_experts(codec: Codecs, seed: int, full: str, experts, given, layout: Projections) -> FactorizedExperts:
    """The packed experts module."""
    module = factorized(experts, layout, _floats(experts, layout))
    for name in sorted(layout, key=lambda name: name == "down"):  # whose inputs the others decide
        # A part after another one of the same experts (a delta after its base) stands for what that one left over.
        done: list[tuple[Part, dict]] = []
        targets = _targets(experts, given.weights(name, module), done)
        for i, part in enumerate(layout[name]):
            if not part.packed:
                continue
            grams = given.grams(name, len(part.chain) > 1)
            made = _quantize_part(codec, seed, full, name, i, part, experts, targets, grams)
            for bank, packed in made.items():
                module.fill_bank(f"{name}_{i}_{bank}", _stacked(packed))
            done.append((part, made))
    return module


def _floats(experts, layout: Projections) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of the parts that the plan leaves in floating point, as they are."""
    for name, parts in layout.items():
        for i, part in enumerate(parts):
            if part.packed:
                continue
            if isinstance(experts, FactorizedExperts):
                keys = [f"{name}_{i}_{bank}" for bank in part.chain]
                yield from ((key, None, getattr(experts, key)) for key in keys)
            else:
                rows = zip(part.users("dense"), part.experts)
                yield from ((f"{name}_{i}_dense", row, dense_weight(experts, name, expert)) for row, expert in rows)


def _targets(experts, wanted: LazySequence, done: list[tuple[Part, dict]]) -> LazySequence:
    """What the parts that are packed when it is asked for (part, its banks) leave of each expert's weight."""

    def left_over(expert: int) -> torch.Tensor:
        weight = wanted[expert]
        for part, made in done:
            if expert in part.experts:
                weight = weight - _product(experts, part, made, part.experts.index(expert)).to(weight)
        return weight

    return LazySequence(len(wanted), left_over)


def _product(experts, part: Part, made: dict, at: int) -> torch.Tensor:
    """What a packed part of an experts module contributes to its expert number `at`."""
    weight, *rest = (made[bank][part.users(bank)[at]].dense() for bank in part.chain)
    for factor in rest:
        weight = factor @ weight
    return experts.spread(part, weight) if part.rows or part.columns else weight


def _quantize_part(
    codec: Codecs, seed: int, full: str, name: str, i: int, part: Part, experts, targets, grams
) -> dict[str, list[PackedMatrix]]:
    """Packed matrices of each bank of one part."""
    if isinstance(part, DensePart):
        return {"dense": _quantize_dense(codec, full, name, i, part, experts, targets, grams)}

    def bank(kind: str) -> LazySequence:
        count = max(part.users(kind)) + 1
        return LazySequence(count, lambda row: experts.bank(name, i, kind, torch.float64, row))

    with named(f"{full}.{name}"):
        lefts, rights = quantize_factors(
            select(targets, part.experts),
            select(grams, part.experts),
            bank("left"),
            bank("right"),
            part.left,
            part.right,
            part.formats,
            codec,
            _seed(seed, full, name, i),
        )
    return {"left": lefts, "right": rights}


def _quantize_dense(codec, full, name, i, part: DensePart, experts, targets, grams) -> list[PackedMatrix]:
    packed = []
    for row in range(max(part.dense) + 1):
        sharers = [e for e, r in zip(part.experts, part.dense) if r == row]
        whole = len(sharers) == 1 and not part.rows and not part.columns
        weight = targets[sharers[0]] if whole else experts.bank(name, i, "dense", torch.float32, row)
        gram = sum(grams[e] for e in sharers)
        if part.columns:
            kept = experts.channels.long()
            gram = gram[kept][:, kept]
        where = f"{full}.{name}[{', '.join(map(str, sharers))}]"
        packed.append(quantize(codec, where, weight, gram, part.form("dense")))
    return packed


def _stacked(packed: list[PackedMatrix]) -> dict[str, torch.Tensor]:
    """The tensors of a bank of these matrices, by kind."""
    return {kind: torch.stack([matrix.tensors[kind] for matrix in packed]) for kind in packed[0].tensors}


def _seed(seed: int, *where) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, where)).encode()).digest()[:4], "little")
