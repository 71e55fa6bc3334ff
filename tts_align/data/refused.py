# SPDX-License-Identifier: Apache-2.0
"""Rows that are left out, however many: written down as they are found, and read again in the order of the file."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections.abc import Iterator
from typing import IO


class Refused:
    """What is wrong with the rows of a manifest, on the disk."""

    def __init__(self) -> None:
        self.count = 0
        self._files: list[IO[str]] = []
        self._last = 0

    def add(self, row: int, where: str, what: str) -> None:
        """Note a row.

        Args:
            row: its number; those found later (such as repeated ids) begin anew once.
            where: file and line.
            what: is wrong with it.
        """
        if not self._files or row < self._last:
            self._files.append(tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogatepass"))  # noqa: SIM115
        self._last = row
        self._files[-1].write(json.dumps([row, where, what]) + "\n")
        self.count += 1

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Place and reasons of each, in the order of the rows."""
        for _, where, what in heapq.merge(*map(self._read, self._files)):
            yield {"where": where, "what": what}

    @staticmethod
    def _read(file: IO[str]) -> Iterator[tuple[int, str, str]]:
        file.seek(0)
        for line in file:
            row, where, what = json.loads(line)
            yield row, where, what

    def close(self) -> None:
        """Let go of the files."""
        while self._files:
            self._files.pop().close()
