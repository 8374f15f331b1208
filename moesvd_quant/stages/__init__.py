"""The stages that a recipe can chain: a class and a line here each."""

from ..recipe.stage import register
from .d2 import D2
from .drop import Drop
from .gptq import Gptq
from .lora import Lora
from .losparse import LoSparse
from .merge import Merge
from .prune import Prune
from .slim import Slim
from .sparsify import Sparsify
from .svd import Svd

register(Drop)
register(Prune)
register(Merge)
register(Slim)
register(Sparsify)
register(LoSparse)
register(Svd)
register(D2)
register(Lora)
register(Gptq)
