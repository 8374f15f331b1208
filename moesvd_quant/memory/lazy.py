"""Sequences whose items are made when they are asked for: all experts in a loop, one in memory."""

from collections.abc import Callable, Sequence

import torch


class LazySequence(Sequence):
    """`count` tensors; the one at `index` is make(index), made anew each time."""

    def __init__(self, count: int, make: Callable[[int], torch.Tensor]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


def select(items: Sequence[torch.Tensor], places: list[int]) -> LazySequence:
    """The items at these places."""
    return LazySequence(len(places), lambda index: items[places[index]])
