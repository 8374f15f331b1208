"""Trellis codes under GPTQ's feedback: a column of the turned matrix at a time, as one or several rings."""

from typing import NamedTuple

import numpy as np
import torch

from ..runtime.trellis import Trellis
from ..runtime.trellis_code import VALUES
from ..runtime.turning import block_of, turn, turn_rows
from .codec import Codec, PackedMatrix, QuantizeError
from .feedback import HessianFactor
from .viterbi import Encoder

TOGETHER = 4  # neighbouring inputs that stay together in the order of quantization: they may share a ring


class Code(NamedTuple):
    """What a rate does, measured on unit Gaussians, and on whole matrices of correlated inputs."""

    spread: float  # root mean square of the code, at its best
    error: float  # mean squared error
    forecast: float  # the same under feedback, which at low rates adds to what is coded


CODES = {
    1: Code(0.83, 0.2760, 0.337),
    1.5: Code(0.91, 0.1430, 0.156),
    2: Code(0.95, 0.0735, 0.0757),
    2.5: Code(0.98, 0.0380, 0.0380),
    3: Code(0.99, 0.0197, 0.0197),
    3.5: Code(1.0, 0.0102, 0.0102),
    4: Code(1.0, 0.0054, 0.0054),
}
FACTORS = 1.2  # of factors, whose columns are short, beyond what whole matrices lose
UNIT = 1 / float(np.std(VALUES.astype(np.float64)))


class TrellisCodec(Codec):
    """Trellis codes as the option `damp` says. Both sides of a whole matrix are turned; of a factor the side that is no
    rank, since the rank's is turned already (`quantize.factors.rotation`)."""

    def __init__(self, options):
        super().__init__(options)
        self._encoders: dict[float, Encoder] = {}

    def form(self, rate, columns, bank="dense", pruned=False) -> Trellis:
        return Trellis(float(rate), rows=bank != "right", columns=bank != "left")

    def noise(self, form) -> float:
        whole = form.rows and form.columns
        return CODES[form.rate].forecast * (1.0 if whole else FACTORS)

    def inputs(self, gram: torch.Tensor, form) -> HessianFactor:
        if form.columns:
            gram = _turned(_turned(gram).T)
        return HessianFactor.of(gram, self.options.damp, TOGETHER)

    @torch.no_grad()
    def pack(self, weight, inputs, form) -> PackedMatrix:
        rows, columns = weight.shape
        turned = _turned(weight) if form.columns else weight.float()
        turned = _turned(turned.T) if form.rows else turned.T  # (columns, rows)
        spread = turned.square().mean(dtype=torch.float64).sqrt()
        if not torch.isfinite(spread):
            raise QuantizeError("the matrix has values that are not finite")
        code = CODES[form.rate]
        # A matrix of zeros has any scale.
        scale = (spread * inflation(inputs, code.error) * code.spread * UNIT).float().clamp(min=1e-30)
        codes = self._encoder(form.rate).encode(turned / scale, inputs)
        tensors = {"codes": codes.to(weight.device), "scale": scale.reshape(1).view(torch.int32)}
        return PackedMatrix(tensors, form, (rows, columns))

    def _encoder(self, rate: float) -> Encoder:
        if rate not in self._encoders:
            self._encoders[rate] = Encoder(rate, torch.get_num_threads())
        return self._encoders[rate]


def _turned(x: torch.Tensor) -> torch.Tensor:
    """`turn` of x (rows, n), in float32."""
    if x.is_cuda:
        return turn(x.float())
    made = torch.empty(x.shape).copy_(x)
    turn_rows(made)
    made *= block_of(x.shape[-1]) ** -0.5
    return made


def inflation(inputs: HessianFactor, error: float) -> float:
    """By how much feedback widens what is to be coded: root of the mean of 1 + error sum_i upper_ij^2."""
    taken = inputs.upper.double().square().sum(0) - 1
    return float((1 + error * taken).mean().sqrt())
