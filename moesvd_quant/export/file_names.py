"""Under which names the files of an architecture hold its weight matrices.

transformers 5 renames and fuses tensors as it reads them (Mixtral: `block_sparse_moe.experts.0.w1` becomes rows of
`mlp.experts.gate_up_proj`). Other engines read the names of the files.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..model.hf_internals import revert_weight_conversion
from ..runtime.native_experts import Fused, form_of

WEIGHT = ".weight"


def linear_names(native: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """{path of a linear in the model: its path in the files}, without those whose weight is no matrix of its own
    there."""
    given = {path: native.get_parameter(path + WEIGHT) for path in paths}
    back = revert_weight_conversion(native, {path + WEIGHT: weight for path, weight in given.items()})
    kept = {id(weight): name for name, weight in back.items()}  # what is only renamed stays the same tensor
    return {p: kept[id(weight)].removesuffix(WEIGHT) for p, weight in given.items() if id(weight) in kept}


def expert_names(native: nn.Module, paths: Iterable[str]) -> dict[tuple[str, int, str], str]:
    """{(path of an experts module, expert, projection): path of that matrix in the files}. Empty for architectures
    whose files hold the experts of a layer in one tensor."""
    state: dict[str, torch.Tensor] = {}
    keys: list[tuple[str, int, str]] = []
    for path in paths:
        module = native.get_submodule(path)
        if form_of(module) is not Fused:
            return {}
        joint, down = Fused.parameters(module)
        above = ["gate", "up"] if Fused.flags(module).has_gate else ["up"]
        # Matrices of a single weight, each with a number of its own, are turned into what the files hold.
        for name, own in ((joint, above), (down, ["down"])):
            found = [(path, expert, projection) for expert in range(len(module.down_proj)) for projection in own]
            numbers = torch.arange(len(keys), len(keys) + len(found)).view(-1, len(own), 1)
            state[f"{path}.{name}"] = numbers.transpose(1, 2) if Fused.flags(module).is_transposed else numbers
            keys += found
    back = revert_weight_conversion(native, state)
    return {keys[int(t)]: name.removesuffix(WEIGHT) for name, t in back.items() if t.numel() == 1}
