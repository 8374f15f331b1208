"""What was measured of one checkpoint, as a JSON record beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..memory.files import read_json, write_json
from .flops import flops_per_token
from .memory import disk_bytes, fits, peak_bytes, resident_bytes
from .perplexity import PROTOCOLS, Logits, document_perplexity, in_memory, perplexity
from .zero_shot import task_names

RECORD, SPEED = "eval.json", "speed.json"
Report = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class EvalSpec:
    """What to measure of a model folder."""

    texts: dict[str, str] = field(default_factory=dict)  # {name: source} for perplexity
    protocols: tuple[str, ...] = ("gptq",)  # of PROTOCOLS
    length: int | None = None  # tokens per window; None is 2048, or what the model can take
    batch_size: int | None = None
    stream: bool | None = None  # one layer in memory at a time; None: where the model does not fit
    tasks: tuple[str, ...] = ()  # of lm-eval, `zero-shot` for the paper's seven
    task_data: str | None = None  # folder of local files; None: lm-eval loads from the hub
    limit: int | None = None  # documents per task
    peak: bool = False  # memory at the peak of loading and generating, in a fresh process


def evaluate(
    folder: str | Path,
    wanted: EvalSpec,
    device: str = "cpu",
    name: str | None = None,
    progress: Report = lambda what, done, total: None,
) -> dict:
    """Record of a model folder. Weights are computed with in float32 on CPU and in their own dtype elsewhere.

    ValueError for an unknown protocol, and for tasks on a model that has to stream.
    """
    from ..calibration.store import fingerprint

    if unknown := sorted(set(wanted.protocols) - set(PROTOCOLS)):
        raise UsageError(f"protocol {', '.join(unknown)}: is none of {', '.join(PROTOCOLS)}")
    folder = Path(folder)
    opened = _open(folder, wanted, device, progress)
    memory = {"disk": disk_bytes(folder), "disk_bytes": disk_bytes(folder)["total"], "resident_bytes": opened.resident}
    if wanted.peak:
        memory |= peak_bytes(folder)
    about = _about(folder, opened)
    record = {
        "name": name or about["name"],
        "path": folder.name,
        "fingerprint": fingerprint(folder),
        "protocol": {
            "perplexity": {key: PROTOCOLS[key] for key in wanted.protocols},
            "length": _length(wanted, opened.config),
            "dtype": str(opened.dtype),
            "texts": wanted.texts,
        },
        "perplexity": {text: _perplexity(opened, wanted, text, progress) for text in wanted.texts},
        "memory": memory,
        "accounting": about["accounting"],
        "flops": flops_per_token(opened.described, _length(wanted, opened.config))
        | {"context": _length(wanted, opened.config)},
    }
    if wanted.tasks:
        record["zero_shot"] = _zero_shot(opened, wanted)
    return record


@dataclass(frozen=True)
class _Opened:
    config: Any
    tokenizer: Any
    logits: Logits
    model: torch.nn.Module | None  # None where it streams
    described: torch.nn.Module  # the modules, on the meta device where it streams
    dtype: torch.dtype
    resident: int  # bytes that its tensors take when loaded


def _open(folder: Path, wanted: EvalSpec, device: str, progress: Report) -> _Opened:
    import moesvd_quant

    from ..model.folder import load_tokenizer, read_config
    from ..model.stream import precision_on

    config = read_config(folder)
    dtype = precision_on(device)
    if wanted.stream if wanted.stream is not None else not fits(folder, device):
        if wanted.tasks:
            raise UsageError(f"{folder}: tasks need the whole model in memory; perplexity alone can stream")
        made = streamed(folder, dtype, device, progress)
        resident = resident_bytes(streamed(folder, None, device).model)
        return _Opened(config, load_tokenizer(folder), made.logits, None, made.model, made.dtype, resident)
    model = moesvd_quant.load(folder)
    resident = resident_bytes(model)
    model = model.to(device, dtype)
    return _Opened(config, load_tokenizer(folder), in_memory(model), model, model, model.dtype, resident)


def streamed(folder: Path, dtype: torch.dtype | None, device: str, progress: Report | None = None):
    """A StreamedModel that reports each layer it reads."""
    from ..model.stream import StreamedModel

    class Reporting(StreamedModel):
        def load_layer(self, index: int):
            if progress:
                progress("layers", index, len(self.layer_names))
            return super().load_layer(index)

    return Reporting(folder, dtype, device)


def _length(wanted: EvalSpec, config) -> int:
    return wanted.length or min(2048, getattr(config, "max_position_embeddings", 2048))


def _perplexity(opened: _Opened, wanted: EvalSpec, text: str, progress: Report) -> dict:
    from ..calibration.text import joiner_of, load_documents, token_windows

    source = wanted.texts[text]
    measured: dict = {}
    say = lambda done, total: progress(f"perplexity on {text}", done, total)  # noqa: E731
    documents, length = load_documents(source, "test"), _length(wanted, opened.config)
    if "gptq" in wanted.protocols:
        windows = token_windows(documents, opened.tokenizer, length, joiner_of(source))
        measured |= perplexity(opened.logits, windows, wanted.batch_size, say).to_dict()
    if "lm-eval" in wanted.protocols:
        whole = wanted.length or getattr(opened.config, "max_position_embeddings", 2048)
        measured["lm_eval"] = document_perplexity(
            opened.logits, documents, opened.tokenizer, whole, wanted.batch_size, say
        )
    return measured


def _zero_shot(opened: _Opened, wanted: EvalSpec) -> dict:
    from .zero_shot import zero_shot

    more = {"batch_size": wanted.batch_size} if wanted.batch_size else {}
    return zero_shot(opened.model, opened.tokenizer, list(wanted.tasks), wanted.task_data, wanted.limit, **more)


def _about(folder: Path, opened: _Opened) -> dict:
    manifest = folder / "moesvd.json"
    if manifest.is_file():
        content = read_json(manifest)
        if "accounting" in content:
            keys = ("bits_per_expert_weight", "expert_ratio", "model_ratio", "params")
            return {"name": content["name"], "accounting": {k: content["accounting"][k] for k in keys}}
    bits = torch.finfo(opened.config.dtype or torch.float32).bits
    params = sum(parameter.numel() for parameter in opened.described.parameters())
    account = {"bits_per_expert_weight": float(bits), "expert_ratio": 0.0, "model_ratio": 0.0, "params": params}
    return {"name": "original", "accounting": account}


def dtype_on(folder: Path, device: str) -> str:
    """The dtype that a model folder is evaluated in on a device, as records have it."""
    from ..model.folder import read_config
    from ..model.stream import precision_on

    return str(precision_on(device) or read_config(folder).dtype or torch.float32)


def is_record_of(record: dict, model: str, dtype: str, wanted: EvalSpec) -> bool:
    """Whether a record has all that is wanted of the model with this fingerprint, measured in the same way."""
    protocol, tasks = record["protocol"], record.get("zero_shot", {})
    return (
        record["fingerprint"] == model
        and protocol["dtype"] == dtype
        and all(protocol["texts"].get(name) == source for name, source in wanted.texts.items())
        and set(wanted.protocols) <= set(protocol["perplexity"])
        and wanted.length in (None, protocol["length"])
        and (not wanted.tasks or tasks.get("protocol", {}).get("limit") == wanted.limit)
        and set(task_names(wanted.tasks)) <= set(tasks.get("tasks", {}))
        and (not wanted.peak or "peak_rss_bytes" in record["memory"])
    )


def write(record: dict, file: Path) -> None:
    """Writes a record; what an earlier one says of the same weights by the same protocol stays in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        record = _joined(read_json(file), record)
    write_json(file, record)


def _joined(before: dict, record: dict) -> dict:
    if before.get("fingerprint") != record["fingerprint"]:
        return record
    alike = all(before["protocol"][key] == record["protocol"][key] for key in ("length", "dtype"))
    joined = before | record | {"memory": before["memory"] | record["memory"]}
    if not record["perplexity"]:
        return joined | {key: before[key] for key in ("protocol", "perplexity")}
    if alike:
        texts = before["protocol"]["texts"] | record["protocol"]["texts"]
        named = before["protocol"]["perplexity"] | record["protocol"]["perplexity"]
        joined["protocol"] = record["protocol"] | {"texts": texts, "perplexity": named}
        kept = {text: before["perplexity"].get(text, {}) | new for text, new in record["perplexity"].items()}
        joined["perplexity"] = before["perplexity"] | kept
    return joined


def collect(folders: list[Path]) -> list[dict]:
    """Records of the folders: each has one, or its sub-folders do, in order of name. ValueError where none."""
    records = []
    for folder in map(Path, folders):
        found = [folder / RECORD] if (folder / RECORD).is_file() else sorted(folder.glob(f"*/{RECORD}"))
        if not found:
            raise UsageError(f"{folder}: no {RECORD} in it or in its sub-folders; run `moesvd eval {folder}` first")
        records += [_with_speed(path) for path in found]
    return list({json.dumps([r["name"], r["perplexity"]]): r for r in records}.values())


def _with_speed(path: Path) -> dict:
    """A record, with what `moesvd speed` measured beside it."""
    speed = path.with_name(SPEED)
    return read_json(path) | ({"speed": read_json(speed)} if speed.is_file() else {})
