"""What a folder with a model says of itself: config and class. Code that comes with it is never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
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
        below = sorted(Path(folder).glob("*/config.json"))
        hint = f"; did you mean {below[-1].parent}?" if below else "; give a folder with a Hugging Face model"
        raise ModelError(f"{folder}: no config.json{hint}")
    kind = read_json(Path(folder) / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
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


# What configs call the number of routed experts of a layer, and of those that a token goes to.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")


def require_routing(folder: Path, config) -> None:
    """ModelError where a config sends each token to more experts than there are, or to groups that do not come out."""
    text = config.get_text_config(decoder=True)
    named = {name: getattr(text, name, None) for name in (*EXPERT_COUNTS, *TOP_K, "n_group", "topk_group")}
    found = {name: value for name, value in named.items() if isinstance(value, int) and value > 0}
    experts = next(((name, found[name]) for name in EXPERT_COUNTS if name in found), None)
    if experts is None:
        return
    for name in TOP_K:
        if found.get(name, 0) > experts[1]:
            raise ModelError(f"{folder}: config.json says {name} {found[name]} and {experts[0]} {experts[1]}")
    groups, chosen = found.get("n_group", 1), found.get("topk_group", 1)
    if experts[1] % groups or chosen > groups:
        raise ModelError(
            f"{folder}: config.json says n_group {groups}, topk_group {chosen} and {experts[0]} {experts[1]}: groups "
            "of experts have one size, and a token cannot go to more of them than there are"
        )
