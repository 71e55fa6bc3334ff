# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and how they share the machine."""

import atexit
import gc
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import lazily
import pytest
from offline import no_network

__all__ = ["no_network"]

lazily.install()  # before the package is imported

LONG = (
    *("test_devices", "test_recipes", "test_cosyvoice_round_trip", "test_benchmarks", "test_sharding"),
    *("test_launchers", "test_module", "test_cli", "test_readme", "test_machines"),
)
"""Files that take longest, started first so that no worker is left with one of them at the end."""

if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and the processes that tests start, must not fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    atexit.register(gc.freeze)  # as the command does: the end of a worker takes a second less

HEAVY = ("beartype", "lightning.pytorch.cli", "peft", "pyarrow.parquet", "rich.progress", "rapidfuzz", "scipy.stats")
HEAVY += ("torchaudio", "torch.distributed.checkpoint", "transformers.models.qwen2.modeling_qwen2")
"""What the package imports, loaded before it: below a module whose shapes are checked nothing is found compiled."""


def pytest_collection(session: pytest.Session) -> None:
    """Load what is heavy in the processes that run tests, not in the one that hands them out."""
    if not session.config.getoption("numprocesses", None):
        for name in HEAVY:
            import_module(name)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded stays: collections of garbage need not look at its million objects each time."""
    from hypothesis.internal.entropy import deterministic_PRNG

    with deterministic_PRNG():  # registers the generators of Python and NumPy, and looks who refers to them
        pass
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; otherwise the order stays."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope="module")
def shapes_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everywhere but in files of whole runs, unless asked for: there the checks take a third of the time."""
    from jaxtyping import config

    whole = request.node.get_closest_marker("whole_runs") is not None and "CHECK_WHOLE_RUNS" not in os.environ
    config.update("jaxtyping_disable", whole)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """A file need not outlive the machine's power: what tests write is synchronised with the disk when it likes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def no_seed_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran before must not move what is drawn: Lightning keeps its seed in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny policy; see ``tiny.py``."""
    from tiny import save_policy

    return save_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def tiny_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with attention dropout."""
    from tiny import save_policy

    return save_policy(tmp_path_factory.mktemp("dropout") / "policy", attention_dropout=0.3)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest of 16 labelled rows, of which eight pairs can be formed."""
    from tiny import save_rows

    return save_rows(tmp_path_factory.mktemp("rows"))
