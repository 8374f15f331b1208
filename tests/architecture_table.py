"""Writes docs/architectures.md: every architecture by what works on it. `make arch-table`; ROWS keeps what passed."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from architecture_check import STEPS, check
from architectures import NOT_BUILT, SURVEY

DONE = ("pass", "linears", "none")  # what the last step says where all went well
HEAD = """# Architectures

Made by `make arch-table` (transformers {transformers}, torch {torch}), which builds a random model of every
architecture in miniature from its config and tries on it:

- **read**: the walk, one decoder layer at a time, gives the logits of the whole model in memory
- **svd**: a fifth of the routed experts' parameters removed, written, verified, with a small divergence
- **gptq4**: the same with 4-bit factors, attention, recurrent layers, shared experts and dense layers
- **reload**: the checkpoint opened with `moesvd_quant.load` gives the logits of the walk over it
- **generate**: `generate` with a cache
- **shared**: with `experts: all` shared experts are factorized and quantized as experts and reloaded; *linears* are
  quantized as linears (they fuse gate and up, clamp, or lie elsewhere), *none* has none

{passed} of {count} pass all. *State* marks models whose layers hand each other more than hidden states (indices,
router states, keys): their walk keeps one suspended forward per batch. What stays in 16 bit besides norms, embeddings
and the output head is named. Experts that no text reaches (those for images) are kept by `svd`, rounded by `gptq`.

| model type | class | read | svd | gptq4 | reload | generate | shared | KL of gptq4 | kept in 16 bit |
|---|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
## Not in the table

{refused}

Sources in FP8 (`quant_method: fp8`, as DeepSeek-V3) and MXFP4 (GPT-OSS) are read layer by layer, and sizes are compared
with the files as published. Other quantized sources are refused. An architecture whose experts are in no known form is
refused with the module's name and form before any work.
"""


def line(row: dict) -> str:
    state = " *state*" if row["stateful"] else ""
    cells = [row[step] or "-" for step in STEPS]
    kept = ", ".join(row.get("left", []))
    return " | ".join([f"| {row['model_type']}", row["class"] + state, *cells, str(row.get("kl", "")), kept]) + " |\n"


def main(out: Path, kept: Path) -> None:
    torch.set_num_threads(1)
    os.environ["MOESVD_CACHE"] = tempfile.mkdtemp()
    lines = kept.read_text().splitlines() if kept.is_file() else []
    rows = {row["model_type"]: row for row in map(json.loads, lines) if row["shared"] in DONE}
    for name in SURVEY:
        if name not in rows:
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = check(name, Path(folder))
            with open(kept, "a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(name, *(rows[name][step] for step in STEPS), file=sys.stderr)
    found = [rows[name] for name in SURVEY]
    passed = sum(row["shared"] in DONE for row in found)
    versions = dict(transformers=transformers.__version__, torch=torch.__version__)
    refused = "\n".join(f"- {name}: {why}" for name, why in NOT_BUILT.items())
    text = HEAD.format(passed=passed, count=len(found), **versions) + "".join(map(line, found))
    out.write_text(text + TAIL.format(refused=refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
