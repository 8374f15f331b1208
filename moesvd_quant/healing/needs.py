"""What healing will need of memory and disk, from shapes, before anything is compressed."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.accounting import planned_model
from ..memory.limits import MemoryLimitError
from ..model.experts import expert_count, find_experts, shapes_of
from ..model.stream import StreamedModel
from ..runtime.parts import Layout
from .targets import float_targets, router_parameters, scale_targets
from .teacher import disk_bytes

FLOAT, NF4 = 4, 0.5625  # bytes of a float32 weight, of one in NF4 with its scales
# Bytes for each trained parameter: gradient, two moments, and the state before; an adapter, which is new, besides.
TRAINED, NEW = 16, 4
LOGITS = {"lm": 2, "distill": 5}  # tensors of a micro-batch's predictions at a time
# Copies of a layer's expert weights that a step makes: where adapters are trained (PEFT adds their product), and where
# packed weights are dequantized.
ADAPTED, UNPACKED = 3, 2


@dataclass(frozen=True)
class HealingNeeds:
    """Bytes. weights: of the model as it is held; trained: what training adds to them; working: of a micro-batch; disk:
    of hidden states."""

    weights: int
    trained: int
    working: int
    disk: int

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def memory(self) -> int:
        return self.weights + self.trained + self.working

    def require(self, free: int, cache: Path, options) -> None:
        """MemoryLimitError where `free` bytes of memory, or the disk of the folder `cache`, do not hold it, with what
        would make it fit."""
        cache.mkdir(parents=True, exist_ok=True)
        if self.disk > (room := shutil.disk_usage(cache).free):
            raise MemoryLimitError(
                f"lora: healing puts {self.disk / 1e9:.2f} GB of hidden states under {cache}, and {room / 1e9:.2f} GB "
                "are free there; set MOESVD_CACHE to a larger disk, or train for fewer steps"
            )
        if self.memory <= free:
            return
        ways = ["objective: layerwise"] if options.objective != "layerwise" else []
        if options.train == "factors":
            ways.append("train: adapters")
        elif options.train == "adapters" and options.frozen != "nf4":
            ways.append("frozen: nf4")
        ways += [f"microbatch below {options.microbatch}"] if options.microbatch > 1 else ["a shorter length"]
        raise MemoryLimitError(
            f"lora: healing takes {self.memory / 1e9:.2f} GB ({self.weights / 1e9:.2f} of weights, "
            f"{self.trained / 1e9:.2f} of what is trained, {self.working / 1e9:.2f} of a micro-batch), and "
            f"{free / 1e9:.2f} GB are free; what takes less: {', '.join(ways)}"
        )


def healing_needs(parent: StreamedModel, layout: Layout, options, windows: Sequence[int], statistics) -> HealingNeeds:
    """parent: the input checkpoint, or its description; layout: of the output; windows: (count, length) to train on;
    statistics: of the original model."""
    item = FLOAT if statistics.dtype == torch.float32 else parent.stored_dtype.itemsize
    model, sizes, (count, length) = planned_model(parent, layout), statistics.sizes, windows
    held, trained, made = zip(*(_layer(model, parent.model, name, item, options) for name in parent.layer_names))
    rows, batch_rows = options.microbatch * length, statistics.batch_size * statistics.shape[1]
    once = sizes.activations * rows / batch_rows + max(made) * item
    ends = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    widest = max(end.numel() for end in ends) * item
    if options.objective == "layerwise":
        return HealingNeeds(int(3 * max(held) + 2 * widest), max(trained), int(once), 4 * count * length * sizes.row)
    outer = _held(model, item) - sum(_held(model.get_submodule(name), item) for name in parent.layer_names)
    kept = once + len(held) * rows * sizes.row if options.checkpointing else len(held) * once
    working, disk = kept + LOGITS[options.objective] * FLOAT * rows * len(ends[1]), 0
    if options.objective == "distill":
        working, disk = working + widest, disk_bytes(count, length * sizes.row)
    return HealingNeeds(int(sum(held) + outer), sum(trained), int(working), disk)


def _layer(model: nn.Module, before: nn.Module, name: str, item: int, options) -> tuple[float, int, int]:
    """Of a layer: bytes of its weights as they are held, bytes for what is trained, weights that a step makes anew."""
    layer = model.get_submodule(name)
    held: float = _held(layer, item)
    linears, banks = float_targets(layer, [""], options.attention)
    parameters = dict(layer.named_parameters())
    targets = [parameters[f"{path}.weight"] for path in linears] + [parameters[path] for path in banks]
    packed = 0 if banks else sum(_weights(experts) for _, experts in find_experts(layer))
    made = UNPACKED * packed + ADAPTED * sum(parameters[path].numel() for path in banks)
    if options.frozen == "nf4":
        held -= sum(p.numel() for p in targets) * (item - NF4)
    if options.train == "adapters":
        terms = _floats(layer) - _floats(before.get_submodule(name))
        adapters = sum(options.rank * p[..., 0, 0].numel() * sum(p.shape[-2:]) for p in targets)
        return held, (TRAINED + NEW) * adapters + (TRAINED + NEW - item) * terms, made
    if options.train == "router":
        targets = [parameters[path] for path in router_parameters(layer, [""])]
    if options.train == "scales":
        targets = [parameters[path] for path in scale_targets(layer, [""], options.attention)]
    grown = (TRAINED + NEW) * sum(p.numel() for p in targets) - sum(_held_bytes(p, item) for p in targets)
    return held, grown, UNPACKED * packed


def _held(module: nn.Module, item: int) -> int:
    """Bytes of a module's weights where those in floating point take `item` each."""
    return sum(_held_bytes(p, item) for p in module.parameters())


def _held_bytes(parameter: torch.Tensor, item: int) -> int:
    return parameter.numel() * (item if parameter.is_floating_point() else parameter.element_size())


def _weights(experts: nn.Module) -> int:
    return expert_count(experts) * sum(out * inputs for out, inputs in shapes_of(experts).values())


def _floats(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.is_floating_point())
