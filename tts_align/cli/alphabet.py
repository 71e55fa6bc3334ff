# SPDX-License-Identifier: Apache-2.0
"""``characters: auto``: the alphabet of a new reward model, taken from the transcripts of the rows it learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from tts_align.cli.places import FILL_IN
from tts_align.models.reward.config import AUTO, collect_characters
from tts_align.utils.files import read_config
from tts_align.utils.model_directory import CONFIG

if TYPE_CHECKING:
    from tts_align.data.records import Row

_CHARACTERS = "model.reward.init_args.sizes.characters"
_STORED = ("reward/model", "model")
"""Where a run keeps a reward model that it has trained."""
_NEEDLESS = ("sample", "judge", "export")
"""Commands to which a new reward model is only a part of the recipe: rows that cannot be read are no hindrance."""


def with_alphabet(recipe: Namespace, run: Path, command: str) -> Namespace:
    """The recipe with ``characters: auto`` filled in; the recipe itself if it does not say so.

    A run that has trained its reward model keeps the alphabet with the model, so it stays the same when the manifest
    grows. Otherwise every character of the transcripts in ``data.manifest`` and ``model.reward_fit.manifest`` is
    taken: what a recogniser heard, or the text where the speech is good.

    Args:
        recipe: as parsed for one command; not changed.
        run: directory of the run.
        command: what it was parsed for.

    Raises:
        ValueError: the manifest holds no transcript.
    """
    if recipe.get(_CHARACTERS) != AUTO:
        return recipe
    filled = recipe.clone()
    filled[_CHARACTERS] = _stored(run) or _of_manifests(recipe, command)
    return filled


def _stored(run: Path) -> str | None:
    for place in _STORED:
        if (run / place / CONFIG).is_file():
            return read_config(run / place / CONFIG).get("characters")
    return None


def _of_manifests(recipe: Namespace, command: str) -> str:
    from tts_align.data.manifest import read_manifest

    named: list[Any] = [recipe.get("data.manifest"), recipe.get("model.reward_fit.manifest")]
    manifests = [path for path in named if path is not None and path not in FILL_IN]
    if not manifests and command in _NEEDLESS:
        return "?"
    found: set[str] = set()
    for path in manifests:
        # The run's own folder is not claimed yet, so what a large manifest becomes lies elsewhere, and only meanwhile.
        with TemporaryDirectory(prefix="tts-align-") as folder:
            on_bad_row: Any = recipe.get("data.on_bad_row") or "stop"
            manifest = read_manifest(path, on_bad_row, check_audio=False, folder=Path(folder))
            for text in _transcripts(manifest.rows):
                found.update(text)
    if not found:
        raise ValueError(
            f"{_CHARACTERS} is {AUTO}, but no row of {' and '.join(map(str, manifests)) or 'data.manifest'} has a "
            "transcript: give the characters, or rows with a text"
        )
    return collect_characters(found)


def _transcripts(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows say; see :class:`tts_align.data.select.LabelledUtterance`."""
    from tts_align.data.table.columns import BAD, from_rest
    from tts_align.data.table.rows import RowTable

    table = rows if isinstance(rows, RowTable) else RowTable.of(rows)
    for text, transcript, label, rest in table.columns("text", "transcript", "label", "rest"):
        heard = from_rest(rest).get("notes", {}).get("transcript")
        if heard is not None:
            yield heard
        elif label != BAD:
            yield transcript or text
