"""A model on the meta device whose decoder layers are filled and emptied one by one, through transformers' own key
conversion. The same reader opens a native checkpoint and one of ours."""

import copy
from pathlib import Path
from typing import Self

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..memory.limits import malloc_trim
from ..runtime.modeling_moesvd import MoesvdConfig, model_class
from .experts import mark_shared_experts
from .folder import ModelError, class_for, read_config, require_whole
from .sources import take_dequantizer
from .weights import WeightFiles, no_loading_bars, one_tensor_at_a_time


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, layers) of the decoder: the list of modules in it that holds most of its weights."""
    decoder = model.get_decoder()
    lists = {name: child for name, child in decoder.named_modules() if isinstance(child, nn.ModuleList) and len(child)}
    if not lists:
        raise ModelError(f"{type(decoder).__name__}: has no list of decoder layers; it cannot be taken layer by layer")
    name = max(lists, key=lambda key: sum(p.numel() for p in lists[key].parameters()))
    path = next(path for path, module in model.named_modules() if module is decoder)
    return f"{path}.{name}" if path else name, lists[name]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is; without the copies that torch.isfinite makes of a whole tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


class LayeredModel:
    """A causal model on the meta device whose layers are filled and emptied one by one.

    dtype: of the weights in memory; None keeps the checkpoint's. Packed tensors stay integers. shared: whether shared
    experts count as experts.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None, device="cpu", shared: bool = False):
        self.shared = shared
        config = read_config(Path(folder))
        require_whole(Path(folder))
        try:
            self.quantizer = take_dequantizer(config)
        except ValueError as error:
            raise ModelError(f"{folder}: {error}") from error
        self._describe(Path(folder), config, dtype, device)
        self.mapping = get_model_conversion_mapping(self.model, None, self.quantizer)
        self.files = WeightFiles(self.folder, self.model, self.mapping)

    def __reduce__(self):
        """A worker opens the folder itself."""
        return type(self), (self.folder, self.dtype, self.device, self.shared)

    @classmethod
    def described(cls, config, like: "LayeredModel") -> Self:
        """A model that is planned and not yet written: it has shapes and no tensors to load."""
        made = cls.__new__(cls)
        made.quantizer, made.shared = None, like.shared
        made._describe(like.folder, config, None, like.device)
        return made

    def _describe(self, folder, config, dtype, device):
        self.folder, self.device, self.config = folder, torch.device(device), config
        self.stored_dtype = config.dtype or torch.float32
        self.dtype = dtype or self.stored_dtype
        with init_empty_weights(include_buffers=False):
            self.model = self._construct().eval()
        self.model.requires_grad_(False)
        self.dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        self.layers_path, self.layers = _decoder_layers(self.model)
        if self.shared:
            for layer in self.layers:
                mark_shared_experts(layer)
        self.layer_names = [f"{self.layers_path}.{i}" for i in range(len(self.layers))]

    def _construct(self):
        if isinstance(self.config, MoesvdConfig):
            return model_class(self.config.moesvd["native_type"])._from_config(self.config, dtype=self.dtype)
        return class_for(self.config)._from_config(self.config, dtype=self.dtype)

    def source_bytes(self) -> int | None:
        """Bytes of the tensors on disk, where they are quantized otherwise than by us; None for plain ones."""
        return None if self.quantizer is None else self.files.total_bytes()

    def load(self, *prefixes: str) -> None:
        """Fills all tensors under the prefixes; ModelError where one is missing, unexpected, misshapen or not
        finite."""
        how = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self.mapping),
            device_map={"": self.device},
            dtype=self.dtype,
            hf_quantizer=self.quantizer,
        )
        with no_loading_bars(), one_tensor_at_a_time():
            info, _ = convert_and_load_state_dict_in_model(self.model, self.files.slices(*prefixes), how)
        self.model.requires_grad_(False)
        missing = [key for key in info.missing_keys if key.startswith(prefixes) and not self._tied(key)]
        for kind, found in (
            ("missing", missing),
            ("unexpected", info.unexpected_keys),
            ("of another shape", info.mismatched_keys),
            ("not convertible", info.conversion_errors),
        ):
            if found:
                raise ModelError(f"{self.folder}: tensors {kind}: {sorted(map(str, found))[:5]}")
        for key, tensor in self.model.named_parameters():
            if not key.startswith(prefixes) or not tensor.is_floating_point() or self._tied(key):
                continue
            if tensor.dtype != self.dtypes[key]:  # a plain tensor among quantized ones comes as it is stored
                tensor.data = tensor.data.to(self.dtypes[key])
            if not is_finite(tensor):
                where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise ModelError(f"{self.folder}: {key} is not finite at {where}; the checkpoint is damaged")
        malloc_trim()

    def _tied(self, key: str) -> bool:
        return key in (getattr(self.model, "all_tied_weights_keys", None) or {})

    def drop(self, prefix: str) -> None:
        """Gives the memory of a module back."""
        for module in self.model.get_submodule(prefix).modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(tensor.to("meta"), requires_grad=False)

    def load_layer(self, index: int) -> nn.Module:
        self.load(self.layer_names[index] + ".")
        if index + 1 < len(self.layer_names):
            self.files.read_ahead(self.layer_names[index + 1] + ".")
        return self.layers[index]

    def drop_layer(self, index: int) -> None:
        self.drop(self.layer_names[index])
        malloc_trim()

    def outer_prefixes(self) -> list[str]:
        """Prefixes of everything that is not a decoder layer: embeddings, norms, lm_head, a vision tower."""
        found, module, at = [], self.model, ""
        for step in self.layers_path.split("."):
            found += [f"{at}{name}." for name, _ in module.named_children() if name != step]
            found += [at + name for name in [*module._parameters, *module._buffers]]
            module, at = module.get_submodule(step), f"{at}{step}."
        return found

    def load_outer(self) -> None:
        self.load(*self.outer_prefixes())
        self.model.tie_weights()

    def _embeddings(self) -> tuple[str, str]:
        """Paths of the input embeddings and of the output head."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return names[id(self.model.get_input_embeddings())], names[id(self.model.get_output_embeddings())]
