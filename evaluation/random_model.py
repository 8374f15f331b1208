"""Models to be timed or counted: with their own weights, or random ones in the shapes of a config."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from ..model.experts import expert_count, find_experts
from ..runtime.parts import Layout
from ..runtime.stored import Stored


def open_model(folder: str | Path, device: str = "cpu", layout: Layout | None = None, dtype: torch.dtype | None = None):
    """A model in 16 bit (or its own dtype) to be timed. A folder with a config and no weights gives random ones at full
    shape; so does `layout`, a layout of ours for the config."""
    import moesvd_quant

    folder = Path(folder)
    if layout is None and any(folder.glob("*.safetensors")):
        return moesvd_quant.load(folder, device=device)
    return _filled(describe_model(folder, layout, dtype), device).eval()


def describe_model(folder: Path, layout: Layout | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a folder with a config, or of a layout of ours for that, on the meta device."""
    from ..model.folder import class_for, read_config
    from ..runtime.modeling_moesvd import config_class, model_class

    config = read_config(folder)
    dtype = dtype or config.dtype or torch.bfloat16
    if layout is not None:
        config = config_class(layout.native_type).from_dict(config.to_dict() | {"moesvd": layout.to_dict()})
    with init_empty_weights(include_buffers=False):
        described = getattr(config, "moesvd", None)
        kind = model_class(described["native_type"]) if described else class_for(config)
        return kind._from_config(config, dtype=dtype)


def _filled(model: nn.Module, device: str) -> nn.Module:
    """The model with random parameters of a usual size in the place of its meta ones."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        formats = module.stored_tensors() if isinstance(module, Stored) else {}
        for name, old in module._parameters.items():
            if old is None:
                continue
            tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
            if tensor.dim() == 1 and "norm" in type(module).__name__.lower():
                tensor.fill_(1)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=generator)
            elif name in formats:
                form, kind = formats[name]
                form.random(kind, tensor, generator)
            else:  # channels of a base
                tensor.zero_()
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    return model.to(device)


def uniform_layout(folder: str | Path, ratio: float) -> Layout:
    """Layout in which every expert matrix, gate and up as one, has factors of one rank share, `ratio` of the parameters
    gone."""
    from ..checkpoint.layout import factor_part
    from ..decompose.ranks import level_ranks
    from ..model.experts import shapes_of
    from ..model.folder import class_for, read_config
    from ..runtime.parts import joined

    config = read_config(Path(folder))
    with init_empty_weights():
        model = class_for(config)._from_config(config)
    layout, items = Layout(config.model_type), []
    for path, experts in find_experts(model):
        items += [(path, name, shape, expert_count(experts)) for name, shape in joined(shapes_of(experts)).items()]
    budget = int((1 - ratio) * sum(out * inner * count for *_, (out, inner), count in items))
    ranks = level_ranks([count * sum(shape) for *_, shape, count in items], [min(i[2]) for i in items], budget)
    for (path, name, _, count), rank in zip(items, ranks):
        layout.experts.setdefault(path, {})[name] = [factor_part(list(range(count)), rank)]
    return layout
