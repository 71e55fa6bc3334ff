# SPDX-License-Identifier: Apache-2.0
"""The recordings of a source, from files or from inside shards, read ahead of whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from tts_align.data.cosyvoice import is_place, read_recordings
from tts_align.utils.audio import AudioError, decode_audio, load_audio

Given = TypeVar("Given")
Made = TypeVar("Made")
Loaded = dict[str, Tensor | AudioError]
"""By its name, the waveform of each recording, or why there is none."""


@dataclass(frozen=True)
class Limits:
    """Which recordings are taken.

    Args:
        max_seconds: longest one.
        min_seconds: shortest one.
        lowest_rate: lowest sample rate of the file, in Hz.
    """

    max_seconds: float = 30.0
    min_seconds: float = 0.1
    lowest_rate: int = 16000

    def __post_init__(self) -> None:
        """Refuse limits that no recording can meet."""
        if not 0 <= self.min_seconds < self.max_seconds:
            given = f"{self.min_seconds:g} and {self.max_seconds:g}"
            raise ValueError(f"min_seconds must be at least 0 and less than max_seconds, got {given}")


@dataclass(frozen=True)
class Recordings:
    """Reads recordings at one rate; what is wrong with one is handed on in its place.

    Args:
        start: what their paths start from.
        sample_rate: wanted, in Hz.
        limits: which are taken; silent ones always are.
        threads: that read at the same time.
    """

    start: Path
    sample_rate: int
    limits: Limits
    threads: int = 4

    def windows(self, names: Sequence[Sequence[str]]) -> Iterator[Loaded]:
        """The recordings of each group, read while the group before is worked on.

        Args:
            names: of the recordings of each group, each once; those inside a shard in its order over all groups, for
                a shard is read once from its beginning to its end.
        """
        embedded = read_recordings([name for name in chain.from_iterable(names) if is_place(name)])
        with ThreadPoolExecutor(self.threads) as pool:

            def load(group: Sequence[str]) -> Loaded:
                inside = [name for name in group if is_place(name)]
                content: dict[str, bytes | AudioError] = dict(islice(embedded, len(inside)))
                return dict(zip(group, pool.map(lambda name: self._load(name, content), group), strict=True))

            yield from ahead(load, names)

    def _load(self, name: str, content: dict[str, bytes | AudioError]) -> Tensor | AudioError:
        try:
            return self._read(name, content)
        except AudioError as error:
            return error

    def _read(self, name: str, content: dict[str, bytes | AudioError]) -> Tensor:
        limits = self.limits
        if not is_place(name):
            where = str(self.start / name)
            sound = load_audio(where, self.sample_rate, limits.max_seconds, limits.lowest_rate, silent=True)
        else:
            where, data = name, content[name]
            if isinstance(data, AudioError):
                raise data
            sound = decode_audio(data, name, self.sample_rate, limits.max_seconds, limits.lowest_rate, silent=True)
        seconds = len(sound) / self.sample_rate
        if seconds < limits.min_seconds:
            raise AudioError(where, f"lasts {seconds:.2f} s, expected at least {limits.min_seconds:g} s")
        return sound


def ahead(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """Results of a function, each made in another thread while the one before is used.

    Example:
        >>> list(ahead(abs, [-1, 2]))
        [1, 2]
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            coming = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
