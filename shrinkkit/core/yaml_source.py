"""YAML loading with the line of every key."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shrinkkit.core.stages import Key
from shrinkkit.errors import InvalidInput, message

MOST_BYTES, MOST_NODES, _DEEPEST = 1 << 20, 5000, 12
"""Of a file, of what stands in it once its aliases are followed, and the levels of nesting."""
_DEEPEST_READ = 64


@dataclass(frozen=True)
class Source:
    """The settings in a file (or given by other means, without `path`), and where each of them stands."""

    data: Any
    path: str = ""
    """As messages name it."""
    lines: dict[Key, int] = field(default_factory=dict)
    """The line of each key, from 1."""
    problems: tuple[str, ...] = ()
    """Mistakes that leave the file readable, such as a key that stands there twice."""

    def where(self, key: Key = ()) -> str:
        """Return `file:line` of `key`, or of the closest section around it; '' when there is no file."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}" if self.path else ""

    def at(self, key: Key) -> Any:
        """Return the settings at `key`."""
        value = self.data
        for part in key:
            value = value[part]
        return value


def load(path: str | os.PathLike[str], *, shown: str = "") -> Source:
    """Return what the YAML 1.2 file at `path` says; its lists come as tuples, its keys as text.

    Args:
        path: A file with one YAML document, in UTF-8.
        shown: What messages call the file; default `path`.

    Raises:
        InvalidInput: There is no such file, it is empty, too large or too deep, not YAML, or its top level is not a
            mapping.
    """
    shown = shown or os.fspath(path)
    yaml = YAML(typ="safe", pure=True)
    try:
        text = _text(Path(path), shown)
        _check_depth(text, shown)
        root = yaml.compose(text)
    except FileNotFoundError as error:
        raise InvalidInput(f"There is no file {shown}. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{shown} cannot be read as text: {error}.") from error
    except YAMLError as error:
        raise InvalidInput(_not_yaml(shown, error)) from error
    if root is None:
        raise InvalidInput(f"{shown} is empty. Copy a built-in one, and change that.")
    if not isinstance(root, MappingNode):
        raise InvalidInput(message("A file must be a mapping of keys to values", f"{shown}:1", "Copy a built-in one."))
    lines: dict[Key, int] = {}
    problems: list[str] = []
    data = _plain(root, (), yaml, shown, lines, problems)
    return Source(data, shown, lines, tuple(problems))


def _text(path: Path, shown: str) -> str:
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{shown} must be a file, and is {'a folder' if path.is_dir() else 'none'}. Check the path.")
    with path.open(encoding="utf-8") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise InvalidInput(f"{shown} must have at most {MOST_BYTES} characters. Leave out what is no setting.")
    return text


def _check_depth(text: str, shown: str) -> None:
    """Raise if YAML is nested so deep that reading it would fail, or holds more than any file of settings."""
    depth = 0
    for number, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if not (depth <= _DEEPEST_READ and number <= 3 * MOST_NODES):
            where = f"{shown}:{event.start_mark.line + 1}"
            raise InvalidInput(message(f"A file holds at most {MOST_NODES} values, {_DEEPEST} levels deep", where))


def _not_yaml(shown: str, error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{shown}:{mark.line + 1}" if mark else shown
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return message(f"This is not YAML: {problem}", where, "Indent with spaces, and quote text that holds : or #.")


def _plain(node: Node, key: Key, yaml: YAML, shown: str, lines: dict[Key, int], problems: list[str]) -> Any:
    lines.setdefault(key, node.start_mark.line + 1)
    if len(lines) > MOST_NODES:
        raise InvalidInput(
            message(f"A file holds at most {MOST_NODES} values, aliases followed", f"{shown}:{lines[key]}")
        )
    if len(key) > _DEEPEST:
        problems.append(message(f"Nothing is nested deeper than {_DEEPEST} levels", f"{shown}:{lines[key]}"))
        return None
    if isinstance(node, SequenceNode):
        return tuple(_plain(n, (*key, i), yaml, shown, lines, problems) for i, n in enumerate(node.value))
    if isinstance(node, MappingNode):
        return _mapping(node, key, yaml, shown, lines, problems)
    try:
        return yaml.constructor.construct_object(node, deep=True)
    except (YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        problems.append(message(f"{node.value[:40]!r} cannot be read: {problem[:100]}", f"{shown}:{lines[key]}"))
        return None


def _mapping(
    node: MappingNode, key: Key, yaml: YAML, shown: str, lines: dict[Key, int], problems: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in node.value:
        where = f"{shown}:{name.start_mark.line + 1}"
        if not isinstance(name, ScalarNode):
            problems.append(message("A key must be a word", where))
            continue
        child = (*key, name.value)
        dotted = ".".join(map(str, child))
        if name.value in values:
            first = lines[child]
            problems.append(message(f"`{dotted}` stands here twice, first on line {first}", where, "Keep one of them."))
            continue
        lines[child] = name.start_mark.line + 1
        values[name.value] = _plain(value, child, yaml, shown, lines, problems)
    return values
