# SPDX-License-Identifier: Apache-2.0
"""Numbers of frozen models, one per token, computed once and kept.

A file of numbers is named by everything that changes them: the weights of the model, the precision and the rule for
what is a target. Each row in it is named by its tokens and layout. So a change of learning rate, shuffle or batch size
keeps the file, new data add rows to it, and other weights get another file.

Where several processes work, the first one decides what is stored and tells the others: on a network disk, or with a
working directory of their own, they may not see the same files. What a process has computed goes to a part of the file
of its own every half minute, so a kill loses little.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from tts_align.batch import Rows
from tts_align.models.base.layout import Layout, TokenRow, collate
from tts_align.utils.distributed import gathered
from tts_align.utils.files import written_atomically
from tts_align.utils.progress import bar

TARGET_RULE = "speech, fill and end-of-speech tokens"
"""What the numbers stand for; a change of rule makes another file."""
CHECKED_ROWS = 4
KEPT_EVERY_SECONDS = 30.0
"""How often a process writes down what it has computed."""
TOLERANCE = 1e-3
"""Largest difference between a stored and a recomputed number."""
TOLERANCE_HALF = 0.25
"""The same under 16-bit autocast, where a number depends more on what else is in the batch."""

ScoreRows = Callable[[Rows], Float[Tensor, "r t"]]
Numbers = NDArray[np.float32]


class StaleCacheError(ValueError):
    """Stored numbers are not what the model says."""


class TokenCache:
    """Numbers per row and token, in memory and in one safetensors file.

    Args:
        folder: where the file lies.
        kind: first part of its name.
        identity: everything that changes the numbers, by name.
    """

    def __init__(self, folder: Path, kind: str, identity: Mapping[str, str]) -> None:
        self.identity = dict(sorted({**identity, "targets": TARGET_RULE}.items()))
        name = hashlib.blake2b(json.dumps(self.identity).encode(), digest_size=8).hexdigest()
        self.path = Path(folder) / f"{kind}-{name}.safetensors"
        self.numbers: dict[str, Numbers] = {}

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
            cache._agree(fault, set())
        return cache

    def _read_whole(self, needed: Iterable[str]) -> None:
        if not self.path.exists():
            raise StaleCacheError(f"no numbers at {self.path}: check model.contrast.weights")
        self.numbers, self.identity = _read(self.path)
        if missing := [key for key in needed if key not in self.numbers]:
            raise StaleCacheError(
                f"{self.path} lacks {len(missing)} of the rows: it was made for other data; leave "
                "model.contrast.weights out"
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
        _write(self.path, self.numbers, self.identity)
        shutil.rmtree(self._parts, ignore_errors=True)

    @property
    def _parts(self) -> Path:
        """Folder of what processes have computed and nobody has put together yet."""
        return self.path.with_name(f"{self.path.name}.parts")

    def gather(self, keys: Sequence[str], width: int) -> Float[Tensor, "r t"]:
        """Numbers of rows, padded with 0 on the right, on the CPU."""
        padded = np.zeros((len(keys), width), np.float32)
        for row, key in enumerate(keys):
            values = self.numbers[key]
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
        """
        done = self._load_everywhere()
        stored = [key for key in rows if key in self.numbers]
        few = stored[:: max(len(stored) // CHECKED_ROWS, 1)][:CHECKED_ROWS]
        self.check({key: rows[key] for key in few}, score, layout, device, tolerance)
        # Batches are cut as if no part of them were done, so that a resumed fill computes the same numbers.
        missing = {key: row for key, row in rows.items() if key not in self.numbers or key in done}
        if all(key in self.numbers for key in missing):
            if missing and rank == 0:
                self.save()
            return
        order = sorted(missing, key=lambda key: (layout.input_count(missing[key]), key))
        batches = _batches({key: missing[key] for key in order[rank::world]}, layout)
        todo = [batch for batch in batches if any(key not in self.numbers for key in batch)]
        for part in gathered(self._compute(todo, score, layout, device, what, rank)):
            self.numbers.update(part)
        if rank == 0:
            self.save()
        gathered(None)  # nobody looks for the file before it is there

    def _compute(
        self,
        batches: Sequence[Mapping[str, TokenRow]],
        score: ScoreRows,
        layout: Layout,
        device: torch.device | str,
        what: str,
        rank: int,
    ) -> dict[str, Numbers]:
        """This process's numbers; what is done is kept when it ends before its time, or has to wait for others."""
        computed: dict[str, Numbers] = {}
        kept = [0, time.monotonic()]
        total = sum(map(len, batches))

        def keep() -> None:
            part = dict(list(computed.items())[int(kept[0]) :])
            if part:
                _write(self._parts / f"{rank}-{time.time_ns()}.safetensors", part, self.identity)
            kept[:] = len(computed), time.monotonic()

        try:
            with bar(total, 0, what, rank, unit="row", leave=False) as shown:
                for batch in batches:
                    computed.update(zip(batch, _score_batch(batch, score, layout, device), strict=True))
                    shown.advance(len(batch))
                    if time.monotonic() - kept[1] >= KEPT_EVERY_SECONDS:
                        keep()
        except BaseException:
            keep()
            raise
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            keep()
        return computed

    def _load_everywhere(self) -> set[str]:
        """Load what the first process finds, in every process; returns what is in parts only, so far.

        Raises:
            StaleCacheError: the first process finds a file that is broken or not ours.
        """
        fault, done = "", set[str]()
        try:
            self.load()
            done = self._load_parts()
        except StaleCacheError as error:
            fault = str(error)
        return self._agree(fault, done)

    def _agree(self, fault: str, done: set[str]) -> set[str]:
        """Take over what the first process has read, or its fault, where it is not what this one has read."""
        views = gathered((fault, _names(self.numbers), _names(done)))
        if views[0][0]:
            raise StaleCacheError(views[0][0])
        if any(view != views[0] for view in views):
            found: list[Any] = [(self.identity, self.numbers, done)]
            dist.broadcast_object_list(found, src=0)
            self.identity, self.numbers, done = found[0]
        return done

    def _load_parts(self) -> set[str]:
        """Read what an earlier fill has left."""
        done: set[str] = set()
        for path in sorted(self._parts.glob("[0-9]*.safetensors")):
            numbers, identity = _read(path)
            if identity == self.identity:
                done |= numbers.keys() - self.numbers.keys()
                self.numbers = numbers | self.numbers
        return done

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


def _write(path: Path, numbers: Mapping[str, Numbers], identity: Mapping[str, str]) -> None:
    keys = sorted(numbers)
    lengths = [len(numbers[key]) for key in keys]
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), -1),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "values": np.concatenate([numbers[key] for key in keys]),
    }
    with written_atomically(path) as scratch:
        save_file(arrays, scratch, metadata={"identity": json.dumps(identity)})


def _read(path: Path) -> tuple[dict[str, Numbers], dict[str, str]]:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            keys, offsets, values = (file.get_tensor(name) for name in ("keys", "offsets", "values"))
    except (SafetensorError, OSError) as error:
        raise StaleCacheError(f"{path} is broken ({error}): delete it, it will be computed again") from None
    numbers = {key.tobytes().hex(): values[offsets[row] : offsets[row + 1]] for row, key in enumerate(keys)}
    return numbers, json.loads(metadata.get("identity", "{}"))


def _names(keys: Iterable[str]) -> str:
    """Short name of a set of rows."""
    return hashlib.blake2b("".join(sorted(keys)).encode(), digest_size=16).hexdigest()


def _batches(rows: Mapping[str, TokenRow], layout: Layout, tokens: int = 16384) -> Iterator[dict[str, TokenRow]]:
    """Cut rows, in their order, into batches of about so many tokens."""
    batch: dict[str, TokenRow] = {}
    for position, (key, row) in enumerate(rows.items(), start=1):
        batch[key] = row
        if len(batch) * layout.input_count(row) >= tokens or position == len(rows):
            yield batch
            batch = {}


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
    tokens: int = 16384,
) -> Iterator[tuple[list[str], list[Numbers]]]:
    """Score rows in batches of about so many tokens; yields keys and their numbers."""
    for batch in _batches(rows, layout, tokens):
        yield list(batch), _score_batch(batch, score, layout, device)
