# SPDX-License-Identifier: Apache-2.0
"""Stages of a build: each written whole, and skipped when it is there and nothing it depends on has changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.utils.files import directory_written_atomically, remove_leftovers, write_json
from tts_align.utils.readers import ReadError, read_json_object


@dataclass(frozen=True)
class Stages:
    """The finished stages of one build.

    Args:
        work: Where they lie.
        sound: Digest of the sound that all of them are made from.
    """

    work: Path
    sound: str

    def run(self, name: str, inputs: Sequence[Any], make: Callable[[Path], None]) -> None:
        """Run `make` on an empty directory unless its result is there and was made from the same inputs."""
        target, stamp = self.work / name, self.work / f"{name}.json"
        digest = _digest([*inputs, self.sound])
        if target.exists() and self._stamp(name).get("digest") == digest:
            print(f"{name}: already there")
            return
        remove_leftovers(self.work)
        start = time.monotonic()
        with directory_written_atomically(target, overwrite=True) as scratch:
            make(scratch)
        seconds = round(time.monotonic() - start, 1)
        write_json(stamp, {"digest": digest, "seconds": seconds})
        print(f"{name}: done in {seconds:.0f} s")

    def unfinished(self, name: str, inputs: Sequence[Any]) -> Path:
        """File for a stage that keeps a training to resume: another one for other inputs."""
        return self.work / f"{name}-{_digest([*inputs, self.sound])[:12]}.unfinished.pt"

    def seconds(self, names: Sequence[str]) -> dict[str, float]:
        """How long each stage took."""
        return {name: self._stamp(name).get("seconds", 0.0) for name in names}

    def _stamp(self, name: str) -> dict[str, Any]:
        """What a finished stage says of itself; a file that says nothing counts as none, and the stage is made anew."""
        try:
            return read_json_object(self.work / f"{name}.json")
        except (ReadError, FileNotFoundError):
            return {}


def _digest(inputs: Sequence[Any]) -> str:
    """Digest of anything whose `repr` tells all about it."""
    return hashlib.blake2b(repr(inputs).encode(), digest_size=16).hexdigest()
