"""A command of ours that is killed again and again, until it comes to its end."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path


def kill_until_done(arguments: list[str], out: Path, waits: Iterable[float], **environment: str) -> list[set[str]]:
    """Runs `moesvd ARGUMENTS --out OUT`, each try killed (signal 9) after the next wait in seconds, until one ends
    before. Returns the names of the files under `out` that each kill left behind. AssertionError, with what the command
    wrote, where it failed, or where no wait was long enough."""
    command = [sys.executable, "-m", "moesvd_quant.cli", *arguments, "--out", str(out)]
    left: list[set[str]] = []
    for wait in waits:
        process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE)
        try:
            time.sleep(wait)
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read().decode()
                return left
        finally:  # of a test that ran out of time, too
            process.kill()
            process.wait()
            process.stderr.close()
        left.append({str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()})
    raise AssertionError(f"killed {len(left)} times and never at its end")
