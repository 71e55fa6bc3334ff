# SPDX-License-Identifier: Apache-2.0
"""Results that survive a kill: every process appends lines to a shard of its own, and the shards become one file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tts_align.utils.files import json_line, naming, read_json_lines, write_json_lines

KEY = "made_with"
"""Column that holds the digest of the settings a row was made with."""


def digest(*settings: object) -> str:
    """A short name for settings: equal if and only if all of them are."""
    return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()


class Shards:
    """The rows of a command on their way to one file.

    Args:
        out: the final file. Shards lie in a directory beside it until it is complete.
        key: of the settings; rows made with others are never mixed with these.
        ids: all rows there will be, in their order.
        rank: number of this process.
        world: how many processes there are.
        overwrite: replace a final file made with other settings.

    Raises:
        ValueError: ``out`` holds rows made with other settings.
    """

    def __init__(
        self, out: Path, key: str, ids: Sequence[str], rank: int = 0, world: int = 1, overwrite: bool = False
    ) -> None:
        if len(set(ids)) != len(ids):
            twice = next(name for number, name in enumerate(ids) if name in ids[:number])
            raise ValueError(f"utterance {twice!r} would appear twice in {out}")
        self.out, self.key, self.ids, self.world = Path(out), key, list(ids), world
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.shard = self.folder / f"{key}-{rank}.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        self._whole = False
        if self.out.exists():
            self._read(self.out)
            if not self.rows and not overwrite:
                raise ValueError(f"{out} was made with other settings or inputs: choose another file, or overwrite it")
        self.refresh()

    def refresh(self) -> None:
        """Read what all processes have written so far."""
        for path in sorted(self.folder.glob(f"{self.key}-*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        wanted = set(self.ids)
        for _, row in read_json_lines(path, cut_tail=True):
            if row.get(KEY) != self.key or row.get("id") not in wanted:
                continue
            if not row.get("error") or row["id"] not in self.rows:  # what failed once may have worked since
                self.rows[row["id"]] = row

    @property
    def missing(self) -> list[str]:
        """Rows that nobody has made yet, in order."""
        return [name for name in self.ids if name not in self.rows]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished rows to this process's shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._whole:  # only an earlier process can have left half a line
            _drop_cut_line(self.shard)
            self._whole = True
        keyed = [row | {KEY: self.key} for row in rows]
        with naming(self.shard), self.shard.open("a", encoding="utf-8") as file:
            file.write("".join(map(json_line, keyed)))
        self.rows |= {row["id"]: row for row in keyed}

    def merge(self, barrier: Callable[[], None] | None = None, rank: int = 0) -> bool:
        """Write the final file once every row is there, and remove the shards.

        Args:
            barrier: waits for the other processes; without it whoever finds everything complete writes.
            rank: with a barrier process 0 writes.

        Returns:
            Whether the final file is complete; without a barrier other processes may still be at work.

        Raises:
            ValueError: rows are missing although all processes have ended.
        """
        if barrier is not None:
            barrier()
        self.refresh()
        missing = self.missing
        if not missing and (barrier is None or rank == 0):
            write_json_lines(self.out, (self.rows[name] for name in self.ids))
        if barrier is not None:
            barrier()  # before anything is raised: nobody waits for a process that has ended
        alone = self.world == 1 if barrier is None else rank == 0
        if missing and alone:
            raise ValueError(
                f"{self.out} is not complete: {len(missing)} of {len(self.ids)} rows are missing, {missing[0]} first. "
                f"All processes have ended, so {self.folder} must be one folder for all of them: give --out as an "
                "absolute path on a disk they share; on a slow network disk give the same command again"
            )
        if not missing and alone and self.folder.exists():
            shutil.rmtree(self.folder)
        return not missing


def _drop_cut_line(path: Path) -> None:
    """Cut off a last line that its writer did not finish."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
