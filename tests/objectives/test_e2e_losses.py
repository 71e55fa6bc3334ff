# SPDX-License-Identifier: Apache-2.0
"""The losses of end-to-end training typed again, slowly and in double precision, with listeners that are sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from spoken import spoken_step
from steps import LAYOUT
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tts_align.batch import Recordings, Totals
from tts_align.models.base.flow_records import FlowDraws, FlowLoss
from tts_align.models.base.reward_records import RewardLabels, RewardScores, TaskLoss, TaskRows
from tts_align.objectives import Part, Step
from tts_align.objectives.base import Parts
from tts_align.objectives.e2e_losses import SecondOrder, flow_error, generators, recognition, used

LENGTHS = (3, 1, 5, 2)
CODES, WIDTH, FRAMES, CHANNELS = LAYOUT.codebook_size, 3, 2, 4
VOICES = ("ann", "bob")
NONE = torch.zeros(4, 0, dtype=torch.long)
DRAWS = FlowDraws(torch.zeros(4), torch.zeros(4, 1, 1), NONE[:, :0].sum(1), torch.ones(4, dtype=torch.bool))
UNREAD = RewardLabels(NONE, NONE.bool(), torch.ones(4, dtype=torch.bool))
"""What the stand-ins below do not ask."""


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PULL = {name: numbers(WIDTH, seed=2 + i) for i, name in enumerate(("asr", "ctc", "speaker"))}
COUNTS = {"asr": (4.0, 2.0, 3.0, 1.0), "ctc": (3.0, 1.0, 2.0, 0.0), "speaker": (1.0, 1.0, 1.0, 1.0)}


class Ear(nn.Module):
    """A reward model whose log-probability of a task is a weighted sum of the speech tokens' vectors."""

    codebook_size, tasks, looks_up = CODES, tuple(PULL), False
    vectors = numbers(CODES, WIDTH, seed=1)
    table = SimpleNamespace(weight=vectors)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.vectors

    def score_embedded(self, embedded: Any, mask: Any, labels: Any, tasks: Any) -> RewardScores:
        real = embedded * mask[..., None]
        rows = [
            TaskRows(name, real.sum(1) @ PULL[name], torch.tensor(COUNTS[name], dtype=torch.float64)) for name in tasks
        ]
        return RewardScores(tuple(rows))

    def losses_embedded(self, embedded: Any, mask: Any, labels: Any) -> dict[str, TaskLoss]:
        total = {name: rows.total.sum() for name, rows in zip(self.tasks, self._all(embedded, mask), strict=True)}
        return {name: TaskLoss(value, torch.tensor(float(3 + i))) for i, (name, value) in enumerate(total.items())}

    def _all(self, embedded: torch.Tensor, mask: torch.Tensor) -> tuple[TaskRows, ...]:
        return self.score_embedded(embedded, mask, None, self.tasks).tasks


class Mouth(nn.Module):
    """A flow whose velocity is what a token and a voice say of each of its frames."""

    frames_per_token, mel_channels, speaker_channels = FRAMES, CHANNELS, len(VOICES)
    looks_up = False
    vectors, voice = numbers(CODES, CHANNELS, seed=11), numbers(len(VOICES), CHANNELS, seed=12)
    table = SimpleNamespace(weight=vectors)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.vectors

    def loss_embedded(self, vectors: Any, mask: Any, mel: Any, mel_mask: Any, speaker: Any, draws: Any) -> FlowLoss:
        made = vectors.repeat_interleave(FRAMES, 1) + (speaker @ self.voice)[:, None]
        error = (made - mel).square() * mel_mask[..., None]
        return FlowLoss(error.sum(), mel_mask.sum().double() * CHANNELS)


@dataclass(frozen=True)
class Case:
    """A scored step with sound, and its mel and logits row by row."""

    step: Step
    mel: list[torch.Tensor]
    logits: list[torch.Tensor]


@pytest.fixture(params=[False, True], ids=["embed", "look_up"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """With models that are asked for vectors of one-hots, or whose tables are read."""
    for listener in (Ear, Mouth):
        monkeypatch.setattr(listener, "looks_up", request.param)
    step = spoken_step(LENGTHS, dtype=torch.float64)
    mel = [numbers(FRAMES * length, CHANNELS, seed=20 + row) for row, length in enumerate(LENGTHS)]
    padded = pad_sequence(mel, batch_first=True)
    mask = torch.arange(padded.shape[1]) < FRAMES * torch.tensor(LENGTHS)[:, None]
    none = torch.zeros(len(LENGTHS), 0)
    sound = Recordings(padded, mask.sum(1), padded, mask, none, LENGTHS)
    # Twice the rows of this micro-batch: it is one of two of its optimiser step.
    totals = Totals(8, 30, 8, 30, {"text": 7, "speaker": 8}, speech_tokens=25, letters=19)
    said = step.batch.utterances
    assert said is not None
    speakers = tuple(VOICES[row % 2] for row in range(len(LENGTHS)))
    known = (*({"speaker": name} for name in speakers[:3]), {})
    said = replace(said, speakers=speakers, attributes=known, labels=UNREAD, target_labels=UNREAD)
    batch = replace(step.batch, totals=totals, utterances=said, recordings=sound)
    parts = Parts({Part.REWARD: Ear(), Part.FLOW: Mouth()})
    assert step.policy.logits is not None
    logits = list(step.policy.logits.detach().split([length + 1 for length in LENGTHS]))
    return Case(replace(step, batch=batch, parts=parts), mel, logits)


def test_recognition_is_a_mean_over_letters_or_rows_of_the_whole_step(case: Case):
    step = case.step
    vectors = step.utterances.placed(numbers(sum(LENGTHS), WIDTH, seed=5))
    loss, metrics = recognition(step, vectors)
    sums = {name: 0.0 for name in Ear.tasks}
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            for name in sums:
                sums[name] += sum(float(vectors[row, token, i]) * float(PULL[name][i]) for i in range(WIDTH))
    # asr: letters and an end of each text; ctc: letters; speaker: three of the eight rows' labels are here.
    expected = sums["asr"] / (19 + 7) + sums["ctc"] / 19 + sums["speaker"] / 5 * 3 / 8
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["rm_asr"].value.item() == pytest.approx(sums["asr"] / 3, rel=1e-6)


def slow_flow(case: Case, tokens: list[torch.Tensor]) -> float:
    """Squared error over all frames and channels of all rows, over what the whole step has of them."""
    total = 0.0
    for row, mel in enumerate(case.mel):
        for frame in range(len(mel)):
            said = tokens[row][frame // FRAMES]
            for channel in range(CHANNELS):
                made = sum(float(said[code]) * float(Mouth.vectors[code, channel]) for code in range(CODES))
                total += (made + float(Mouth.voice[row % 2, channel]) - float(mel[frame, channel])) ** 2
    return total / (25 * FRAMES * CHANNELS)


def test_the_flow_error_is_a_mean_over_frames_and_channels_of_the_whole_step(case: Case):
    tokens = [torch.eye(CODES, dtype=torch.float64)[torch.arange(length) % CODES] for length in LENGTHS]
    vectors = case.step.utterances.placed(torch.cat(tokens) @ Mouth.vectors)
    loss, mean = flow_error(case.step, vectors, DRAWS, VOICES)
    assert loss.item() == pytest.approx(slow_flow(case, tokens), rel=1e-12)
    assert mean.value.item() == pytest.approx(slow_flow(case, tokens) * 25 / sum(LENGTHS), rel=1e-6)


def noise_of(case: Case) -> list[torch.Tensor]:
    """Gumbel numbers of each row's own generator."""
    drawn = []
    for generator, logits in zip(generators(case.step.utterances, 2, torch.device("cpu")), case.logits, strict=True):
        exponential = torch.empty(len(logits), CODES, dtype=torch.float64).exponential_(generator=generator)
        drawn.append(-exponential.log())
    return drawn


def slow_second(case: Case, tokens: list[torch.Tensor], text: str, flow_weight: float) -> float:
    """Flow error of the sampled tokens, minus the mean reward of the rows."""
    reward = 0.0
    for row, length in enumerate(LENGTHS):
        for name, weight in ((text, 2.0), ("speaker", 0.5)):
            total = sum(
                float(tokens[row][token, code]) * float(Ear.vectors[code] @ PULL[name])
                for token in range(length)
                for code in range(CODES)
            )
            reward += weight * total / max(COUNTS[name][row], 1.0)
    return flow_weight * slow_flow(case, tokens) - reward / 8


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(("text_task", "expected"), [(None, "asr"), ("ctc", "ctc")])
def test_fresh_draws_are_rewarded_as_drawn(hard: bool, text_task: str | None, expected: str, case: Case):
    temperature = 0.7
    second = SecondOrder(text_task, 2.0, {"speaker": 0.5}, 3.0, temperature, hard)
    loss, metrics = second.loss(case.step, DRAWS, VOICES)
    soft, tokens = [], []
    for logits, noise in zip(case.logits, noise_of(case), strict=True):
        scores = ((logits[:, :CODES] + noise) / temperature).tolist()
        shares = [[math.exp(x) for x in row] for row in scores]
        soft.append(torch.tensor([[x / sum(row) for x in row] for row in shares], dtype=torch.float64))
        tokens.append(torch.eye(CODES, dtype=torch.float64)[soft[-1].argmax(-1)] if hard else soft[-1])
    assert loss.item() == pytest.approx(slow_second(case, tokens, expected, 3.0), rel=1e-9)
    assert set(metrics) == {"second_fm", f"second_{expected}", "second_speaker"}
    # The gradient, hard or soft, is that of the soft tokens around what was heard: typed as the softmax's Jacobian.
    logits = case.step.policy.logits
    (found,) = torch.autograd.grad(loss, logits)
    rows = list(found.split([length + 1 for length in LENGTHS]))
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            upstream = [_slope(case, tokens, row, token, code, expected) for code in range(CODES)]
            share = soft[row][token].tolist()
            middle = sum(s * u for s, u in zip(share, upstream, strict=True))
            typed = [s * (u - middle) / temperature for s, u in zip(share, upstream, strict=True)]
            np.testing.assert_allclose(rows[row][token, :CODES].numpy(), typed, rtol=1e-6, atol=1e-9)
        assert rows[row][length].abs().max() == 0  # the end of speech is no token


def _slope(case: Case, tokens: list[torch.Tensor], row: int, token: int, code: int, text: str) -> float:
    """How the loss changes with one entry of one token: a quadratic, so a central difference is exact."""
    sides = []
    for sign in (1, -1):
        moved = [one.clone() for one in tokens]
        moved[row][token, code] += sign * 0.5
        sides.append(slow_second(case, moved, text, 3.0))
    return sides[0] - sides[1]


def test_without_fresh_draws_the_stored_tokens_are_rewarded(case: Case):
    loss, _ = SecondOrder("ctc", 2.0, {"speaker": 0.5}, 3.0, resample=False).loss(case.step, DRAWS, VOICES)
    stored = [torch.tensor(row.speech) for row in case.step.utterances.rows]
    tokens = [torch.eye(CODES, dtype=torch.float64)[row] for row in stored]
    assert loss.item() == pytest.approx(slow_second(case, tokens, "ctc", 3.0), rel=1e-9)


def test_a_reward_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="attributes must be among"):
        SecondOrder(attributes={"mood": 1.0}).check(("asr",))
    with pytest.raises(ValueError, match="decoder_layers or ctc"):
        SecondOrder(attributes={"mood": 1.0}).check(("mood",))
    with pytest.raises(ValueError, match="ctc: true"):
        SecondOrder("ctc").check(("asr",))


def test_what_has_an_effect_in_each_stage():
    """As the table of the method has it: the reward model's loss ends with stage 2, the second order begins with 3."""
    assert used(1, ["reward"]) == {"reward_weight"}
    assert used(1, ["flow", "policy"]) == {"flow_weight", "policy_weight", "streaming_share"}
    second, third = used(2, []), used(3, [])
    assert second - third == {"reward_weight"}
    assert {"second_flow_weight", "asr_weight", "temperature", "resample"} <= third - second
