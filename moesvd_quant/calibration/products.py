"""Sums of outer products over tokens, which most of a walk's arithmetic is."""

import torch


def add_product(total: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> None:
    """total (n, m) float32 += x^T z, for x (tokens, n) and z (tokens, m) float32.

    Where a CPU has units for it, x and z are rounded to bfloat16 first, as a model in that precision would have them;
    products and sums are exact to float32. A sum x^T x so made is the exact one of inputs that are a little different,
    and stays positive; what the rounding adds to an entry has a 400th, or less, of the standard deviation over samples
    of as many tokens.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        total.addmm_(x.T, z)
    finally:
        matmul.fp32_precision = before
