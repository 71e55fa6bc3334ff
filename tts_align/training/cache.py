# SPDX-License-Identifier: Apache-2.0
"""Numbers of frozen models, one per token, computed once and kept.

A file of numbers is named by everything that changes them: the weights of the model, the precision and the rule for
what is a target. Each row in it is named by its tokens and layout. So a change of learning rate, shuffle or batch size
keeps the file, new data add rows to it, and other weights get another file.

The numbers stay in their files (see :mod:`~tts_align.training.numbers`), however many rows there are. Where several
processes work, the first one decides what is stored and tells the others: on a network disk, or with a working
directory of their own, they may not see the same files. What a process has computed goes to a part of the file of its
own every half minute, so a kill loses little; a signal ends all of them after the batch in which it came.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tts_align.batch import Rows
from tts_align.models.base.layout import Layout, TokenRow, collate
from tts_align.training.numbers import Columns, Names, Numbers, StoredNumbers, key_of, names_of, write_numbers
from tts_align.utils import agreement, signals
from tts_align.utils.distributed import agreed, gathered
from tts_align.utils.progress import bar

TARGET_RULE = "speech, fill and end-of-speech tokens"
"""What the numbers stand for; a change of rule makes another file."""
CHECKED_ROWS = 4
KEPT_EVERY_SECONDS = 30.0
"""How often a process writes down what it has computed."""
KEPT_EVERY_BYTES = 2**26
"""How many bytes it computes before it writes them down, too."""
BATCH_TOKENS = 16384
"""Positions of a batch that is scored, about."""
TOLERANCE = 1e-3
"""Largest difference between a stored and a recomputed number."""
TOLERANCE_HALF = 0.25
"""The same under 16-bit autocast, where a number depends more on what else is in the batch."""

ScoreRows = Callable[[Rows], Float[Tensor, "r t"]]
Places = NDArray[np.int64]


class StaleCacheError(ValueError):
    """Stored numbers are not what the model says."""


class TokenCache:
    """Numbers per row and token, in one safetensors file that is looked at where it lies.

    Args:
        folder: where the file lies.
        kind: first part of its name.
        identity: everything that changes the numbers, by name.
    """

    def __init__(self, folder: Path, kind: str, identity: Mapping[str, str]) -> None:
        self.identity = dict(sorted({**identity, "targets": TARGET_RULE}.items()))
        name = hashlib.blake2b(json.dumps(self.identity).encode(), digest_size=8).hexdigest()
        self.path = Path(folder) / f"{kind}-{name}.safetensors"
        self.numbers = StoredNumbers()

    @classmethod
    def read(cls, path: Path, needed: Iterable[str], everywhere: bool = False) -> TokenCache:
        """Read a file whatever made it.

        Args:
            path: the file.
            needed: keys of the rows it must hold.
            everywhere: called in every process, of which the first one's view counts.

        Raises:
            StaleCacheError: it is missing or broken, or lacks some of the rows.
        """
        cache, fault = cls(path.parent, path.stem, {}), ""
        cache.path = path
        try:
            cache._read_whole(needed)
        except StaleCacheError as error:
            if not everywhere:
                raise
            fault = str(error)
        if everywhere:
            cache._agree(fault, names_of(()))
        return cache

    def _read_whole(self, needed: Iterable[str]) -> None:
        if not self.path.exists():
            raise StaleCacheError(f"no numbers at {self.path}: check model.contrast.weights")
        self.numbers, self.identity = _read(self.path)
        if missing := int((~self.numbers.holds(names_of(needed))).sum()):
            raise StaleCacheError(
                f"{self.path} lacks {missing} of the rows: it was made for other data; leave model.contrast.weights out"
            )

    def load(self) -> None:
        """Read the file, if there is one.

        Raises:
            StaleCacheError: the file is broken or not ours; the message says what to delete.
        """
        if not self.path.exists():
            return
        self.numbers, identity = _read(self.path)
        if identity != self.identity:
            raise StaleCacheError(f"{self.path} holds numbers of something else: delete it")

    def save(self) -> None:
        """Write the file, all of it or nothing, and remove its parts."""
        write_numbers(self.path, self.numbers, self.identity)
        self.numbers = _read(self.path)[0]
        shutil.rmtree(self._parts, ignore_errors=True)

    @property
    def _parts(self) -> Path:
        """Folder of what processes have computed and nobody has put together yet."""
        return self.path.with_name(f"{self.path.name}.parts")

    def gather(self, keys: Sequence[str], width: int) -> Float[Tensor, "r t"]:
        """Numbers of rows, padded with 0 on the right, on the CPU."""
        padded = np.zeros((len(keys), width), np.float32)
        for row, values in enumerate(self.numbers.of(keys)):
            padded[row, : len(values)] = values
        return torch.from_numpy(padded)

    def ensure(
        self,
        rows: Mapping[str, TokenRow],
        score: ScoreRows,
        layout: Layout,
        what: str,
        device: torch.device | str = "cpu",
        tolerance: float = TOLERANCE,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Load what is stored, recompute a few of it, and compute what is missing, shared over the ranks.

        Args:
            rows: what is needed, by key.
            score: numbers of collated rows, without gradient.
            layout: of the model.
            what: is computed, for the progress bar.
            device: where ``score`` wants its rows.
            tolerance: between stored and recomputed numbers.
            rank: of this process.
            world: number of processes.

        Raises:
            StaleCacheError: a recomputed number differs.
            Interrupted: this process, or one of the others, was asked to end; all end, and resume.
        """
        done, names = self._load_everywhere(), names_of(rows)
        held = self.numbers.holds(names)
        stored = np.flatnonzero(held)
        few = stored[:: max(len(stored) // CHECKED_ROWS, 1)][:CHECKED_ROWS]
        self.check(_chosen(rows, names[few]), score, layout, device, tolerance)
        # Batches are cut as if no part of them were done, so that a resumed fill computes the same numbers.
        missing = np.flatnonzero(~held | np.isin(names, done))
        if held[missing].all():
            if len(missing) and rank == 0:
                self.save()
            return
        counts = np.fromiter((layout.input_count(rows[key_of(names[one])]) for one in missing), np.int64, len(missing))
        order = np.lexsort((names[missing], counts))[rank::world]
        cut = (missing[order[batch]] for batch in _batches(counts[order]))
        todo = [names[batch] for batch in cut if not held[batch].all()]
        with signals.finishing():
            computed = self._compute(todo, rows, score, layout, device, what, rank)
            agreement.together()
            self._exchange(computed, rank)
            self.numbers.replace(computed)
            if rank == 0:
                self.save()
            agreement.together()  # nobody looks for the file before it is there
        if rank != 0:
            self._look_again()

    def _compute(
        self,
        batches: Sequence[Names],
        rows: Mapping[str, TokenRow],
        score: ScoreRows,
        layout: Layout,
        device: torch.device | str,
        what: str,
        rank: int,
    ) -> StoredNumbers:
        """This process's numbers, up to the batch in which any was asked to end; what is done is kept."""
        computed, kept = StoredNumbers(), time.monotonic()

        def keep() -> None:
            computed.spill(self._parts / f"{rank}-{time.time_ns()}.safetensors", self.identity)

        try:
            with bar(sum(map(len, batches)), 0, what, rank, unit="row", leave=False) as shown:
                for names in batches:
                    batch = _chosen(rows, names)
                    computed.update(zip(batch, _score_batch(batch, score, layout, device), strict=True))
                    shown.advance(len(batch))
                    if time.monotonic() - kept >= KEPT_EVERY_SECONDS or computed.fresh_bytes >= KEPT_EVERY_BYTES:
                        keep()
                        kept = time.monotonic()
                    if signals.look():
                        break
        finally:
            keep()
        return computed

    def _exchange(self, computed: StoredNumbers, rank: int) -> None:
        """Tell the others what this process has computed, and hear what they have, some megabytes at a time."""
        mine = computed.chunks()
        while any(parts := gathered(next(mine, None))):
            for number, part in enumerate(parts):
                if part is not None and number != rank:
                    self._receive(part)

    def _receive(self, part: Columns) -> None:
        """Take over numbers of another process, in a file as soon as they are many."""
        for place, name in enumerate(part.names):
            self.numbers[key_of(name)] = part[place]
        if self.numbers.fresh_bytes >= KEPT_EVERY_BYTES:
            self.numbers.spill_nameless(self.path.parent)

    def _look_again(self) -> None:
        """Look at the file that the first process has written, if this one sees it, and let go of anything else."""
        try:
            found, identity = _read(self.path)
        except StaleCacheError:
            return
        if identity == self.identity and np.array_equal(found.names, self.numbers.names):
            self.numbers = found

    def _load_everywhere(self) -> Names:
        """Load what the first process finds, in every process; returns what is in parts only, so far.

        Raises:
            StaleCacheError: the first process finds a file that is broken or not ours.
        """
        fault, done = "", names_of(())
        try:
            self.load()
            done = self._load_parts()
        except StaleCacheError as error:
            fault = str(error)
        return self._agree(fault, done)

    def _agree(self, fault: str, done: Names) -> Names:
        """Take over what the first process has read, or its fault, where it is not what this one has read."""
        views = gathered((fault, _digest(self.numbers.names), _digest(done)))
        if views[0][0]:
            raise StaleCacheError(views[0][0])
        if any(view != views[0] for view in views):
            first, told = dist.get_rank() == 0, self.numbers.chunks()
            self.identity, done = agreed((self.identity, done))
            if not first:
                self.numbers = StoredNumbers()
            while (part := agreed(next(told, None) if first else None)) is not None:
                if not first:
                    self._receive(part)
        return done

    def _load_parts(self) -> Names:
        """Read what an earlier fill has left."""
        before = self.numbers.names
        for path in sorted(self._parts.glob("[0-9]*.safetensors")):
            numbers, identity = _read(path)
            if identity == self.identity:
                for part in numbers.settled():
                    self.numbers.append(part)
        return np.setdiff1d(self.numbers.names, before)

    def check(
        self,
        rows: Mapping[str, TokenRow],
        score: ScoreRows,
        layout: Layout,
        device: torch.device | str,
        tolerance: float,
    ) -> None:
        """Recompute rows and compare."""
        for keys, numbers in scored(rows, score, layout, device):
            for key, fresh in zip(keys, numbers, strict=True):
                kept = self.numbers[key]
                gap = float(np.abs(kept - fresh).max()) if kept.shape == fresh.shape else float("inf")
                if not gap <= tolerance:
                    raise StaleCacheError(
                        f"{self.path} does not hold what the model says (largest difference {gap:.3g}): delete it, "
                        "it will be computed again"
                    )


def _read(path: Path) -> tuple[StoredNumbers, dict[str, str]]:
    try:
        columns, identity = Columns.open(path)
    except (ValueError, OSError) as error:
        raise StaleCacheError(f"{path} is broken ({error}): delete it, it will be computed again") from None
    return StoredNumbers([columns]), identity


def _digest(names: Names) -> str:
    """Short name of a set of rows."""
    return hashlib.blake2b(names.tobytes(), digest_size=16).hexdigest()


def _chosen(rows: Mapping[str, TokenRow], names: Names) -> dict[str, TokenRow]:
    """Some of the rows."""
    return {key: rows[key] for key in map(key_of, names)}


def _batches(counts: Places, tokens: int | None = None) -> Iterator[slice]:
    """Cut rows, in their order, into batches of about ``tokens`` positions."""
    start = 0
    for place, count in enumerate(counts.tolist(), start=1):
        if (place - start) * count >= (tokens or BATCH_TOKENS) or place == len(counts):
            yield slice(start, place)
            start = place


def _score_batch(
    batch: Mapping[str, TokenRow], score: ScoreRows, layout: Layout, device: torch.device | str
) -> list[Numbers]:
    collated = collate(list(batch.values()), layout).to(device)
    values, lengths = score(collated).float().cpu().numpy(), collated.mask.sum(-1).tolist()
    return [values[i, :length].copy() for i, length in enumerate(lengths)]


def scored(
    rows: Mapping[str, TokenRow],
    score: ScoreRows,
    layout: Layout,
    device: torch.device | str,
    tokens: int | None = None,
) -> Iterator[tuple[list[str], list[Numbers]]]:
    """Score rows in batches of about ``tokens`` positions; yields keys and their numbers."""
    keys, counts = list(rows), np.array([layout.input_count(row) for row in rows.values()], np.int64)
    for batch in _batches(counts, tokens):
        some = {key: rows[key] for key in keys[batch]}
        yield list(some), _score_batch(some, score, layout, device)
