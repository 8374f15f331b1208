"""Kernels for GPUs on a machine without one: by Triton's interpreter, and through its compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CASES = Path(__file__).with_name("triton_cases.py")


def test_products_by_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is first imported
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "." * 15 in done.stdout


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moesvd_quant.runtime.grid_triton import COLUMNS, ROWS, TOKENS, grid_kernel
from moesvd_quant.runtime.trellis_triton import FACTOR, OFFSET, trellis_kernel

tile = dict(TOKENS=TOKENS, ROWS=ROWS, COLUMNS=COLUMNS)

def build(kernel, types, constants, capability):
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names if name not in constants}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"]) > 1000

bytes_ = dict(codes="*u8", levels="*u8", zeros="*u8", base="*fp32", table="*fp32", y="*fp32", spans="*i32")
for capability in (80, 90):
    for kind in ("*bf16", "*fp32"):
        for bits, sym in ((2, False), (3, False), (4, True), (8, False)):
            build(grid_kernel, bytes_ | {"x": kind}, dict(BITS=bits, GROUP=128, SYM=sym, **tile), capability)
        types = bytes_ | {"x": kind, "places": "*i64"}
        types["firsts"] = "*i32"
        for joint in (1, 4):
            constants = dict(JOINT=joint, MASK=4095, FACTOR=FACTOR, OFFSET=OFFSET, **tile)
            build(trellis_kernel, types, constants, capability)
"""


@pytest.mark.slow
def test_the_compiler_for_gpus_takes_them():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
