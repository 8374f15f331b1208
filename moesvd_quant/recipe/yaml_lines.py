"""YAML text with the line of every key, and overrides from the command line. Safe tags only."""

import yaml

from ..errors import MoesvdError

Path = tuple[str | int, ...]


class YamlProblem(MoesvdError, ValueError):
    """A text that is no valid YAML; `line` counts from 1."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def parse(text: str) -> tuple[object, dict[Path, int]]:
    """The content of a YAML text and the line of each path. YamlProblem on errors and duplicate keys."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(line, f"character {chr(error.character)!r} is not allowed in YAML; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(mark.line + 1 if mark else 1, error.problem or str(error)) from error
    lines: dict[Path, int] = {}
    if node is not None:
        _collect(node, (), lines)
    return content, lines


def _collect(node, path: Path, lines: dict[Path, int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise YamlProblem(line, f"key {key.value!r} stands here twice")
            seen.add(key.value)
            lines[(*path, key.value)] = line
            _collect(value, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect(value, (*path, index), lines)


def apply_override(content: dict, override: str, stages: list[str]) -> Path:
    """Sets `a.b=value` in a recipe's content; returns the path set.

    A first part that is a stage's name stands for that stage (`svd.ratio=0.6`, `stages.svd.ratio=0.6`).
    ValueError where it has no `=`, or names a stage that the recipe has not.
    """
    key, found, text = override.partition("=")
    if not found:
        raise ValueError("has no '='; write key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no YAML value") from error
    parts: list[str | int] = list(key.strip().split("."))
    if parts[0] == "stages":
        parts = parts[1:]
        if not parts or parts[0] not in stages:
            raise ValueError(f"the recipe's stages are: {', '.join(stages)}")
    if parts[0] in stages:
        index = stages.index(str(parts[0]))
        if not isinstance(content["stages"][index], dict):
            content["stages"][index] = {parts[0]: {}}
        parts = ["stages", index, *parts]
    target = content
    for part in parts[:-1]:
        target = target[part] if isinstance(part, int) else target.setdefault(part, {})
        if target is None or not isinstance(target, dict | list):
            raise ValueError(f"{part} holds no keys")
    target[parts[-1]] = value
    return tuple(parts)
