"""A model of rows of 256, which llama.cpp's K and IQ types ask for, from the embedded one of rows of 192.

python evaluation/benchmarks/engines/widen.py MODEL OUT, then `python -m moesvd_quant.reference.train --start OUT ...`:
what is new is random, so that training has to make use of it.
"""

import sys

import torch
from transformers import AutoConfig, AutoTokenizer, MixtralForCausalLM

HIDDEN = 256
NEW = 0.5  # spread of new entries of a matrix, relative to that of the old ones


def widened(old: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`old` in the first places of a tensor of `shape`. The others are its mean in a vector (a norm), else random."""
    new = torch.full(shape, float(old.mean())) if old.ndim == 1 else torch.randn(shape) * NEW * old.std()
    new[tuple(map(slice, old.shape))] = old
    return new


def main(folder: str, out: str) -> None:
    torch.manual_seed(0)
    old = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder)
    head = config.hidden_size // config.num_attention_heads
    config.hidden_size, config.num_attention_heads, config.head_dim = HIDDEN, HIDDEN // head, head
    made, weights = MixtralForCausalLM(config), old.state_dict()
    made.load_state_dict({name: widened(weights[name], tensor.shape) for name, tensor in made.state_dict().items()})
    made.tie_weights()
    made.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
