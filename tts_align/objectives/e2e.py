# SPDX-License-Identifier: Apache-2.0
"""Speech tokenizer, reward model, flow matching and language model trained end to end (E2E, arXiv 2606.09234)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tts_align.batch import Batch, Mean, Reads, Utterances
from tts_align.gumbel import RowNoise, gumbel_softmax_st, row_generators
from tts_align.objectives.base import Objective, Outcome, Part, Parts, Step, check_not_negative, check_positive
from tts_align.objectives.mtr import TEXT_TASKS, attribute_share
from tts_align.utils.seeds import drawn_for_step
from tts_align.utils.weights import PARTS, loaded, read_weights, speaker_vectors_of

if TYPE_CHECKING:
    from tts_align.models.base.flow import FlowHead
    from tts_align.models.base.flow_records import FlowDraws
    from tts_align.models.base.policy import CodecLM
    from tts_align.models.base.reward import RewardHead

Shaper = Literal["reward", "flow", "policy"]
SHAPERS: tuple[Shaper, ...] = ("reward", "flow", "policy")
NOISE, GUMBEL = 1, 2
"""What is drawn for a row: the flow's noise, and the noise that samples speech tokens."""


class E2E(Objective, name="e2e"):
    """End-to-end training in three stages, each of which starts from the one before.

    Stage 1 trains tokenizer, reward model, flow and language model together: policy_weight L_LM + reward_weight L_RM +
    flow_weight L_FM. The reward model and the flow read linear images of the tokenizer's quantised vectors, through
    whose rounding the gradient passes unchanged; the language model reads such an image, zero at first, added to its
    own table, and reaches the tokenizer through it alone, since its targets are whole numbers. Stage 2 freezes the
    tokenizer and trains the other three on its tokens; they share nothing, so the sum trains each by itself, but for
    the common clipping of gradients. Stage 3 freezes the reward model, too, and adds the second order: tokens that the
    language model samples (Gumbel-softmax, in one teacher-forced forward) pass through the flow, which is to make the
    real sound of the same frames, and through the reward model.

    L_LM is a mean over tokens, L_FM over frames and channels, L_RM the sum over its tasks of a mean over letters (asr,
    ctc) or rows. When a stage ends, what lies between the models is folded into their own token tables, so that they
    work alone. The published weights are the defaults; what stage 3 freezes is this project's choice.

    Args:
        stage: stage to train: 1, 2 or 3.
        losses: losses that train the tokenizer in stage 1; the models of the others are left out of it.
        start: directory of the run of an earlier stage to start from; without it ``fit`` makes its own.
        voices: names of speakers; each one's vector is a one at its place. Not for rows that bring speaker_vector.
        policy_weight: weight of the language model's loss, L_LM.
        reward_weight: weight of the reward model's loss, L_RM.
        flow_weight: weight of the flow's loss, L_FM.
        asr_weight: weight of the text in the reward of stage 3.
        attribute_weight: weight of each attribute, such as the speaker, in the reward of stage 3.
        attributes: attributes that are rewarded in stage 3; they must be tasks of the reward model.
        second_flow_weight: weight of the flow's loss on sampled speech tokens in stage 3.
        estimator: gradient estimator of the samples: straight_through (one token, the soft sample's gradient) or soft.
        temperature: temperature of the Gumbel-softmax.
        streaming_share: share of optimiser steps in which the flow does not look beyond its own chunk.
    """

    reads = Reads.SPEECH
    wants_utterances = True
    wants_sound = True

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 3,
        losses: Sequence[Shaper] = SHAPERS,
        start: str | None = None,
        voices: Sequence[str] = (),
        policy_weight: float = 0.1,
        reward_weight: float = 1.0,
        flow_weight: float = 1.0,
        asr_weight: float = 1.0,
        attribute_weight: float = 0.1,
        attributes: Sequence[str] = ("speaker",),
        second_flow_weight: float = 1.0,
        estimator: Literal["straight_through", "soft"] = "straight_through",
        temperature: float = 1.0,
        streaming_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_not_negative(policy_weight=policy_weight, reward_weight=reward_weight, flow_weight=flow_weight)
        check_not_negative(
            asr_weight=asr_weight,
            attribute_weight=attribute_weight,
            second_flow_weight=second_flow_weight,
            streaming_share=streaming_share,
        )
        check_positive(temperature=temperature)
        if not losses or (stage > 1 and set(losses) != set(SHAPERS)):
            raise ValueError(
                "losses say what stage 1 trains the tokenizer with: name at least one, or leave them out in a later "
                "stage, where model.stage_fit.losses is for the stage 1 that `fit` makes"
            )
        if stage == 1 and start is not None:
            raise ValueError("start has no effect in stage 1: name the directories of model.tokenizer and model.policy")
        self.stage, self.start, self.voices = stage, start, tuple(voices)
        self.weights = {"policy": policy_weight, "reward": reward_weight, "flow": flow_weight}
        self.asr_weight, self.second_flow_weight = asr_weight, second_flow_weight
        self.attributes = dict.fromkeys(attributes, attribute_weight)
        self.hard, self.temperature = estimator == "straight_through", temperature
        self.streaming_share = streaming_share
        self.losses = frozenset(losses)
        self.bridges = nn.ModuleDict()

    # --- the facts, which depend on the stage ---

    @property
    def needs(self) -> frozenset[Part]:  # type: ignore[override]
        """All models but, in stage 1, those that are left out of it."""
        return self.trains if self.stage == 1 else frozenset({Part.TOKENIZER, Part.REWARD, Part.FLOW})

    @property
    def trains(self) -> frozenset[Part]:  # type: ignore[override]
        """The tokenizer in stage 1 only, the reward model until stage 2, the flow in all."""
        if self.stage == 1:
            return frozenset({Part.TOKENIZER, *(Part(name) for name in self.losses & {"reward", "flow"})})
        return frozenset({Part.REWARD, Part.FLOW} if self.stage == 2 else {Part.FLOW})

    @property
    def scores(self) -> bool:  # type: ignore[override]
        """Whether the policy trains: always, unless it is left out of stage 1."""
        return self.stage > 1 or "policy" in self.losses

    @property
    def wants_logits(self) -> bool:  # type: ignore[override]
        """Stage 3 samples speech tokens of the policy's distributions."""
        return self.stage == 3

    # --- the models ---

    def bind(self, policy: CodecLM, parts: Parts) -> None:
        """Check that all speak of the same tokens; in stage 1 put bridges between them, later load what it made."""
        tokenizer = parts.tokenizer
        readers = {name: _reader(name, parts) for name in _READERS if name in parts}
        counts = {
            "policy": policy.layout.codebook_size,
            **{name: reader.codebook_size for name, reader in readers.items()},
        }
        if wrong := {name: count for name, count in counts.items() if count != tokenizer.codebook_size}:
            raise ValueError(
                f"all models must have the {tokenizer.codebook_size} speech tokens of model.tokenizer, got {wrong}"
            )
        if self.stage == 3:
            tasks = parts.reward.tasks
            if unknown := [name for name in self.attributes if name not in tasks]:
                raise ValueError(
                    f"attributes must be among model.reward's tasks, {', '.join(tasks)}, got {', '.join(unknown)}"
                )
            if not set(TEXT_TASKS) & set(tasks):
                raise ValueError("stage 3 rewards the text: model.reward must have decoder_layers or ctc")
        if self.stage == 1:
            for name, reader in readers.items():
                reader.table.requires_grad_(False)  # folding overwrites it
                self.bridges[name] = _bridge(tokenizer.embedding_channels, reader.table.embedding_dim)
            if self.scores:
                bridge = _bridge(tokenizer.embedding_channels, policy.table.embedding_dim)
                nn.init.zeros_(bridge.weight)
                self.bridges["policy"] = bridge
        if self.start is not None:
            self.load(policy, parts, Path(self.start))

    def load(self, policy: CodecLM, parts: Parts, run: Path) -> None:
        """Take over what an earlier stage left in its run's directory; what it did not train stays as it is."""
        found = loaded(run / PARTS, {"policy": policy, **parts})
        if Part.TOKENIZER not in found:
            raise ValueError(f"there is no trained tokenizer in {run / PARTS}: name the run of an earlier stage of e2e")
        if self.stage == 3 and not {Part.REWARD, Part.FLOW, "policy"} <= found:
            raise ValueError(f"stage 3 starts from a run of stage 2, or of stage 1 with all losses; {run} is neither")
        self.start = str(run)

    def initial_policy(self, policy: CodecLM) -> CodecLM | None:
        """The policy that this stage started from."""
        weights = None if self.start is None else read_weights(Path(self.start) / PARTS, "policy")
        if weights is None:
            return None
        earlier = copy.deepcopy(policy)
        earlier.load_state_dict(weights)
        return earlier

    @contextmanager
    def merged(self, policy: CodecLM, parts: Parts) -> Iterator[None]:
        """Within the block each model's table of speech tokens holds what its bridge makes of the codebook."""
        codebook = parts.tokenizer.codebook().detach()
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, bridge in self.bridges.items():
                table = (policy if name == "policy" else _reader(name, parts)).table.weight
                kept.append((table, table.clone()))
                image, rows = bridge(codebook).to(table.dtype), table[: len(codebook)]
                rows.copy_(rows + image if name == "policy" else image)
        bridges, self.bridges = self.bridges, nn.ModuleDict()
        try:
            yield
        finally:
            self.bridges = bridges
            with torch.no_grad():
                for table, before in kept:
                    table.copy_(before)

    # --- the step ---

    def prepare(self, batch: Batch, policy: CodecLM, parts: Parts) -> Batch:
        """Tokenise the sound, and put its speech tokens where the placeholders stand."""
        assert batch.recordings is not None
        assert batch.utterances is not None
        sound, said, rows = batch.recordings, batch.utterances, batch.rows
        tokenizer = parts.tokenizer
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 1):
            tokenised = tokenizer(sound.features.to(next(tokenizer.parameters()).dtype), sound.frames)
        if tokenised.tokens.shape != said.speech.shape:
            raise ValueError(
                f"the tokenizer made {tokenised.tokens.shape[1]} speech tokens of the longest row instead of "
                f"{said.speech.shape[1]}: its `count` does not agree with what it does"
            )
        speech_tokens = tokenised.tokens.flatten().index_select(0, said.code_place)
        # A token is an input right behind the one that predicts it.
        place = rows.hidden_index.index_select(0, said.code_target) + 1
        vectors = None
        if "policy" in self.bridges:
            # :: (r, s, c) -> (c, h), the real speech tokens
            image = self.bridges["policy"](tokenised.embedding.flatten(0, 1).index_select(0, said.code_place))
            vectors = image.new_zeros(len(rows.token), image.shape[-1]).index_copy(0, place, image)
        rows = replace(
            rows,
            token=rows.token.index_copy(0, place, speech_tokens),
            target=rows.target.index_copy(0, said.code_target, speech_tokens),
            vectors=vectors,
        )
        speech = tokenised.tokens.where(said.mask, 0)
        return replace(
            batch,
            rows=rows,
            utterances=replace(said, speech=speech),
            recordings=replace(sound, tokenised=tokenised),
        )

    def forward(self, step: Step) -> Outcome:
        """Sum of the stage's losses on this micro-batch."""
        losses: list[Tensor] = []
        metrics: dict[str, Mean] = {}
        if self.scores:
            losses.append(self.weights["policy"] * step.cross_entropy())
            logp, mask = step.policy.logp, step.policy.mask
            metrics["lm"] = Mean.of(-logp, mask)
        if Part.REWARD in self.trains:
            loss, found = self._recognition(step)
            losses.append(self.weights["reward"] * loss)
            metrics |= found
        if Part.FLOW in self.trains:
            draws = self._draws(step)
            loss, metrics["fm"] = self._flow_loss(step, self._vectors(step, "flow"), draws)
            losses.append(self.weights["flow"] * loss)
            if self.stage == 3:
                loss, found = self._second_order(step, draws)
                losses.append(loss)
                metrics |= found
        return Outcome(sum(losses[1:], losses[0]), metrics)

    def _vectors(self, step: Step, name: Literal["reward", "flow"]) -> Float[Tensor, "r s h"]:
        """What a model reads of the speech tokens: its bridge's image of them, or its own table's."""
        if name in self.bridges:
            return self.bridges[name](step.recordings.tokenised.embedding)
        return _reader(name, step.parts).embed(step.utterances.speech)

    def _recognition(self, step: Step) -> tuple[Float[Tensor, ""], dict[str, Mean]]:
        """L_RM: text, speaker and whatever else the reward model knows of the rows."""
        reward, said = step.parts.reward, step.utterances
        labels = reward.encode_labels(said.transcripts, said.attributes).to(said.speech.device)
        losses = reward.losses_embedded(self._vectors(step, "reward"), said.mask, labels)
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

    def _draws(self, step: Step) -> FlowDraws:
        """What is random for the flow; whether it streams is the same for all of an optimiser step."""
        flow, sound = step.parts.flow, step.recordings
        coin = drawn_for_step(step.number)
        frames = [count * flow.frames_per_token for count in sound.token_counts]
        return flow.draw(
            frames, _generators(step.utterances, NOISE, sound.mel.device), None, coin < self.streaming_share
        )

    def _flow_loss(
        self, step: Step, vectors: Float[Tensor, "r s h"], draws: FlowDraws
    ) -> tuple[Float[Tensor, ""], Mean]:
        """This micro-batch's share of the mean squared error over all frames and channels."""
        flow, sound = step.parts.flow, step.recordings
        speaker = speaker_vectors_of(step.utterances.speakers, self.voices, sound.speaker, flow.speaker_channels)
        mel, mask = sound.mel.to(vectors.dtype), step.utterances.mask
        loss = flow.loss_embedded(vectors, mask, mel, sound.mel_mask, speaker.to(vectors.dtype), draws)
        count = step.batch.totals.speech_tokens * flow.frames_per_token * flow.mel_channels
        return loss.total / max(count, 1), Mean(loss.total.detach(), loss.count)

    # --- the second order ---

    def _second_order(self, step: Step, draws: FlowDraws) -> tuple[Float[Tensor, ""], dict[str, Mean]]:
        """Losses of speech tokens that the policy samples, each given the real speech tokens before it."""
        assert step.policy.logits is not None
        reward, flow = step.parts.reward, step.parts.flow
        said = step.utterances
        noise = RowNoise(_generators(said, GUMBEL, step.policy.logits.device), said.targets)
        sample = gumbel_softmax_st(step.policy.logits, reward.codebook_size, noise, self.temperature, self.hard)
        soft = sample.index_select(0, said.code_target)
        error, mean = self._flow_loss(step, said.placed(flow.embed(soft[None])[0]), draws)
        labels = reward.encode_labels(said.target_texts, said.attributes).to(soft.device)
        text = "asr" if "asr" in reward.tasks else "ctc"
        weights = {text: self.asr_weight, **self.attributes}
        scores = reward.score_embedded(said.placed(reward.embed(soft)), said.mask, labels, tuple(weights))
        rewards = torch.stack([weights[rows.name] * rows.mean for rows in scores.tasks]).sum(0)
        metrics = {f"second_{rows.name}": Mean(-rows.total.detach().sum(), rows.count.sum()) for rows in scores.tasks}
        loss = self.second_flow_weight * error - step.mean(rewards, step.batch.totals.rows)
        return loss, {"second_fm": mean, **metrics}


_READERS = ("reward", "flow")  # besides the policy they read the tokenizer's vectors


def _reader(name: str, parts: Parts) -> RewardHead | FlowHead:
    return parts.reward if name == Part.REWARD else parts.flow


def _bridge(channels: int, width: int) -> nn.Linear:
    """From a tokenizer's vectors to those that another model reads, about as long as they are."""
    bridge = nn.Linear(channels, width, bias=False)
    nn.init.normal_(bridge.weight, std=channels**-0.5)
    return bridge


def _generators(said: Utterances, purpose: int, device: torch.device) -> tuple[torch.Generator, ...]:
    """One for each row, of its seed and of what is drawn."""
    return row_generators([4 * seed + purpose for seed in said.seeds], device)
