"""Reading the tensors of a model folder when it is their turn."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..memory.files import advise
from .census import Census
from .headers import StoredTensor


class WeightFiles:
    """The safetensors of a model folder, by the parameters that they go to."""

    def __init__(self, folder: Path, census: Census, tensors: dict[str, StoredTensor]):
        self.folder, self.tensors = folder, tensors
        self.targets = sorted((target, name) for target, names in census.sources.items() for name in names)

    def slices(self, *prefixes: str) -> dict[str, Any]:
        """{name on disk: slice that reads it} of all that goes under the prefixes."""
        state: dict = {}
        for file, names in self._under(prefixes).items():
            handle = safe_open(self.folder / file, "pt")
            state |= {name: handle.get_slice(name) for name in names}
        return state

    def read_ahead(self, prefix: str) -> None:
        """Asks the system to read the tensors under the prefix into its cache, while this process computes."""
        for file, names in self._under((prefix,)).items():
            advise(self.folder / file, names)

    def _under(self, prefixes: tuple[str, ...]) -> dict[str, list[str]]:
        """{file name: names on disk}."""
        names = dict.fromkeys(name for target, name in self.targets if target.startswith(prefixes))
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.tensors[name].file, []).append(name)
        return wanted
