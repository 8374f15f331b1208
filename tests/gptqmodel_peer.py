"""GPTQModel's own high-level result, run as a process of its own: it unfuses the model classes it touches.

python gptqmodel_peer.py MODEL WINDOWS.pt TEST.pt BITS GROUP_SIZE OUT -> prints the perplexity of TEST in float32
"""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from moesvd_quant.evaluation.perplexity import in_memory, perplexity


def dense(model):
    """Packed linears as float32 ones, so that both sides are computed with alike."""
    for name, module in list(model.named_modules()):
        if not hasattr(module, "dequantize_weight"):
            continue
        weight = module.dequantize_weight().float()
        if weight.shape[0] == module.in_features:
            weight = weight.T
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight.data = weight.contiguous()
        if module.bias is not None:
            linear.bias.data = module.bias.float()
        model.set_submodule(name, linear)
    return model.float().eval()


def main(folder, windows, test, bits, group_size, out):
    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), sym=False, desc_act=True, damp_percent=0.01)
    model = GPTQModel.load(folder, config)
    rows = torch.load(windows)
    model.quantize(
        [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows], batch_size=8
    )
    model.save(out)
    loaded = GPTQModel.load(out, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
    packed = sum(hasattr(m, "dequantize_weight") for m in loaded.model.modules())
    print("RESULT", packed, perplexity(in_memory(dense(loaded.model)), torch.load(test)).ppl)


if __name__ == "__main__":
    main(*sys.argv[1:])
