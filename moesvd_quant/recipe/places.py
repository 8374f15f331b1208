"""Where the keys of a recipe stand: lines of its text, or the overrides that set them."""

import re
from dataclasses import dataclass, field

from .yaml_lines import Path


@dataclass
class Places:
    where: str  # file of the text
    lines: dict[Path, int]  # of every key in the text
    overrides: dict[Path, str] = field(default_factory=dict)  # by the key that each sets, in their order

    def of(self, at: Path, message: str = "") -> str:
        """Where a key stands: the line, or the override that set it, or that set an option which a message names."""
        shared = [path for path in self.overrides if path[: len(at)] == at or at[: len(path)] == path]
        named = [path for path in shared if re.search(rf"\b{path[-1]}\b", message.partition(":")[0])]
        if shared:
            nearest = max(reversed(named or shared), key=lambda path: min(len(path), len(at)))
            return f"override {self.overrides[nearest]!r}"
        line = next((self.lines[at[:end]] for end in range(len(at), -1, -1) if at[:end] in self.lines), 1)
        return f"{self.where}:{line}"
