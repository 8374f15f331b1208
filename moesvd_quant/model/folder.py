"""What a folder with a model says of itself: config and class. Code that comes with it is never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from ..errors import ModelError
from ..memory.files import read_json
from ..runtime.modeling_moesvd import check_digests, native_class


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """What the files of a folder make impossible is a ModelError that names the folder."""
    try:
        yield
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{folder}: {error}") from error


def require_whole(folder: Path) -> None:
    """ModelError where a weight file of one of our checkpoints is missing or is not the one its manifest names."""
    with _reading(folder):
        check_digests(folder)


def read_config(folder: Path):
    """The transformers config of a model folder; ModelError where there is none."""
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a folder with a Hugging Face model")
    kind = read_json(Path(folder) / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
