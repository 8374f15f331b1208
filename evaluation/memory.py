"""Bytes of a model: on disk, resident after load, at the peak of loading and generating."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from ..errors import MoesvdError
from ..model.headers import read_headers, weight_files
from ..model.hf_internals import tied_weights
from ..model.stream import StreamedModel

KINDS = ("experts", "router", "attention", "embeddings", "norms", "other")


def kind_of(name: str) -> str:
    """What a tensor belongs to, by its name."""
    parts = name.split(".")
    if "experts" in parts:
        return "experts"
    if any(part in ("gate", "router", "shared_expert_gate") for part in parts):
        return "router"
    if any("attn" in part or "attention" in part for part in parts) and "norm" not in parts[-2]:
        return "attention"
    if any(part in ("lm_head", "embed_tokens", "wte", "embeddings") for part in parts):
        return "embeddings"
    return "norms" if any("norm" in part for part in parts) else "other"


def disk_bytes(folder: str | Path) -> dict[str, int]:
    """Bytes of a model's files: {"total" with headers, and each of KINDS without}."""
    sizes = dict.fromkeys(KINDS, 0)
    for name, tensor in read_headers(Path(folder)).items():
        sizes[kind_of(name)] += tensor.bytes
    return {"total": sum(path.stat().st_size for path in weight_files(Path(folder)))} | sizes


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once; on the meta device, what is tied to no other."""
    tied = tied_weights(model)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [tensor for name, tensor in named if name not in tied or tensor.device.type != "meta"]
    stored = {t.untyped_storage().data_ptr() or id(t): t.untyped_storage().nbytes() for t in tensors}  # meta: by object
    return sum(stored.values())


def loaded_bytes(folder: str | Path) -> int:
    """The same of a folder's model as `load` opens it, without opening it."""
    return resident_bytes(StreamedModel(folder, "auto").model)


def fits(folder: str | Path, device: str = "cpu") -> bool:
    """Whether the model is likely to fit in what is free now, with a fifth to spare; float32 on a CPU."""
    import psutil

    if torch.device(device).type == "cuda":
        return disk_bytes(folder)["total"] < 0.8 * torch.cuda.mem_get_info(device)[0]
    tensors = read_headers(Path(folder)).values()
    needed = sum(t.numel * (4 if t.dtype.is_floating_point else t.dtype.itemsize) for t in tensors)
    return needed < 0.8 * psutil.virtual_memory().available


def peak_bytes(folder: str | Path) -> dict[str, int]:
    """{"resident_bytes", "peak_rss_bytes", "import_rss_bytes"} of a fresh process that loads the folder and
    generates 32 tokens. MoesvdError with its message where it fails."""
    command = [sys.executable, "-m", "moesvd_quant.evaluation.memory", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MoesvdError(f"{folder}: measuring memory failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(folder: str) -> None:
    import resource

    import moesvd_quant

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    import transformers.generation  # noqa: F401 (its import is not the model's memory)

    before = peak()
    model = moesvd_quant.load(folder)
    prompt = torch.ones(1, 8, dtype=torch.long)
    model.generate(prompt, attention_mask=prompt, max_new_tokens=32, do_sample=False)
    figures = {"resident_bytes": resident_bytes(model), "peak_rss_bytes": peak(), "import_rss_bytes": before}
    print(json.dumps(figures))


if __name__ == "__main__":
    _measure(sys.argv[1])
