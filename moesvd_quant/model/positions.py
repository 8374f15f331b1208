"""How many tokens a model takes at once, and how many it was made for."""

from typing import Any

USUAL = 2048  # tokens of a window, where none are asked for


def positions(config: Any) -> int:
    """Tokens that a model takes at once; USUAL where its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or USUAL


def usual_length(config: Any, tokenizer: Any) -> int:
    """Tokens of a window where none are asked for: USUAL, or what the model takes, or what its tokenizer says that it
    was made for (`model_max_length`), whichever is least. A model may have positions that it was never trained on."""
    return min(USUAL, positions(config), int(tokenizer.model_max_length))
