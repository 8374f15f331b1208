"""What was measured of one checkpoint, as a JSON record beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint.files import write_json
from .memory import disk_bytes, peak_bytes, resident_bytes
from .perplexity import PROTOCOL, perplexity

RECORD = "eval.json"


def evaluate(
    folder: str | Path,
    texts: dict[str, str],
    length: int | None = None,
    device: str = "cpu",
    name: str | None = None,
    peak: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict:
    """Perplexity on each text {name: source} and memory of a model folder.

    length: tokens per window; None is 2048, or what the model can take. Weights are computed with in float32
    on CPU and in their own dtype elsewhere.
    """
    from transformers import AutoTokenizer

    import moesvd_quant

    from ..calibration.text import joiner_of, load_documents, token_windows

    folder = Path(folder)
    model = moesvd_quant.load(folder)
    resident = resident_bytes(model)
    model = model.to(torch.float32) if str(device) == "cpu" else model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = length or min(2048, getattr(model.config, "max_position_embeddings", 2048))
    measured = {}
    for text, source in texts.items():
        windows = token_windows(load_documents(source, "test"), tokenizer, length, joiner_of(source))
        say = lambda done, total, text=text: progress(f"perplexity on {text}", done, total)  # noqa: E731
        measured[text] = perplexity(model, windows, progress=say).to_dict()
    memory = {
        "disk": disk_bytes(folder),
        "disk_bytes": disk_bytes(folder)["total"],
        "resident_bytes": resident,
    }
    if peak:
        memory |= peak_bytes(folder)
    about = _about(folder, model)
    return {
        "name": name or about["name"],
        "path": folder.name,
        "protocol": {"perplexity": PROTOCOL, "length": length, "dtype": str(model.dtype), "texts": texts},
        "perplexity": measured,
        "memory": memory,
        "accounting": about["accounting"],
    }


def _about(folder: Path, model) -> dict:
    manifest = folder / "moesvd.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text())
        if "accounting" in content:
            keys = ("bits_per_expert_weight", "expert_ratio", "model_ratio")
            return {"name": content["name"], "accounting": {k: content["accounting"][k] for k in keys}}
    bits = torch.finfo(model.config.dtype or torch.float32).bits
    return {
        "name": "original",
        "accounting": {"bits_per_expert_weight": float(bits), "expert_ratio": 0.0, "model_ratio": 0.0},
    }


def write(record: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def collect(folders: list[Path]) -> list[dict]:
    """Records of the folders: each has one, or its sub-folders do, in order of name. ValueError where none."""
    records = []
    for folder in map(Path, folders):
        found = [folder / RECORD] if (folder / RECORD).is_file() else sorted(folder.glob(f"*/{RECORD}"))
        if not found:
            raise ValueError(f"{folder}: no {RECORD} in it or in its sub-folders; run `moesvd eval {folder}` first")
        records += [json.loads(path.read_text()) for path in found]
    return list({json.dumps([r["name"], r["perplexity"]]): r for r in records}.values())
