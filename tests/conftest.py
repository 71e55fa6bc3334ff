# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from pathlib import Path

import pytest
from tiny import save_policy, save_rows


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny policy; see ``tiny.py``."""
    return save_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def tiny_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with attention dropout."""
    return save_policy(tmp_path_factory.mktemp("dropout") / "policy", attention_dropout=0.3)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest of 16 labelled rows, of which eight pairs can be formed."""
    return save_rows(tmp_path_factory.mktemp("rows"))
