# SPDX-License-Identifier: Apache-2.0
"""Build the symbolic experiment: base model, sentences, judged and labelled candidates, gates."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_align.cli.demo.gates import Gate
from tts_align.cli.demo.symbolic import SAMPLING, SCHEDULE, make_base, prompts
from tts_align.cli.demo.training import Schedule
from tts_align.cli.judge import judge
from tts_align.cli.label import LabelRule, label
from tts_align.cli.sample import sample
from tts_align.data.demo.sentences import SPEAKERS, Split, all_sentences, right_rates
from tts_align.evaluation.candidates import Candidate, read_candidates
from tts_align.evaluation.judges.base import Reading
from tts_align.evaluation.judges.symbolic import SymbolicJudge
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import write_prompts
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.assets import ASSETS
from tts_align.utils.files import write_json

BASE, SENTENCES, REPORT = "base", "sentences", "build.json"


@dataclass(frozen=True)
class SymbolicPlan:
    """Every number of a build.

    Args:
        seed: of split, cells, corpus, weights and samples.
        schedule: of the base model's training.
        preference_sentences: how many sentences candidates are drawn for.
        dev_sentences: how many held-out sentences candidates are drawn for.
        samples: candidates per sentence and voice.
        test_sentences: how many test sentences the gates look at; all of them by default.
    """

    seed: int = 0
    schedule: Schedule = SCHEDULE
    preference_sentences: int = 500
    dev_sentences: int = 100
    samples: int = 5
    test_sentences: int | None = None


def build_symbolic(
    directory: Path = ASSETS / "symbolic", seed: int = 0, plan: SymbolicPlan | None = None
) -> list[Gate]:
    """Build the symbolic experiment, or what of it is missing.

    The directory then holds ``base/`` (the model), ``sentences/{preference,dev,test}.jsonl`` (prompts),
    ``preference.parquet`` and ``dev.parquet`` (labelled rows) and ``build.json`` (what the gates measured).

    Args:
        directory: where it goes; candidates lie beside it, in a directory with ``-build`` added.
        seed: of everything; ignored when ``plan`` is given.
        plan: sizes and lengths.

    Returns:
        The gates, passed or not.
    """
    plan = plan or SymbolicPlan(seed)
    directory = Path(directory)
    work = directory.with_name(f"{directory.name}-build")
    if not (directory / BASE).exists():
        # Half precision on disk; the model reads it back as float32.
        make_base(plan.seed, plan.schedule).half().save(directory / BASE)
    module = Parts(Qwen2CodecLM(str(directory / BASE)).eval(), SymbolicJudge(), SAMPLING)
    counts: dict[Split, int | None] = {
        "preference": plan.preference_sentences,
        "dev": plan.dev_sentences,
        "test": plan.test_sentences,
    }
    for split, number in counts.items():
        write_prompts(directory / SENTENCES / f"{split}.jsonl", prompts(split, plan.seed))
        write_prompts(work / f"{split}.jsonl", prompts(split, plan.seed, number))
        candidates, judged = work / f"{split}-candidates.jsonl", work / f"{split}-judged.jsonl"
        sample(module, work / f"{split}.jsonl", candidates, plan.samples, SPEAKERS, 256, plan.seed, overwrite=True)
        judge(module, candidates, judged, batch_rows=256, overwrite=True)
        if split != "test":
            label(judged, directory / f"{split}.parquet", LabelRule())
    gates = measure(read_candidates(work / "test-judged.jsonl"), plan.seed)
    report = {"plan": dataclasses.asdict(plan), "gates": {gate.name: round(gate.value, 4) for gate in gates}}
    write_json(directory / REPORT, report)
    print("\n".join(map(str, gates)), flush=True)
    shutil.rmtree(work)
    return gates


def measure(candidates: Sequence[Candidate], seed: int = 0) -> list[Gate]:
    """What a base model says of sentences it never saw, against what it must."""
    rates = right_rates(seed)
    taught_right = {sentence.id: rates[sentence.cell] > 0.5 for sentence in all_sentences()}
    heard = [(one, one.verdict) for one in candidates if one.verdict is not None]
    is_right = [(taught_right[one.prompt.id], verdict.reading is Reading.RIGHT) for one, verdict in heard]
    sides: dict[str, set[bool]] = {}
    for (one, _), (_, right) in zip(heard, is_right, strict=True):
        sides.setdefault(one.prompt.id, set()).add(right)
    return [
        Gate("base accuracy", _mean([right for _, right in is_right]), 0.60, 0.70),
        Gate("base says neither reading", _mean([v.reading is Reading.NEITHER for _, v in heard]), high=0.03),
        Gate("cells taught right, read right", _mean([right for taught, right in is_right if taught]), low=0.93),
        Gate("cells taught wrong, read right", _mean([right for taught, right in is_right if not taught]), high=0.12),
        Gate("base nearest CER", _mean([verdict.nearest_cer for _, verdict in heard]), high=0.01),
        Gate("one-sided sentences", _mean([len(both) == 1 for both in sides.values()]), low=0.75),
    ]


def _mean(numbers: Sequence[float | bool]) -> float:
    return sum(numbers) / max(len(numbers), 1)
