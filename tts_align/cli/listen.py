# SPDX-License-Identifier: Apache-2.0
"""The commands of a listening test: make its page, read its answers, turn them into labels."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.data.manifest import write_manifest
from tts_align.evaluation.listening_test.answers import Sheet, read_key, read_sheets
from tts_align.evaluation.listening_test.design import Plan, draw
from tts_align.evaluation.listening_test.labels import HumanRule, LabelledRows
from tts_align.evaluation.listening_test.labels import label as make_labels
from tts_align.evaluation.listening_test.page import page
from tts_align.evaluation.listening_test.records import Key, ListeningTestError
from tts_align.evaluation.listening_test.results import Ties, summarise
from tts_align.evaluation.listening_test.screening import Rules, Screened, screen
from tts_align.evaluation.listening_test.sources import read_systems
from tts_align.evaluation.listening_test.tables import print_tables
from tts_align.evaluation.statistics.intervals import RESAMPLES
from tts_align.utils.assets import resolve
from tts_align.utils.files import check_not_source, write_json, written_atomically
from tts_align.utils.messages import say

log = logging.getLogger(__name__)
_NAMED = 10


@dataclass(frozen=True)
class Made:
    """A listening test on the disk.

    Args:
        page: HTML file for listeners.
        key: what they must not see.
        questions: number of questions that count, for one listener, in all kinds.
        left_out: utterances that are not asked about, with the reason.
    """

    page: Path
    key: Path
    questions: int
    left_out: tuple[str, ...]


def make(
    systems: Sequence[str],
    out: Path,
    sentences: str | None = None,
    key: Path | None = None,
    overwrite: bool = False,
    plan: Plan | None = None,
) -> Made:
    """Make a listening test: one HTML file that opens from the disk, and beside it the key that listeners must not see.

    Args:
        systems: recordings to compare: runs, scored folders, JSONL files of candidates that sample --audio wrote, or
            folders of sound files named after their sentences; each also as NAME=PATH.
        out: HTML file to write.
        sentences: sentences with texts and marked words, for recordings that come without; those of the run's recipe
            by default.
        key: JSON file to write that says which clip is whose; the name of the page with .key.json by default.
        overwrite: whether to replace a page and a key that are there.
        plan: what is asked, and how.
    """
    plan, out = plan or Plan(), Path(out)
    key = Path(key) if key is not None else out.with_suffix(".key.json")
    if out.suffix != ".html":
        raise ListeningTestError(f"out: expected a name that ends in .html, got {out.name!r}")
    check_not_source(out, key)
    if there := [str(path) for path in (out, key) if path.exists() and not overwrite]:
        raise ListeningTestError(
            f"{there[0]} is there already, and its answers need its key: choose another name, or --overwrite true"
        )
    named = [systems] if isinstance(systems, str) else list(systems)
    places = [Path(one.rpartition("=")[2]) for one in named] + ([] if sentences is None else [resolve(sentences)])
    for option, path in (("out", out), ("key", key)):
        check_not_source(path, *places, option=option, inside=True)
    found = read_systems(named, sentences)
    drawn = draw(found, plan)
    write_json(key, drawn.key.to_json(key.parent.resolve()))
    with written_atomically(out) as scratch:
        scratch.write_text(page(drawn, plan), "utf-8")
    counted = [one for one in drawn.key.trials.values() if not one.training]
    made = Made(out, key, len(counted), found.left_out)
    _say_made(made, drawn.key.systems, drawn.key.loudness_lufs)
    return made


def _say_made(made: Made, systems: Sequence[str], loudness_lufs: float) -> None:
    size = os.path.getsize(made.page) / 1e6
    lines = [f"  {one}" for one in made.left_out[:_NAMED]]
    more = [f"  and {len(made.left_out) - _NAMED} more"] if len(made.left_out) > _NAMED else []
    if made.left_out:
        say("\n".join([f"{len(made.left_out)} utterances left out:", *lines, *more]))
    say(f"page:         {made.page} ({size:.1f} MB): {made.questions} questions about {', '.join(systems)}")
    say(f"key:          {made.key} (keep it from listeners)")
    say(f"loudness:     {loudness_lufs:.1f} LUFS, all clips")


def score(
    answers: Sequence[Path],
    key: Path,
    out: Path | None = None,
    ties: Ties = "split",
    resamples: int = RESAMPLES,
    rules: Rules | None = None,
) -> dict[str, Any]:
    """Screen the listeners of a test by stated rules, and print its tables.

    Intervals resample listeners and sentences at a time; tests are exact and on sentences, and their p-values are
    adjusted for the number of pairs (Holm). Files that cannot be used are named, and the others count.

    Args:
        answers: files that listeners saved, or folders of them.
        key: key of the test.
        out: JSON file to write with all numbers and every listener.
        ties: use of the answer "no difference": split (half a vote for each side) or drop.
        resamples: number of resamples of the bootstrap.
        rules: which listeners count.
    """
    if out is not None:
        check_not_source(out, key, *answers)
    sheets, screened, known, faults = _screened(answers, key, rules or Rules())
    summary = summarise(sheets, known, ties, resamples)
    print_tables(summary, screened)
    found = {
        "test": known.test,
        "rules": vars(rules or Rules()),
        "ties": ties,
        "listeners": [vars(one) for one in screened],
        "refused": list(faults),
        **summary,
    }
    if out is not None:
        write_json(out, found)
        say(f"numbers:      {out}")
    return found


def label(
    answers: Sequence[Path],
    key: Path,
    out: Path,
    rule: HumanRule | None = None,
    rules: Rules | None = None,
) -> LabelledRows:
    """Turn the answers of a listening test into a manifest of desirable and undesirable rows.

    Rows whose recordings came with speech tokens go straight into fit; those of recordings alone go through prepare.

    Args:
        answers: files that listeners saved, or folders of them.
        key: key of the test.
        out: manifest to write, .jsonl or .parquet.
        rule: which recordings become rows.
        rules: which listeners count.
    """
    out = Path(out)
    check_not_source(out, key, *answers)
    sheets, _, known, _ = _screened(answers, key, rules or Rules())
    found = make_labels(sheets, known, rule or HumanRule(), out.parent.resolve())
    good = sum(bool(row.desirable) for row in found.rows)
    say(f"desirable:    {good} rows\nundesirable:  {len(found.rows) - good} rows")
    say(f"no label:     {found.undecided} undecided, {found.unheard} heard by too few")
    if not found.rows:
        raise ListeningTestError(
            "the rule keeps no row: lower rule.agreement or rule.min_listeners, or ask more people"
        )
    write_manifest(found.rows, out)
    alone = sum(not row.speech for row in found.rows)
    hint = f" ({alone} without speech tokens: `tts-align prepare` makes them)" if alone else ""
    say(f"manifest:     {out}{hint}")
    return found


def _screened(
    answers: Sequence[Path], key: Path, rules: Rules
) -> tuple[list[Sheet], list[Screened], Key, tuple[str, ...]]:
    """Answers of the listeners that count, every listener, the key, and why files were refused.

    Raises:
        ListeningTestError: nobody counts.
    """
    known = read_key(key)
    read = read_sheets([Path(one) for one in answers], known)
    for note in read.notes:
        say(f"note: {note}")
    for fault in read.faults:
        log.warning("refused: %s", fault)
    screened = screen(read.sheets, known, rules)
    sheets = [sheet for sheet, one in zip(read.sheets, screened, strict=True) if not one.reason]
    if not sheets:
        reasons = [*read.faults, *(f"listener {one.listener}: {one.reason}" for one in screened)]
        raise ListeningTestError("no listener counts:\n  " + "\n  ".join(reasons[:_NAMED]))
    return sheets, screened, known, read.faults


FUNCTIONS: dict[str, Callable[..., object]] = {"make": make, "score": score, "label": label}
"""What each command does."""
GROUPS: dict[str, dict[str, type]] = {
    "make": {"plan": Plan},
    "score": {"rules": Rules},
    "label": {"rule": HumanRule, "rules": Rules},
}
"""Options of a command that are a record."""
_FILES = {"make": "systems", "score": "answers", "label": "answers"}
"""Option that takes what stands before the first option."""


def positional(name: str, args: list[str]) -> list[str]:
    """A command line in which files need not be named by their option.

    >>> positional("make", ["runs/a", "b=wavs", "--out", "test.html"])
    ['--systems=["runs/a", "b=wavs"]', '--out', 'test.html']
    """
    words = next((place for place, word in enumerate(args) if word.startswith("-")), len(args))
    return [f"--{_FILES[name]}={json.dumps(args[:words])}", *args[words:]] if words else args
