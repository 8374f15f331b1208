"""LoSparse's formulas against the way its public code computes them."""

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.losparse import kept_rows, kept_share, rank_for, split


def test_the_factors_are_the_best_of_their_rank_and_the_rest_is_the_rest():
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    left, right, rest = split(weight, 8)
    assert torch.allclose(left @ right + rest, weight.double(), atol=1e-12)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert np.linalg.norm(rest.numpy()) == pytest.approx(np.sqrt((values[8:] ** 2).sum()))
    roots = np.sqrt(values[:8])  # of the singular values, on both sides
    assert np.allclose(np.linalg.norm(left.numpy(), axis=0), roots)
    assert np.allclose(np.linalg.norm(right.numpy(), axis=1), roots)


def test_the_rank_is_the_papers_to_a_step():
    assert rank_for((4096, 14336), 0.05) == 160  # 159.3
    assert rank_for((4096, 14336), 0.05) - 8 < 0.05 * 4096 * 14336 / (4096 + 14336)
    assert rank_for((16, 16), 0.99) == 8 and rank_for((16, 16), 1.9) == 16


def test_the_schedule_is_that_of_the_public_code():
    total, warm, first, last, final = 100, 4, 2, 5, 0.15  # its steps, warmup_steps, initial_ and final_warmup
    for step in range(1, total + 1):
        if step <= first * warm:
            wanted = 1.0
        elif step > total - last * warm:
            wanted = final
        else:
            wanted = final + (1 - final) * (1 - (step - first * warm) / (total - (first + last) * warm)) ** 3
        assert kept_share(step, first * warm, total - last * warm, final) == pytest.approx(wanted)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
def test_rows_compete_over_all_banks_as_the_weights_of_the_public_code_do(share):
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 10, 7), (3, 6, 5)]
    importance = [torch.rand(shape[:-1], generator=generator) for shape in shapes]
    kept = kept_rows(importance, [7, 5], share)
    spread = [scores[..., None].expand(shape) for scores, shape in zip(importance, shapes)]
    every = torch.cat([one.flatten() for one in spread])
    edge = every.kthvalue(int(len(every) * (1 - share))).values
    total = sum(int(rows.sum()) * columns for rows, columns in zip(kept, (7, 5)))
    assert share * len(every) - 7 < total <= share * len(every)
    for rows, one in zip(kept, spread):
        theirs = (one >= edge)[..., 0]  # the row at the edge stays with them, though it may be one too many
        assert (theirs | ~rows).all() and (theirs ^ rows).sum() <= 1
