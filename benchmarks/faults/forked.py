# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own that need not load the libraries again: copies of one that has loaded them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HUNG_SECONDS = 120.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: its exit status; minus the number of the signal that killed it.
        seconds: that it took.
        out: what it printed.
        err: what it complained about.
    """

    code: int
    seconds: float
    out: str
    err: str

    @property
    def traceback(self) -> bool:
        """Whether a person would see one."""
        return "Traceback (most recent call last)" in self.err

    @property
    def message(self) -> str:
        """The error, without what libraries say before it."""
        return self.err.partition("tts-align: error: ")[2]


def preload() -> None:
    """Load what commands load, with one thread: a copy of a process has only one of its threads."""
    import torch

    torch.set_num_threads(1)
    import lightning.pytorch
    import pyarrow.parquet
    import safetensors.torch
    import soundfile
    import tensorboard
    import torchaudio

    import tts_align.cli.export
    import tts_align.cli.judge
    import tts_align.cli.label
    import tts_align.cli.lightning
    import tts_align.cli.prepare
    import tts_align.cli.sample
    import tts_align.cli.score
    import tts_align.training.stages

    assert all((lightning.pytorch, pyarrow.parquet, safetensors.torch, soundfile, tensorboard, torchaudio, tts_align))


class Started:
    """A command at work in a process of its own.

    Args:
        args: its command line.
        folder: where it runs.
        environment: changes of its environment.
        before: called in the process before the command.
    """

    def __init__(
        self,
        args: Sequence[str],
        folder: Path,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.logs = [folder.parent / f".{folder.name}.{name}" for name in ("out", "err")]
        self.begun = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            self._run(args, folder, environment or {}, before)

    def _run(
        self, args: Sequence[str], folder: Path, environment: dict[str, str], before: Callable[[], None] | None
    ) -> None:
        code = 70
        try:
            os.setsid()
            for number, path in enumerate(self.logs, start=1):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(handle, number)
            os.environ.update({"HF_HUB_OFFLINE": "1", **environment})
            os.chdir(folder)
            sys.argv = ["tts-align", *args]
            if before is not None:
                before()
            from tts_align.cli.entry import main

            main(list(args))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send a signal to the process and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, number)

    def wait(self, until: float | None = None) -> Ended | None:
        """Wait for its end, or until a moment; ``None`` if it is still at work then."""
        limit = self.begun + HUNG_SECONDS if until is None else until
        while True:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                seconds = time.monotonic() - self.begun
                return Ended(os.waitstatus_to_exitcode(status), seconds, *(_read(path) for path in self.logs))
            if time.monotonic() > limit:
                if until is None:
                    self.send(signal.SIGKILL)
                    raise TimeoutError(f"still at work after {HUNG_SECONDS:.0f} s: {_read(self.logs[1])[-500:]}")
                return None
            time.sleep(0.002)


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def forked(
    args: Sequence[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
    signal_after: tuple[float, int] | None = None,
) -> Ended:
    """Run a command to its end, or send it a signal some seconds after its start.

    Args:
        args: its command line.
        folder: where it runs.
        environment: changes of its environment.
        before: called in the process before the command.
        signal_after: seconds, and the signal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = Started(args, folder, environment, before)
    if signal_after is not None:
        ended = started.wait(started.begun + signal_after[0])
        if ended is not None:
            return ended
        started.send(signal_after[1])
    ended = started.wait()
    assert ended is not None
    return ended
