# SPDX-License-Identifier: Apache-2.0
"""What a command that writes a file or a folder of its own makes sure of before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tts_align.utils.files import check_inside, remove_leftovers
from tts_align.utils.locks import lock_of, locked
from tts_align.utils.messages import first_process


@contextmanager
def writing(out: Path, command: str) -> Iterator[None]:
    """Within the block no other command writes the same file; its first process speaks for all.

    Args:
        out: what is written at the end; what killed commands left unfinished beside it is removed.
        command: that writes it.

    Raises:
        LockedError: another one is at work.
        ValueError: ``out`` is a directory, or its folder of work in progress leads elsewhere.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: name a file in it")
    if not first_process():
        yield
        return
    for name in (f"{out.name}.parts", f"{out.name}.work.parts"):
        check_inside(out.with_name(name), out.parent)
    with locked(lock_of(out), out, command, "out"):
        remove_leftovers(out.parent)
        remove_leftovers(out.with_name(f"{out.name}.audio"), deep=True)
        yield


@contextmanager
def writing_into(folder: Path, command: str) -> Iterator[None]:
    """Within the block no other command writes into the same folder; its first process speaks for all.

    Args:
        folder: need not exist; what killed commands left unfinished in it is removed.
        command: that writes there.

    Raises:
        LockedError: another one is at work.
    """
    if not first_process():
        yield
        return
    folder = Path(folder).absolute()
    with locked(lock_of(folder), folder, command, "out"):
        remove_leftovers(folder, deep=True)
        yield
