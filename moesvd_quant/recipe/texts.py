"""Texts as people name them."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError


def named_texts(sources: Sequence[str]) -> dict[str, str]:
    """{name: source} of texts, each `name=source`, a known name, or a file that its first name part names.

    ValueError where two have one name.
    """
    named: dict[str, str] = {}
    for source in sources:
        name, given, rest = source.partition("=")
        name = name if given else Path(source).name.split(".")[0]
        if name in named:
            raise UsageError(f"two texts are named {name!r}; give one of them another name: {name}2={source}")
        named[name] = rest if given else source
    return named
