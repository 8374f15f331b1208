"""The dtype of each tensor of a model on the meta device: what is loaded into it becomes that."""

import torch
from torch import nn

from .hf_internals import kept_in_float32


def set_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Gives parameters and buffers {name: dtype} theirs."""
    state = model.state_dict(keep_vars=True)
    for name, dtype in dtypes.items():
        state[name].data = state[name].data.to(dtype)


def keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """What transformers keeps in float32 in a model of `dtype` becomes float32."""
    if pattern := kept_in_float32(model, dtype):
        state = model.state_dict()
        kept = [name for name, tensor in state.items() if tensor.is_floating_point() and pattern.search(name)]
        set_dtypes(model, dict.fromkeys(kept, torch.float32))


def keep_dtypes(planned: nn.Module, parent: nn.Module, changed: list[str]) -> None:
    """A planned model takes the dtypes of its parent: a tensor that both have its own; weights of the modules at the
    paths `changed`, which are stored in another way, those of the module there."""
    before, own = parent.state_dict(), planned.state_dict()
    kept = {name: before[name].dtype for name, tensor in own.items() if _same_kind(tensor, before.get(name))}
    for path in changed:
        like = next((p.dtype for p in parent.get_submodule(path).parameters() if p.is_floating_point()), None)
        if like is not None:
            inside = [name for name in own if name.startswith(path + ".") and name not in kept]
            kept |= {name: like for name in inside if own[name].is_floating_point()}
    set_dtypes(planned, kept)


def _same_kind(tensor: torch.Tensor, before: torch.Tensor | None) -> bool:
    return before is not None and tensor.is_floating_point() and before.is_floating_point()
