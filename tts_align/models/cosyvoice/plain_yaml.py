# SPDX-License-Identifier: Apache-2.0
"""HyperPyYAML files as plain data: its tags name classes and functions to call, and here nothing is called."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tts_align.utils.readers import ReadError, fast_loader, read_yaml

_REFERENCE = re.compile(r"<([^<>]+)>")
_STEPS = re.compile(r"\s*([^\[\]]+?)\s*((?:\[[^\[\]]+\])*)\s*")
_STEP = re.compile(r"\[([^\[\]]+)\]")
_ARITHMETIC: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_ONLY_NUMBERS = re.compile(r"[\d\s.eE+\-*/%()]+")
_LONGEST = 1000
"""Characters of a reference and of what it becomes; no real one comes near."""


@dataclass(frozen=True)
class _Reference:
    text: str


class _PlainLoader(fast_loader()):  # type: ignore[misc]
    """Every tag that YAML itself does not know becomes the value it stands before."""


def _plain(loader: Any, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    if node.tag in ("!ref", "!copy"):
        return _Reference(node.value)
    if node.tag.startswith(("!new:", "!name:", "!apply:")) and not node.value:
        return {}  # called without arguments
    tag = loader.resolve(yaml.ScalarNode, node.value, (not node.style, True))
    return loader.construct_object(yaml.ScalarNode(tag, node.value, node.start_mark, node.end_mark), deep=True)


_PlainLoader.add_constructor(None, _plain)  # None stands for every other tag
# YAML 1.1 takes 1e-06 for a word; HyperPyYAML takes it for a number.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """The values of a HyperPyYAML file.

    What stands behind a tag such as ``!new:``, ``!name:`` or ``!apply:`` is kept, its name is dropped. ``!ref <a>``
    and ``!copy <a[b]>`` become the value they refer to, ``!ref <a> * <b>`` its result, and ``!ref <a>/x`` a text.

    Args:
        path: of the file.

    Raises:
        ValueError: not YAML, or a reference to what is not there or to itself; the message names the file.
    """
    try:
        loaded = read_yaml(path, _PlainLoader)
        if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
            raise ValueError(f"expected names and values, got {type(loaded).__name__} {loaded!s:.60}")
        return _Resolver(loaded).value(loaded)
    except ReadError:
        raise
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


class _Resolver:
    """Puts values in the place of references; what is shared in the file is resolved once and stays shared."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()

    def value(self, raw: Any) -> Any:
        if not isinstance(raw, (dict, list, _Reference)):
            return raw
        if id(raw) in self.done:
            return self.done[id(raw)]
        if id(raw) in self.open:
            raise ValueError(f"{raw.text if isinstance(raw, _Reference) else 'a value'!r} refers to itself")
        self.open.add(id(raw))
        self.done[id(raw)] = done = self._resolve(raw)
        self.open.remove(id(raw))
        return done

    def _resolve(self, raw: dict[Any, Any] | list[Any] | _Reference) -> Any:
        if isinstance(raw, dict):
            if odd := [key for key in raw if isinstance(key, _Reference)]:
                raise ValueError(f"expected plain names, got the reference {odd[0].text!r} as a name")
            return {key: self.value(value) for key, value in raw.items()}
        if isinstance(raw, list):
            return [self.value(value) for value in raw]
        whole = _REFERENCE.fullmatch(raw.text.strip())
        if whole:
            return self._look_up(whole[1])
        filled = _REFERENCE.sub(lambda match: str(self._look_up(match[1])), raw.text[: _LONGEST + 1])
        if len(filled) > _LONGEST:
            raise ValueError(f"the reference {raw.text[:40]!r}... is longer than {_LONGEST} characters")
        return _calculated(filled)

    def _look_up(self, path: str) -> Any:
        """The value at ``a`` or ``a[b][0]``, itself resolved."""
        match = _STEPS.fullmatch(path)
        if match is None:
            raise ValueError(f"expected <name> or <name[part]>, got <{path}>")
        value: Any = self.root
        for step in (match[1], *_STEP.findall(match[2])):
            while isinstance(value, _Reference):
                value = self.value(value)
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(f"<{path}> refers to {step!r}, which is not there") from None
        return self.value(value)


def _calculated(text: str) -> Any:
    """The result of an arithmetic expression of numbers; any other text as it is."""
    if not _ONLY_NUMBERS.fullmatch(text):
        return text
    try:
        return _number(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ZeroDivisionError, OverflowError, MemoryError):
        return text


def _number(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_number(node.left), _number(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_number(node.operand))
    raise TypeError("not arithmetic")


def section_of(config: Mapping[str, Any] | None, *names: str, needs: Sequence[str] = ()) -> Mapping[str, Any]:
    """A part of a model's yaml; empty only if there is no yaml at all.

    Args:
        config: the whole yaml as plain data; ``None`` for the published numbers.
        names: where the part is, from the outside inwards.
        needs: what the part must hold, because weights do not tell it.

    Raises:
        ValueError: the part is not there, or lacks something.
    """
    if config is None:
        return {}
    section: Any = config
    for depth, name in enumerate(names, start=1):
        section = section.get(name)
        if not isinstance(section, Mapping):
            raise ValueError(
                f"the model's yaml has no part {'.'.join(names[:depth])}: expected the whole yaml, nested as "
                "published, or none for the published numbers"
            )
    if lacking := [name for name in needs if name not in section]:
        raise ValueError(
            f"the model's yaml has no {'.'.join(names)}.{lacking[0]}, which the weights do not tell either"
        )
    return section
