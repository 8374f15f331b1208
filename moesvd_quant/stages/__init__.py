"""The stages that a recipe can chain: a class and a line here each."""

from .d2 import D2
from .gptq import Gptq
from .lora import Lora
from .stage import Stage
from .svd import Svd

STAGES: dict[str, type[Stage]] = {}


def register(stage: type[Stage]) -> type[Stage]:
    """Makes a stage known to recipes by its name; may stand before a class as a decorator."""
    STAGES[stage.name] = stage
    return stage


register(Svd)
register(D2)
register(Lora)
register(Gptq)
