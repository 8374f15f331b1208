"""Layouts as the recipes make them, for models without weights: what speed is measured on."""

from pathlib import Path

from accelerate import init_empty_weights
from torch import nn

from moesvd_quant.checkpoint.layout import dense_part, factor_part
from moesvd_quant.model.experts import expert_count, find_experts, shapes_of
from moesvd_quant.model.folder import class_for, read_config
from moesvd_quant.runtime.formats import Format
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.parts import Layout, LinearLayout, Part, Projections, joined
from moesvd_quant.runtime.trellis import Trellis

GROUP = 128
# What recipe `fit` chooses at 2.3 bits on mixtral-6m is of this kind, for each eight experts: the share of a full rank
# (None: whole) and the rate.
FIT = ((1 / 4, 2.0), (1 / 16, 1.5), (None, 3.0), (None, 3.0), (None, 3.0), (None, 3.0), (None, 3.0), (None, 2.5))


def layouts(folder: str | Path) -> dict[str, Layout]:
    """Those of the recipes gptq4, gptq2, trellis2 and fit at 2.3 bits, for the config in a folder; attention has 4
    bits, as there."""
    config = read_config(Path(folder))
    with init_empty_weights():
        model = class_for(config)._from_config(config)
    made = {}
    for name, form in (("gptq4", Grid(4, GROUP, False)), ("gptq2", Grid(2, GROUP, False)), ("trellis2", trellis(2.0))):
        made[name] = _layout(model, lambda count, shape, form=form: [_whole(list(range(count)), form)])
    made["fit2.3"] = _layout(model, _fitted)
    return made


def trellis(rate: float) -> Trellis:
    return Trellis(rate, rows=True, columns=True)


def _layout(model: nn.Module, parts_of) -> Layout:
    layout = Layout(model.config.model_type)
    for path, experts in find_experts(model):
        projections: Projections = {}
        for name, shape in joined(shapes_of(experts)).items():
            projections[name] = parts_of(expert_count(experts), shape)
        layout.experts[path] = projections
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".self_attn." in path:
            layout.linears[path] = LinearLayout(Grid(4, GROUP, False))
    return layout


def _whole(experts: list[int], form: Format) -> Part:
    part = dense_part(experts)
    part.formats["dense"] = form
    return part


def _fitted(count: int, shape: tuple[int, int]) -> list[Part]:
    """The choices of FIT in turn; experts with equal ones are one part, as everywhere."""
    parts = []
    for share, rate in dict.fromkeys(FIT):
        experts = [expert for expert in range(count) if FIT[expert % len(FIT)] == (share, rate)]
        if not experts:
            continue
        if share is None:
            parts.append(_whole(experts, trellis(rate)))
            continue
        part = factor_part(experts, int(share * min(shape)))
        part.formats["left"], part.formats["right"] = Trellis(rate, True, False), Trellis(rate, False, True)
        parts.append(part)
    return parts
