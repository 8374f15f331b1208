"""What is claimed of single matrices: few distinct ranks in a group, factors that are rounded together."""

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Literal

import torch

from moesvd_quant.checkpoint.accounting import account
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.decompose.whitening import whitened_directions, whitened_error, whitened_svd
from moesvd_quant.evaluation.benchmarks.bars import Bar
from moesvd_quant.model.experts import dense_weight, expert_count, find_experts, shapes_of
from moesvd_quant.planning.allocation import allowed_storages
from moesvd_quant.planning.choices import choices_of
from moesvd_quant.planning.context import Context, expert_grams
from moesvd_quant.planning.knapsack import MAX_RANKS, RANK_STEP, allocate
from moesvd_quant.quantize.factors import quantize_factors
from moesvd_quant.run.run import Run
from moesvd_quant.stages.gptq import Gptq


def rank_bars(job: Run, budgets: Sequence[float]) -> list[Bar]:
    """Few distinct choices in a group keep nearly all that free ones gain over a single one, by forecast errors.

    budgets: bits per original expert weight.
    """
    parent, options = job.meta, {stage.name: stage for stage in job.recipe.stages}
    gptq = options["gptq"]
    context = Context(parent, job.statistics, options["svd"], job.recipe.seed, job.device, packing=gptq)
    tables = choices_of(context, allowed_storages(context), ranks=True).tables
    weights = account(parent, layout_of(parent)).original_expert_params
    bars = []
    for bits in budgets:
        one, few = (allocate(tables, bits * weights / 8, distinct=n).error for n in (1, MAX_RANKS))
        free = allocate(tables, bits * weights / 8, distinct=10**6).error
        bars.append(Bar(f"gain lost by {MAX_RANKS} distinct ranks, {bits} bits", (few - free) / (one - free), 0.1))
    return bars


def factor_bar(job: Run, ratio: float = 0.4, bits: Literal[2, 3, 4] = 3) -> Bar:
    """Error of quantized factors beyond truncation, as a geometric mean over matrices, relative to quantizing U Sigma
    and V as a singular value decomposition gives them."""
    quotients = []
    for index, found in enumerate(job.statistics.layers()):
        layer = job.meta.load_layer(index)
        for path, experts in find_experts(layer):
            grams = expert_grams(found, path, job.device)
            for name, (out, in_features) in shapes_of(experts).items():
                rank = round((1 - ratio) * out * in_features / (out + in_features) / RANK_STEP) * RANK_STEP
                for expert in range(expert_count(experts)):
                    weight = dense_weight(experts, name, expert)
                    quotients.append(excess_quotient(weight, grams[name][expert], rank, bits))
        job.meta.drop_layer(index)
    return Bar(f"{bits} bit factors, error beyond truncation, against U Sigma and V", geometric_mean(quotients), 0.6)


def excess_quotient(weight: torch.Tensor, gram: torch.Tensor, rank: int, bits: Literal[2, 3, 4]) -> float:
    """Of one matrix (out, in) and the Gram matrix (in, in) of its inputs."""
    stage = Gptq(bits=bits)
    codec, (storage,) = stage.codec(), stage.storages()
    forms = {"right": codec.form(storage, weight.shape[1], "right"), "left": codec.form(storage, rank, "left")}
    left, right = whitened_svd(weight, gram, rank)
    (mine,), (rights,) = quantize_factors([weight], [gram], [left], [right], [0], [0], forms, codec, 0)
    _, basis, plain = (found.double() for found in whitened_directions(weight, gram, rank))
    sigma = (plain @ gram.double() * plain).sum(1).sqrt()
    v = plain / sigma[:, None]
    naive = codec.pack(basis * sigma, codec.inputs(v @ gram.double() @ v.T, forms["left"]), forms["left"]).dense()
    naive = naive @ codec.pack(v, codec.inputs(gram, forms["right"]), forms["right"]).dense()
    truncated = whitened_error(weight, left @ right, gram)
    return (whitened_error(weight, mine.dense() @ rights.dense(), gram) - truncated) / (
        whitened_error(weight, naive, gram) - truncated
    )
