"""What in decoder layers can be trained: names of modules and parameters by kind."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..model.experts import ROUTERS, find_experts, find_linears
from ..runtime.formats import Format
from ..runtime.stored import Stored


def float_targets(module: nn.Module, layers: list[str], attention: bool) -> tuple[list[str], list[str]]:
    """(linears, banks) in floating point in the layers at these paths ("" is the module itself): paths of modules, and
    of parameters of experts modules."""
    linears, banks = [], []
    for prefix, layer in _layers(module, layers):
        for path, linear in find_linears(layer):
            if attention and isinstance(linear, nn.Linear) and not _passed_by(layer, path):
                linears.append(prefix + path)
        for path, experts in find_experts(layer):
            for projection, parts in experts.layout.items():
                if not any(part.packed for part in parts):  # a float part beside packed ones is a term
                    names = (key for key, *_ in experts.banks() if key.startswith(f"{projection}_"))
                    banks += [f"{prefix}{path}.{key}" for key in names]
    return linears, banks


def _passed_by(layer: nn.Module, path: str) -> bool:
    """Whether a linear is one whose weight Mamba's fused kernels take as it is: an adapter on it would be passed by."""
    home, _, name = path.rpartition(".")
    return name == "out_proj" and hasattr(layer.get_submodule(home), "conv1d")


def router_parameters(module: nn.Module, layers: list[str]) -> list[str]:
    """Names of the floating-point parameters of the routers in these layers."""
    return _parameters(module, layers, lambda name, p: p.is_floating_point() and ROUTERS & set(name.split(".")[:-1]))


def trained_formats(layer: nn.Module) -> dict[str, Format]:
    """{name of each tensor of packed weights that training may change: its format}."""
    return {
        f"{path}.{name}" if path else name: form
        for path, module in layer.named_modules()
        if isinstance(module, Stored)
        for name, (form, kind) in module.stored_tensors().items()
        if kind == form.trained
    }


def packed_scales(module: nn.Module, layers: list[str], attention: bool) -> list[str]:
    """Names of the scales of the packed experts in these layers, and with `attention` of all else that is packed."""
    found = [f"{prefix}{name}" for prefix, layer in _layers(module, layers) for name in trained_formats(layer)]
    if attention:
        return found
    experts = tuple(f"{prefix}{path}." for prefix, layer in _layers(module, layers) for path, _ in find_experts(layer))
    return [name for name in found if name.startswith(experts)]


def vectors(module: nn.Module, layers: list[str]) -> list[str]:
    """Names of the norms and biases of these layers."""
    values = set(packed_scales(module, layers, True))  # those of a sparse linear are a vector, too
    found = _parameters(module, layers, lambda name, p: p.is_floating_point() and p.ndim == 1)
    return [name for name in found if name not in values]


def scale_targets(module: nn.Module, layers: list[str], attention: bool) -> list[str]:
    """Names of all that `train: scales` trains: scales, norms and biases, routers."""
    found = packed_scales(module, layers, attention) + vectors(module, layers) + router_parameters(module, layers)
    return sorted(set(found))


def _parameters(module: nn.Module, layers: list[str], wanted: Callable[[str, nn.Parameter], Any]) -> list[str]:
    """Names of the parameters in these layers that are wanted, by their name in the layer."""
    return [
        prefix + name
        for prefix, layer in _layers(module, layers)
        for name, parameter in layer.named_parameters()
        if wanted(name, parameter)
    ]


def _layers(module: nn.Module, layers: list[str]):
    for path in layers:
        yield f"{path}." if path else "", module.get_submodule(path)
