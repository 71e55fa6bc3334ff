# SPDX-License-Identifier: Apache-2.0
"""What ``test`` does for a reward model: how well it hears held-out utterances."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from tts_align.batch import Batch
from tts_align.evaluation.metrics.functional import cer
from tts_align.evaluation.statistics.intervals import cluster_bootstrap
from tts_align.models.base.reward import RewardHead
from tts_align.models.base.reward_records import AttributeTask
from tts_align.utils.distributed import gathered
from tts_align.utils.files import write_json

_LETTERS_PER_TOKEN = 4
"""No speech is faster; a model that has hardly learnt would write for ever."""
Answer = Mapping[str, Any]
"""What is known of one utterance (``said``, and attributes) and what the model says (``heard``, and ``predicted``)."""


class RewardEvaluation:
    """One test of a reward model.

    Args:
        model: the reward model.

    Raises:
        ValueError: the model cannot say what it hears.
    """

    def __init__(self, model: RewardHead) -> None:
        self.model = model
        self.transcribes = bool({"asr", "ctc"} & set(model.tasks))
        lacking = [("transcribe", self.transcribes), ("predict", bool(model.attribute_tasks))]
        for method, needed in lacking:
            if needed and getattr(type(model), method) is getattr(RewardHead, method):
                raise ValueError(
                    f"{type(model).__name__} cannot be tested: give it a method `{method}`, see RewardHead.{method}, "
                    "or set run.test_after_fit: false"
                )
        self.answers: list[Answer] = []

    @torch.no_grad()
    def step(self, batch: Batch) -> None:
        """Let the model hear one batch."""
        said = batch.utterances
        assert said is not None
        heard: Sequence[str | None] = [None] * len(said.speech)
        if self.transcribes:
            heard = self.model.transcribe(said.speech, said.mask, _LETTERS_PER_TOKEN * said.speech.shape[1])
        predicted = self.model.predict(said.speech, said.mask) if self.model.attribute_tasks else {}
        self.answers += [
            {
                "said": said.transcripts[row],
                "heard": heard[row],
                "known": dict(said.attributes[row]),
                "predicted": {name: values[row] for name, values in predicted.items()},
            }
            for row in range(len(said.speech))
        ]

    def finish(self, directory: Path, first: bool = True) -> None:
        """Gather all ranks; the first writes and prints.

        Args:
            directory: of the run.
            first: whether this rank is the first.
        """
        answers = [answer for part in gathered(self.answers) for answer in part]
        if first:
            numbers = measure(answers, self.model.attribute_tasks)
            write_json(directory / "test" / "reward.json", numbers)
            print()  # the progress bar has left the line open
            print_numbers(numbers)


def measure(answers: Sequence[Answer], attributes: Sequence[AttributeTask]) -> dict[str, dict[str, Any]]:
    """Error rate of transcripts, accuracy of classes and events, correlations of scores and numbers.

    Args:
        answers: of all utterances.
        attributes: tasks of the model.

    Returns:
        By name of the number: ``value``, its 95 % interval where it is a mean, and ``n``.
    """
    numbers: dict[str, dict[str, Any]] = {}
    texts = [(answer["said"], answer["heard"]) for answer in answers if None not in (answer["said"], answer["heard"])]
    if texts:
        interval = cluster_bootstrap([cer(said, heard) for said, heard in texts], [said for said, _ in texts])
        numbers["cer"] = dataclasses.asdict(interval)
    for one in attributes:
        pairs = [(a["known"][one.name], a["predicted"][one.name]) for a in answers if one.name in a["known"]]
        if pairs:
            numbers |= _attribute(one, *zip(*pairs, strict=True))
    return numbers


def _attribute(one: AttributeTask, known: Sequence[Any], predicted: Sequence[Any]) -> dict[str, dict[str, Any]]:
    true = one.encode(known).target
    if one.kind in ("classes", "events"):
        right = (true == torch.tensor(predicted)).float().reshape(len(known), -1).mean(1).tolist()
        interval = cluster_bootstrap(right, [str(number) for number in range(len(right))])
        return {f"{one.name}_accuracy": dataclasses.asdict(interval)}
    linear, ranks = _correlations(torch.tensor(predicted, dtype=torch.float64), true.double())
    return {
        f"{one.name}_lcc": {"value": linear, "n": len(known)},
        f"{one.name}_srcc": {"value": ranks, "n": len(known)},
    }


def _correlations(predicted: Float[Tensor, " n"], true: Float[Tensor, " n"]) -> tuple[float | None, float | None]:
    """Correlation of the scores and of their ranks; ``None`` where one side is constant or has one score only.

    Raises:
        ValueError: a score is not finite.
    """
    if not (predicted.isfinite().all() and true.isfinite().all()):
        raise ValueError("expected finite scores, got NaN or infinity: the reward model or a label is broken")
    if predicted.unique().numel() < 2 or true.unique().numel() < 2:  # torchmetrics: a warning, and 0 for ranks
        return None, None
    return float(pearson_corrcoef(predicted, true)), float(spearman_corrcoef(predicted, true))


def print_numbers(numbers: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Show them, a line each."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption="95 % intervals", caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("reward model", justify="right", no_wrap=True)
    table.add_column(" utterances", justify="right", no_wrap=True)
    for name, number in numbers.items():
        cell = "-" if number["value"] is None else f"{number['value']:.3f}"
        if number["value"] is not None and "low" in number:
            cell += f" ({number['low']:.3f}–{number['high']:.3f})"
        table.add_row(name, cell, str(number["n"]))
    (console or Console()).print(table)
