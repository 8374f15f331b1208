"""How the package's modules import each other, read from their source, and in fresh processes where that matters."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.sparse.csgraph import connected_components

import moesvd_quant

ROOT = Path(moesvd_quant.__file__).parent


def sources() -> dict[str, Path]:
    """{module: file} of the package, evaluation included."""
    found = {}
    for folder, _, files in os.walk(ROOT, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(ROOT.parent).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def top_level(body: list) -> Iterator[ast.stmt]:
    """Statements that run at import: not those in functions, nor those for type checkers alone."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        for name in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                yield from top_level(getattr(node, name, []))


def imports(module: str, path: Path, known: dict) -> set[str]:
    """Modules of the package that `module` imports when it is imported."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in top_level(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & known.keys()
            found |= inner or {base}
    return found & known.keys() - {module}


def test_no_modules_import_each_other_in_a_circle():
    known = sources()
    names = sorted(known)
    graph = np.zeros((len(names), len(names)), dtype=bool)
    for name in names:
        for other in imports(name, known[name], known):
            graph[names.index(name), names.index(other)] = True
    _, label = connected_components(graph, directed=True, connection="strong")
    circles = [[n for n, at in zip(names, label) if at == wanted] for wanted in set(label)]
    assert not [circle for circle in circles if len(circle) > 1]


def package_imports() -> set[tuple[str, str]]:
    """(package, another one that it imports), benchmarks left out: they are programs, which may use everything."""
    known = sources()
    package = lambda name: name.split(".")[1] if "." in name else ""  # noqa: E731
    return {
        (package(name), package(other))
        for name, path in known.items()
        for other in imports(name, path, known)
        if "benchmarks" not in name and package(name) != package(other)
    }


def test_no_packages_import_each_other():
    found = package_imports()
    circles = [(one, two) for one, two in found if one and two and one < two and (two, one) in found]
    assert not circles


def test_the_table_of_packages_is_that_of_the_code():
    """Every import between packages is in the table or follows from it, and every cell of it is one."""
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", (ROOT.parent / "docs/design.md").read_text(), re.MULTILINE)
    words = lambda cell: re.findall(r"`(\w+)`", cell)  # noqa: E731
    table = {name: set(words(on)) for names, on in rows for name in words(names)}
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py") if any(file.parent.glob("[a-z]*.py"))}
    assert table.keys() == folders - {"reference"}
    found = {(one, two) for one, two in package_imports() if {one, two} <= table.keys() - {"cli"}}
    assert {(one, two) for one in table for two in table[one]} <= found
    below = {name: set(on) for name, on in table.items()}
    for name in table:  # from the ground up: what is below a row's packages is known before it
        below[name] |= {deeper for on in table[name] for deeper in below[on]}
    assert not [(one, two) for one, two in found if two not in below[one]]


def test_recipes_import_no_torch():
    for name, path in sources().items():
        if name.startswith("moesvd_quant.recipe."):
            assert "import torch" not in path.read_text(), name
            taken = [
                n.module or "" for n in top_level(ast.parse(path.read_text()).body) if isinstance(n, ast.ImportFrom)
            ]
            assert not [module for module in taken if module.split(".")[0] == "torch"], name


def test_the_library_imports_neither_its_command_line_nor_its_benchmarks():
    known = sources()
    for name, path in known.items():
        program = name.startswith(("moesvd_quant.cli", "moesvd_quant.evaluation.benchmarks"))
        if not program:
            assert not [other for other in imports(name, path, known) if "cli" in other or "benchmarks" in other], name


def test_what_ships_into_checkpoints_imports_nothing_else_of_ours():
    from moesvd_quant.runtime.modeling_moesvd import SHIPPED

    known = sources()
    ours = {f"moesvd_quant.runtime.{Path(name).stem}" for name in SHIPPED}
    for name in ours:
        assert imports(name, known[name], known) <= ours, name


# Each in a copy of a process that has torch and transformers, and nothing of ours.
ALONE = """
import importlib, os, sys, torch, transformers
assert not [name for name in sys.modules if name.startswith("moesvd_quant.")]
for name in sys.argv[1:]:
    if not (child := os.fork()):
        importlib.import_module(f"moesvd_quant.{name}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_a_module_can_be_imported_first():
    modules = ["runtime.modeling_deepseek", "runtime.parts", "model.stream", "stages.svd"]
    done = subprocess.run([sys.executable, "-c", ALONE, *modules], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
