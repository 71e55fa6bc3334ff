# SPDX-License-Identifier: Apache-2.0
"""The forgetting probe: general sentences without marked words, so that a mended word that breaks the rest is seen.

In each language of the test set, spoken before and after the training with the same seeds, judged as the test is. Their
error rates stand in the summary under ``forgetting``, their rows in ``forgetting.jsonl``. The embedded experiment can
say nothing but its own grammar: there sentences of its dev set are spoken, and either reading counts as right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.listening import Failures
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.prompts import SentencePrompt, read_prompts
from tts_align.evaluation.speaking import evenly_spread, utterance_requests
from tts_align.evaluation.stages.hearing import Listeners
from tts_align.evaluation.stages.spoken import SpokenStages
from tts_align.evaluation.statistics.intervals import RESAMPLES, cluster_bootstrap, paired_difference
from tts_align.evaluation.utterances import SYSTEMS
from tts_align.models.base.policy import CodecLM
from tts_align.utils.files import write_json, write_json_lines
from tts_align.utils.readers import read_json_object
from tts_align.utils.seeds import part_seed

FORGETTING, ROWS = "forgetting", "forgetting.jsonl"
SENTENCES = 20
"""In each language."""
LANGUAGES = ("en", "ja", "zh")
"""Languages that the package has general sentences of."""
EMBEDDED, EMBEDDED_SENTENCES = "demo:audio", "demo:audio/sentences/dev.jsonl"
_FOLDER = Path(__file__).with_name("general")


def general_sentences(language: str) -> list[SentencePrompt]:
    """The package's general sentences of a language; none if it has none.

    Args:
        language: BCP 47 code; its first part decides.

    Example:
        >>> [len(general_sentences(language)) for language in ("en-GB", "ja", "zh", "fr")]
        [20, 20, 20, 0]
    """
    code = language.lower().partition("-")[0]
    if code not in LANGUAGES:
        return []
    found = read_prompts(_FOLDER / f"{code}.txt")
    return [dataclasses.replace(one, id=f"general-{code}-{one.id[5:]}", language=code) for one in found]


def probe_sentences(prompts: str | Path, languages: Sequence[str], count: int | None = None) -> list[SentencePrompt]:
    """What the probe speaks beside a test set.

    Args:
        prompts: name of the test set; an embedded one has general sentences of its own.
        languages: of the test set's sentences.
        count: sentences of each language, evenly spread; all by default.
    """
    if str(prompts).startswith(EMBEDDED):
        own = evenly_spread(read_prompts(EMBEDDED_SENTENCES), SENTENCES)
        return evenly_spread([_unmarked(one) for one in own], count)
    return [one for language in sorted(set(languages)) for one in evenly_spread(general_sentences(language), count)]


def _unmarked(sentence: SentencePrompt) -> SentencePrompt:
    """The same sentence without its mark: whichever reading is heard, only the rest counts."""
    return dataclasses.replace(
        sentence, id=f"general-{sentence.id}", spans=(), right=tuple(sorted(sentence.transcripts))
    )


class ForgettingProbe:
    """Speaks and judges general sentences before and after the training, in stages that resume.

    Args:
        module: its policy is the aligned system; its vocoder and judge are used.
        reference: the system before training; ``None`` for the policy without its adapter, or for none at all.
        sentences: see :func:`probe_sentences`.
        speakers: voices, taken in turn; each sentence is spoken once.
        seed: of all utterances, the same before and after; that of the run by default.
        batch_rows: utterances spoken together.
        max_failed_share: largest share that may go without a verdict.
    """

    def __init__(
        self,
        module: SpeaksAndListens,
        reference: CodecLM | None,
        sentences: Sequence[SentencePrompt],
        speakers: Sequence[str] = (),
        seed: int | None = None,
        batch_rows: int = 128,
        max_failed_share: float = 1.0,
    ) -> None:
        voices = list(speakers) or [""]
        voiced = [
            one if one.speaker else dataclasses.replace(one, speaker=voices[place % len(voices)])
            for place, one in enumerate(sentences)
        ]
        self.module, self.reference, self.batch_rows = module, reference, batch_rows
        self.requests = utterance_requests(voiced, (), 1, part_seed(seed, 1))
        self.max_failed_share = max_failed_share

    def run(self, folder: Path, voices: str = "", rank: int = 0, world: int = 1) -> dict[str, list[Candidate]]:
        """Speak and judge this process's share; every process gets what all of them heard, by system.

        Args:
            folder: of the stages; what is there already is neither spoken nor heard again.
            voices: digest of the voices.
            rank: number of this process.
            world: number of processes.
        """
        mine = self.requests[rank::world]
        stages = SpokenStages(self.module, self.reference, self.requests, mine, rank)
        judge = self.module.judge
        vocoder = self.module.vocoder if judge is not None and judge.needs_audio else None
        stages.begin(folder, Listeners(judge), vocoder, voices, self.max_failed_share, f"{FORGETTING}-")
        for hearing in stages.hearing.values():
            # Of all processes together: one alone may have no more than a sentence, which may fail.
            hearing.failures = {
                name: Failures(max(2, len(self.requests)), self.max_failed_share) for name in hearing.failures
            }
        for start in range(0, len(mine), self.batch_rows):
            stages.step(mine[start : start + self.batch_rows])
        judged, _ = stages.finish(rank == 0)
        return {system: sorted(judged.get(system, ()), key=_name) for system in SYSTEMS}


def _name(one: Candidate) -> str:
    return one.id


def forgetting_summary(
    judged: Mapping[str, Sequence[Candidate]], resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """Error rates of general sentences by language: before, after, and the paired difference.

    An utterance without a verdict in one of the systems is left out of both and counted under ``failed``.

    Args:
        judged: candidates of each system.
        resamples: of the bootstrap.
    """
    by_name = {system: {one.id: one for one in candidates} for system, candidates in judged.items() if candidates}
    languages = sorted({one.prompt.language for candidates in judged.values() for one in candidates})
    found = {}
    for language in languages:
        names = sorted({n for c in by_name.values() for n, one in c.items() if one.prompt.language == language})
        known = [name for name in names if all(name in c and c[name].verdict for c in by_name.values())]
        rates = {system: [_rate(candidates[name]) for name in known] for system, candidates in by_name.items()}
        entry: dict[str, Any] = {
            system: _plain(cluster_bootstrap(values, known, resamples)) for system, values in rates.items()
        }
        if len(rates) == 2:
            entry["difference"] = _plain(paired_difference(rates["base"], rates["aligned"], known, resamples))
        found[language] = entry | {"failed": len(names) - len(known)}
    return found


def _rate(candidate: Candidate) -> float:
    assert candidate.verdict is not None
    return candidate.verdict.cer


def _plain(interval: Any) -> dict[str, Any]:
    values = dataclasses.asdict(interval)
    return {name: None if isinstance(one, float) and math.isnan(one) else one for name, one in values.items()}


def write_forgetting(folder: Path, judged: Mapping[str, Sequence[Candidate]]) -> dict[str, Any]:
    """Write the probe's rows into a scored folder, its numbers into the summary there, and print them.

    Args:
        folder: that holds ``summary.json``.
        judged: candidates of each system.
    """
    rows = [one.to_row() | {"system": system} for system, candidates in judged.items() for one in candidates]
    write_json_lines(folder / ROWS, sorted(rows, key=lambda row: (row["id"], row["system"])))
    found = forgetting_summary(judged)
    path = folder / "summary.json"
    write_json(path, read_json_object(path) | {FORGETTING: found})
    for language, entry in found.items():
        print(f"general sentences, {language}: {_sentence(entry)}", flush=True)
    return found


def _sentence(entry: Mapping[str, Any]) -> str:
    sides = [
        f"{system} {100 * entry[system]['value']:.2f} %" for system in ("base", "aligned") if _known(entry, system)
    ]
    difference = entry.get("difference") or {}
    said = f" (p = {difference['p_value']:.2g})" if difference.get("p_value") is not None else ""
    lost = f", {entry['failed']} not judged" if entry["failed"] else ""
    return f"CER {', '.join(sides)}{said}{lost}" if sides else f"none of {entry['failed']} was judged"


def _known(entry: Mapping[str, Any], system: str) -> bool:
    return (entry.get(system) or {}).get("value") is not None
