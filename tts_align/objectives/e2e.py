# SPDX-License-Identifier: Apache-2.0
"""Speech tokenizer, reward model, flow matching and language model trained end to end (E2E, arXiv 2606.09234)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tts_align.batch import Batch, Mean, Reads
from tts_align.models.base.bridges import Bridge, bridge_to, words
from tts_align.objectives.base import Objective, Outcome, Part, Parts, Step, check_not_negative, check_positive
from tts_align.objectives.e2e_losses import (
    NOISE,
    SHAPERS,
    SecondOrder,
    Shaper,
    encoded,
    flow_error,
    generators,
    recognition,
    used,
)
from tts_align.utils.messages import say
from tts_align.utils.seeds import drawn_for_step
from tts_align.utils.weights import PARTS, loaded, read_weights

if TYPE_CHECKING:
    from tts_align.models.base.flow import FlowHead
    from tts_align.models.base.flow_records import FlowDraws
    from tts_align.models.base.policy import CodecLM
    from tts_align.models.base.reward import RewardHead


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
    ctc) or rows. When a stage ends, what lies between the models is merged into their own token tables, so that they
    work alone. The published weights are the defaults; what stage 3 freezes is this project's choice.

    A model that the recipe names by its directory keeps what it has learnt: in stage 1 its bridge starts as the image
    of the codebook that is nearest to its table, wider than linear where the codebook's rank asks for it, and the error
    is printed. What a stage does not use must not be set: weights of the losses that it lacks, and everything of the
    second order in stages 1 and 2; where ``fit`` makes the stages before, what they use may be set, too.

    Args:
        stage: stage to train: 1, 2 or 3.
        losses: losses that train the tokenizer in stage 1; the models of the others are left out of it.
        start: directory of the run of an earlier stage to start from; without it ``fit`` makes its own.
        voices: names of speakers; each one's vector is a one at its place. Not for rows that bring speaker_vector.
        policy_weight: weight of the language model's loss, L_LM; 0.1 by default.
        reward_weight: weight of the reward model's loss, L_RM, in stages 1 and 2; 1 by default.
        flow_weight: weight of the flow's loss, L_FM; 1 by default.
        asr_weight: weight of the text in the reward of stage 3; 1 by default.
        attribute_weight: weight of each attribute, such as the speaker, in the reward of stage 3; 0.1 by default.
        attributes: attributes that are rewarded in stage 3, tasks of the reward model; speaker by default.
        second_flow_weight: weight of the flow's loss on sampled speech tokens in stage 3; 1 by default.
        text_task: task by which the reward model hears the text in stage 3: asr, which knows the letters before, or
            ctc, which cannot answer from the text; asr by default if it has it.
        estimator: gradient estimator of the samples: straight_through (one token, the soft sample's gradient, the
            default) or soft.
        temperature: temperature of the Gumbel-softmax; 1 by default.
        resample: whether stage 3 draws a token anew at each position, as the paper does and by default; otherwise the
            stored tokens have the gradient that this draw would have had, as with the objective diffro.
        streaming_share: share of optimiser steps in which the flow does not look beyond its own chunk.
        unfreeze_after: optimiser steps for which a part waits before it trains, by name: {tokenizer: 200} lets new
            models settle on the tokens as they are, {reward: 200} keeps a trained reward model as it is for a while.
        all_rows: whether utterances labelled undesirable are heard, too: what is said in them trains the reward model,
            their sound the flow, and stage 3 rewards them for what they should have said. L_LM reads desirable ones.
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
        policy_weight: float | None = None,
        reward_weight: float | None = None,
        flow_weight: float | None = None,
        asr_weight: float | None = None,
        attribute_weight: float | None = None,
        attributes: Sequence[str] | None = None,
        second_flow_weight: float | None = None,
        text_task: Literal["asr", "ctc"] | None = None,
        estimator: Literal["straight_through", "soft"] | None = None,
        temperature: float | None = None,
        resample: bool | None = None,
        streaming_share: float | None = None,
        unfreeze_after: Mapping[str, int] | None = None,
        all_rows: bool = False,
    ) -> None:
        super().__init__()
        weights = {
            "policy_weight": policy_weight,
            "reward_weight": reward_weight,
            "flow_weight": flow_weight,
            "asr_weight": asr_weight,
            "attribute_weight": attribute_weight,
            "second_flow_weight": second_flow_weight,
            "streaming_share": streaming_share,
        }
        check_not_negative(**{name: value for name, value in weights.items() if value is not None})
        check_positive(temperature=_or(temperature, 1.0))
        if not losses or (stage > 1 and set(losses) != set(SHAPERS)):
            raise ValueError(
                "losses say what stage 1 trains the tokenizer with: name at least one, or leave them out in a later "
                "stage, where model.stage_fit.losses is for the stage 1 that `fit` makes"
            )
        if stage == 1 and start is not None:
            raise ValueError("start has no effect in stage 1: name the directories of model.tokenizer and model.policy")
        others = {
            "attributes": attributes,
            "text_task": text_task,
            "estimator": estimator,
            "temperature": temperature,
            "resample": resample,
        }
        given = {name for name, value in {**weights, **others}.items() if value is not None}
        stages = range(1, stage + 1) if start is None else (stage,)
        if idle := sorted(given.difference(*(used(one, losses) for one in stages))):
            raise ValueError(f"{', '.join(idle)} have no effect in stage {stage} of e2e: leave them out")
        self.stage, self.start, self.voices = stage, start, tuple(voices)
        if all_rows:
            self.reads = Reads.ANY  # type: ignore[misc]  # the registry asks the class
        self.weights = {
            "policy": _or(policy_weight, 0.1),
            "reward": _or(reward_weight, 1.0),
            "flow": _or(flow_weight, 1.0),
        }
        rewarded = ("speaker",) if attributes is None else attributes
        self.second = SecondOrder(
            text_task,
            _or(asr_weight, 1.0),
            dict.fromkeys(rewarded, _or(attribute_weight, 0.1)),
            _or(second_flow_weight, 1.0),
            _or(temperature, 1.0),
            estimator != "soft",
            resample is not False,
        )
        self.streaming_share, self.losses = _or(streaming_share, 0.0), frozenset(losses)
        self.unfreeze_after = dict(unfreeze_after or {})
        if idle := sorted(self.unfreeze_after.keys() - self.trainable):
            raise ValueError(
                f"unfreeze_after of {', '.join(idle)} has no effect in stage {stage}: what trains in it is "
                f"{', '.join(sorted(self.trainable))}"
            )
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
            self.second.check(parts.reward.tasks)
        if self.stage == 1:
            codebook = tokenizer.codebook().detach()
            for name, reader in readers.items():
                reader.table.requires_grad_(False)  # folding overwrites it
                self.bridges[name] = bridge_to(name, reader, codebook)
            if self.scores:
                bridge = Bridge(tokenizer.embedding_channels, policy.table.embedding_dim)
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
        others = {"policy", *map(str, parts)} - found
        rest = f"; {words(sorted(others))} as the recipe gives {'it' if len(others) == 1 else 'them'}" if others else ""
        say(f"stage {self.stage} starts with {words(sorted(found))} of {run}{rest}")

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

    def encode(self, batch: Batch, parts: Parts) -> Batch:
        """Labels of the rows, and voices."""
        return encoded(batch, parts, self.voices, self.stage == 3)

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
        speech_tokens = tokenised.tokens.flatten().index_select(0, said.code_place)  # :: (r, s) -> (c)
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
            metrics["lm"] = Mean.of(-step.policy.logp, step.policy.mask & step.batch.desirable[:, None])
        if Part.REWARD in self.trains:
            loss, found = recognition(step, self._vectors(step, "reward"))
            losses.append(self.weights["reward"] * loss)
            metrics |= found
        if Part.FLOW in self.trains:
            draws = self._draws(step)
            loss, metrics["fm"] = flow_error(step, self._vectors(step, "flow"), draws, self.voices)
            losses.append(self.weights["flow"] * loss)
            if self.stage == 3:
                loss, found = self.second.loss(step, draws, self.voices)
                losses.append(loss)
                metrics |= found
        return Outcome(sum(losses[1:], losses[0]), metrics)

    def _vectors(self, step: Step, name: Literal["reward", "flow"]) -> Float[Tensor, "r s h"]:
        """What a model reads of the speech tokens: its bridge's image of them, or its own table's."""
        if name in self.bridges:
            return self.bridges[name](step.recordings.tokenised.embedding)
        return _reader(name, step.parts).embed(step.utterances.speech)

    def _draws(self, step: Step) -> FlowDraws:
        """What is random for the flow; whether it streams is the same for all of an optimiser step."""
        flow, sound = step.parts.flow, step.recordings
        coin = drawn_for_step(step.number)
        frames = [count * flow.frames_per_token for count in sound.token_counts]
        return flow.draw(
            frames, generators(step.utterances, NOISE, sound.mel.device), None, coin < self.streaming_share
        )


_READERS = ("reward", "flow")  # besides the policy they read the tokenizer's vectors


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _reader(name: str, parts: Parts) -> RewardHead | FlowHead:
    return parts.reward if name == Part.REWARD else parts.flow
