# SPDX-License-Identifier: Apache-2.0
"""Parts of modules: since Python 3.12 ``isinstance`` does not see the parts of a module, such as ``policy``."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
from places import ROOT
from torch import nn

from tts_align.data.wants import WantsRows, wants_rows
from tts_align.training.callbacks.watched import Watched, is_watched

PACKAGE = ROOT / "tts_align"
NO_PARTS = {"Saves"}
"""Protocols whose attributes a module keeps as its own: a path."""


def protocols() -> dict[str, type]:
    """Those of the package that name attributes, by name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        names = [one.name for one in ast.parse(path.read_text()).body if isinstance(one, ast.ClassDef)]
        if names and "Protocol" in path.read_text():
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            kinds = [vars(module)[name] for name in names]
            found |= {one.__name__: one for one in kinds if getattr(one, "_is_protocol", False) and attributes(one)}
    return found


def attributes(protocol: type) -> set[str]:
    """What it names that is no method."""
    return {name for one in protocol.__mro__ for name in getattr(one, "__annotations__", ())}


def asked(path: Path) -> list[str]:
    """Classes that a file asks ``isinstance`` about."""
    calls = [one for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.Call)]
    of = [one.args[1] for one in calls if getattr(one.func, "id", "") == "isinstance"]
    return [one.id for kinds in of for one in ast.walk(kinds) if isinstance(one, ast.Name)]


def test_nobody_asks_isinstance_for_the_parts_of_a_module() -> None:
    wrong = set(protocols()) - NO_PARTS
    assert {path: found for path in PACKAGE.rglob("*.py") if (found := wrong & set(asked(path)))} == {}


def test_the_search_finds_them() -> None:
    assert {"WantsRows", "Watched"} <= set(protocols())
    assert "Record" in asked(PACKAGE / "batch.py")


class Module(nn.Module):
    """Works like an ``AlignModule``."""

    rows_wanted = trained_tokenizer = objective = parts = log_when_due = None

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(1, 1)


@pytest.mark.parametrize("asks", [wants_rows, is_watched])
def test_parts_are_found(asks: object) -> None:
    assert callable(asks)
    assert asks(Module())
    assert not asks(nn.Linear(1, 1))
    assert WantsRows is not Watched
