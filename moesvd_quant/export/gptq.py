"""Export in the GPTQ format, which vLLM and GPTQModel read.

vLLM wants the names of the architecture's files, as published checkpoints have them. GPTQModel 7 wants those of the
modules that it makes of transformers' own. Of most architectures the two are the same, of Mixtral they are not.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, ClassVar

import torch

from ..errors import ModelError
from ..runtime.grids import Grid
from .gptq_format import to_standard
from .packed_form import PackedForm
from .packed_weights import PackedWeight, require_one_form

# transformers reads GPTQ into linear layers alone. It would leave the experts, which it fuses, randomly initialised,
# and only warn. Its GPTQConfig raises on a `dataset` that is not one of three names, and shows the name. GPTQModel and
# vLLM do not read this field: it says what GPTQ was calibrated on, for those who quantize again.
REFUSAL = (
    "none: transformers cannot read experts in the GPTQ format, it would initialise them at random. Open this folder "
    "with GPTQModel or vLLM, or export it --to compressed-tensors"
)


class GptqForm(PackedForm):
    """qweight, qzeros, scales and g_idx for each matrix; the experts of a layer are on grids of one kind."""

    fused_names: ClassVar[bool] = True  # those that GPTQModel gives them

    def __init__(self, parent, native):
        super().__init__(parent, native)
        for _, layer in groupby(self.experts, key=lambda weight: weight.home):
            require_one_form(layer, "kernels take the experts of a layer in one form")

    def require(self, weight: PackedWeight) -> None:
        out, columns = weight.shape
        if not weight.form.sym:
            raise ModelError(f"{weight}: vLLM and GPTQModel take no zero points; quantize again with gptq.sym=true")
        if columns % 32 or out % 32 or columns % weight.form.group_size:
            raise ModelError(
                f"{weight}: the GPTQ format needs multiples of 32 and whole groups, the matrix is {out} x {columns}"
            )

    def encode(self, weight: PackedWeight) -> dict[str, torch.Tensor]:
        return to_standard(weight.matrix(), weight.bias)

    def quantization(self) -> dict[str, Any]:
        return describe(self.weights, self.name, self.left_as_they_are())


class GptqModelForm(GptqForm):
    """The same under the names that GPTQModel has."""

    def name(self, weight: PackedWeight) -> str:
        return weight.home if weight.expert is None else f"{weight.home}.{weight.expert}.{weight.projection}_proj"

    def other_tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state


def describe(
    weights: list[PackedWeight], name: Callable[[PackedWeight], str], unpacked: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ checkpoint. name: of a weight in the files; unpacked: paths of linears that
    stay as they are, in memory and in the files."""
    usual = Counter(weight.form for weight in weights).most_common(1)[0][0]
    head = "lm_head"
    return {
        **_numbers(usual),
        "desc_act": False,
        head: any(weight.home == head for weight in weights),
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": _exceptions(weights, usual, name)
        | {f"-:^{_any_of(path)}$": {} for path in unpacked if path != head},
        "dataset": REFUSAL,
    }


def _exceptions(weights: list[PackedWeight], usual: Grid, name: Callable[[PackedWeight], str]) -> dict[str, Any]:
    """What is not as usual, by patterns of paths, which are those of GPTQModel (in memory) and of vLLM (in files).

    vLLM asks for what it has merged (the experts of a layer, `qkv_proj`), so a pattern names the module around where
    all that is in it is alike.
    """
    found: dict[str, Any] = {}
    experts = {weight.home for weight in weights if weight.expert is not None}
    for around, group in groupby(weights, key=_around):
        inside = list(group)
        forms = {weight.form for weight in inside}
        if forms == {usual}:
            continue
        holds_others = not around or any(home.startswith(f"{around}.") for home in experts)
        if len(forms) == 1 and not holds_others:
            steps = 1 if inside[0].expert is None else 2  # after the module: a linear, or an expert and its projection
            found[f"+:^{_any_of(around, name(inside[0]).rsplit('.', steps)[0])}(\\.|$)"] = _numbers(inside[0].form)
        else:
            unusual = (weight for weight in inside if weight.form != usual)
            found |= {f"+:^{_any_of(weight.home, name(weight))}$": _numbers(weight.form) for weight in unusual}
    return found


def _around(weight: PackedWeight) -> str:
    return weight.home.rpartition(".")[0] if weight.expert is None else weight.home


def _any_of(*paths: str) -> str:
    different = [re.escape(path) for path in dict.fromkeys(paths)]
    return different[0] if len(different) == 1 else f"({'|'.join(different)})"


def _numbers(form: Grid) -> dict[str, Any]:
    return {"bits": form.bits, "group_size": form.group_size, "sym": form.sym}
