# SPDX-License-Identifier: Apache-2.0
"""What is in progress is finished, then the process ends with 128 plus the signal's number."""

import os
import signal
from collections.abc import Callable

import pytest

from tts_align.cli.errors import plain_errors
from tts_align.utils import signals
from tts_align.utils.signals import Interrupted, at_once, check, finishing, handled


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def interrupted(work: Callable[[], None]) -> Interrupted:
    """Work as a command works, and give the way it ended."""

    def command() -> None:
        with handled():
            work()

    with pytest.raises(Interrupted) as raised:
        command()
    return raised.value


@pytest.mark.parametrize("number", signals.HANDLED)
def test_outside_of_an_item_it_ends_at_once(number: int) -> None:
    def work() -> None:
        send(number)
        pytest.fail("went on")

    before = signal.getsignal(number)
    end = interrupted(work)
    assert end.code == 128 + number
    assert str(end) == f"interrupted by {signal.Signals(number).name}"
    assert signal.getsignal(number) is before
    check()  # nothing is left of it


def test_an_item_is_finished_first() -> None:
    done = []

    def work() -> None:
        with finishing():
            for item in range(5):
                if item == 2:
                    send()
                    send()  # once more, as whoever stops a whole group does
                done.append(item)
                check()

    assert interrupted(work).code == 143
    assert done == [0, 1, 2]


def test_a_library_that_is_interrupted_while_it_is_loaded_has_no_fault() -> None:
    """Compiled ones turn what ends them into an error of import of their own."""

    def work() -> None:
        with plain_errors(faults=True):
            try:
                send(signal.SIGINT)
            except Interrupted:
                raise ImportError("initialization failed") from None

    assert interrupted(work).code == 130
    with pytest.raises(SystemExit) as raised, handled(), plain_errors(faults=True):
        raise ImportError("initialization failed")
    assert raised.value.code == 1


def test_without_a_check_the_end_of_the_block_is_one() -> None:
    done = []

    def work() -> None:
        with finishing():
            send(signal.SIGINT)
            done.append(1)
        done.append(2)

    assert interrupted(work).code == 130
    assert done == [1]


def test_a_second_signal_later_ends_it_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with finishing():
            send()
            send()
            pytest.fail("went on")

    monkeypatch.setattr(signals, "_AGAIN_SECONDS", 0.0)
    assert interrupted(work).code == 143


def test_within_an_item_a_part_may_end_at_once_and_others_are_told() -> None:
    told = []

    def work() -> None:
        signals.forward(told.append)
        with finishing(), at_once():
            send()
            pytest.fail("went on")

    assert interrupted(work).code == 143
    assert told == [signal.SIGTERM]


def test_what_another_process_was_asked_counts_here() -> None:
    def work() -> None:
        with finishing():
            signals.ask(0)
            check()
            signals.ask(signal.SIGTERM)
            check()

    assert interrupted(work).code == 143
