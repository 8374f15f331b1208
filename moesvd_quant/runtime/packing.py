"""Small integers in few bits. A copy lies in every checkpoint."""

import torch
import torch.nn.functional as F


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values (..., n) below 2**bits -> uint8 (..., ceil(n/8)*bits): eight values fill `bits` bytes."""
    values = F.pad(values, (0, -values.shape[-1] % 8))
    if bits == 8:
        return values
    values = values.unflatten(-1, (-1, 8))
    word = sum(values[..., i].int() << i * bits for i in range(8)).unsqueeze(-1)
    shift = torch.arange(bits, device=values.device, dtype=torch.int32) * 8
    return (word >> shift & 255).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 (..., n)."""
    if bits == 8:
        return packed[..., :n]
    if bits in (2, 4):  # values do not cross bytes
        shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        return (packed.unsqueeze(-1) >> shift & (1 << bits) - 1).flatten(-2)[..., :n]
    parts = packed.unflatten(-1, (-1, bits)).int()
    word = sum(parts[..., i] << 8 * i for i in range(bits))
    shift = torch.arange(8, device=packed.device, dtype=torch.int32) * bits
    return (word.unsqueeze(-1) >> shift & (1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :n]
