# SPDX-License-Identifier: Apache-2.0
"""Folders of recognisers: what must be in one, where to fetch it, and a digest of what decides its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from tts_align.evaluation.measures.base import file_digest
from tts_align.utils.shards import digest


class MissingWeightsError(FileNotFoundError):
    """A recogniser's folder or one of its files is not there; the message says what to fetch."""

    def __str__(self) -> str:
        return str(self.args[0])


def check_folder(folder: Path, wanted: Sequence[Sequence[str]], hub_ids: Sequence[str], option: str) -> None:
    """Refuse a folder in which files of a recogniser are missing.

    Args:
        folder: where the weights should be.
        wanted: groups of patterns; of each group one file must be there.
        hub_ids: models of Hugging Face that have them all.
        option: of the recipe that names the folder.

    Raises:
        MissingWeightsError: what is missing, where it can be fetched and where it belongs.
    """
    missing = [" or ".join(group) for group in wanted if not any(any(folder.glob(pattern)) for pattern in group)]
    if folder.is_dir() and not missing:
        return
    fault = f"lacks {', '.join(missing)}" if folder.is_dir() else "is not there"
    fetch = "\n".join(f"  hf download {name} --local-dir {folder}" for name in hub_ids)
    raise MissingWeightsError(
        f"the folder {folder} of a recogniser {fault}. Weights are never fetched by themselves; fetch them with\n"
        f"{fetch}\nor with any other such model, and name the folder in {option}"
    )


def files_digest(paths: Iterable[Path]) -> str:
    """One digest of the content of files, whatever folder they lie in."""
    found = []
    for path in sorted(paths, key=lambda path: path.name):
        state = path.stat()
        found.append((path.name, _digest(str(path.resolve()), state.st_size, state.st_mtime_ns)))
    return digest(found)


@lru_cache(maxsize=256)
def _digest(path: str, size: int, changed: int) -> str:  # what a file's content is remembered by
    return file_digest(Path(path))
