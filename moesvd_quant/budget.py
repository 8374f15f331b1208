"""Budgets as people write them."""

import re
from typing import Literal, NamedTuple


class Budget(NamedTuple):
    """amount in bytes of all files ("bytes"), or in bits per original expert weight ("bpw")."""

    amount: float
    unit: Literal["bytes", "bpw"]


UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}


def parse_budget(text: str) -> Budget:
    """`20GB`, `512MiB`, `1.5bpw`; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = found[2].upper() if found else ""
    if not found or float(found[1]) <= 0 or (unit != "BPW" and unit not in UNITS):
        raise ValueError(f"{text!r} is no budget; write bytes (20GB, 512MiB) or bits per expert weight (1.5bpw)")
    return Budget(float(found[1]), "bpw") if unit == "BPW" else Budget(float(found[1]) * UNITS[unit], "bytes")
