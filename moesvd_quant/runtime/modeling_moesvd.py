"""Factorized and packed experts as a transformers model. A copy lies in every checkpoint, with the files of SHIPPED.

They need torch and transformers alone, so that a checkpoint opens without moesvd_quant.
"""

import hashlib
import inspect
import json
import shutil
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .factorized_experts import FactorizedExperts
from .formats import Float, Format
from .grids import Grid
from .modeling_deepseek import DeepseekForCausalLM as DeepseekForCausalLM  # its model type is registered by that
from .more_formats import MORE as MORE  # formats are registered by their import
from .native_experts import SharedExpert
from .parts import Layout, layout_from
from .routers import regroup, router_of, why_not
from .sparse import Sparse, SparseRows
from .stored import StoredLinear
from .trellis import Trellis

# What a checkpoint needs to open itself.
SHIPPED = (
    "modeling_moesvd.py", "factorized_experts.py", "expert_products.py", "chains.py", "pruned_base.py", "parts.py",
    "stored.py", "formats.py", "native_experts.py", "native_call.py", "routers.py", "modeling_deepseek.py",
    "more_formats.py", "packing.py", "numba_here.py", "spans.py", "lanes.py", "team.py", "grids.py",
    "grid_kernels.py", "grid_lanes.py", "grid_numba.py", "grid_triton.py", "trellis.py", "trellis_code.py",
    "trellis_kernels.py", "trellis_lanes.py", "trellis_numba.py", "trellis_read.py", "trellis_triton.py",
    "trellis_parts.py", "turning.py", "hadamard_lanes.py", "hadamard_numba.py", "sparse.py",
)  # fmt: skip
MANIFEST = "moesvd.json"
OWN = (Float, Grid, Sparse, SparseRows, Trellis)  # formats that the shipped files have


def apply_layout(model: nn.Module, layout: Layout) -> None:
    """Replaces the modules that the layout names; their tensors are empty."""
    for path, projections in layout.experts.items():
        native = model.get_submodule(path)
        native.is_expert = SharedExpert.fits(native)
        replace_experts(model, path, FactorizedExperts(native, projections, layout.sources.get(path)))
    for path, linear in layout.linears.items():
        model.set_submodule(path, StoredLinear.empty_like(model.get_submodule(path), linear))


def replace_experts(model: nn.Module, path: str, made: FactorizedExperts) -> None:
    """Puts an experts module in its place, and gives the router beside it a row for each of its experts. ValueError
    where that router cannot serve them."""
    if made.sources is not None:
        router = router_of(model.get_submodule(path.rpartition(".")[0]), made.original_experts)
        if why := why_not(router, made.sources):
            raise ValueError(f"{path}: its experts cannot be regrouped: {why}")
        assert router is not None
        regroup(router, made.sources)
    model.set_submodule(path, made)


class MoesvdConfig(PreTrainedConfig):
    """The native config plus `moesvd` (the layout). Instances are of a subclass of the native class as well."""

    model_type = "moesvd"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        native = config_class(layout_from(config_dict.get("moesvd")).native_type)
        return super(MoesvdConfig, native).from_dict(config_dict | {"model_type": "moesvd"}, **kwargs)


@lru_cache
def config_class(native_type: str) -> Any:
    body = {"model_type": "moesvd", "__module__": __name__}
    made = type("MoesvdConfig", (MoesvdConfig, CONFIG_MAPPING[native_type]), body)
    AutoModelForCausalLM.register(made, MoesvdForCausalLM, exist_ok=True)
    return made


def native_class(config_type: Any) -> Any:
    """The class that predicts text: of a composite (vision-language) config the whole model. KeyError for none."""
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if "text_config" in config_type.sub_configs:
        mappings.reverse()
    return next((m[config_type] for m in mappings if config_type in m), None) or mappings[0][config_type]


@lru_cache
def model_class(native_type: str) -> Any:
    """A subclass of the architecture's causal model whose modules follow `config.moesvd`."""
    native = native_class(CONFIG_MAPPING[native_type])

    def __init__(self, config, *args, **kwargs):
        native.__init__(self, config, *args, **kwargs)
        apply_layout(self, layout_from(config.moesvd))

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.config.architectures = ["MoesvdForCausalLM"]
        native.save_pretrained(self, save_directory, *args, **kwargs)
        finish_folder(Path(save_directory))

    body = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "config_class": config_class(native_type),
        "__module__": __name__,
    }
    return type("Moesvd" + native.__name__, (native,), body)


class MoesvdForCausalLM:
    """Entry point for AutoModelForCausalLM: builds the model class of the checkpoint's architecture."""

    config_class = MoesvdConfig

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, output_loading_info=False, **kwargs):
        check_digests(Path(folder))
        config = config or AutoConfig.from_pretrained(folder, **kwargs)
        made = model_class(config.moesvd["native_type"])
        model, info = made.from_pretrained(folder, *args, config=config, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if found := info.get(kind):
                raise ValueError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        return model_class(config.moesvd["native_type"])._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        """transformers asks this of remote code; saving is taken care of by `save_pretrained`."""


def file_digest(path: Path) -> str:
    """sha256 of a file; read once in a process, unless it changes."""
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _digest(path: Path, size: int, changed: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_mapping(file: Path) -> dict:
    """A mapping from a JSON file; ValueError where the file is damaged."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); copy the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no mapping but {type(content).__name__}; copy the checkpoint again")
    return content


def check_digests(folder: Path) -> None:
    """Raises ValueError where a weight file of the folder is not the one its manifest names."""
    if not (folder / MANIFEST).is_file():
        return
    digests = read_mapping(folder / MANIFEST).get("digests")
    if not isinstance(digests, dict):
        raise ValueError(f"{folder / MANIFEST}: has no digests of weight files; copy the checkpoint again")
    for name, digest in digests.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{path}: missing; the checkpoint is incomplete, copy it again")
        if file_digest(path) != digest:
            raise ValueError(f"{path}: damaged (sha256 differs from {MANIFEST}); copy the checkpoint again")


# What the class of a format from outside may use.
HEADER = '''"""Formats that this checkpoint uses and that moesvd_quant does not have."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from .formats import Format, register
from .packing import pack, unpack
'''


def write_more_formats(folder: Path, layout: Layout) -> None:
    """The source of those formats of the layout that no shipped file has, so that the checkpoint opens itself."""
    forms: list[Format] = [linear.form for linear in layout.linears.values()]
    forms += [form for part in layout.parts() for form in part.formats.values()]
    kinds = {type(form).name: type(form) for form in forms if type(form) not in OWN}
    if kinds:
        sources = [inspect.getsource(kinds[name]) for name in sorted(kinds)]
        listed = "".join(f"{kind.__name__}, " for kind in kinds.values())
        (folder / "more_formats.py").write_text("\n\n".join([HEADER, *sources, f"MORE = ({listed})\n"]))


def finish_folder(folder: Path) -> None:
    """Adds what makes a saved folder open again: these files, `auto_map`, and the digests of its weights."""
    for name in SHIPPED:
        source, target = Path(__file__).resolve().parent / name, folder.resolve() / name
        if source != target:
            shutil.copyfile(source, target)
    config = read_mapping(folder / "config.json")
    write_more_formats(folder, layout_from(config["moesvd"]))
    config["auto_map"] = {
        "AutoConfig": "modeling_moesvd.MoesvdConfig",
        "AutoModelForCausalLM": "modeling_moesvd.MoesvdForCausalLM",
    }
    config["architectures"] = ["MoesvdForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    digests = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    manifest = folder / MANIFEST
    content = read_mapping(manifest) if manifest.is_file() else {}
    manifest.write_text(json.dumps(content | {"digests": digests}, indent=1, sort_keys=True) + "\n")


AutoConfig.register("moesvd", MoesvdConfig, exist_ok=True)
