# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from pathlib import Path

import pytest
from tiny import save_policy, save_rows


@pytest.fixture(autouse=True)
def no_seed_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran before must not move what is drawn: Lightning keeps its seed in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


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
