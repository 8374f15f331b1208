"""Experts merged into one: which belong together, which of their channels correspond, and their average.

An expert is the same whatever the order of its intermediate channels: rows of gate and up, columns of down. Before two
are averaged, the channels of one are brought into the order of the other.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment

Weights = dict[str, torch.Tensor]  # of one expert: "gate" and "up" (I, H), "down" (H, I)


def channel_rows(weights: Weights) -> torch.Tensor:
    """(I, n) float32: all weights of each intermediate channel in a row."""
    return torch.cat([w.T if name == "down" else w for name, w in weights.items()], 1).float()


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """(n, n) cosines of vectors from their products; 0 beside a vector of zeros."""
    return _cosines(gram, gram.diagonal(), gram.diagonal())


def _cosines(cross: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(n, m) of the vectors of two sets, from products between them (n, m), and squares of both (n,), (m,)."""
    lengths = one.clamp(min=0).sqrt()[:, None] * other.clamp(min=0).sqrt()
    return torch.where(lengths > 0, cross / lengths, 0.0)


def unit_distances(cross: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(n, m) distances between vectors of length 1, from the products `cross` (n, m) of longer ones and the squares of
    these, `one` (n,) and `other` (m,). A vector of zeros stays zero."""
    cosine = _cosines(cross, one, other)
    return ((one > 0)[:, None].to(cosine) + (other > 0).to(cosine) - 2 * cosine).clamp(min=0).sqrt()


def assignment(cost: torch.Tensor) -> torch.Tensor:
    """(I,) int64: the channel to put into each place, one each, that costs the least together; cost (I, I)[place,
    channel]."""
    return torch.from_numpy(linear_sum_assignment(cost.double().cpu().numpy())[1])


def match_weights(first: Weights, other: Weights) -> torch.Tensor:
    """(I,) int64: the order of the other expert's channels in which its weights are nearest to those of the first.

    sum |W - P W'|^2 is least where the product of both is largest (Li et al., MC-SMoE, 2024).
    """
    return assignment(-(channel_rows(first) @ channel_rows(other).T))


def average(members: Sequence[Weights], orders: torch.Tensor, shares: torch.Tensor) -> Weights:
    """sum_i shares[i] P_i W_i, float32; orders (n, I): the channels of each member in the order of the first, shares
    (n,), which add up to 1."""
    total: Weights = {}
    for weights, order, share in zip(members, orders.long(), shares.tolist()):
        for name, weight in weights.items():
            order = order.to(weight.device)
            moved = share * (weight[:, order] if name == "down" else weight[order]).float()
            total[name] = total[name] + moved if name in total else moved
    return total


def join_most_alike(likeness: torch.Tensor, leaders: Sequence[int]) -> torch.Tensor:
    """(E,) int64: the leader of each expert, that which is most like it (E, E); leaders lead themselves (MC-SMoE)."""
    chosen = torch.tensor(leaders)
    found = chosen[likeness[:, chosen].argmax(1)]
    found[chosen] = chosen
    return found


def join_few(likeness: torch.Tensor, saliency: torch.Tensor, leaders: Sequence[int], size: int) -> torch.Tensor:
    """(E,) int64: the leader of each expert. The most salient leader takes those most like it, until its group has
    `size` experts, then the next one: most leaders stay as they are (REAM's pseudo-pruning).

    likeness (E, E), saliency (E,). ValueError where all groups together cannot hold all experts.
    """
    count = len(saliency)
    if len(leaders) * size < count:
        raise ValueError(f"{len(leaders)} groups of at most {size} experts cannot hold {count}")
    found = torch.full((count,), -1)
    found[list(leaders)] = torch.tensor(leaders)
    for leader in sorted(leaders, key=lambda expert: -float(saliency[expert])):
        free = [expert for expert in (-likeness[leader]).argsort(stable=True).tolist() if found[expert] < 0]
        found[free[: size - 1]] = leader
    return found


def shares_of(leader: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """(E,) float64: each expert's part of its group's average, by what it is worth (E,); equal parts where a group is
    worth nothing."""
    total = torch.zeros(len(leader), dtype=torch.float64).index_add(0, leader, worth.double())
    size = torch.bincount(leader, minlength=len(leader)).double()
    return torch.where(total[leader] > 0, worth.double() / total[leader].clamp(min=1e-300), 1 / size[leader])


def groups_of(leader: torch.Tensor) -> list[list[int]]:
    """The experts of each group, its leader first, in the order of the leaders."""
    found = leader.tolist()
    return [[at, *(e for e, first in enumerate(found) if first == at and e != at)] for at in sorted(set(found))]


def ream_likeness(logits: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """(E, E) float64 between 0 and 1: half of it from how alike the router's logits are over the tokens, half from the
    experts' mean outputs.

    logits (E, E): sums of their products; outputs (E, H): mean of softmax times output, over all tokens.
    """
    logits, outputs = logits.double(), outputs.double()
    apart = unit_distances(logits, logits.diagonal(), logits.diagonal())
    routed = 1 - apart / apart.max().clamp(min=torch.finfo(torch.float64).tiny)
    return (routed + (cosines(outputs @ outputs.T) + 1) / 2) / 2


def ream_order(
    weights: tuple[Weights, Weights], products: torch.Tensor, squares: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """(I,) int64: the order of the second expert's channels that is nearest to the first's, in their weights and in
    their activations on the same tokens.

    products (I, I): sums over tokens of activations of the first times those of the second; squares: of each (I,).
    """
    first, second = (channel_rows(one) for one in weights)
    apart = unit_distances(first @ second.T, first.square().sum(1), second.square().sum(1))
    return assignment(apart + unit_distances(products, *squares))
