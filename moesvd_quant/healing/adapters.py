"""What is trained: adapters by PEFT on everything in floating point, terms beside what is packed, factors, routers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..checkpoint.files import write_json, write_tensors
from ..model.experts import ROUTERS, find_experts, find_linears

SCALE = 2  # alpha / rank: what an adapter's product is multiplied with
LEFT, RIGHT = ("_left", ".left"), ("_right", ".right")  # endings of parameters, a lora_B and a lora_A behind them


@dataclass(frozen=True)
class Updates:
    """What training gives: float32 by parameter name; `add` is added to the stored value, `put` takes its place."""

    add: dict[str, torch.Tensor]
    put: dict[str, torch.Tensor]

    def write(self, file: Path) -> None:
        tensors = {f"add/{k}": v for k, v in self.add.items()} | {f"put/{k}": v for k, v in self.put.items()}
        write_tensors(file, tensors)

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "Updates":
        """From what `write` wrote."""
        kinds: dict[str, dict] = {"add": {}, "put": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            kinds[kind][key] = tensor
        return cls(kinds["add"], kinds["put"])


@dataclass(frozen=True)
class Adapters:
    """What a PEFT folder holds; config is None where nothing in floating point was adapted."""

    config: LoraConfig | None
    tensors: dict[str, torch.Tensor]


@torch.no_grad()
def apply(layer: nn.Module, prefix: str, updates: Updates, stored: torch.dtype) -> None:
    """Merges into a layer whose parameters are called prefix + path: rounded once, to `stored`, whatever the layer's
    own dtype. KeyError where an update names no parameter."""
    parameters = {prefix + path: p for path, p in layer.named_parameters()}
    for kind, tensors in (("add", updates.add), ("put", updates.put)):
        for name, tensor in tensors.items():
            if not name.startswith(prefix):
                continue
            parameter, tensor = parameters[name], tensor.to(parameters[name].device)
            parameter.copy_((parameter.float() + tensor if kind == "add" else tensor).to(stored))


def float_targets(module: nn.Module, layers: list[str], attention: bool) -> tuple[list[str], list[str]]:
    """(linears, banks) in floating point in the layers at these paths ("" is the module itself): paths of modules, and
    of parameters of experts modules."""
    linears, banks = [], []
    for prefix, layer in _layers(module, layers):
        for path, linear in find_linears(layer):
            if attention and isinstance(linear, nn.Linear):
                linears.append(prefix + path)
        for path, experts in find_experts(layer):
            for projection, parts in experts.layout.items():
                if not any(part["quant"] for part in parts):  # a float part beside packed ones is a term
                    names = (key for key, *_ in experts.banks() if key.startswith(f"{projection}_"))
                    banks += [f"{prefix}{path}.{key}" for key in names]
    return linears, banks


def router_parameters(module: nn.Module, layers: list[str]) -> list[str]:
    """Names of the floating-point parameters of the routers in these layers."""
    return [
        prefix + name
        for prefix, layer in _layers(module, layers)
        for name, parameter in layer.named_parameters()
        if parameter.is_floating_point() and ROUTERS & set(name.split(".")[:-1])
    ]


def _layers(module: nn.Module, layers: list[str]):
    for path in layers:
        yield f"{path}." if path else "", module.get_submodule(path)


class Trained:
    """A module of which some is trained: `tensors` for the optimizer, `updates` when it is done.

    layers: paths of the decoder layers in it ("" is the module itself), outside of which nothing is trained; new: names
    of low-rank terms that `terms.into_layout` added. What is trained is float32 whatever the module's dtype.
    """

    def __init__(self, module: nn.Module, layers: list[str], options, new: list[str], seed: int):
        self.module = module
        module.requires_grad_(False)
        linears, banks = float_targets(module, layers, options.attention)
        factors = [*banks, *(f"{path}.weight" for path in linears)]
        plain = {"adapters": new, "router": router_parameters(module, layers), "factors": factors}[options.train]
        parameters = dict(module.named_parameters())
        self._plain = {name: parameters[name] for name in plain}
        self.config = None
        if options.train == "adapters" and (linears or banks):
            self.config = lora_config(options.rank, linears, banks)
            torch.manual_seed(seed)
            inject_adapter_in_model(self.config, module)
        self.adapters = {
            _plain_name(path, layer): layer for path, layer in module.named_modules() if isinstance(layer, LoraLayer)
        }
        for parameter in self.tensors().values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def tensors(self, side: str = "both") -> dict[str, nn.Parameter]:
        """Trained parameters by name; of one side, "left" or "right": the factors of that side, or their adapters.

        A matrix that is not factorized (a dense bank, attention) is trained with the left side.
        """
        found = {}
        for name, layer in self.adapters.items():
            for kind in ("lora_A", "lora_B"):
                found[f"{name}.{kind}.weight"] = getattr(layer, kind)["default"].weight, name
        found |= {name: (parameter, name) for name, parameter in self._plain.items()}
        is_right = lambda name: name.endswith(RIGHT)  # noqa: E731
        return {key: p for key, (p, name) in found.items() if side == "both" or is_right(name) == (side == "right")}

    @torch.no_grad()
    def updates(self, prefix: str = "") -> Updates:
        """What training changed, by parameter names with `prefix` before them."""
        add = {prefix + name: _delta(layer) for name, layer in self.adapters.items()}
        put = {prefix + name: parameter.detach().clone() for name, parameter in self._plain.items()}
        return Updates(add, put)

    def peft_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Adapters under the names that a PEFT folder has, `prefix` before the module's own."""
        found = {}
        for path, layer in self.module.named_modules():
            if isinstance(layer, LoraLayer):
                for kind in ("lora_A", "lora_B"):
                    weight = getattr(layer, kind)["default"].weight.detach()
                    found[f"base_model.model.{prefix}{path}.{kind}.weight"] = weight.clone()
        return found


def lora_config(rank: int, linears: list[str], banks: list[str]) -> LoraConfig:
    """Every target by its whole path; a name list that PEFT cannot mistake for another."""
    return LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        lora_dropout=0.0,
        target_modules=sorted(linears) or None,
        target_parameters=sorted(banks) or None,
        task_type="CAUSAL_LM",
    )


def _plain_name(path: str, layer: LoraLayer) -> str:
    """Name of the parameter that a LoRA layer adapts, as it is called without it."""
    path = ".".join(part for part in path.split(".") if part != "base_layer")
    return f"{path}.{getattr(layer, 'parameter_name', 'weight')}"


def _delta(layer: LoraLayer) -> torch.Tensor:
    """float32 scale * B @ A in the shape of the parameter, whatever the dtype that the frozen one is held in."""
    a, b = (getattr(layer, kind)["default"].weight.float() for kind in ("lora_A", "lora_B"))
    scale = layer.scaling["default"]
    if not isinstance(layer, ParamWrapper):
        return scale * b @ a
    shape, experts = layer.get_param().shape, layer.num_experts
    a = a.reshape(experts, -1, a.shape[-1])  # (experts, rank, in)
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, out, rank), as peft lays it out
    return (scale * b @ a).reshape(shape)


def save_peft(folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor], base: str) -> None:
    """A standard PEFT folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    content["target_modules"] = sorted(content["target_modules"] or [])  # peft keeps a set, in any order
    write_json(file, content)
    write_tensors(folder / "adapter_model.safetensors", tensors)
