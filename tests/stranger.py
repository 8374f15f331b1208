"""A checkpoint opened on a machine that has transformers and not moesvd_quant."""

import os
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path[:] = [p for p in sys.path if p]
sys.modules["moesvd_quant"] = None  # as on a machine without it
import torch
from transformers import AutoModelForCausalLM
folder, ids, out, trust = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3], sys.argv[4] == "trust"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
with torch.no_grad():
    torch.save(model(ids).logits, out)
"""


def logits_without_package(checkpoint: Path, ids: torch.Tensor, folder: Path, trust: bool = True):
    """(finished process, logits or None where it made none); `folder` is worked in."""
    torch.save(ids, folder / "ids.pt")
    out = folder / "logits.pt"
    command = [sys.executable, "-c", PROGRAM, checkpoint, folder / "ids.pt", out, "trust" if trust else "no"]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    how = dict(capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, cwd=folder, timeout=200)
    done = subprocess.run(command, **how)
    return done, torch.load(out) if out.exists() else None
