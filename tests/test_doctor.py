"""What the machine lacks is said, with what to do; shells complete; complaints of libraries are not heard."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moesvd_quant import cli, machine
from moesvd_quant.machine import PACKAGES, State, examine

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def run(monkeypatch, *command) -> int:
    monkeypatch.setattr("sys.argv", ["moesvd", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_this_machine_can_do_it(monkeypatch, capsys):
    found = {one.name: one for one in examine()}
    assert not [one for one in found.values() if one.state is State.MISSING]
    assert all(found[name].value == version(name) for name in PACKAGES)
    assert str(os.environ["MOESVD_CACHE"]) in found["cache"].value
    assert run(monkeypatch, "doctor", "--json") == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} == set(found)


def test_what_is_missing_is_said_and_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(monkeypatch, "doctor") == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if "cannot be written" in line)
    assert lines[at].startswith("missing") and "-> set MOESVD_CACHE" in lines[at + 1]


@pytest.mark.parametrize(
    "needed, tested, state, advice",
    [
        ("torch>=2", version("torch").split("+")[0], State.OK, ""),
        ("torch>=2", "2.0.0", State.NOTE, "tested with 2.0.0"),
        ("torch>=99", "2.0.0", State.MISSING, "pip install 'torch>=99'"),
        ("no-such-package>=1", "1", State.MISSING, "pip install 'no-such-package>=1'"),
    ],
)
def test_versions_are_held_to_what_is_needed_and_tested(needed, tested, state, advice):
    requirement = Requirement(needed)
    found = machine._package(requirement.name, requirement, {requirement.name: tested})
    assert (found.state, found.advice) == (state, advice)


def test_tested_versions_are_the_constraints():
    found = machine.tested_versions()
    assert f"torch=={found['torch']}\n" in CONSTRAINTS.read_text() and found["lm-eval"] == version("lm_eval")


def test_more_threads_than_cores_are_not_good(monkeypatch):
    monkeypatch.setenv("MOESVD_THREADS", "4096")
    assert machine.cores().state is State.NOTE and "MOESVD_THREADS=" in machine.cores().advice


def test_offline_is_no_fault():
    assert machine.hub({"HF_HUB_OFFLINE": "1"}).state is State.NOTE and machine.hub({}).state is State.OK


def test_shells_complete_verbs_and_recipes():
    def completed(words: str) -> set[str]:
        asked = {"_MOESVD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-c", "import sys; sys.argv = ['moesvd']; from moesvd_quant.cli import main; main()"]
        return set(subprocess.run(command, env=os.environ | asked, capture_output=True, text=True).stdout.split())

    assert {"doctor", "demo"} <= completed("moesvd d")
    assert completed("moesvd run gptq") == {"gptq2", "gptq3", "gptq4", "gptq-fit", "gptq4-qlora"}


def test_libraries_that_complain_of_what_nothing_uses_are_not_heard():
    """Those messages alone, in a process that imports the libraries for the first time."""
    asked = (
        "import logging, moesvd_quant, torchao, bitsandbytes\n"
        "for name in ('torchao', 'torch.utils._pytree', 'bitsandbytes'):\n"
        "    logging.getLogger(name).warning('of another kind, %s', name)\n"
    )
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    lines = (said.stdout + said.stderr).splitlines()
    assert len(lines) == 3 and all("of another kind" in line for line in lines), lines
