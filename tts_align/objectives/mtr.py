# SPDX-License-Identifier: Apache-2.0
"""Training of the multi-task reward model of DiffRO (arXiv 2507.05911), with the regularisers of RRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tts_align.batch import Batch, Mean, Reads
from tts_align.models.base.reward_records import Regularisers, RewardLabels, TaskLoss
from tts_align.objectives.base import Objective, Outcome, Part, Parts, Step, check_codebook, check_not_negative

if TYPE_CHECKING:
    from tts_align.models.base.policy import CodecLM
    from tts_align.models.base.reward import RewardHead

TEXT_TASKS = ("asr", "ctc")
"""Tasks whose label is the transcript."""


class MTR(Objective, name="mtr"):
    """Multi-task recognition: the reward model learns what is said in speech tokens, and how.

    Every utterance serves, good or bad, with what is known about it: a transcript (what a recogniser heard, or the
    text where the speech is good) and any of the attributes. The policy is only there for its speech tokens.

    The loss of a task is its mean over the rows that have its label; a row's loss on text is the sum over its tokens.
    The defaults train plainly; RRPO uses label smoothing 0.1, adversarial 0.5 and mixup.

    Args:
        weights: weight of each task's loss; 1 for those left out.
        label_smoothing: share of a target's probability that is spread over all classes; not for ctc and numbers.
        mixup: alpha of the Beta distribution that mixes utterances two by two; 0 for no mixing.
        adversarial: weight of the loss on the encoder's output moved against the model; 0 for none.
        radius: length of that move.
    """

    needs = frozenset({Part.REWARD})
    trains = needs
    reads = Reads.ANY
    wants_utterances = True
    scores = False

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        adversarial: float = 0.0,
        radius: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        check_not_negative(**self.weights)
        self.regularisers = Regularisers(label_smoothing, mixup, adversarial, radius)

    def bind(self, policy: CodecLM, parts: Parts) -> None:
        """Check that the reward model reads the speech tokens of the data."""
        check_codebook(policy, parts.reward)

    def encode(self, batch: Batch, parts: Parts) -> Batch:
        """Labels of transcripts and attributes."""
        return with_labels(batch, parts.reward)

    def forward(self, step: Step) -> Outcome:
        """Sum of the tasks' losses on this micro-batch."""
        reward, said = step.parts.reward, step.utterances
        if unknown := sorted(self.weights.keys() - set(reward.tasks)):
            raise ValueError(f"weights of {', '.join(unknown)} have no effect: the tasks are {', '.join(reward.tasks)}")
        labels = labels_of(step)
        regularisers = self.regularisers if self.training else None
        losses = reward.losses(said.speech, said.mask, labels, regularisers, torch.default_generator)
        share = [self.weights.get(name, 1.0) * _share(name, loss, step) for name, loss in losses.items()]
        return Outcome(
            torch.stack(share).sum(), {name: Mean(loss.total.detach(), loss.count) for name, loss in losses.items()}
        )


def with_labels(batch: Batch, reward: RewardHead) -> Batch:
    """The batch with the reward model's labels of its transcripts and attributes, and with its lengths."""
    said = batch.utterances
    assert said is not None
    labels = reward.encode_labels(said.transcripts, said.attributes)
    labels = replace(labels, speech_lengths=speech_lengths(batch))
    return replace(batch, utterances=replace(said, labels=labels))


def speech_lengths(batch: Batch) -> tuple[int, ...]:
    """How many speech tokens each row has, as the CPU knows it."""
    assert batch.utterances is not None
    return tuple(len(row.speech) for row in batch.utterances.rows)


def labels_of(step: Step) -> RewardLabels:
    """Labels of transcripts and attributes: those that came with the batch, or made here, for which a device waits."""
    said = step.utterances
    if said.labels is not None:
        return said.labels
    return step.parts.reward.encode_labels(said.transcripts, said.attributes).to(said.speech.device)


def _share(name: str, loss: TaskLoss, step: Step) -> Tensor:
    """This micro-batch's share of a task's mean over all rows of the optimiser step that have its label."""
    if name in TEXT_TASKS:
        return loss.total / max(step.batch.totals.labels["text"], 1)
    return attribute_share(name, loss, step)


def attribute_share(name: str, loss: TaskLoss, step: Step) -> Tensor:
    """The same for an attribute, which may be several numbers in a row: those are averaged."""
    here = sum(name in row for row in step.utterances.attributes)
    return loss.total / loss.count.clamp(min=1) * here / max(step.batch.totals.labels.get(name, 0), 1)
