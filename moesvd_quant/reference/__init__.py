"""The embedded reference model: a small Mixture of Experts trained for real, and the script that trained it."""

from pathlib import Path


def path() -> Path:
    """Folder of the embedded model, a Mixtral of 5.9 M parameters."""
    return Path(__file__).parent / "mixtral-6m"
