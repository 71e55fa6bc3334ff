# SPDX-License-Identifier: Apache-2.0
"""A test of recordings: the listening stages of ``test`` on a folder of WAV files of any system."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.listening import warn_of_failures
from tts_align.evaluation.measures.base import UtteranceMeasure, describe
from tts_align.evaluation.protocols import find_protocol
from tts_align.evaluation.report import write_report
from tts_align.evaluation.stages.hearing import Hearing, Listeners
from tts_align.evaluation.stages.scoring import judged_utterance, with_verdict
from tts_align.evaluation.stages.sound import Recorded
from tts_align.evaluation.suites import read_suite
from tts_align.utils.files import file_name
from tts_align.utils.shards import digest

_KINDS = (".wav", ".flac", ".ogg", ".mp3")
"""Recordings that are taken, the first that is there."""


class RecordedTest:
    """One folder of recordings, the test set they were made of, and what listens.

    Args:
        folder: recordings, ``NAME.wav`` for each utterance.
        prompts: file or folder of the test set.
        suite: kind of the test set.
        judge: transcribes; ``None`` for nobody.
        protocol: name of the protocol; the test set's own by default.
        language: of the sentences, where the test set does not say it.
        measures: further numbers.
        readings: tells readings, if it is not the judge.
        system: name of the system; that of the folder by default.
        max_failed_share: largest share of the recordings on which a listener may fail.

    Raises:
        ValueError: nothing listens, a judge reads speech tokens, or no utterance has a recording.
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        folder: Path,
        prompts: str,
        suite: str,
        judge: Judge | None,
        protocol: str | None,
        language: str,
        measures: Sequence[UtteranceMeasure],
        readings: Judge | None,
        system: str | None,
        max_failed_share: float,
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder of recordings {folder}")
        self.suite = read_suite(suite, prompts, language)
        if judge is None and readings is None and not measures:
            raise ValueError("no judge configured: pass --judge with a class or a recipe, or --measures")
        for one in (judge, readings):
            if one is not None and not one.needs_audio:
                raise ValueError(f"{type(one).__name__} reads speech tokens, and recordings have none")
        self.folder, self.max_failed_share = folder, max_failed_share
        self.system = system or folder.resolve().name
        self.protocol = find_protocol(protocol or self.suite.protocol)
        self.protocol.check(self.suite.languages)
        self.models: dict[str, Any] = describe(measures)
        self.models |= {name: one.identity() for name, one in (("judge", judge), ("readings", readings)) if one}
        found = {item.prompt_audio for item in self.suite.items if item.prompt_audio is not None}
        self.lost_prompts = sorted(str(path) for path in found if not path.is_file())
        prompted = {item.id: item.prompt_audio for item in self.suite.items if item.prompt_audio is not None}
        kept = {name: path for name, path in prompted.items() if path.is_file()}
        self.listeners = Listeners(judge, readings, measures, kept)
        self.candidates = {item.id: Candidate(item.sentence, "", 0, 0, (), True) for item in self.suite.items}
        there = _recordings(folder)
        self.files = {name: there[key] for name in self.candidates if (key := _key(name, there)) is not None}
        self.others = sorted(there.keys() - {_key(name, there) for name in self.candidates})
        if not self.files:
            name = next(iter(self.candidates))
            raise ValueError(
                f"none of the {len(self.candidates)} utterances of {prompts} has a recording in {folder}, expected "
                f"{folder / f'{name}.wav'} and so on; there {_some(self.others)}"
            )

    def remarks(self) -> Iterator[str]:
        """What a person should know before it starts."""
        missing = [name for name in self.candidates if name not in self.files]
        if missing:
            count = f"{len(missing)} of {len(self.candidates)}"
            yield f"missing:      {count} recordings, counted as failures: {_some(missing)}"
        if self.others:
            yield f"not scored:   {len(self.others)} recordings that the test set does not name: {_some(self.others)}"
        if self.lost_prompts:
            yield f"no voices:    {len(self.lost_prompts)} recordings of voices are missing: {_some(self.lost_prompts)}"

    def begin(self, out: Path, batch_rows: int, rank: int, world: int) -> list[list[Candidate]]:
        """Open the stages; returns this process's utterances in batches.

        Args:
            out: folder to write.
            batch_rows: recordings heard together.
            rank: number of this process.
            world: number of processes.
        """
        ids = [one.id for one in self.candidates.values()]
        mine = list(self.candidates.values())[rank::world]
        states = {name: path.stat() for name, path in sorted(self.files.items())}
        made = digest(
            [item.sentence for item in self.suite.items],
            [(name, state.st_size, state.st_mtime_ns) for name, state in states.items()],
        )
        self._hearing = Hearing(
            self.listeners,
            out / "stages",
            self.system,
            made,
            ids,
            [one.id for one in mine],
            rank,
            self.max_failed_share,
        )
        self._sounds = {one.id: self.files[one.prompt.id] for one in mine if one.prompt.id in self.files}
        return [mine[start : start + batch_rows] for start in range(0, len(mine), batch_rows)]

    def step(self, batch: Sequence[Candidate]) -> None:
        """Take one batch through all stages."""
        self._hearing.listen(batch, Recorded(self._sounds))

    def finish(self, out: Path, first: bool) -> dict[str, Any] | None:
        """Gather all processes; the first writes the report, and returns the summary.

        Args:
            out: folder to write.
            first: whether this process is the first.
        """
        rows = {name: store.finish(first) for name, store in self._hearing.stores.items()}
        if not first:
            return None
        utterances = []
        for item in self.suite.items:
            one = self.candidates[item.id]
            path = self.files.get(item.id)
            columns = {
                "id": item.id,
                "audio": "" if path is None else Path(os.path.relpath(path, out)).as_posix(),
                "prompt_audio": "" if item.prompt_audio is None else str(item.prompt_audio),
            }
            utterances.append(
                judged_utterance(one, self.system, rows, self.listeners, self.protocol, item.reference, **columns)
            )
        if self.listeners.judge is not None:
            warn_of_failures([with_verdict(one, rows) for one in self.candidates.values()])
        suite = {"name": self.suite.name, "path": self.suite.path, "sentences": len(self.suite.items)}
        suite["digest"] = self.suite.digest()
        facts = {"suite": suite, "protocol": self.protocol.identity(), "models": self.models}
        return write_report(out, utterances, facts)


def _recordings(folder: Path) -> dict[str, Path]:
    """Recordings in a folder and those below it, by their path in it without its ending, which any case may have."""
    found: dict[str, Path] = {}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _KINDS and path.is_file()]
    for path in sorted(files, key=lambda one: -_KINDS.index(one.suffix.lower())):
        found[_composed(path.relative_to(folder).with_suffix("").as_posix())] = path
    return found


def _key(name: str, there: dict[str, Path]) -> str | None:
    """How the recording of an utterance is named: as it is, or with what a file's name cannot hold quoted."""
    return next((key for key in (_composed(name), _composed(file_name(name))) if key in there), None)


def _composed(name: str) -> str:
    """A name with its accents and voicing marks in their letters, which some systems write apart."""
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "is none"
