"""Quantizing factors: the gauge is free, the refit is worth it, users of shared banks count together."""

import pytest
import torch

from moesvd_quant.decompose.whitening import gram_root, refit_right, whitened_error, whitened_svd
from moesvd_quant.quantize import factors
from moesvd_quant.quantize.codec import Codec
from moesvd_quant.quantize.factors import connected, quantize_factors, rotation
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.stages.gptq import Gptq

FORMS = {bank: Grid(3, 32, False) for bank in ("left", "right")}


class Exact:
    """A packed matrix that lost nothing."""

    def __init__(self, matrix):
        self.matrix = matrix

    def dense(self, dtype=None):
        return self.matrix


class Lossless(Codec):
    """Loses nothing, and writes down the Gram matrices by the shape of what they are for."""

    def __init__(self):
        self.seen = {}

    def noise(self, form):
        return 0.031

    def inputs(self, gram, form):
        return gram

    def pack(self, weight, inputs, form):
        self.seen.setdefault(tuple(weight.shape), []).append(inputs)
        return Exact(weight)


def problem(seed=0, out=64, columns=96, rank=32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(1000, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    return weight, gram, *whitened_svd(weight, gram, rank)


GPTQ = Gptq(damp=0.01).codec()


def run(quantizer, weight, gram, left, right):
    lefts, rights = quantize_factors([weight], [gram], left[None], right[None], [0], [0], FORMS, quantizer, seed=0)
    return lefts[0].dense() @ rights[0].dense()


def test_without_loss_in_the_quantizer_the_product_is_the_best_of_its_rank():
    weight, gram, left, right = problem()
    got = run(Lossless(), weight, gram, left, right)
    assert torch.allclose(got, left @ right, atol=1e-8)


def test_rotation_is_orthogonal_and_drawn_by_seed():
    turn = rotation(32, 7)
    assert torch.allclose(turn @ turn.T, torch.eye(32, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turn, rotation(32, 7)) and not torch.equal(turn, rotation(32, 8))


def test_better_than_quantizing_the_factors_one_by_one():
    weight, gram, left, right = problem()
    ours = whitened_error(weight, run(GPTQ, weight, gram, left, right), gram)
    plain_right = GPTQ.pack(right, GPTQ.inputs(gram, FORMS["right"]), FORMS["right"]).dense()
    plain_left = GPTQ.pack(left, GPTQ.inputs(right @ gram @ right.T, FORMS["left"]), FORMS["left"]).dense()
    lost = whitened_error(weight, left @ right, gram)
    assert ours - lost < 0.65 * (whitened_error(weight, plain_left @ plain_right, gram) - lost)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [16, 48])
def test_fitted_in_turn_they_lose_less_than_one_after_the_other(bits, rank, monkeypatch):
    weight, gram, left, right = problem(rank=rank)
    forms = {bank: Grid(bits, 32, False) for bank in ("left", "right")}
    lost = whitened_error(weight, left @ right, gram)

    def excess(rounds):
        monkeypatch.setattr(factors, "ROUNDS", rounds)
        lefts, rights = quantize_factors([weight], [gram], left[None], right[None], [0], [0], forms, GPTQ, seed=0)
        return whitened_error(weight, lefts[0].dense() @ rights[0].dense(), gram) - lost

    once = excess(0)
    twice, often = excess(2), excess(6)
    assert often <= twice < 0.93 * once
    assert bits == 2 or often < 0.87 * once


def test_the_right_factor_beside_a_left_one_is_least_squares_for_any_inputs():
    weight, gram, left, right = problem()
    left = left + 0.1 * torch.randn(left.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    root = gram_root(gram)  # rows of W S as columns: L R S = W S, whatever S
    expected = torch.linalg.lstsq(left, weight @ root).solution @ torch.linalg.inv(root)
    assert torch.allclose(refit_right(weight, left, right, 0.0), expected, atol=1e-6)
    assert torch.allclose(refit_right(weight, left, right, 1e9), right, atol=1e-6)


def test_a_shared_right_factor_sees_the_inputs_of_all_its_experts():
    first, second = problem(0), problem(1)
    codec = Lossless()
    lefts, rights = quantize_factors(
        [first[0], second[0]], [first[1], second[1]], torch.stack([first[2], second[2]]), first[3][None],
        [0, 1], [0, 0], FORMS, codec, seed=0,
    )  # fmt: skip
    assert len(rights) == 1 and len(lefts) == 2
    assert torch.allclose(codec.seen[32, 96][0], first[1] + second[1])
    right = rights[0].dense()
    for left, (weight, gram, *_) in zip(lefts, (first, second)):  # each refitted under its own inputs
        assert ((weight - left.dense() @ right) @ gram @ right.T).abs().max() < 1e-6 * gram.abs().max()


def test_experts_that_share_no_row_are_fitted_apart():
    assert connected([0, 1, 2, 0], [0, 1, 1, 2]) == [[0, 3], [1, 2]]
    problems = [problem(seed) for seed in range(2)]
    weights, grams, left, right = (list(parts) for parts in zip(*problems))
    together = quantize_factors(weights, grams, left, right, [0, 1], [0, 1], FORMS, GPTQ, seed=0)
    for expert, alone in enumerate(problems):
        lefts, rights = quantize_factors(*([part] for part in alone), [0], [0], FORMS, GPTQ, seed=0)
        assert torch.equal(together[0][expert].dense(), lefts[0].dense())
        assert torch.equal(together[1][expert].dense(), rights[0].dense())
