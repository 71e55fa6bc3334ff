# SPDX-License-Identifier: Apache-2.0
"""What is measured of judged utterances, as torchmetrics that add up over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.metrics.functional import BAD_CER


class VerdictMean(Metric):
    """Mean of one number per verdict, kept as a sum and a count; an utterance without a verdict counts at its worst."""

    higher_is_better = False
    full_state_update = False
    worst = 1.0
    """Counted for an utterance that is missing or could not be judged."""
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def number(self, verdict: Verdict) -> float:
        """The number of one verdict."""
        raise NotImplementedError

    def update(self, verdicts: list[Verdict | None]) -> None:
        """Add verdicts; ``None`` for an utterance without one."""
        self.total += sum(self.worst if verdict is None else self.number(verdict) for verdict in verdicts)
        self.count += len(verdicts)

    def compute(self) -> Tensor:
        """The mean; NaN before anything was added."""
        return self.total / self.count


class Accuracy(VerdictMean):
    """Share of utterances with the right reading."""

    higher_is_better = True
    worst = 0.0

    def number(self, verdict: Verdict) -> float:
        """1 if right; an utterance without a marked word has nothing to misread and counts as right."""
        return float(verdict.reading in (Reading.RIGHT, Reading.UNMARKED))


class CER(VerdictMean):
    """Mean character error rate against the right reading."""

    def number(self, verdict: Verdict) -> float:
        """Character error rate of one utterance."""
        return verdict.cer


class NearestCER(VerdictMean):
    """Mean character error rate against the nearer reading: intelligibility apart from the reading."""

    def number(self, verdict: Verdict) -> float:
        """Character error rate of one utterance."""
        return verdict.nearest_cer


class BadCaseRatio(VerdictMean):
    """Share of utterances whose character error rate exceeds 0.3."""

    def number(self, verdict: Verdict) -> float:
        """1 if bad."""
        return float(verdict.cer > BAD_CER)


def verdict_metrics() -> MetricCollection:
    """All four, under the names of ``test/summary.json``."""
    metrics = {"accuracy": Accuracy(), "cer": CER(), "nearest_cer": NearestCER(), "bad_case_ratio": BadCaseRatio()}
    # Groups are found by comparing states after the first update: two shares that are equal by chance would be merged.
    return MetricCollection(dict(metrics), compute_groups=False)
