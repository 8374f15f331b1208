"""What is trained: adapters by PEFT on all that is in floating point, terms beside what is packed, factors, routers, or
the scales of what is packed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn

from ..memory.files import write_json, write_tensors
from .targets import float_targets, router_parameters, scale_targets, trained_formats

SCALE = 2  # alpha / rank: what an adapter's product is multiplied with
LEFT, RIGHT = ("_left", ".left"), ("_right", ".right")  # endings of parameters, a lora_B and a lora_A behind them


@dataclass(frozen=True)
class Updates:
    """What training gives, float32 by parameter name: left @ right is added to the stored value, `put` replaces it
    (tensors of packed weights as `Format.trainable` has them)."""

    left: dict[str, torch.Tensor]
    right: dict[str, torch.Tensor]
    put: dict[str, torch.Tensor]

    def write(self, file: Path, prefix: str = "") -> None:
        """Those of the parameters whose names start with the prefix."""
        kinds = {"left": self.left, "right": self.right, "put": self.put}
        write_tensors(
            file,
            {f"{kind}/{name}": t for kind, ts in kinds.items() for name, t in ts.items() if name.startswith(prefix)},
        )

    @classmethod
    def read(cls, file: Path) -> "Updates":
        kinds: dict[str, dict] = {"left": {}, "right": {}, "put": {}}
        for name, tensor in load_file(file).items():
            kind, _, key = name.partition("/")
            kinds[kind][key] = tensor
        return cls(**kinds)

    def names(self) -> set[str]:
        """The parameters that are updated."""
        return {*self.left, *self.put}

    def parameters(self) -> int:
        return sum(t.numel() for ts in (self.left, self.right, self.put) for t in ts.values())


def update_file(folder: Path, index: int) -> Path:
    """Where the updates of a layer lie."""
    return folder / f"updates-{index:05d}.safetensors"


@dataclass(frozen=True)
class Adapters:
    """What a PEFT folder holds; config is None where nothing in floating point was adapted."""

    config: LoraConfig | None
    tensors: dict[str, torch.Tensor]


@torch.no_grad()
def apply(layer: nn.Module, prefix: str, updates: Updates, stored: Callable[[str], torch.dtype]) -> None:
    """Merges into a layer whose parameters are called prefix + path: each is rounded once, to the dtype `stored(name)`
    that it has on disk. KeyError where an update names no parameter of the layer."""
    parameters = {prefix + path: p for path, p in layer.named_parameters()}
    for name, left in updates.left.items():
        parameter = parameters[name]
        product = (left @ updates.right[name]).reshape(parameter.shape)
        parameter.copy_((parameter.float() + product.to(parameter.device)).to(stored(name)))
    formats = {prefix + path: form for path, form in trained_formats(layer).items()}
    for name, tensor in updates.put.items():
        value = formats[name].stored(tensor) if name in formats else tensor
        parameters[name].copy_(value.to(stored(name)))


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
        plain = {
            "adapters": new,
            "factors": factors,
            "router": router_parameters(module, layers),
            "scales": scale_targets(module, layers, options.attention),
        }[options.train]
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
        formats = trained_formats(module)
        for name, parameter in self.tensors().items():
            trained = formats[name].trainable(parameter.data) if name in formats else parameter.data.float()
            parameter.data = trained
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
        pairs = {prefix + name: _product(layer) for name, layer in self.adapters.items()}
        put = {prefix + name: parameter.detach() for name, parameter in self._plain.items()}
        return Updates({n: left for n, (left, _) in pairs.items()}, {n: right for n, (_, right) in pairs.items()}, put)

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


def _product(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 scale * B and A whose product, reshaped, is added to the parameter, whatever dtype that is held in."""
    a, b = (getattr(layer, kind)["default"].weight.float() for kind in ("lora_A", "lora_B"))
    b = layer.scaling["default"] * b
    if isinstance(layer, ParamWrapper):
        a = a.reshape(layer.num_experts, -1, a.shape[-1])  # (experts, rank, in)
        b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)  # (experts, out, rank), as peft lays it out
    return b, a


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
