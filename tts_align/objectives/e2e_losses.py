# SPDX-License-Identifier: Apache-2.0
"""The losses of end-to-end training: recognition, flow, and the second order through sampled speech tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.batch import Batch, Mean, Utterances
from tts_align.gumbel import RowNoise, relaxed_tokens, row_generators, sampled_vectors
from tts_align.objectives.base import Parts, Step
from tts_align.objectives.mtr import TEXT_TASKS, attribute_share, labels_of, speech_lengths, with_labels
from tts_align.utils.weights import speaker_vectors_of

if TYPE_CHECKING:
    from tts_align.models.base.flow_records import FlowDraws

Shaper = Literal["reward", "flow", "policy"]
SHAPERS: tuple[Shaper, ...] = ("reward", "flow", "policy")
NOISE, GUMBEL = 1, 2
"""What is drawn for a row: the flow's noise, and the noise that samples speech tokens."""


def used(stage: int, losses: Sequence[str]) -> set[str]:
    """Knobs that have an effect in a stage; in stage 1 they depend on the losses that train the tokenizer."""
    if stage == 1:
        return {f"{name}_weight" for name in losses} | ({"streaming_share"} if "flow" in losses else set())
    first = {f"{name}_weight" for name in SHAPERS} | {"streaming_share"}
    if stage == 2:
        return first
    return (first - {"reward_weight"}) | {
        *("asr_weight", "attribute_weight", "attributes", "second_flow_weight"),
        *("text_task", "estimator", "temperature", "resample"),
    }


def generators(said: Utterances, purpose: int, device: torch.device) -> tuple[torch.Generator, ...]:
    """One for each row, of its seed and of what is drawn."""
    return row_generators([4 * seed + purpose for seed in said.seeds], device)


def encoded(batch: Batch, parts: Parts, voices: Sequence[str], second: bool) -> Batch:
    """The batch with labels and voices, made on the CPU.

    Args:
        batch: before it moves to the device.
        parts: the models of the stage.
        voices: names of speakers whose vector is a one at its place.
        second: whether sampled speech tokens are rewarded.
    """
    sound = batch.recordings
    assert sound is not None
    if "reward" in parts:
        batch = with_labels(batch, parts.reward)
    said = batch.utterances
    assert said is not None
    if "flow" in parts:
        vectors = speaker_vectors_of(said.speakers, voices, sound.speaker, parts.flow.speaker_channels)
        said = replace(said, voices=vectors)
    if second:
        labels = parts.reward.encode_labels(said.target_texts, said.attributes)
        said = replace(said, target_labels=replace(labels, speech_lengths=speech_lengths(batch)))
    return replace(batch, utterances=said)


def recognition(step: Step, vectors: Float[Tensor, "r s h"]) -> tuple[Float[Tensor, ""], dict[str, Mean]]:
    """L_RM: text, speaker and whatever else the reward model knows of the rows, whose vectors it is given."""
    reward, said = step.parts.reward, step.utterances
    losses = reward.losses_embedded(vectors, said.mask, labels_of(step))
    totals = step.batch.totals
    share = []
    for name, loss in losses.items():
        if name in TEXT_TASKS:  # the end of a text is one more letter for asr
            count = totals.letters + (totals.labels["text"] if name == "asr" else 0)
            share.append(loss.total / max(count, 1))
        else:
            share.append(attribute_share(name, loss, step))
    return torch.stack(share).sum(), {
        f"rm_{name}": Mean(loss.total.detach(), loss.count) for name, loss in losses.items()
    }


def flow_error(
    step: Step, vectors: Float[Tensor, "r s h"], draws: FlowDraws, voices: Sequence[str]
) -> tuple[Float[Tensor, ""], Mean]:
    """L_FM: this micro-batch's share of the mean squared error over all frames and channels.

    Args:
        step: whose rows they are.
        vectors: what the flow reads of their speech tokens.
        draws: everything random.
        voices: names of speakers whose vector is a one at its place.
    """
    flow, sound = step.parts.flow, step.recordings
    speaker = step.utterances.voices
    if speaker is None:
        speaker = speaker_vectors_of(step.utterances.speakers, voices, sound.speaker, flow.speaker_channels)
    mel, mask = sound.mel.to(vectors.dtype), step.utterances.mask
    loss = flow.loss_embedded(vectors, mask, mel, sound.mel_mask, speaker.to(vectors.dtype), draws)
    count = step.batch.totals.speech_tokens * flow.frames_per_token * flow.mel_channels
    return loss.total / max(count, 1), Mean(loss.total.detach(), loss.count)


@dataclass(frozen=True)
class SecondOrder:
    """What stage 3 adds: sampled speech tokens through the flow and the reward model.

    Args:
        text_task: asr or ctc; asr if the reward model has it by default.
        text_weight: weight of the text in the reward.
        attributes: weight of each rewarded attribute.
        flow_weight: weight of the flow's loss on the samples.
        temperature: of the Gumbel-softmax.
        hard: one token at each position, or a soft sample.
        resample: draw tokens anew, or take the stored ones with the gradient of a draw.
    """

    text_task: str | None = None
    text_weight: float = 1.0
    attributes: Mapping[str, float] = field(default_factory=dict)
    flow_weight: float = 1.0
    temperature: float = 1.0
    hard: bool = True
    resample: bool = True

    def check(self, tasks: Sequence[str]) -> None:
        """Raise ``ValueError`` unless a reward model has what is rewarded.

        Args:
            tasks: of the reward model.
        """
        if unknown := [name for name in self.attributes if name not in tasks]:
            raise ValueError(
                f"attributes must be among model.reward's tasks, {', '.join(tasks)}, got {', '.join(unknown)}"
            )
        if not set(TEXT_TASKS) & set(tasks):
            raise ValueError("stage 3 rewards the text: model.reward must have decoder_layers or ctc")
        if self.text_task is not None and self.text_task not in tasks:
            missing = "decoder_layers" if self.text_task == "asr" else "ctc: true"
            raise ValueError(f"text_task: {self.text_task} needs a model.reward with {missing} in its sizes")

    def loss(self, step: Step, draws: FlowDraws, voices: Sequence[str]) -> tuple[Float[Tensor, ""], dict[str, Mean]]:
        """Losses of speech tokens that the policy samples, each given the real speech tokens before it."""
        assert step.policy.logits is not None
        reward, said, logits = step.parts.reward, step.utterances, step.policy.logits
        told, heard = self._sampled(step, logits)
        error, mean = flow_error(step, said.placed(told), draws, voices)
        labels = said.target_labels
        if labels is None:
            labels = reward.encode_labels(said.target_texts, said.attributes).to(logits.device)
        text = self.text_task or ("asr" if "asr" in reward.tasks else "ctc")
        weights = {text: self.text_weight, **self.attributes}
        scores = reward.score_embedded(said.placed(heard), said.mask, labels, tuple(weights))
        rewards = torch.stack([weights[one.name] * one.mean for one in scores.tasks]).sum(0)
        metrics = {f"second_{one.name}": Mean(-one.total.detach().sum(), one.count.sum()) for one in scores.tasks}
        return self.flow_weight * error - step.mean(rewards, step.batch.totals.rows), {"second_fm": mean, **metrics}

    def _sampled(self, step: Step, logits: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "c e"], Float[Tensor, "c h"]]:
        """What flow and reward model read of the samples at the real speech tokens."""
        reward, flow, said, target = step.parts.reward, step.parts.flow, step.utterances, step.batch.rows.target
        size, rows = reward.codebook_size, RowNoise(generators(said, GUMBEL, logits.device), said.targets)
        if self.hard and reward.looks_up and flow.looks_up:
            tables = flow.table.weight[:size], reward.table.weight[:size]
            chosen = None if self.resample else target
            vectors = sampled_vectors(logits, torch.cat(tables, 1), rows, self.temperature, chosen)
            # :: (m, e + h) -> (c, e + h)
            told, heard = vectors.index_select(0, said.code_target).split([one.shape[1] for one in tables], 1)
            return told, heard
        sample = relaxed_tokens(logits, size, target, rows, self.temperature, self.hard, self.resample)
        soft = sample.index_select(0, said.code_target)
        return flow.embed(soft[None])[0], reward.embed(soft)
