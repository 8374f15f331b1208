"""numba, where it is installed. A copy lies in every checkpoint."""

from importlib.util import find_spec

import torch

HERE = find_spec("numba") is not None


def use_torchs_threads() -> None:
    """What numba compiled runs on as many threads as torch."""
    try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
        from numba import config, set_num_threads
    except ImportError:
        raise
    set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
