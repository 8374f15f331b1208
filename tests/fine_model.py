"""Makes a model of many narrow experts, and a shared one, out of the reference's eight wide ones, and trains it on.

python tests/fine_model.py --data FOLDER --out FOLDER [--tokens N] [--split 4]

Each expert's neurons are dealt out to `split` experts, which their routers then tell apart as they train (sparse
upcycling of fine-grained experts, as Qwen1.5-MoE was made). FOLDER is that of moesvd_quant.reference.train.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moesvd_quant.reference import path as reference
from moesvd_quant.reference.train import LENGTH, perplexities, text_files, train, training_batches, windows

SHARED, NOISE = 64, 0.05


def fine(coarse: MixtralForCausalLM, split: int, generator: torch.Generator) -> Qwen2MoeForCausalLM:
    """The same function, but for noise in the routers and a shared expert that is still small."""
    old = coarse.config
    made = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=old.vocab_size, hidden_size=old.hidden_size, num_hidden_layers=old.num_hidden_layers,
            num_attention_heads=old.num_attention_heads, num_key_value_heads=old.num_key_value_heads, qkv_bias=False,
            moe_intermediate_size=old.intermediate_size // split, shared_expert_intermediate_size=SHARED,
            num_experts=split * old.num_local_experts, num_experts_per_tok=split * old.num_experts_per_tok,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.01,
            max_position_embeddings=old.max_position_embeddings, tie_word_embeddings=True,
            rms_norm_eps=old.rms_norm_eps, bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id,
        )
    )  # fmt: skip
    state = {name: tensor for name, tensor in coarse.state_dict().items() if ".mlp." not in name}
    assert not made.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        for source, target in zip(coarse.model.layers, made.model.layers):
            bank, target_bank = source.mlp.experts, target.mlp.experts
            for expert in range(old.num_local_experts):
                dealt = torch.randperm(old.intermediate_size, generator=generator).chunk(split)
                for at, neurons in enumerate(dealt, split * expert):
                    gate, up = (half[neurons] for half in bank.gate_up_proj[expert].chunk(2))
                    target_bank.gate_up_proj[at] = torch.cat([gate, up])
                    target_bank.down_proj[at] = split * bank.down_proj[expert][:, neurons]
            router = source.mlp.gate.weight.repeat_interleave(split, 0)
            drawn = torch.randn(router.shape, generator=generator)
            target.mlp.gate.weight.copy_(router + NOISE * router.std() * drawn)
            target.mlp.shared_expert.down_proj.weight.mul_(0.1)
    return made


def main(
    data: Annotated[Path, typer.Option(help="Folder of training and *.valid.* files.")],
    out: Annotated[Path, typer.Option()],
    tokens: Annotated[int, typer.Option()] = 4_000_000,
    split: Annotated[int, typer.Option(help="Experts that each one is dealt out to.")] = 4,
    lr: Annotated[float, typer.Option()] = 1e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(reference())
    model = fine(MixtralForCausalLM.from_pretrained(reference(), dtype=torch.float32), split, generator)
    train_files, valid_files = text_files(data)
    valid = {path.name.split(".")[0]: windows(path, tokenizer, 100) for path in valid_files}
    print("before", perplexities(model, valid), flush=True)
    train(model, training_batches(train_files, tokenizer, tokens // LENGTH, generator), lr)
    print("after", perplexities(model, valid), flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
