"""Merging experts: the formulas of MC-SMoE and REAM, computed another way."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from moesvd_quant.decompose.merging import (
    average,
    channel_rows,
    cosines,
    groups_of,
    join_few,
    join_most_alike,
    match_weights,
    ream_likeness,
    ream_order,
    shares_of,
    unit_distances,
)

DRAW = torch.Generator().manual_seed(3)


def expert(inner=5, hidden=4):
    return {
        "gate": torch.randn(inner, hidden, generator=DRAW),
        "up": torch.randn(inner, hidden, generator=DRAW),
        "down": torch.randn(hidden, inner, generator=DRAW),
    }


def moved(weights, order):
    return {name: w[:, order] if name == "down" else w[order] for name, w in weights.items()}


def output(weights, x):
    return (F.silu(x @ weights["gate"].T) * (x @ weights["up"].T)) @ weights["down"].T


def test_the_order_of_channels_changes_nothing_and_is_found_again():
    one, order, x = expert(), torch.randperm(5, generator=DRAW), torch.randn(7, 4, generator=DRAW)
    other = moved(one, order)
    assert torch.allclose(output(one, x), output(other, x), atol=1e-5)
    found = match_weights(one, other)
    assert order[found].tolist() == list(range(5))
    both = average([one, other], torch.stack([torch.arange(5), found]), torch.tensor([0.3, 0.7]))
    assert all(torch.allclose(both[name], one[name], atol=1e-6) for name in one)


def test_weights_are_matched_as_near_as_any_order_can_be():
    one, other = expert(), expert()
    far = lambda order: sum(float((one[n] - w).square().sum()) for n, w in moved(other, order).items())  # noqa: E731
    best = min(permutations(range(5)), key=lambda order: far(list(order)))
    assert match_weights(one, other).tolist() == list(best)


def test_ream_matches_by_weights_and_activations_together():
    one, other = expert(), expert()
    acts = torch.randn(2, 30, 5, generator=DRAW)
    unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)  # noqa: E731
    apart = torch.cdist(unit(channel_rows(one)), unit(channel_rows(other))) + torch.cdist(
        unit(acts[0].T), unit(acts[1].T)
    )
    best = min(permutations(range(5)), key=lambda order: sum(float(apart[i, j]) for i, j in enumerate(order)))
    products = acts[0].T @ acts[1], (acts[0].square().sum(0), acts[1].square().sum(0))
    assert ream_order((one, other), *products).tolist() == list(best)


def test_distances_of_unit_vectors_and_of_zeros():
    x, y = torch.randn(3, 6, generator=DRAW), torch.randn(4, 6, generator=DRAW)
    x[1] = 0
    found = unit_distances(x @ y.T, x.square().sum(1), y.square().sum(1))
    assert torch.allclose(found, torch.cdist(F.normalize(x), F.normalize(y)), atol=1e-3)
    assert torch.allclose(found[1], torch.ones(4))


def test_likeness_is_of_router_logits_and_gated_outputs():
    logits, outputs = torch.randn(50, 4, generator=DRAW), torch.randn(4, 6, generator=DRAW)
    columns = F.normalize(logits.T)
    apart = torch.cdist(columns, columns)
    expected = (F.cosine_similarity(outputs[:, None], outputs, dim=-1) + 1) / 4 + (1 - apart / apart.max()) / 2
    found = ream_likeness(logits.T @ logits, outputs).float()
    off = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(found[off], expected[off], atol=1e-3)


def test_each_expert_joins_the_leader_most_like_it():
    logits = torch.randn(40, 6, generator=DRAW)
    leader = join_most_alike(cosines(logits.T @ logits), [4, 1])
    for one in range(6):
        if one not in (1, 4):
            near = max((1, 4), key=lambda at: float(F.cosine_similarity(logits[:, one], logits[:, at], dim=0)))
            assert leader[one] == near
    assert leader[1] == 1 and leader[4] == 4


def test_the_most_salient_leader_takes_the_rest_until_its_group_is_full():
    likeness = torch.rand(6, 6, generator=DRAW)
    saliency = torch.tensor([1.0, 9, 2, 8, 3, 7])
    leader = join_few(likeness, saliency, [1, 3, 5], 3)
    near = sorted((0, 2, 4), key=lambda e: -float(likeness[1, e]))
    assert (leader[near[:2]] == 1).all() and leader[near[2]] == 3
    assert groups_of(leader) == [[1, *sorted(near[:2])], [3, near[2]], [5]]
    assert set(join_few(likeness, saliency, [1, 3, 5], 16).tolist()) == {1, 3, 5}
    with pytest.raises(ValueError, match="2 groups of at most 2 experts cannot hold 6"):
        join_few(likeness, saliency, [1, 3], 2)


def test_shares_add_up_to_one_in_each_group():
    leader = torch.tensor([1, 1, 3, 3])
    assert shares_of(leader, torch.tensor([1.0, 3, 0, 0])).tolist() == [0.25, 0.75, 0.5, 0.5]
