"""One decoder layer of a model in memory at a time, through transformers' own key conversion.

The same reader opens a native checkpoint and one of ours, and the same walk serves calibration,
decomposition, quantization and verification.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from .modeling_moesvd import MoesvdConfig, check_digests, model_class


class ModelError(ValueError):
    """A model folder that cannot be used; the message says where and what to do."""


def read_config(folder: Path):
    """The transformers config of a model folder; ModelError where there is none."""
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a folder with a Hugging Face model")
    return AutoConfig.from_pretrained(folder)


def weight_files(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of a safetensors folder. Pickle files are not read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {key: Path(name).name for key, name in names.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(f"{folder}: no model.safetensors and no index of shards; only safetensors are read")
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except SafetensorError as error:
        raise ModelError(f"{single}: truncated or damaged ({error})") from error


@contextmanager
def no_loading_bars():
    """transformers draws a bar per call, which is one per layer here."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class StreamedModel:
    """A causal model on the meta device whose layers are filled and emptied one by one.

    dtype: of the weights in memory; None keeps the checkpoint's. Packed tensors stay integers.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
        config = read_config(Path(folder))
        check_digests(Path(folder))
        self._describe(Path(folder), config, dtype, device)
        self.mapping = get_model_conversion_mapping(self.model)
        self.sources = self._target_names(weight_files(self.folder))
        self._check_files()

    @classmethod
    def described(cls, config, like: "StreamedModel") -> "StreamedModel":
        """A model that is planned and not yet written: it has shapes and no tensors to load."""
        made = cls.__new__(cls)
        made._describe(like.folder, config, None, like.device)
        return made

    def _describe(self, folder, config, dtype, device):
        self.folder, self.device, self.config = folder, torch.device(device), config
        self.stored_dtype = config.dtype or torch.float32
        self.dtype = dtype or self.stored_dtype
        with init_empty_weights(include_buffers=False):
            self.model = self._construct().eval()
        self.model.requires_grad_(False)
        self.decoder = self.model.get_decoder()
        names = {id(module): name for name, module in self.model.named_modules()}
        self.prefix = names[id(self.decoder)]
        self.layer_names = [f"{self.prefix}.layers.{i}" for i in range(len(self.decoder.layers))]

    def _construct(self):
        if isinstance(self.config, MoesvdConfig):
            return model_class(self.config.moesvd["native_type"])._from_config(self.config, dtype=self.dtype)
        return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)

    def _target_names(self, files):
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        meta, prefix = self.model.state_dict(), self.model.base_model_prefix
        rename = lambda key: rename_source_key(key, renamings, converters, prefix, meta)[0]  # noqa: E731
        return [(rename(key), key, file) for key, file in files.items()]

    def _check_files(self):
        """Opens each shard: a truncated one is found before any work starts."""
        for file in sorted({file for *_, file in self.sources}):
            try:
                with safe_open(self.folder / file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self.folder / file}: missing, truncated or damaged ({error})") from error

    def load(self, *prefixes: str) -> None:
        """Fills all tensors under the prefixes; ModelError where one is missing, unexpected, misshapen or not
        finite."""
        wanted: dict[str, list[str]] = {}
        for target, key, file in self.sources:
            if target.startswith(prefixes):
                wanted.setdefault(file, []).append(key)
        state = {}
        handles = [safe_open(self.folder / file, "pt") for file in wanted]
        for handle, keys in zip(handles, wanted.values()):
            state.update({key: handle.get_slice(key) for key in keys})
        how = LoadStateDictConfig(
            weight_mapping=get_model_conversion_mapping(self.model), device_map={"": self.device}, dtype=self.dtype
        )
        with no_loading_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, how)
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
            if not torch.isfinite(tensor).all():
                where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise ModelError(f"{self.folder}: {key} is not finite at {where}; the checkpoint is damaged")

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
        return self.decoder.layers[index]

    def drop_layer(self, index: int) -> None:
        self.drop(self.layer_names[index])

    def outer_prefixes(self) -> list[str]:
        """Prefixes of everything that is not a decoder layer: embeddings, norms, lm_head."""
        inside = [f"{self.prefix}.{name}." for name, _ in self.decoder.named_children() if name != "layers"]
        outside = [f"{name}." for name, _ in self.model.named_children() if name != self.prefix.split(".")[0]]
        return inside + outside

    def load_outer(self) -> None:
        self.load(*self.outer_prefixes())
        self.model.tie_weights()

    @torch.no_grad()
    def walk(self, windows: torch.Tensor, batch_size: int = 8) -> Iterator["LayerVisit"]:
        """Takes token windows (n, length) through the model breadth-first: all batches through one layer,
        then the next. Yields a visit per layer with its weights in memory; hidden states advance after it."""
        self.load_outer()
        batches = windows.to(self.device).split(batch_size)
        calls = _record_layer_calls(self.decoder, batches)
        hidden = [args[0] for args, _ in calls[0]]
        for index in range(len(self.layer_names)):
            layer = self.load_layer(index)
            visit = LayerVisit(index, layer, hidden, calls[index])
            yield visit
            hidden = visit.outputs()
            calls[index] = []
            self.drop_layer(index)
        self.hidden = hidden

    @torch.no_grad()
    def logits(self, windows: torch.Tensor, batch_size: int = 8) -> Iterator[torch.Tensor]:
        """Logits (batch, length, vocabulary) of each batch, from a walk over all layers."""
        for _ in self.walk(windows, batch_size):
            pass
        for hidden in self.hidden:
            yield self.model.lm_head(self.decoder.norm(hidden))


class LayerVisit:
    """A decoder layer with its weights, and the inputs that the walk has for it."""

    def __init__(self, index, layer, hidden, calls):
        self.index, self.layer, self.hidden, self.calls = index, layer, hidden, calls
        self._outputs = None

    def outputs(self) -> list[torch.Tensor]:
        """Output hidden states of every batch; run once, so that hooks set before see each batch once."""
        if self._outputs is None:
            self._outputs = self.run(self.hidden)
        return self._outputs

    def run(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Output hidden states of the layer for these input ones, a tensor per batch of the walk."""
        return [_call(self.layer, states, call) for states, call in zip(hidden, self.calls)]

    def run_batch(self, layer: nn.Module, batch: int) -> torch.Tensor:
        """What a layer that stands in for this one puts out for one batch of the walk."""
        return _call(layer, self.hidden[batch], self.calls[batch])


def _call(layer: nn.Module, states: torch.Tensor, call: tuple) -> torch.Tensor:
    args, kwargs = call
    out = layer(states, *args[1:], **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _record_layer_calls(decoder, batches):
    """What each layer is called with, per batch, learnt by a run in which layers pass their input on."""
    calls: list[list] = [[] for _ in decoder.layers]
    for index, layer in enumerate(decoder.layers):

        def forward(*args, _index=index, **kwargs):
            if not args:
                args = (kwargs.pop("hidden_states"),)
            calls[_index].append((args, kwargs))
            return args[0]

        layer.forward = forward
    try:
        for batch in batches:
            decoder(input_ids=batch, use_cache=False)
    finally:
        for layer in decoder.layers:
            del layer.forward
    return calls
