"""What tests of faithfulness share: models of every architecture with the dtypes that checkpoints have, and the
comparison of a checkpoint with the tensors that its original had in memory."""

import copy
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.modeling_utils import PreTrainedModel

from architectures import tiny_architecture
from tiny import tiny_tokenizer


def kept_names(model: PreTrainedModel) -> list[str]:
    """What the class keeps in float32: by its attribute, or because it makes it so in a model of bfloat16."""
    patterns = {*(model._keep_in_fp32_modules_strict or ())}
    made = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16).state_dict()
    named = [name for name in made if any(re.search(p.replace("*", ".*"), name) for p in patterns)]
    return [*named, *(name for name, tensor in made.items() if tensor.dtype == torch.float32 and name not in named)]


def write_original(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """A model of the architecture in bfloat16, but for what its class keeps in float32: that gets values which bfloat16
    does not have. Returns its tensors as they were in memory."""
    model = tiny_architecture(name, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict(keep_vars=True)
    for key in kept_names(model):
        if state[key].is_floating_point():
            noise = torch.rand(state[key].shape, generator=generator) * 1e-3
            value = state[key].data.float()
            state[key].data = torch.where(value == -1, value, value + noise)  # zaya sets its -1 anew
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return before


def targets(checkpoint: Path) -> tuple[str, ...]:
    """Prefixes of what the plan of a checkpoint names."""
    layout = json.loads((checkpoint / "config.json").read_text())["moesvd"]
    return tuple(f"{path}." for path in [*layout["experts"], *layout["linears"]])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def same_outside(found: dict, before: dict, changed: tuple[str, ...], absent: set[str]) -> None:
    """All but what starts with `changed` has the dtype and bits that it had; only `absent` may be missing."""
    outside = {key for key in before if not key.startswith(changed)}
    assert outside - set(found) <= absent, sorted(outside - set(found) - absent)[:5]
    for key in outside & set(found):
        assert found[key].dtype == before[key].dtype, (key, found[key].dtype, before[key].dtype)
        assert torch.equal(found[key], before[key]), key
