"""Runs of recipes that leave fewer experts, and what transformers' experts are called with."""

import torch
import torch.nn.functional as F

import moesvd_quant
from moesvd_quant.model.experts import find_experts
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))


def job(folder, out, small, stages, more=()):
    (out / "mine.yaml").write_text(f"stages: [{stages}]")
    return Run(load_recipe(out / "mine.yaml", [*small, "evaluate.perplexity=[]", *more]), folder, out / "out")


def logits(folder):
    with torch.no_grad():
        return moesvd_quant.load(folder)(IDS).logits


def seen_by_experts(model, windows):
    """{path: (tokens, router weights, norms, products), each (E,)}: the formulas with F.linear, from what the experts
    modules of transformers are called with."""
    found, hooks = {}, []

    def note(path):
        def hook(module, args):
            hidden, index, weights = args
            sums = found.setdefault(path, torch.zeros(4, module.num_experts, dtype=torch.float64))
            for row, chosen, share in zip(hidden, index, weights):
                for expert, weight in zip(chosen.tolist(), share.double()):
                    gate, up = F.linear(row, module.gate_up_proj[expert]).chunk(2)
                    out = F.linear(F.silu(gate) * up, module.down_proj[expert]).double()
                    size = out.square().sum().sqrt()
                    sums[:, expert] += torch.stack([torch.ones_like(size), weight, size, weight * size])

        return hook

    for path, experts in find_experts(model):
        hooks.append(experts.register_forward_pre_hook(note(path)))
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found
