"""README.md of a checkpoint: what was done, what it cost on which texts, how to run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..memory.files import write_text


@dataclass(frozen=True)
class Cost:
    """Perplexity of a checkpoint and of its original on a text."""

    text: str
    original: float
    here: float


def write_card(folder: Path, manifest: dict, costs: Sequence[Cost] = ()) -> None:
    """manifest: of the checkpoint. costs: what was measured; without any the card says how to measure."""
    base = manifest["base_model"]
    lines = [
        *_front(manifest),
        f"# {base}, compressed: {manifest['name']}",
        "",
        f"Made by moesvd_quant {manifest['versions']['moesvd_quant']} from "
        f"`{base}`. The licence of the original"
        + (f" ({manifest['licence']})" if manifest.get("licence") else "")
        + " applies.",
        "",
        *_size(manifest["accounting"]),
        *_cost(manifest, costs),
        *_running(folder.name),
        *_made(manifest),
    ]
    write_text(folder / "README.md", "\n".join(lines))


def _front(manifest: dict) -> list[str]:
    """What the hub reads: the original where it lies there, the licence where it is known."""
    front = ["---", "library_name: moesvd_quant", "pipeline_tag: text-generation", "tags: [moe, compression]"]
    if manifest["base_model"].count("/") == 1 and not manifest["base_model"].startswith((".", "/", "~")):
        front.append(f"base_model: {manifest['base_model']}")
    if manifest.get("licence"):
        front.append(f"license: {manifest['licence']}")
    return [*front, "---"]


def _size(account: dict) -> list[str]:
    return [
        "| | original | here |",
        "|---|---|---|",
        f"| disk | {account['original_bytes'] / 1e6:.2f} MB | {account['disk_bytes'] / 1e6:.2f} MB |",
        f"| memory when loaded | | {account['resident_bytes'] / 1e6:.2f} MB |",
        f"| bits per original expert weight | | {account['bits_per_expert_weight']:.3f} |",
        f"| routed-expert parameters removed | | {account['expert_ratio']:.1%} |",
        f"| parameters removed | | {account['model_ratio']:.1%} |",
        "",
    ]


def _cost(manifest: dict, costs: Sequence[Cost]) -> list[str]:
    divergence = (
        f"KL divergence from the last stage's input, on {manifest['check']['tokens']} tokens of the calibration text: "
        f"{manifest['check']['kl']:.4f} nats per token."
    )
    lines = ["## What it cost", ""]
    if costs:
        lines += ["| perplexity on | original | here | change |", "|---|---|---|---|"]
        lines += [f"| {c.text} | {c.original:.5g} | {c.here:.5g} | {c.here / c.original - 1:+.2%} |" for c in costs]
    else:
        lines.append("Not measured on held-out text yet: `moesvd eval FOLDER --text TEXT`.")
    unlike = "Text unlike the calibration's loses more: measure on your own text before you rely on it."
    return [*lines, "", divergence, unlike, ""]


def _running(name: str) -> list[str]:
    return [
        "## How to run it",
        "",
        "```python",
        "import moesvd_quant",
        "",
        f'model = moesvd_quant.load("{name}")  # this folder, or a hub name that was downloaded',
        "```",
        "",
        f'Without the package: `AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)`. The code that '
        "comes with the folder needs torch and transformers alone.",
        "",
        f"- a server for OpenAI's clients: `moesvd serve {name}`; in the terminal: `moesvd chat {name}`",
        f"- plain 16-bit weights for other engines (vLLM, SGLang ...): `moesvd export {name} --to dense --out plain`",
        f"- is every file whole: `moesvd validate {name}`",
        "",
    ]


def _made(manifest: dict) -> list[str]:
    """The stages behind the checkpoint, and the whole recipe."""
    stages = ", ".join(f"`{name}`" for stage in manifest["stages"] for name in stage)
    recipe = ["```yaml", manifest["recipe"].rstrip(), "```", ""]
    return ["## What was done", "", f"{stages}, as this recipe says, every default written out:", "", *recipe]
