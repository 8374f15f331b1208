"""A model on the meta device whose decoder layers are filled and emptied one by one, through transformers' own key
conversion. The same reader opens a native checkpoint and one of ours."""

from pathlib import Path
from typing import Literal, Self, TypeAlias

import torch
from torch import nn

from ..errors import ModelError
from ..memory.allocator import malloc_trim
from ..runtime.factorized_experts import FactorizedExperts
from .balance import balance, move
from .dtypes import keep_float32, set_dtypes
from .experts import mark_shared_experts
from .headers import StoredTensor
from .hf_internals import fill, ignored_missing, tied_weights
from .opened import Opened, open_folder
from .weights import WeightFiles

Precision: TypeAlias = torch.dtype | Literal["auto"] | None


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

    dtype: of the weights in memory: one of torch's; `auto` as transformers loads the folder, in the model's own dtype
    but for what its class keeps in float32; None keeps every tensor as it is on disk. Packed tensors stay integers.
    shared: whether shared experts count as experts. leave_out: whether its checkpoints are without the tensors that the
    model's class does not use. balanced: whether inner channels of native experts are balanced when a layer is loaded
    (`model/balance.py`); not those of a model in float16, which has too few exponents.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: Precision = None,
        device="cpu",
        shared: bool = False,
        leave_out: bool = False,
        balanced: bool = False,
    ):
        opened = open_folder(folder)
        self.precision, self.stored_dtype = dtype, opened.dtype
        self.opened: Opened | None = opened
        self.dtype = dtype if isinstance(dtype, torch.dtype) else opened.dtype
        self._describe(Path(folder), opened.empty_model(self.dtype), device, shared, leave_out)
        self.balanced = balanced
        if dtype is None:
            set_dtypes(self.model, opened.census.dtypes)
        else:
            keep_float32(self.model, self.dtype)
        self.files = WeightFiles(self.folder, opened.census, opened.tensors)

    def __reduce__(self):
        """A worker opens the folder itself."""
        return type(self), (self.folder, self.precision, self.device, self.shared, self.leave_out, self.balanced)

    @classmethod
    def described(cls, model: nn.Module, folder: Path, device="cpu", like: "LayeredModel | None" = None) -> Self:
        """A model on the meta device that is planned and not yet written: it has no tensors to load. like: a model of
        the original's folder, whose dtype and unused tensors it has."""
        made = cls.__new__(cls)
        made.precision, made.opened = None, like.opened if like else None
        made.stored_dtype = made.dtype = like.stored_dtype if like else model.dtype
        made._describe(folder, model, device, like.shared if like else False, like.leave_out if like else False)
        return made

    def _describe(self, folder: Path, model: nn.Module, device, shared: bool, leave_out: bool) -> None:
        self.folder, self.device, self.shared, self.leave_out = folder, torch.device(device), shared, leave_out
        self.model, self.config = model, model.config
        self.layers_path, self.layers = _decoder_layers(model)
        if shared:
            for layer in self.layers:
                mark_shared_experts(layer)
        self.layer_names = [f"{self.layers_path}.{i}" for i in range(len(self.layers))]
        self.balanced = False
        self.moved: dict[str, torch.Tensor] = {}  # by path in the loaded layer, see `balance`

    def source_bytes(self) -> int | None:
        """Bytes of all tensors on disk, those that the model's class does not use included; None for none."""
        return sum(tensor.bytes for tensor in self.opened.tensors.values()) if self.opened else None

    def unused(self) -> dict[str, StoredTensor]:
        """The tensors on disk that the model's class does not use and that its checkpoints carry, by name."""
        if self.opened is None or self.leave_out:
            return {}
        return {name: self.opened.tensors[name] for name in self.opened.census.unused}

    def load(self, *prefixes: str) -> None:
        """Fills all tensors under the prefixes; ModelError where one is missing, unexpected, misshapen or not
        finite."""
        opened = self.opened
        assert opened is not None  # what is described alone has nothing to load
        wanted = {key: t.dtype for key, t in self.model.state_dict().items() if key.startswith(prefixes)}
        slices = self.files.slices(*prefixes)
        info = fill(self.model, slices, opened.mapping, self.dtype, self.device, opened.quantizer)
        self.model.requires_grad_(False)
        missing = [key for key in info.missing_keys if key.startswith(prefixes) and not self.is_tied(key)]
        for kind, found in (
            ("not convertible", [text.splitlines()[-1] for text in info.conversion_errors.values()]),
            ("missing", [key for key in missing if not ignored_missing(self.model, key)]),
            ("unexpected", info.unexpected_keys),
            ("of another shape", info.mismatched_keys),
        ):
            if found:
                raise ModelError(f"{self.folder}: tensors {kind}: {sorted(map(str, found))[:5]}")
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            if not key.startswith(prefixes) or not tensor.is_floating_point() or self.is_tied(key):
                continue
            if tensor.dtype != wanted[key]:  # a plain tensor among quantized ones comes as it is stored
                tensor.data = tensor.data.to(wanted[key])
            if tensor.device.type != "meta" and not is_finite(tensor):
                where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise ModelError(f"{self.folder}: {key} is not finite at {where}; the checkpoint is damaged")
        malloc_trim()

    def dtype_on_disk(self, key: str) -> torch.dtype:
        """Of a parameter; of one that is not there yet, the model's."""
        return self.opened.census.dtypes.get(key, self.stored_dtype) if self.opened else self.stored_dtype

    def is_tied(self, key: str) -> bool:
        """Whether a parameter is not on disk because it shares the tensor of another."""
        return key in tied_weights(self.model)

    def drop(self, prefix: str) -> None:
        """Gives the memory of a module back."""
        for module in self.model.get_submodule(prefix).modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(tensor.to("meta"), requires_grad=False)

    def load_layer(self, index: int) -> nn.Module:
        self.load(self.layer_names[index] + ".")
        if self.balanced and self.stored_dtype != torch.float16:
            self.moved = balance(self.layers[index])
        if index + 1 < len(self.layer_names):
            self.files.read_ahead(self.layer_names[index + 1] + ".")
        return self.layers[index]

    def restore_native(self, index: int) -> None:
        """Moves the channels back of those experts of a loaded layer that are still native."""
        for path, exponents in self.moved.items():
            if not isinstance(experts := self.layers[index].get_submodule(path), FactorizedExperts):
                move(experts, -exponents)
        self.moved = {}

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
