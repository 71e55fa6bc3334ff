# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.metrics.reading import Accuracy, verdict_metrics


def verdicts():
    rows = [
        (Reading.RIGHT, 0.0, 0.0),
        (Reading.WRONG, 0.2, 0.0),
        (Reading.NEITHER, 0.4, 0.4),
        (Reading.UNMARKED, 0.1, 0.1),
    ]
    return [Verdict("x", reading, cer, nearest) for reading, cer, nearest in rows]


def test_metrics_by_hand():
    """Right: 2 of 4. CER .7 / 4, nearest .5 / 4, bad: 1 of 4."""
    metrics = verdict_metrics()
    metrics.update(verdicts()[:3])
    metrics.update(verdicts()[3:])
    got = {name: value.item() for name, value in metrics.compute().items()}
    assert got == pytest.approx({"accuracy": 0.5, "cer": 0.175, "nearest_cer": 0.125, "bad_case_ratio": 0.25})


def test_an_utterance_without_a_verdict_counts_at_its_worst():
    metrics = verdict_metrics()
    metrics.update([None, *verdicts()[:1]])
    got = {name: value.item() for name, value in metrics.compute().items()}
    assert got == pytest.approx(dict.fromkeys(("accuracy", "cer", "nearest_cer", "bad_case_ratio"), 0.5))


def test_states_add_up_over_processes():
    one, two = Accuracy(), Accuracy()
    one.update(verdicts())
    two.update(verdicts()[:1])
    total, count = one.total + two.total, one.count + two.count
    assert (total / count).item() == pytest.approx(3 / 5)
    assert all(name in dict(one.metric_state) for name in ("total", "count"))
    assert one.metric_state["count"].dtype == torch.long
