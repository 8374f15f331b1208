"""Where each tensor of a model folder goes, before any of them is read: into a parameter, or nowhere."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ModelError
from .headers import FLOATS, StoredTensor
from .hf_internals import fill, ignored_missing, ignored_unexpected, renamed, tied_weights

NAMED = 5  # tensors that a message names


@dataclass(frozen=True)
class Census:
    """The tensors of a folder by what the model's class does with them. Nothing falls between.

    sources: {parameter: names on disk that it is made of}. converted: parameters whose values are not those on disk as
    they are there. unused: names on disk that the class knows and does not use
    (layers for multi-token prediction). dtypes: {parameter: its dtype on disk}, without those that are stored
    quantized.
    """

    sources: dict[str, list[str]]
    converted: set[str]
    unused: list[str]
    dtypes: dict[str, torch.dtype]


def take_census(where, model: nn.Module, mapping: list, quantizer, tensors: dict[str, StoredTensor]) -> Census:
    """The census of a folder for a model on the meta device, by loading all tensors without their data.

    Raises ModelError that names the tensors which are missing, have another shape, or have no place in the model.
    """
    found = list(renamed(tensors, model, mapping))
    goes_to = {name: targets for name, targets, _ in found}
    state = model.state_dict()
    unused = [name for name, targets in goes_to.items() if targets[0] not in state]
    if lost := [name for name in unused if not ignored_unexpected(model, goes_to[name][0])]:
        raise ModelError(f"{where}: {type(model).__name__} has no place for the tensors {_listed(lost)}{_why(model)}")
    sources: dict[str, list[str]] = {}
    for name, targets in goes_to.items():
        for target in targets if targets[0] in state else ():
            sources.setdefault(target, []).append(name)
    _require_no_gaps(where, sources)
    _require_all(where, model, mapping, quantizer, {n: t for n, t in tensors.items() if n not in set(unused)})
    stored = {target: [tensors[name].dtype for name in names] for target, names in sources.items()}
    plain = {t: dtypes for t, dtypes in stored.items() if _is_plain(dtypes) and (quantizer is None or len(dtypes) == 1)}
    _require_kinds(where, state, plain)
    converted = {target for _, targets, is_converted in found if is_converted for target in targets}
    return Census(sources, converted, unused, {target: common_dtype(dtypes) for target, dtypes in plain.items()})


def _why(model: nn.Module) -> str:
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        return ""
    predicted = getattr(config, "num_nextn_predict_layers", None)
    more = f" and num_nextn_predict_layers {predicted}: multi-token prediction is not read" if predicted else ""
    return f". config.json says num_hidden_layers {layers}{more}. Correct it, or remove these tensors"


def _is_plain(dtypes: Iterable[torch.dtype]) -> bool:
    return all(not dtype.is_floating_point or dtype in FLOATS for dtype in dtypes)


def common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds the values of all of them."""
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def _require_kinds(where, state: dict[str, torch.Tensor], stored: dict[str, list[torch.dtype]]) -> None:
    """ModelError for integers where floating point is wanted, or other integers than those that are: a cast would give
    other values."""
    wrong = [
        f"{name} (on disk {found[0]}, wanted {state[name].dtype})"
        for name, found in stored.items()
        if name in state and any(dtype not in _like(state[name].dtype) for dtype in found)
    ]
    if wrong:
        raise ModelError(f"{where}: tensors of another dtype: {_listed(wrong)}")


def _like(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return FLOATS if dtype.is_floating_point else (dtype,)


def _require_no_gaps(where, sources: dict[str, list[str]]) -> None:
    """ModelError for parameters made of numbered tensors (a matrix for each expert) of which one is not there."""
    gaps = []
    for names in sources.values():
        found: dict[str, dict[str, set[int]]] = {}  # {what stands before the last number: {what stands after: numbers}}
        for before, number, after in filter(None, map(_numbered, names if len(names) > 1 else [])):
            found.setdefault(before, {}).setdefault(after, set()).add(number)
        for before, by_suffix in found.items():
            numbers = set().union(*by_suffix.values())
            if len(numbers) > 1:
                wanted = set(range(max(numbers) + 1))
                gaps += [f"{before}{n}{after}" for after, have in by_suffix.items() for n in wanted - have]
    if gaps:
        raise ModelError(f"{where}: tensors missing: {_listed(gaps)}")


def _numbered(name: str) -> tuple[str, int, str] | None:
    found = re.fullmatch(r"(.*\.)(\d+)(\..*)", name)
    return (found[1], int(found[2]), found[3]) if found else None


def _require_all(where, model, mapping, quantizer, tensors: dict[str, StoredTensor]) -> None:
    """ModelError where the tensors are not those of the model: all are loaded on the meta device."""
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    dtype = next(model.parameters()).dtype
    info = fill(model, empty, mapping, dtype, "meta", quantizer)
    shapes = [f"{key} (on disk {tuple(found)}, wanted {tuple(wanted)})" for key, found, wanted in info.mismatched_keys]
    broken, tied = info.conversion_errors, tied_weights(model)
    given = {key for key in info.missing_keys if tied.get(key, key) not in info.missing_keys}  # by the one they share
    missing = [key for key in info.missing_keys - given - set(broken) if not ignored_missing(model, key)]
    for what, found in (
        ("missing", missing),
        ("of another shape", shapes),
        ("not what the class makes its weights of", broken),
    ):
        if found:
            raise ModelError(f"{where}: tensors {what}: {_listed(found)}")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + more
