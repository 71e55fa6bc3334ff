# SPDX-License-Identifier: Apache-2.0
"""What processes of one run tell each other of a signal; real ones are stopped in ``test_faults_campaign``."""

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from tts_align.utils import agreement, signals
from tts_align.utils.agreement import Agreement, EndedError


def test_a_signal_of_one_is_heard_by_all():
    store = dist.HashStore()
    one, other = Agreement(store, 2), Agreement(store, 2)
    assert other.asked(0) == 0
    assert one.asked(signal.SIGTERM) == signal.SIGTERM
    assert other.asked(0) == signal.SIGTERM


def test_who_was_asked_waits_for_the_others():
    store = dist.HashStore()
    both, ends = [Agreement(store, 2) for _ in range(2)], []

    def leave() -> None:
        both[0].leave(signal.SIGTERM)
        ends.append(time.monotonic())

    thread = threading.Thread(target=leave)
    thread.start()
    time.sleep(0.1)
    assert not ends
    both[1].leave(waits=False)
    thread.join(5)
    assert ends


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.05)
    Agreement(dist.HashStore(), 2).leave(signal.SIGTERM)


def test_a_store_whose_process_has_ended_is_named():
    class Gone(dist.Store):
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(EndedError, match="the first process of this run has ended: its own message says why"):
        Agreement(Gone(), 2).asked(0)
    Agreement(Gone(), 2).leave()  # nothing to wait for


def test_with_others_nothing_ends_before_a_check():
    done = []

    def work() -> None:
        signals.share(lambda number: number)
        with signals.finishing(), signals.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
            signals.check()
            done.append(2)

    with pytest.raises(signals.Interrupted), signals.handled():
        work()
    signals.share(None)
    assert done == [1]


def test_one_process_waits_for_nobody():
    with agreement.ending_together():
        agreement.barrier()
