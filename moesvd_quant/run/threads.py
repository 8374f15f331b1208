"""How many threads a task has."""

import os

import torch


def sync_threads() -> None:
    """Threads per task are part of the result's last bits; two by default, $MOESVD_THREADS otherwise."""
    torch.set_num_threads(int(os.environ.get("MOESVD_THREADS", "2")))
