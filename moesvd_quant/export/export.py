"""Checkpoints for other software. One layer at a time."""

from pathlib import Path

from ..checkpoint.accounting import original_model
from ..checkpoint.finish import write_index
from ..checkpoint.layout import layout_of
from ..checkpoint.unused import UNUSED_FILE, write_unused
from ..checkpoint.verify import check_carried
from ..memory.files import write_json, write_one_by_one
from ..model.carried import carry_files
from ..model.folder import ModelError
from ..model.remaining import counts_left
from ..model.stream import StreamedModel
from .compressed_tensors import CompressedTensorsForm
from .dense import DenseForm
from .gptq import GptqForm, GptqModelForm
from .packed_form import PackedForm
from .part import parts_of

FORMS: dict[str, type[DenseForm] | type[PackedForm]] = {
    "dense": DenseForm,
    "compressed-tensors": CompressedTensorsForm,
    "gptq": GptqForm,
    "gptqmodel": GptqModelForm,
}


def export_checkpoint(folder: Path, out: Path, to: str) -> None:
    """Writes `folder` (one of ours) into `out` in one of FORMS. ModelError, before anything is written where it can be
    known, where that cannot be."""
    if to not in FORMS:
        raise ModelError(f"--to {to}: is none of {', '.join(FORMS)}")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: exists and is not empty; choose another --out")
    parent = StreamedModel(folder)
    if not hasattr(parent.config, "moesvd"):
        raise ModelError(f"{folder}: is not one of our checkpoints; there is nothing to export")
    native = original_model(parent, _experts_left(parent))
    form = FORMS[to](parent, native)
    out.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    total = 0
    for part in parts_of(parent):
        tensors = form.tensors(part)
        write_one_by_one(out / part.file, tensors)
        names |= dict.fromkeys(tensors, part.file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    write_unused(parent, out)
    names |= dict.fromkeys(parent.unused(), UNUSED_FILE)
    total += sum(tensor.bytes for tensor in parent.unused().values())
    write_index(out, names, total)
    native.config.architectures = [type(native).__name__]
    native.config.save_pretrained(out)
    if quantization := form.quantization():
        write_json(out / "config.json", native.config.to_dict() | {"quantization_config": quantization})
    if isinstance(form, GptqForm):  # where tools for this format look first
        write_json(out / "quantize_config.json", quantization)
    carry_files(folder, out)
    if to == "dense":
        check_carried(StreamedModel(out), folder, layout_of(parent))


def _experts_left(parent: StreamedModel) -> int | None:
    """How many routed experts each layer has, where some were dropped or merged; None where all are there. ModelError
    where layers have different numbers: no class of transformers can hold them."""
    counts = counts_left(parent.model)
    if len(counts) > 1:
        raise ModelError(
            f"{parent.folder}: layers have {', '.join(map(str, counts))} experts, and plain checkpoints have the same "
            "number in each; load it with moesvd_quant, or keep as many experts in each layer"
        )
    return counts[0] if counts else None
