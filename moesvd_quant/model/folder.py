"""What a folder with a model says before a weight is read: its config, class and weight files."""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from .modeling_moesvd import native_class


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
