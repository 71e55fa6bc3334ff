# SPDX-License-Identifier: Apache-2.0
"""The rows of one stage: what is finished is there when the same test is started again."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tts_align.utils.distributed import gathered
from tts_align.utils.files import write_json_lines
from tts_align.utils.shards import Shards

Row = Mapping[str, Any]


class StageStore:
    """Rows of one stage of one system, by the name of the utterance.

    Every process appends what it has finished; when all have, the first writes one file. Rows that were made with
    anything else (other weights, another judge, other sentences) have another key, and are not taken.

    Args:
        folder: of all stages.
        name: of the stage and the system.
        key: digest of everything the rows depend on.
        ids: all utterances of the test, in their order.
        mine: those that this process works on.
        rank: number of this process.
    """

    def __init__(self, folder: Path, name: str, key: str, ids: Sequence[str], mine: Sequence[str], rank: int) -> None:
        self.mine = list(mine)
        self.shards = Shards(folder / f"{name}.jsonl", key, ids, rank, overwrite=True)

    def get(self, name: str) -> Row | None:
        """Row of an utterance, if there is one."""
        return self.shards.rows.get(name)

    def wanted(self, batch: Sequence[str]) -> list[str]:
        """Which utterances of a batch are to be worked on.

        All of them if any has no row yet: a batch that was cut by a kill is made again as it was, to the last bit. Of
        those that all have rows, the ones that failed.
        """
        rows = [self.get(name) for name in batch]
        if any(row is None for row in rows):
            return list(batch)
        return [name for name, row in zip(batch, rows, strict=True) if row is not None and row.get("error")]

    def add(self, rows: Iterable[Row]) -> None:
        """Keep finished rows."""
        self.shards.append(dict(row) for row in rows)

    def finish(self, first: bool) -> dict[str, Row]:
        """Rows of all processes; all must call it. The first writes the file, if every row is there.

        Args:
            first: whether this process is the first.
        """
        own = {name: row for name in self.mine if (row := self.get(name)) is not None}
        joined = {name: row for part in gathered(own) for name, row in part.items()}
        if first and all(name in joined for name in self.shards.ids):
            write_json_lines(self.shards.out, (joined[name] for name in self.shards.ids))
            shutil.rmtree(self.shards.folder, ignore_errors=True)
        return joined
