"""Low-rank terms beside packed weights, which cannot be merged into: layout, and a layer brought into its form."""

import copy

import torch
from torch import nn

from ..checkpoint.layout import factor_part, layout_of, projections_of
from ..errors import MoesvdError
from ..model.experts import expert_count, find_experts, find_linears, split_projections
from ..model.stream import StreamedModel
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.formats import FLOAT
from ..runtime.parts import Layout, Projections
from ..runtime.stored import Stored, StoredLinear


class TermError(MoesvdError, ValueError):
    """A checkpoint that cannot take a low-rank term; the message names the module."""


def healed_layout(parent: StreamedModel, rank: int, terms: bool, attention: bool) -> Layout:
    """The parent's layout; with `terms`, a float low-rank term of this rank beside whatever is packed."""
    layout = layout_of(parent)
    for layer, name in zip(parent.layers, parent.layer_names):
        for path, experts in find_experts(layer):
            full = f"{name}.{path}"
            parts = layout.experts.setdefault(full, projections_of(experts))
            for projection, of_projection in parts.items():
                packed = [part.packed for part in of_projection]
                if any(packed) and not all(packed):
                    raise TermError(f"{full}.{projection}: has a low-rank term already; heal its input again instead")
                if terms and all(packed) and of_projection:
                    of_projection.append(factor_part(list(range(expert_count(experts))), rank))
        for path, linear in find_linears(layer):
            full = f"{name}.{path}"
            if isinstance(linear, StoredLinear):
                if linear.rank:
                    raise TermError(f"{full}: has a low-rank term already; heal its input again instead")
                if terms and attention:
                    layout.linears[full].rank = rank
    return layout


def into_layout(layer: nn.Module, name: str, layout: Layout, dtype: torch.dtype, seed: int) -> list[str]:
    """Brings a loaded layer of the parent into the form of `layout`; what it computes stays the same.

    Returns the parameters (paths in the layer) that are new, in `dtype`: left factors of zero, right ones by seed.
    """
    generator, new = torch.Generator().manual_seed(seed), []
    for path, experts in list(find_experts(layer)):
        parts = layout.experts[f"{name}.{path}"]
        if not isinstance(experts, FactorizedExperts):
            layer.set_submodule(path, _dense(experts, parts))
            continue
        experts.layout = copy.deepcopy(parts)
        banks = {key: bank.shape for key, bank in experts.banks() if not bank.form.packed}
        new += [f"{path}.{key}" for key in _add(experts, banks, dtype, generator)]
    for path, linear in list(find_linears(layer)):
        if isinstance(linear, StoredLinear):
            linear.layout = layout.linears[f"{name}.{path}"]
            terms: dict[str, tuple[int, ...]] = {
                "left": (linear.out_features, linear.rank),
                "right": (linear.rank, linear.in_features),
            }
            new += [f"{path}.{key}" for key in _add(linear, terms if linear.rank else {}, dtype, generator)]
    layer.requires_grad_(False)
    return new


def _dense(native: nn.Module, parts: Projections) -> FactorizedExperts:
    made = FactorizedExperts(native, parts)
    with torch.no_grad():
        for projection, weights in split_projections(native).items():
            getattr(made, f"{projection}_0_dense").copy_(weights)
    return made


@torch.no_grad()
def _add(module: Stored, banks: dict, dtype: torch.dtype, generator: torch.Generator) -> list[str]:
    """Adds those float banks {name: shape} that the module lacks; returns their names."""
    device = module.device
    new = [key for key in banks if key not in dict(module.named_parameters(recurse=False))]
    for key in new:
        module.add_bank(key, banks[key], FLOAT, dtype, device)
        drawn = torch.zeros(banks[key])
        if key.endswith("right"):
            drawn = torch.randn(banks[key], generator=generator) * banks[key][-1] ** -0.5
        getattr(module, key).copy_(drawn)
    return new
