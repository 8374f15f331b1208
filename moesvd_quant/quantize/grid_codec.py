"""Grids of groups, by GPTQ or by plain rounding."""

import torch

from ..runtime.grids import Grid
from .codec import Codec, PackedMatrix
from .feedback import HessianFactor
from .gptq import gptq
from .noise import ROUNDING
from .rounding import resolve_group_size, round_to_nearest


class GridCodec(Codec):
    """Grids as the options `group_size`, `sym`, `damp` and `rtn` say."""

    def form(self, rate, columns, bank="dense", pruned=False) -> Grid:
        size = resolve_group_size(self.options.group_size, columns, bank == "left" or pruned)
        return Grid(int(rate), size, self.options.sym)

    def noise(self, form) -> float:
        return ROUNDING[form.bits]

    def inputs(self, gram: torch.Tensor, form) -> HessianFactor | None:
        return None if self.options.rtn else HessianFactor.of(gram, self.options.damp)

    def pack(self, weight, inputs, form) -> PackedMatrix:
        return round_to_nearest(weight, form) if inputs is None else gptq(weight, inputs, form)
