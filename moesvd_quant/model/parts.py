"""What a layout says of an experts module. A copy lies in every checkpoint.

The layout (`config.moesvd`) says for each experts module and projection which tensors make up its weights:

    W[e] = dense[d(e)] + sum_t left_t[l_t(e)] @ right_t[r_t(e)]

A projection is a list of parts; a part holds one bank of dense rows, or a bank of left and one of right
factors of a single rank, for the experts it names. Experts that no part names have weight zero. Gate and up may be one
projection, `gate_up`, whose rows are those of gate and then those of up: they then share their right factors. A bank is
floating point, or packed (`packing.dequantize`).

A dense part may be pruned along the intermediate dimension: it then has `rows` of gate and up, or `columns` of down,
only for the `channels` of its module. Where up and down also say `dynamic`, each token uses just that many of them.
"""

from torch import nn

from .native_experts import form_of

JOINT = "gate_up"  # gate and up as one projection


def part_banks(part: dict, out_features: int, in_features: int) -> dict:
    """Banks of a part: {"dense" | "left" | "right": shape}."""
    if "dense" in part:
        return {"dense": (max(part["dense"]) + 1, part.get("rows", out_features), part.get("columns", in_features))}
    return {
        "left": (max(part["left"]) + 1, out_features, part["rank"]),
        "right": (max(part["right"]) + 1, part["rank"], in_features),
    }


def channel_tensors(layout: dict) -> dict:
    """int32 tensors of a module with pruned dense parts, {name: length}: the channels they keep, and, as the bits of
    fp32, what a token's choice among these starts from and how it weighs their activations."""
    pruned = [part for parts in layout.values() for part in parts if "rows" in part or "columns" in part]
    if not pruned:
        return {}
    names = ["channels"]
    if any("dynamic" in part for part in pruned):
        names += ["channel_prior", "channel_weight"]
    return dict.fromkeys(names, pruned[0].get("rows") or pruned[0]["columns"])


def projection_shapes(experts: nn.Module) -> dict:
    """(out, in) of each projection of a native experts module: {"gate", "up", "down"} or without gate."""
    form = form_of(experts)
    if form is None:
        raise ValueError(
            f"{type(experts).__name__} is no fused experts module; a library that unfuses experts (gptqmodel does) "
            "was at work in this process: open the checkpoint in a fresh one"
        )
    return {name: tuple(weight.shape[1:]) for name, weight in form.weights(experts).items()}


def joined(shapes: dict) -> dict:
    """(out, in) of each projection where gate and up, if there are both, are one."""
    if "gate" not in shapes:
        return shapes
    (gate, inputs), (up, _) = shapes["gate"], shapes["up"]
    return {JOINT: (gate + up, inputs), "down": shapes["down"]}


def separate(pairs: dict) -> dict:
    """Outputs (n, out) of gate and of up, from those of each projection before down."""
    return dict(zip(("gate", "up"), pairs[JOINT].chunk(2, -1))) if JOINT in pairs else pairs
