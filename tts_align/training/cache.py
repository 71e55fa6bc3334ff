# SPDX-License-Identifier: Apache-2.0
"""Numbers of frozen models, one per token, computed once and kept.

A file of numbers is named by everything that changes them: the weights of the model, the precision and the rule for
what is a target. Each row in it is named by its tokens and layout. So a change of learning rate, shuffle or batch size
keeps the file, new data add rows to it, and other weights get another file.
"""

from __future__ import annotations

import hashlib
import json
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
from tts_align.utils.files import written_atomically
from tts_align.utils.progress import bar

TARGET_RULE = "speech, fill and end-of-speech tokens"
"""What the numbers stand for; a change of rule makes another file."""
CHECKED_ROWS = 4
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
    def read(cls, path: Path, needed: Iterable[str]) -> TokenCache:
        """Read a file whatever made it.

        Args:
            path: the file.
            needed: keys of the rows it must hold.

        Raises:
            StaleCacheError: it is missing or broken, or lacks some of the rows.
        """
        if not path.exists():
            raise StaleCacheError(f"no numbers at {path}: check model.contrast.weights")
        cache = cls(path.parent, path.stem, {})
        cache.path = path
        cache.numbers, cache.identity = _read(path)
        missing = [key for key in needed if key not in cache.numbers]
        if missing:
            raise StaleCacheError(
                f"{path} lacks {len(missing)} of the rows: it was made for other data; leave model.contrast.weights out"
            )
        return cache

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
        """Write the file, all of it or nothing."""
        keys = sorted(self.numbers)
        lengths = [len(self.numbers[key]) for key in keys]
        arrays: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), -1),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "values": np.concatenate([self.numbers[key] for key in keys]),
        }
        with written_atomically(self.path) as scratch:
            save_file(arrays, scratch, metadata={"identity": json.dumps(self.identity)})

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
        packed: bool = False,
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
            packed: collate several rows to a bin.
            tolerance: between stored and recomputed numbers.
            rank: of this process.
            world: number of processes.

        Raises:
            StaleCacheError: a recomputed number differs.
        """
        self.load()
        stored = [key for key in rows if key in self.numbers]
        few = stored[:: max(len(stored) // CHECKED_ROWS, 1)][:CHECKED_ROWS]
        self.check({key: rows[key] for key in few}, score, layout, device, packed, tolerance)
        missing = {key: row for key, row in rows.items() if key not in self.numbers}
        if not missing:
            return
        order = sorted(missing, key=lambda key: (layout.input_count(missing[key]), key))
        mine = {key: missing[key] for key in order[rank::world]}
        computed: dict[str, Numbers] = {}
        with bar(len(mine), 0, what, rank, unit="row", leave=False) as shown:
            for keys, numbers in scored(mine, score, layout, device, packed):
                computed.update(zip(keys, numbers, strict=True))
                shown.advance(len(keys))
        for part in _from_all_ranks(computed, world):
            self.numbers.update(part)
        if rank == 0:
            self.save()

    def check(
        self,
        rows: Mapping[str, TokenRow],
        score: ScoreRows,
        layout: Layout,
        device: torch.device | str,
        packed: bool,
        tolerance: float,
    ) -> None:
        """Recompute rows and compare."""
        for keys, numbers in scored(rows, score, layout, device, packed):
            for key, fresh in zip(keys, numbers, strict=True):
                kept = self.numbers[key]
                gap = float(np.abs(kept - fresh).max()) if kept.shape == fresh.shape else float("inf")
                if not gap <= tolerance:
                    raise StaleCacheError(
                        f"{self.path} does not hold what the model says (largest difference {gap:.3g}): delete it, "
                        "it will be computed again"
                    )


def _read(path: Path) -> tuple[dict[str, Numbers], dict[str, str]]:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            keys, offsets, values = (file.get_tensor(name) for name in ("keys", "offsets", "values"))
    except (SafetensorError, OSError) as error:
        raise StaleCacheError(f"{path} is broken ({error}): delete it, it will be computed again") from None
    numbers = {key.tobytes().hex(): values[offsets[row] : offsets[row + 1]] for row, key in enumerate(keys)}
    return numbers, json.loads(metadata.get("identity", "{}"))


def scored(
    rows: Mapping[str, TokenRow],
    score: ScoreRows,
    layout: Layout,
    device: torch.device | str,
    packed: bool,
    tokens: int = 16384,
) -> Iterator[tuple[list[str], list[Numbers]]]:
    """Score rows in batches of about so many tokens; yields keys and their numbers."""
    batch: list[str] = []
    for position, (key, row) in enumerate(rows.items(), start=1):
        batch.append(key)
        if len(batch) * layout.input_count(row) < tokens and position < len(rows):
            continue
        collated = collate([rows[one] for one in batch], layout, packed).to(device)
        values, lengths = score(collated).float().cpu().numpy(), collated.mask.sum(-1).tolist()
        yield batch, [values[i, :length].copy() for i, length in enumerate(lengths)]
        batch = []


def _from_all_ranks(mine: dict[str, Numbers], world: int) -> list[dict[str, Numbers]]:
    if world == 1:
        return [mine]
    parts: list[dict[str, Numbers]] = [{} for _ in range(world)]
    dist.all_gather_object(parts, mine)
    return parts
