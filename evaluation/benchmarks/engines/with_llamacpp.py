"""llama.cpp through llama-cpp-python. SETTING: a type, q4_k_m or iq2_xs; with +16 the embedding stays in 16 bit, as all
other engines leave it."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from exchange import main, texts, write_sizes
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.numpy import load_file
from to_gguf import convert

KEEP = "+16"


def make(model: Path, windows: Path, setting: str, out: Path) -> None:
    out.mkdir(parents=True)
    whole, made = out / "whole.gguf.part", out / "model.gguf"
    convert(model, whole)
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.nthread = 1
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{setting.removesuffix(KEEP).upper()}")
    if setting.endswith(KEEP):
        wanted.output_tensor_type = wanted.token_embedding_type = int(GGMLQuantizationType.BF16)
    importance = load_file(windows.with_name("importance.safetensors"))
    entry = type(wanted.imatrix)._type_
    matrix = (entry * (len(importance) + 1))()  # a last one without a name ends it
    for slot, (name, values) in zip(matrix, importance.items()):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    wanted.imatrix = matrix
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(made).encode(), ctypes.byref(wanted)):
        raise SystemExit(f"llama.cpp does not quantize to {setting}")
    whole.unlink()
    tensors = GGUFReader(made).tensors
    write_sizes({common_name(tensor.name): int(tensor.n_bytes) for tensor in tensors}, out)
    (out / "types.txt").write_text("".join(f"{t.name} {t.tensor_type.name} {t.shape.tolist()}\n" for t in tensors))


def common_name(name: str) -> str:
    """A tensor's name in words that the sizes of other engines have."""
    return name.replace("_exps.", ".experts.").replace("token_embd", "embed_tokens").replace("attn_", "attention.")


def logits(windows: Path, out: Path):
    rows = texts(windows)
    llama_cpp.llama_backend_init()
    plain = llama_cpp.llama_model_default_params()
    plain.use_extra_bufts = False  # Intel's AMX, which virtual machines may name and not have
    loaded = llama_cpp.llama_model_load_from_file(str(out / "model.gguf").encode(), plain)
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = rows.shape[1]
    wanted.n_threads = wanted.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(loaded, wanted)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(rows.shape[1], 0, 1)
    for row in rows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(row)
        for at, token in enumerate(row):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = int(token), at, 1, 0
            batch.logits[at] = True
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not decode a window")
        found = llama_cpp.llama_get_logits(context)
        yield np.ctypeslib.as_array(found, (len(row), vocabulary)).copy()


if __name__ == "__main__":
    main(make, logits)
