# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the data tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from letters import Letters, make_rows

from tts_align.data.manifest import write_manifest


@pytest.fixture
def policy() -> Letters:
    return Letters()


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., str]:
    """Write labelled rows and give their path."""

    def write(count: int = 40, sentences: int = 8, seed: int = 0) -> str:
        return str(write_manifest(make_rows(count, sentences, seed), tmp_path / f"rows-{count}-{seed}.jsonl"))

    return write
