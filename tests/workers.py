"""Work for the workers of tests/test_parallel.py, in a module that they can import."""

import os
from pathlib import Path

import torch


def square(item: int) -> tuple[int, int]:
    return item**2, torch.get_num_threads()


def die_once(folder: Path, item: int) -> int:
    """Takes its process down at the first try of item 2, as the system's memory killer would."""
    marker = folder / "died"
    if item == 2 and not marker.exists():
        marker.touch()
        os._exit(9)
    return item


def die(item: int) -> None:
    os._exit(9)


def fail(item: int) -> None:
    raise ValueError(f"layer {item}: cannot be")
