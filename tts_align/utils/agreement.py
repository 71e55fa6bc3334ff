# SPDX-License-Identifier: Apache-2.0
"""Processes of one run that end together: a signal that reached one of them is heard by all, after their items."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from tts_align.utils import signals
from tts_align.utils.distributed import gathered

PATIENCE_SECONDS = 60.0
"""So long a process that ends waits for the others to end too: they may be in the middle of an item."""
_POLLED_SECONDS = 0.02
_STOP, _LEFT = "stop", "left"


class EndedError(ValueError):
    """Another process of the run has ended without a word."""


class Agreement:
    """What the processes of a run tell each other through their store, without meeting.

    Args:
        store: key-value store that all processes share.
        world: number of processes.
    """

    def __init__(self, store: dist.Store, world: int) -> None:
        self.store, self.world = store, world

    def asked(self, number: int) -> int:
        """The signal that any process got; tells the others of this one's.

        Args:
            number: of the signal that this process got; 0 for none.

        Raises:
            EndedError: the process that keeps the store has ended.
        """
        try:
            if number:
                self.store.set(_STOP, str(number))
                return number
            return int(self.store.get(_STOP)) if self.store.check([_STOP]) else 0
        except dist.DistError as error:
            raise EndedError("the first process of this run has ended: its own message says why") from error

    def leave(self, number: int = 0, waits: bool = True) -> None:
        """End this process's part.

        Args:
            number: of the signal; 0 for none.
            waits: for the others to end theirs, a while at most.
        """
        with suppress(dist.DistError, EndedError):  # the process that keeps the store did not wait any longer
            self.asked(number)
            left, until = self.store.add(_LEFT, 1), time.monotonic() + PATIENCE_SECONDS
            while waits and left < self.world and time.monotonic() < until:
                time.sleep(_POLLED_SECONDS)
                left = self.store.add(_LEFT, 0)


_runs = 0
"""How many runs of several processes there have been: each has keys of its own."""


@contextmanager
def ending_together() -> Iterator[None]:
    """Within the block a signal for one process ends all of them, each at its next :func:`signals.check`.

    None ends where it is: the others may just be waiting for it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    global _runs
    _runs += 1
    # The only way to a store that is there already; it holds keys of the process group beside ours.
    store = dist.distributed_c10d._get_default_store()
    agreement = Agreement(dist.PrefixStore(f"tts-align/{_runs}", store), dist.get_world_size())
    signals.share(agreement.asked)
    try:
        signals.begin()
        try:
            yield
        finally:
            signals.end()
        agreement.leave(waits=dist.get_rank() == 0)  # which may keep the store
    except signals.Interrupted as end:
        agreement.leave(end.number)
        raise
    finally:
        signals.share(None)


def barrier() -> None:
    """Wait for the other processes of a run; one that was asked to end is not waited for, but followed.

    Raises:
        Interrupted: a process was asked to end.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    _meet(signals.check)


def together() -> None:
    """Wait for the other processes of a run; if any was asked to end, all end here, otherwise all continue.

    For whoever does with the others what cannot be done without one of them. Unlike at a :func:`barrier`, nobody leaves
    before all are here: who works item by item looks (:func:`signals.look`) after each, and comes here.

    Raises:
        Interrupted: a process was asked to end.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        signals.check()
        return
    _meet(signals.look)
    if number := max(gathered(signals.asked())):  # what comes later waits for the next time
        signals.ask(number)
        signals.stop()


def _meet(meanwhile: Callable[[], object]) -> None:
    """Wait until all processes are here, and do something now and then."""
    devices = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
    work = dist.barrier(async_op=True, device_ids=devices)
    assert work is not None
    while not work.is_completed():
        meanwhile()
        time.sleep(_POLLED_SECONDS)
    work.wait()
