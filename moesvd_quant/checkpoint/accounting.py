"""Exact bytes of a checkpoint from its layout, before a weight is read; every tensor counts."""

import copy
import json
from dataclasses import asdict, dataclass

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..memory.files import NAMES
from ..model.dtypes import keep_dtypes, keep_float32
from ..model.experts import expert_count, find_experts, is_shared, mark_shared_experts, shapes_of
from ..model.folder import EXPERT_COUNTS
from ..model.hf_internals import tied_weights
from ..model.opened import empty_model
from ..model.stream import StreamedModel
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.modeling_moesvd import config_class
from ..runtime.parts import Layout
from ..runtime.routers import router_of, rows_of
from ..runtime.stored import StoredLinear
from .unused import empty_tensors


@dataclass(frozen=True)
class Accounting:
    """Bytes and parameters of a checkpoint beside those of its original."""

    disk_bytes: int  # of all safetensors files, headers included
    tensor_bytes: int
    resident_bytes: int  # tensors that the class uses, and buffers, when loaded
    expert_bytes: int  # of the routed experts' tensors: codes, scales, zeros, factors
    expert_params: int  # stored routed-expert parameters, packed ones counted as weights
    original_bytes: int
    original_expert_params: int
    original_params: int
    params: int
    bits_per_expert_weight: float  # expert bytes * 8 / original expert parameters
    expert_ratio: float  # fraction of routed-expert parameters removed
    model_ratio: float  # the same of all parameters

    def to_dict(self) -> dict:
        return asdict(self)


def _planned(parent: StreamedModel, layout: Layout):
    native = config_class(layout.native_type)
    config = native.from_dict(parent.config.to_dict() | {"moesvd": layout.to_dict()})
    return empty_model(config, parent.stored_dtype)


def loaded_bytes(parent: StreamedModel, layout: Layout) -> int:
    """Bytes of the tensors and buffers of the model that a layout describes, when transformers has loaded it."""
    made = _planned(parent, layout)
    keep_float32(made, parent.stored_dtype)
    tensors = stored_tensors(made)
    buffers = {name: buffer for name, buffer in made.named_buffers() if name not in tensors}
    return sum(t.numel() * t.element_size() for t in [*tensors.values(), *buffers.values()])


def planned_model(parent: StreamedModel, layout: Layout):
    """The model that a layout describes, on the meta device, as it will be stored: what the layout does not change has
    the parent's dtypes."""
    made = _planned(parent, layout)
    keep_dtypes(made, parent.model, [*layout.experts, *layout.linears])
    return made


def original_config(config, experts: int | None = None):
    """The native config of one of our checkpoints, or a native one. experts: see `original_model`."""
    if hasattr(config, "moesvd"):
        native = CONFIG_MAPPING[config.moesvd["native_type"]]
        ours = ("moesvd", "auto_map", "architectures", "model_type")
        config = native.from_dict({key: value for key, value in config.to_dict().items() if key not in ours})
    if experts is not None:
        config = copy.deepcopy(config)
        for part in (config, config.get_text_config(decoder=True)):
            for name in EXPERT_COUNTS:
                if getattr(part, name, None):
                    setattr(part, name, experts)
    return config


def original_model(parent: StreamedModel, experts: int | None = None):
    """The native architecture on the meta device; shared experts count as experts where they do in `parent`. experts:
    how many routed ones each layer has, where that is another number than the original's."""
    made = empty_model(original_config(parent.config, experts), parent.stored_dtype)
    if any(is_shared(experts) for _, experts in find_experts(parent.model)):
        for name in parent.layer_names:
            mark_shared_experts(made.get_submodule(name))
    return made


def stored_tensors(model) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds: its state without tensors tied to another."""
    tied = tied_weights(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def file_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Size of a safetensors file of these tensors: 8 bytes, a padded JSON header, the data. The header's length depends
    on where tensors lie: they are written by dtype, then by name."""
    header, offset, order = {}, 0, list(NAMES)
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header["__metadata__"] = {"format": "pt"}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset


def by_file(model, layer_names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of each file of a checkpoint: one per layer, and `outer`."""
    files: dict[str, dict] = {name: {} for name in layer_names} | {"outer": {}}
    for name, tensor in stored_tensors(model).items():
        owner = next((layer for layer in layer_names if name.startswith(layer + ".")), "outer")
        files[owner][name] = tensor
    return files


def expert_parameters(model) -> tuple[int, int]:
    """(weights, bytes) of all routed experts; a packed weight counts as one parameter, one that is left out as none."""
    weights = size = 0
    for _, module in find_experts(model):
        size += sum(p.numel() * p.element_size() for n, p in module.named_parameters() if "bias" not in n)
        if isinstance(module, FactorizedExperts):
            banks = [bank for _, bank in module.banks()]
            weights += sum(bank.shape[0] * bank.form.matrix_weights(bank.shape[1:]) for bank in banks)
        else:
            count = expert_count(module)
            weights += sum(count * out * in_features for out, in_features in shapes_of(module).values())
    return weights, size


def account(parent: StreamedModel, layout: Layout) -> Accounting:
    """Accounting of the checkpoint that `layout` describes; `parent` supplies architecture and dtype."""
    planned, original = planned_model(parent, layout), original_model(parent)
    weights, size = expert_parameters(planned)
    original_weights, _ = expert_parameters(original)
    everything = stored_tensors(original)
    original_params = sum(t.numel() for t in everything.values())
    dropped = sum(_beside_weights(original, path) - _beside_weights(planned, path) for path in layout.sources)
    dropped += sum(_left_out(planned.get_submodule(path)) for path in layout.linears)
    params = original_params - original_weights + weights - dropped
    files = by_file(planned, parent.layer_names)
    used_bytes = sum(t.numel() * t.element_size() for t in stored_tensors(planned).values())
    if unused := parent.unused():
        files["unused"] = empty_tensors(unused)
    unused_bytes = sum(tensor.bytes for tensor in unused.values())
    return Accounting(
        disk_bytes=sum(file_bytes(tensors) for tensors in files.values()),
        tensor_bytes=used_bytes + unused_bytes,
        resident_bytes=loaded_bytes(parent, layout),
        expert_bytes=size,
        expert_params=weights,
        original_bytes=layout.source_bytes or sum(t.numel() * t.element_size() for t in everything.values()),
        original_expert_params=original_weights,
        original_params=original_params,
        params=params,
        bits_per_expert_weight=8 * size / original_weights,
        expert_ratio=1 - weights / original_weights,
        model_ratio=1 - params / original_params,
    )


def _left_out(linear: StoredLinear) -> int:
    """Weights of a linear that are not stored: those that a sparse one has not."""
    return linear.in_features * linear.out_features - linear.layout.form.matrix_weights(linear.bank_shapes["weight"])


def _beside_weights(model, path: str) -> int:
    """Numbers of an experts module that are no weights, and of the router beside it: biases, a row for each expert."""
    experts = model.get_submodule(path)
    router = router_of(model.get_submodule(path.rpartition(".")[0]), expert_count(experts))
    own = [p for name, p in experts.named_parameters() if "bias" in name]
    rows = [t for module in router.modules for t in rows_of(module, router.experts).values()] if router else []
    return sum(t.numel() for t in [*own, *rows])
