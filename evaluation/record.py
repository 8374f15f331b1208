"""What was measured of one checkpoint, as a JSON record beside it."""

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..memory.files import read_json, write_json
from ..recipe.tasks import task_names
from .flops import flops_per_token
from .inputs import EvalSpec, data_digest, protocol_of, read_text, require_possible, window_length
from .memory import disk_bytes, loaded_bytes, peak_bytes
from .opening import Measured, Report, open_model
from .perplexity import too_long
from .text_figures import is_compared, original_of, text_figures

RECORD, SPEED = "eval.json", "speed.json"


def evaluate(
    folder: str | Path,
    wanted: EvalSpec,
    device: str = "cpu",
    name: str | None = None,
    progress: Report = lambda what, done, total: None,
) -> dict:
    """Record of a model folder. Weights are computed with in float32 on CPU and in their own dtype elsewhere.

    Texts are read before the model is. Where an original is given, each text has a `difference` from it beside its
    perplexity (`difference.Difference`, and the original's fingerprint), but for the original itself. UsageError for
    an unknown protocol, for an original with another tokenizer, and for tasks on a model that has to stream; TextError
    for a text that cannot be measured on.
    """
    from ..calibration.store import fingerprint
    from ..checkpoint.finish import origin_of
    from ..model.opened import open_folder
    from ..model.tokenizer import load_tokenizer

    require_possible(wanted)
    folder = Path(folder)
    config, tokenizer = open_folder(folder).config, load_tokenizer(folder)
    texts = {name: read_text(source, wanted, tokenizer, config) for name, source in wanted.texts.items()}
    original = original_of(folder, wanted)
    opened = open_model(folder, wanted, device, progress)
    memory = {
        "disk": disk_bytes(folder),
        "disk_bytes": disk_bytes(folder)["total"],
        "resident_bytes": loaded_bytes(folder),
    }
    if wanted.peak:
        memory |= peak_bytes(folder)
    about = _about(folder, opened)
    length = window_length(wanted, config, tokenizer)
    record = {
        "name": name or about["name"],
        "base_model": origin_of(folder)["base_model"],
        "path": folder.name,
        "folder": str(folder.resolve()),
        "fingerprint": fingerprint(folder),
        "protocol": protocol_of(folder, wanted, device),
        "perplexity": text_figures(opened.logits, texts, wanted, original, tokenizer, device, progress),
        "memory": memory,
        "accounting": about["accounting"],
        "flops": flops_per_token(opened.described, length) | {"context": length},
    }
    if wanted.tasks:
        record["zero_shot"] = _zero_shot(opened.model, tokenizer, wanted, progress)
    return record


def _zero_shot(model, tokenizer, wanted: EvalSpec, progress: Report) -> dict:
    from .zero_shot import zero_shot

    more: dict[str, Any] = {"progress": progress} | ({"batch_size": wanted.batch_size} if wanted.batch_size else {})
    found = zero_shot(model, tokenizer, list(wanted.tasks), wanted.task_data, wanted.limit, wanted.run_code, **more)
    return found | {"data": data_digest(wanted.task_data)}


def _about(folder: Path, opened: Measured) -> dict:
    manifest = folder / "moesvd.json"
    if manifest.is_file():
        content = read_json(manifest)
        if "accounting" in content:
            keys = ("bits_per_expert_weight", "expert_ratio", "model_ratio", "params")
            return {"name": content["name"], "accounting": {k: content["accounting"][k] for k in keys}}
    bits = torch.finfo(opened.stored_dtype).bits
    params = sum(parameter.numel() for parameter in opened.described.parameters())
    account = {"bits_per_expert_weight": float(bits), "expert_ratio": 0.0, "model_ratio": 0.0, "params": params}
    return {"name": "original", "accounting": account}


def doubts(records: list[dict]) -> list[str]:
    """What to doubt in the figures of original models: windows that are longer than those they were trained on."""
    return [
        f"{record['name']} on {text}: the end of windows of {figures['length']} tokens is harder to predict than their "
        f"beginning ({figures['quarters'][-1]:.2f} against {figures['quarters'][0]:.2f} nats per token); the model was "
        f"probably trained on shorter ones. Give a length (evaluate.length, --length), {figures['length'] // 4} perhaps"
        for record in records
        if record["name"] == "original"
        for text, figures in record["perplexity"].items()
        if "quarters" in figures and too_long(figures["quarters"], figures["tokens"])
    ]


ALIKE = ("length", "dtype", "tokenizer", "computed")  # of two protocols, beside the texts


def answers(record: dict, source: str | None, protocol: dict, wanted: EvalSpec) -> bool:
    """Whether a record has all that is wanted, measured on the weights with fingerprint `source` by this protocol."""
    from ..calibration.store import fingerprint

    had, zero_shot = record["protocol"], record.get("zero_shot", {})
    asked = wanted.original if wanted.original and fingerprint(wanted.original) != source else None
    return (
        record["fingerprint"] == source
        and all(had.get(key) == protocol[key] for key in ALIKE)
        and all(had["texts"].get(name) == protocol["texts"][name] for name in wanted.texts)
        and set(wanted.protocols) <= set(had["perplexity"])
        and (not wanted.tasks or zero_shot.get("protocol", {}).get("limit") == wanted.limit)
        and (not wanted.tasks or zero_shot.get("data") == data_digest(wanted.task_data))
        and set(task_names(wanted.tasks)) <= set(zero_shot.get("tasks", {}))
        and (not wanted.peak or "peak_rss_bytes" in record["memory"])
        and (asked is None or all(is_compared(record["perplexity"].get(name, {}), asked) for name in wanted.texts))
    )


def write(record: dict, file: Path) -> None:
    """Writes a record; what an earlier one says of the same weights by the same protocol stays in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        record = _joined(read_json(file), record)
    write_json(file, record)


def _joined(before: dict, record: dict) -> dict:
    was, now = before.get("protocol", {}), record["protocol"]
    if before.get("fingerprint") != record["fingerprint"] or was.get("tokenizer") != now["tokenizer"]:
        return record
    joined = before | record | {"memory": before["memory"] | record["memory"]}
    if not record["perplexity"]:
        return joined | {key: before[key] for key in ("protocol", "perplexity")}
    if all(was.get(key) == now[key] for key in ALIKE):
        named = was["perplexity"] | now["perplexity"]
        joined["protocol"] = now | {"texts": was["texts"] | now["texts"], "perplexity": named}
        same = [text for text in before["perplexity"] if was["texts"][text] == now["texts"].get(text)]
        kept = {text: before["perplexity"][text] | record["perplexity"][text] for text in same}
        joined["perplexity"] = before["perplexity"] | record["perplexity"] | kept
    return joined


def collect(folders: list[Path]) -> list[dict]:
    """Records of the folders: each has one, or its sub-folders do (a run), or theirs (a folder of runs), in order of
    name. UsageError where none."""
    records = []
    for folder in map(Path, folders):
        levels = (sorted(folder.glob(pattern)) for pattern in (RECORD, f"*/{RECORD}", f"*/*/{RECORD}"))
        found = next(filter(None, levels), None)
        if found is None:
            raise UsageError(
                f"{folder}: no {RECORD} in it or below; give folders that `moesvd eval`, run or bench measured"
            )
        records += [_with_speed(path) for path in found]
    return list({json.dumps([r["name"], r.get("base_model"), r["perplexity"]]): r for r in records}.values())


def _with_speed(path: Path) -> dict:
    """A record, with what `moesvd speed` measured of the same weights."""
    record, file = read_json(path), path.with_name(SPEED)
    speed = read_json(file) if file.is_file() else {}
    return record | ({"speed": speed} if speed.get("fingerprint") == record["fingerprint"] else {})
