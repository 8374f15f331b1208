"""What turns layer files into a checkpoint: index, config, tokenizer, manifest."""

from pathlib import Path

from ..memory.files import read_json, write_json
from ..model.carried import carry_files
from ..runtime.modeling_moesvd import MANIFEST, finish_folder
from .card import write_card


def layer_file(index: int) -> str:
    return f"model-layer-{index:05d}.safetensors"


OUTER_FILE = "model-outer.safetensors"


def write_index(folder: Path, tensors: dict[str, str], total_bytes: int) -> None:
    """model.safetensors.index.json: {tensor name: file name}."""
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(tensors.items()))},
    )


def write_config(folder: Path, native_config: dict, layout: dict) -> None:
    config = {k: v for k, v in native_config.items() if k not in ("auto_map", "_name_or_path")}
    write_json(folder / "config.json", config | {"model_type": "moesvd", "moesvd": layout})


def write_manifest(folder: Path, manifest: dict) -> None:
    """moesvd.json with the digests of all weight files, the modeling file, and `auto_map` in the config."""
    write_json(folder / MANIFEST, manifest)
    finish_folder(folder)


def refresh(source: Path, folder: Path) -> None:
    """Brings what a finished checkpoint carries of its original up to date: tokenizer, templates, licence ..."""
    manifest = read_json(folder / MANIFEST)
    now = {"carried": carry_files(source, folder, manifest.get("carried")), "licence": licence_of(source)}
    if now["licence"] != manifest.get("licence"):
        write_card(folder, manifest | now)
    if any(manifest.get(key) != value for key, value in now.items()):
        write_json(folder / MANIFEST, manifest | now)


def origin_of(folder: Path) -> dict:
    """{"base_model", "names"}: what a model folder was made from, and the labels of the stages behind it."""
    manifest = folder / MANIFEST
    content = read_json(manifest) if manifest.is_file() else {}
    names = [content["name"]] if "name" in content else []
    return {"base_model": content.get("base_model", _own_name(folder)), "names": names}


def _own_name(folder: Path) -> str:
    """Name of a model folder; in the hub's cache, where folders are named by commits, the hub's."""
    hub = folder.resolve().parent.parent.name
    if folder.resolve().parent.name == "snapshots" and hub.startswith("models--"):
        return hub.removeprefix("models--").replace("--", "/")
    return folder.name


def licence_of(folder: Path) -> str | None:
    """The `license:` of a model folder's card, where it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(errors="replace").splitlines()[:40]:
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip().strip("\"'")
    return None
