"""Routers: which of their tensors have a row for each expert. A copy lies in every checkpoint.

A stage may drop experts, merge them or put them in another order. A module's `sources` say from which original experts
each of its own comes, [[0], [2, 3]]; its router has a row for each of its own.
"""

from typing import NamedTuple

import torch
from torch import nn

# Names under which routers and the gate of a shared expert stand.
ROUTERS = {"gate", "router", "shared_expert_gate"}
# What classes call the number of experts, and of groups of experts of which a token may use but a few.
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "out_features")
GROUPS = ("num_group", "n_group", "n_groups")

Sources = list[list[int]]


class Router(NamedTuple):
    """The router of an experts module: modules in it whose tensors have a row for each of `experts` experts."""

    modules: list[nn.Module]
    experts: int

    @property
    def groups(self) -> int:
        """Groups of neighbouring experts that the router chooses of, of one size; 1 where it does not."""
        found = [getattr(module, name) for module in self.modules for name in GROUPS if getattr(module, name, None)]
        return max(found, default=1)

    @property
    def top_k(self) -> int:
        """How many experts a token is sent to."""
        return max(getattr(module, "top_k", 0) or 0 for module in self.modules)


def router_of(block: nn.Module, experts: int) -> Router | None:
    """The router in a block that holds an experts module; None where nothing in it has a row for each expert."""
    homes = [module for name, module in block.named_children() if name in ROUTERS]
    inside = [module for home in homes for module in home.modules()]
    modules = [module for module in inside if rows_of(module, experts)]
    around = [home for home in homes if home not in modules]  # a home may have the counts and its child the rows
    return Router([*modules, *around], experts) if modules else None


def rows_of(module: nn.Module, experts: int) -> dict[str, torch.Tensor]:
    """The tensors of a module that have a row for each expert."""
    own = {**module._parameters, **module._buffers}
    return {name: t for name, t in own.items() if t is not None and t.ndim and t.shape[0] == experts}


@torch.no_grad()
def regroup(router: Router, sources: Sources) -> None:
    """Gives a router the rows of the first source of each new expert; of merged ones a stage may set other rows."""
    kept = torch.tensor([group[0] for group in sources])
    for module in router.modules:
        for name, tensor in rows_of(module, router.experts).items():
            rows = tensor.detach().index_select(0, kept.to(tensor.device))
            if name in module._buffers:
                module._buffers[name] = rows
            else:
                module._parameters[name] = nn.Parameter(rows, requires_grad=tensor.requires_grad)
        for name in COUNTS:
            if getattr(module, name, None) == router.experts:
                setattr(module, name, len(sources))


def why_not(router: Router | None, sources: Sources) -> str | None:
    """Why a router cannot serve these experts; None where it can."""
    if router is None:
        return "no module beside the experts has a row for each of them"
    if len(sources) < router.top_k:
        return f"a token is sent to {router.top_k} experts, and {len(sources)} would be left"
    size = router.experts // router.groups
    each = [sum(group[0] // size == at for group in sources) for at in range(router.groups)]
    if len(set(each)) > 1:
        return f"the router chooses among {router.groups} groups of one size, and {each} experts would be left in them"
    return None
