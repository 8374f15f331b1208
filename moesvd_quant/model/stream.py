"""One decoder layer of a model in memory at a time, through transformers' own key conversion.

The same reader opens a native checkpoint and one of ours, and the same walk serves calibration,
decomposition, quantization and verification.
"""

import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ..checkpoint.files import advise
from ..memory import Batches, return_freed
from .calls import StatePassedOn, finish, head_input, record, without_embeddings
from .modeling_moesvd import MoesvdConfig, check_digests, model_class, native_class
from .sources import take_dequantizer
from .stateful import forwards

# By the names that safetensors gives dtypes.
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
_BYTES |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1)


class ModelError(ValueError):
    """A model folder that cannot be used; the message says where and what to do."""


def read_config(folder: Path):
    """The transformers config of a model folder; ModelError where there is none."""
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a folder with a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
        raise ModelError(
            f"{folder}: config.json cannot be read as model_type {kind!r} by transformers {transformers.__version__}, "
            f"and code that comes with a model is not run: {error}"
        ) from error


def class_for(config) -> Any:
    """The class that predicts text with a config of transformers; ModelError where there is none."""
    try:
        return native_class(type(config))
    except KeyError:
        parts = ", ".join(name for name in type(config).sub_configs) or "none"
        raise ModelError(
            f"model_type {config.model_type!r}: transformers has no class for it that predicts text from tokens alone "
            f"(causal language models and vision-language models are supported; parts of this config: {parts})"
        ) from None


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


@contextmanager
def one_tensor_at_a_time():
    """transformers reads all tensors ahead by threads otherwise: one more layer in memory."""
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})


class StreamedModel:
    """A causal model on the meta device whose layers are filled and emptied one by one.

    dtype: of the weights in memory; None keeps the checkpoint's. Packed tensors stay integers.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
        config = read_config(Path(folder))
        check_digests(Path(folder))
        try:
            self.quantizer = take_dequantizer(config)
        except ValueError as error:
            raise ModelError(f"{folder}: {error}") from error
        self._describe(Path(folder), config, dtype, device)
        self.mapping = get_model_conversion_mapping(self.model, None, self.quantizer)
        self.sources = self._target_names(weight_files(self.folder))
        self._check_files()

    def __reduce__(self):
        """A worker opens the folder itself."""
        return StreamedModel, (self.folder, self.dtype, self.device)

    @classmethod
    def described(cls, config, like: "StreamedModel") -> "StreamedModel":
        """A model that is planned and not yet written: it has shapes and no tensors to load."""
        made = cls.__new__(cls)
        made.quantizer = None
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
        self.layer_names = [f"{self.layers_path}.{i}" for i in range(len(self.layers))]
        self.stateful = False

    def _construct(self):
        if isinstance(self.config, MoesvdConfig):
            return model_class(self.config.moesvd["native_type"])._from_config(self.config, dtype=self.dtype)
        return class_for(self.config)._from_config(self.config, dtype=self.dtype)

    def source_bytes(self) -> int | None:
        """Bytes of the tensors on disk, where they are quantized otherwise than by us; None for plain ones."""
        if self.quantizer is None:
            return None
        total = 0
        for file in {file for *_, file in self.sources}:
            with safe_open(self.folder / file, "pt") as opened:
                slices = [opened.get_slice(key) for key in opened.keys()]  # noqa: SIM118
                total += sum(math.prod(s.get_shape()) * _BYTES[s.get_dtype()] for s in slices)
        return total

    def _target_names(self, files):
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        meta, prefix = self.model.state_dict(), self.model.base_model_prefix
        found = []
        for key in sorted(files, key=dot_natural_key):  # the order in which transformers renames: some rules need it
            target = rename_source_key(key, renamings, converters, prefix, meta)[0]
            if target not in meta and key in meta:
                target = rename_source_key(key, [], [], prefix, meta)[0]
            found.append((target, key, files[key]))
        return found

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
        state: dict = {}
        handles = [safe_open(self.folder / file, "pt") for file in wanted]
        for handle, keys in zip(handles, wanted.values()):
            state.update({key: handle.get_slice(key) for key in keys})
        how = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self.mapping),
            device_map={"": self.device},
            dtype=self.dtype,
            hf_quantizer=self.quantizer,
        )
        with no_loading_bars(), one_tensor_at_a_time():
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
            if tensor.dtype != self.dtypes[key]:  # a plain tensor among quantized ones comes as it is stored
                tensor.data = tensor.data.to(self.dtypes[key])
            if not is_finite(tensor):
                where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise ModelError(f"{self.folder}: {key} is not finite at {where}; the checkpoint is damaged")
        return_freed()

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
            self.read_ahead(self.layer_names[index + 1] + ".")
        return self.layers[index]

    def drop_layer(self, index: int) -> None:
        self.drop(self.layer_names[index])
        return_freed()

    def read_ahead(self, prefix: str) -> None:
        """Asks the system to read the tensors under the prefix into its cache, while this process computes."""
        wanted: dict[str, list[str]] = {}
        for target, key, file in self.sources:
            if target.startswith(prefix):
                wanted.setdefault(file, []).append(key)
        for file, keys in wanted.items():
            advise(self.folder / file, keys)

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

    def _load_around(self, without: str) -> None:
        """All that is not a decoder layer, but the module `without`."""
        self.load(*(prefix for prefix in self.outer_prefixes() if prefix != f"{without}."))

    @torch.no_grad()
    def walk(self, windows: torch.Tensor, batch_size: int = 8, scratch: Path | None = None) -> Iterator["LayerVisit"]:
        """Takes token windows (n, length) through the model breadth-first: all batches through one layer,
        then the next. Yields a visit per layer with its weights in memory; hidden states advance after it.

        scratch: folder of the disk that hidden states go to; in memory where it is None. After the walk, `hidden` are
        those the last layer gave, and neither embeddings nor output head are in memory.
        """
        embeddings, head = self._embeddings()
        self._load_around(head)
        self.batches = windows.to(self.device).split(batch_size)
        try:
            hidden, calls = record(self.model, self.layers, self.batches, Batches(scratch, self.device))
        except StatePassedOn:
            yield from self._walk_with_state(embeddings)
            return
        if idle := [name for name, called in zip(self.layer_names, calls) if not called]:
            raise ModelError(f"{self.folder}: a forward of the model does not call {idle[0]}; it cannot be calibrated")
        self.drop(embeddings)
        for index in range(len(self.layer_names)):
            layer = self.load_layer(index)
            visit = LayerVisit(index, layer, hidden, calls[index])
            yield visit
            hidden = visit.outputs()
            calls[index] = []
            self.drop_layer(index)
        self.hidden, self.like = hidden, visit.whole[0]

    def _walk_with_state(self, embeddings: str) -> Iterator["LayerVisit"]:
        """The same where layers hand each other more than hidden states; those stay in memory, with the forwards."""
        self.stateful = True
        for index, standing in forwards(self.model, self.layers, self.batches):
            if index == 0:  # every forward is past them
                self.drop(embeddings)
            layer = self.load_layer(index)
            calls = [forward.call or ((), {}) for forward in standing]
            hidden = Batches(None, self.device)
            for args, _ in calls:
                hidden.append(args[0])
            visit = LayerVisit(index, layer, hidden, [(args[1:], kwargs) for args, kwargs in calls], keep=True)
            yield visit
            self.hidden = visit.outputs()
            for forward, out in zip(standing, visit.whole):
                forward.answer(out)
            self.like = visit.whole[0]
            self.drop_layer(index)

    @contextmanager
    def output(self) -> Iterator[None]:
        """Within it, after a walk, `head` can be used: the output head is in memory."""
        embeddings, head = self._embeddings()
        self.load(f"{embeddings}." if self._tied(f"{head}.weight") else f"{head}.")
        self.model.tie_weights()
        if self._embeddings_follow():
            self.load(f"{embeddings}.")
        try:
            yield
        finally:
            self.drop(embeddings)
            self.drop(head)

    def _embeddings_follow(self) -> bool:
        """Whether what comes after the layers reads the input embeddings as well."""
        if not any(p.device.type == "meta" for p in self.model.get_input_embeddings().parameters()):
            return False
        found = []
        for value in (0.0, 1.0):
            with without_embeddings(self.model, value):
                found.append(finish(self.model, self.layers, self.hidden[0], self.batches[0], self.like))
        return not torch.equal(*found)

    def head(self, hidden: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Logits (n, length, vocabulary) of token ids `batch` whose last decoder layer gave `hidden`; after a walk."""
        with without_embeddings(self.model):
            return finish(self.model, self.layers, hidden, batch, self.like)

    def head_input(self, hidden: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """What the output head gets then."""
        with without_embeddings(self.model):
            return head_input(self.model, self.layers, hidden, batch, self.like)

    @torch.no_grad()
    def logits(self, windows: torch.Tensor, batch_size: int = 8, scratch: Path | None = None) -> Iterator[torch.Tensor]:
        """Logits (batch, length, vocabulary) of each batch, from a walk over all layers."""
        for _ in self.walk(windows, batch_size, scratch):
            pass
        with self.output():
            for hidden, batch in zip(self.hidden, self.batches):
                yield self.head(hidden, batch)


class LayerVisit:
    """A decoder layer with its weights, and the inputs that the walk has for it.

    calls: per batch, the arguments beside the hidden states; keep: whether all that the layer returns is kept.
    """

    def __init__(self, index: int, layer: nn.Module, hidden: Batches, calls: list, keep: bool = False):
        self.index, self.layer, self.hidden, self.calls, self.keep = index, layer, hidden, calls, keep
        self.whole: list = []  # what the layer returned, with state if it hands on any; of the first batch, or of all
        self._outputs: Batches | None = None

    def outputs(self) -> Batches:
        """Output hidden states of every batch; run once, so that hooks set before see each batch once."""
        if self._outputs is None:
            self._outputs = self.hidden.like()
            for out in self._run(self.hidden):
                if self.keep or not self.whole:
                    self.whole.append(out)
                self._outputs.append(_hidden(out))
        return self._outputs

    def run(self, hidden: Batches) -> Batches:
        """Output hidden states of the layer for these input ones, a tensor per batch of the walk."""
        made = hidden.like()
        for out in self._run(hidden):
            made.append(_hidden(out))
        return made

    def run_batch(self, layer: nn.Module, batch: int) -> torch.Tensor:
        """What a layer that stands in for this one puts out for one batch of the walk."""
        args, kwargs = self.calls[batch]
        return _hidden(layer(self.hidden[batch], *args, **kwargs))

    def _run(self, hidden: Batches) -> Iterator:
        return (self.layer(states, *args, **kwargs) for states, (args, kwargs) in zip(hidden, self.calls))


def _hidden(out):
    return out[0] if isinstance(out, tuple) else out
