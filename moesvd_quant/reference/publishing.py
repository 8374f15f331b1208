"""What a training leaves for others: bfloat16 weights, the tokenizer, and a card that says how well they do."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from .kinds import ROUTER_LOSS, Kind
from .texts import VALID_WINDOWS, collate
from .training import COOLDOWN, PEAK, SEED, WARMUP_STEPS, arguments, steps_of

SHARD = "16MB"
ARCHITECTURE = {
    Kind.mixtral: "Mixtral: 8 experts of {0.intermediate_size} hidden units, 2 for each token",
    Kind.fine: "Qwen2-MoE: 64 experts of {0.moe_intermediate_size} hidden units, 8 for each token, and a shared one of"
    " {0.shared_expert_intermediate_size}",
}


@dataclass(frozen=True)
class Story:
    """What only the one who trained knows. `sources` says where the text of each file comes from."""

    kind: Kind
    batch: int
    length: int
    sources: dict[str, str]
    command: str


def publish(
    checkpoint: Path, out: Path, tokenizer: PreTrainedTokenizerBase, valid: dict[str, Dataset], story: Story, device
) -> dict[str, float]:
    """Writes the model of a checkpoint to `out`, with its card; perplexity of each text in `valid`."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.config.output_router_logits, model.config.use_cache = False, True  # both were for training
    model.save_pretrained(out, max_shard_size=SHARD)
    tokenizer.model_max_length = story.length
    tokenizer.save_pretrained(out)
    measured = Trainer(model, arguments(checkpoint.parent, device, story.batch), collate)
    found = {
        name: math.exp(measured.evaluate(data, metric_key_prefix=name)[f"{name}_loss"]) for name, data in valid.items()
    }
    (out / "README.md").write_text(card(model, steps_of(checkpoint), story, found))
    return found


lines = "\n".join


def card(model, steps: int, story: Story, found: dict[str, float]) -> str:
    """README.md: what the model is made of, and how well it does."""
    config, tokens = model.config, steps * story.batch * story.length
    parameters = sum(p.numel() for p in model.parameters())
    return f"""---
license: apache-2.0
---
# Reference Mixture of Experts

{ARCHITECTURE[story.kind].format(config)}; {config.num_hidden_layers} layers,
{config.hidden_size} wide, vocabulary {config.vocab_size}, {parameters / 1e6:.1f} M parameters, bfloat16.
Its use is to make compression methods comparable, not to write prose.
The weights are under the project's licence, the texts keep theirs.

## Training

From random weights (seed {SEED}), {tokens / 1e6:.1f} M tokens: {steps} steps of {story.batch} x {story.length}.
AdamW, rate {PEAK} after {WARMUP_STEPS} steps, down to 0 by 1 - sqrt in the last {COOLDOWN:.0%} of the steps or fewer.
Router loss {ROUTER_LOSS}. The last sitting:

    {story.command}

## Sources and licences

{lines(f"- {name}: {origin}" for name, origin in story.sources.items())}

The weights are a product of these texts; no text is contained.

## Validation perplexity

Non-overlapping windows of {story.length} tokens, the first {VALID_WINDOWS} of each held-out file.

| source | perplexity |
|---|---|
{lines(f"| {name} | {value:.1f} |" for name, value in found.items())}
"""
