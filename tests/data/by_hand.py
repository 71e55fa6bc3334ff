# SPDX-License-Identifier: Apache-2.0
"""What tables and arrays do, typed once more slowly: row by row, with records and dictionaries."""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tts_align.batch import Reads
from tts_align.data.labels import stars_of
from tts_align.data.mismatch import partners
from tts_align.data.parse import Rules, parse
from tts_align.data.records import Row
from tts_align.data.select import LabelledUtterance
from tts_align.models.base.generation import Context
from tts_align.models.base.layout import TokenRow
from tts_align.models.base.policy import CodecLM


def read(raws: list[tuple[str, Any]], rules: Rules) -> tuple[list[Row], list[str], set[str], bool]:
    """Rows, faults with their places, unknown columns, and whether there were stars; of (place, raw row)."""
    rows: dict[str, Row] = {}
    places: dict[str, str] = {}
    faults, ignored, starred = [], set(), False
    for number, (where, raw) in enumerate(raws, start=1):
        row, wrong, unknown = parse(raw, f"row-{number}", rules)
        ignored |= unknown
        starred |= isinstance(raw, dict) and stars_of(raw.get("label")) is not None
        if row is not None and row.id in places:
            wrong, row = [f"id {row.id!r} is taken by {places[row.id]}"], None
        faults += [f"{where}: {what}" for what in wrong]
        if row is not None:
            rows[row.id], places[row.id] = row, where
    return list(rows.values()), faults, ignored, starred


def lines(path: Path) -> list[tuple[str, Any]]:
    """Places and raw rows of a file of JSON lines."""
    return [(f"{path}:{n}", json.loads(line)) for n, line in enumerate(path.read_text("utf-8").splitlines(), start=1)]


def pairs(rows: list[Row], seed: int) -> list[tuple[LabelledUtterance, LabelledUtterance]]:
    """Given pairs, and those that are formed."""
    found, loose = [], defaultdict(lambda: ([], []))
    for row in rows:
        if row.pair is not None:
            found.append(
                (LabelledUtterance(row, row.pair.chosen, True), LabelledUtterance(row, row.pair.rejected, False))
            )
        elif row.desirable is not None:
            loose[row.sentence][0 if row.desirable else 1].append(
                LabelledUtterance(row, row.sounds[0], row.desirable)
            )  # fmt: skip
    generator = np.random.default_rng([seed, 0x9A125])
    for good, bad in loose.values():
        if good and bad:
            rejected = [bad[i] for i in generator.permutation(len(bad))]
            for i in generator.permutation(len(good)):
                match = next((one for one in rejected if one.sound != good[i].sound), None)
                if match is not None:
                    rejected.remove(match)
                    found.append((good[i], match))
    return found


def select(rows: list[Row], reads: Reads, paired_only: bool, flip: bool, seed: int) -> list[tuple]:
    """Items of an objective."""
    if reads is Reads.PAIR or paired_only:
        items = pairs(rows, seed)
        if reads is not Reads.PAIR:
            items = [(one,) for both in items for one in both if reads is not Reads.SPEECH or one.desirable]
    elif reads is Reads.LABELLED:
        items = []
        for row in rows:
            if row.pair is not None:
                items += [(LabelledUtterance(row, s, g),) for s, g in zip(row.sounds, (True, False), strict=True)]
            elif row.desirable is not None:
                items.append((LabelledUtterance(row, row.sounds[0], row.desirable),))
    elif reads is Reads.SPEECH:
        good = [row for row in rows if row.pair is not None or row.desirable is not False]
        items = [(LabelledUtterance(row, row.sounds[0], True),) for row in good]
    else:
        items = [
            (LabelledUtterance(row, sound, number == 0 and row.desirable is not False),)
            for row in rows
            for number, sound in enumerate(row.sounds)
        ]
    if flip:
        turned = [tuple(replace(one, desirable=not one.desirable) for one in item) for item in items]
        items = [tuple(sorted(item, key=lambda one: not one.desirable)) for item in turned]
    return items


def token_rows(items: list[tuple], policy: CodecLM, share: float, seed: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """Token rows and their mismatched twins."""

    def arranged(row: TokenRow) -> TokenRow:
        if share <= 0 or not policy.layout.can_bistream(row):
            return row
        digest = hashlib.blake2b(f"{seed} {policy.layout.key(row)}".encode(), digest_size=8).digest()
        return replace(row, bistream=int.from_bytes(digest, "big") < share * 2**64)

    rows = []
    for item in items:
        for one in item:
            row = one.row
            context = Context(row.speaker, row.instruct, row.prompt_text, row.prompt_speech)
            rows.append(arranged(policy.encode_text(row.text, context).row(one.sound.speech)))
    partner = partners([row.text[row.prefix :] for row in rows], [len(row.speech) for row in rows], seed)
    other = [replace(row, speech=rows[i].speech, bistream=False) for row, i in zip(rows, partner.tolist(), strict=True)]
    return rows, [arranged(row) for row in other]
