# SPDX-License-Identifier: Apache-2.0
"""The guards, on a tiny policy that trains by reward while a judge that is told what to say listens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from tiny import Memory, build, gap, make_reward, make_trainer, weights
from torch import Tensor

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.prompts import SentencePrompt, read_prompts, write_prompts
from tts_align.evaluation.speaking import speak, utterance_requests
from tts_align.models.base.vocoder import Vocoder
from tts_align.objectives import SFT, DiffRO
from tts_align.training.callbacks.guards import CollapseGuard, HackingGuard, histogram_entropy
from tts_align.training.module import AlignModule

pytestmark = pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")


class Scripted(Judge):
    """Gives each hearing the error rate it is told, a little different for each utterance; it reads speech tokens."""

    needs_audio = False

    def __init__(self, rates: Sequence[float], utterances: int) -> None:
        super().__init__()
        self.rates, self.utterances, self.asked = list(rates), utterances, 0

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        verdicts = []
        for _ in samples:
            rate = self.rates[min(self.asked // self.utterances, len(self.rates) - 1)]
            wobble = 0.001 * (self.asked % self.utterances)
            verdicts.append(Verdict("", Reading.UNMARKED, rate + wobble, rate + wobble))
            self.asked += 1
        return verdicts


class Tone(Vocoder):
    """Sound whose length is that of the speech tokens."""

    sample_rate = 8000

    def speak(self, speech: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
        return [torch.ones(len(speech_tokens)) for speech_tokens in speech]


class Drifting:
    """A voice that turns by so much with each hearing."""

    sample_rate = 16000

    def __init__(self, turn: float) -> None:
        self.turn, self.calls = turn, 0
        self.lengths: list[int] = []

    def encode(self, waveforms: Sequence[Tensor]) -> Tensor:
        angle = torch.tensor(self.turn * self.calls)
        self.calls += 1
        self.lengths += [len(one) for one in waveforms]
        return torch.stack([angle.cos(), angle.sin()]).expand(len(waveforms), 2)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [SentencePrompt(f"s{number}", "abcdefgh"[number]) for number in range(8)])
    return str(path)


class Setup:
    """A module, its data, and fits of it with a guard."""

    def __init__(self, folder: Path, policy: Path, rows: str) -> None:
        self.folder, self.policy, self.rows = folder, policy, rows

    def fit(self, guard: HackingGuard, rates: Sequence[float], **options: Any) -> tuple[AlignModule, Any]:
        judge = Scripted(rates, guard.sentences)
        parts = {"reward": make_reward(), "judge": judge, "vocoder": Tone()}
        module, data = build(DiffRO(), self.policy, self.rows, self.folder / "cache", parts=parts, rows_per_step=4)
        trainer = make_trainer(self.folder, guard, **options)
        trainer.fit(module, datamodule=data)
        return module, trainer


@pytest.fixture
def setup(tmp_path: Path, tiny_policy: Path, tiny_rows: str) -> Setup:
    return Setup(tmp_path, tiny_policy, tiny_rows)


def guard(prompts: str, **knobs: Any) -> HackingGuard:
    return HackingGuard(prompts, **({"every_steps": 1, "sentences": 6} | knobs))


def give_rewards(monkeypatch: pytest.MonkeyPatch, rewards: Sequence[float]) -> None:
    """What the reward model says of what it hears, hearing by hearing."""
    given = iter(rewards)
    monkeypatch.setattr(HackingGuard, "_rewards", lambda *_: {"": next(given)})


def test_rising_errors_with_rising_reward_stop_the_training(
    setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    give_rewards(monkeypatch, [-3.0, -2.0, -1.0, -0.5, -0.1])
    watch = guard(prompts)
    _, trainer = setup.fit(watch, [0.1, 0.1, 0.105, 0.3])
    assert trainer.global_step == 3  # of four: .105 is within the margin, .3 is not
    assert "step 3: the reward model is being fooled" in caplog.text
    assert re.search(r"up by 0\.200 \(0\.19\d to 0\.20\d\) since step 0", caplog.text)
    logged = [metrics["guard/cer"] for _, metrics in trainer.logger.logged if "guard/cer" in metrics]
    assert logged == pytest.approx([0.1025, 0.1025, 0.1075, 0.3025])


def test_patience_waits_for_what_passes(setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    """One bad hearing between good ones is forgiven, two in a row are not."""
    give_rewards(monkeypatch, [-3.0, -2.0, -1.0, -0.5, -0.1])
    _, trainer = setup.fit(guard(prompts, patience=2), [0.1, 0.3, 0.1, 0.3, 0.1])
    assert trainer.global_step == 4
    assert "being fooled" not in caplog.text
    give_rewards(monkeypatch, [-3.0, -2.0, -1.0, -0.5, -0.1])
    _, trainer = setup.fit(guard(prompts, patience=2), [0.1, 0.1, 0.3, 0.4])
    assert trainer.global_step == 3
    assert "being fooled" in caplog.text


def test_it_can_only_warn(setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    give_rewards(monkeypatch, [-3.0, -2.0, -1.0, -0.5, -0.1])
    _, trainer = setup.fit(guard(prompts, stop=False), [0.1, 0.3])
    assert trainer.global_step == 4
    assert "being fooled" in caplog.text


def test_rising_errors_with_a_falling_reward_are_no_hacking(
    setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    give_rewards(monkeypatch, [-0.5, -1.0, -1.5, -2.0, -3.0])
    _, trainer = setup.fit(guard(prompts), [0.1, 0.1, 0.3, 0.5])
    assert trainer.global_step == 4
    assert "guards" not in {record.name.rpartition(".")[2] for record in caplog.records}


def test_falling_errors_are_welcome(setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    give_rewards(monkeypatch, [-3.0, -2.0, -1.0, -0.5, -0.1])
    _, trainer = setup.fit(guard(prompts), [0.5, 0.3, 0.2, 0.1])
    assert trainer.global_step == 4
    assert "guards" not in {record.name.rpartition(".")[2] for record in caplog.records}


def test_a_voice_that_moves_stops_the_training(setup: Setup, prompts: str, caplog: pytest.LogCaptureFixture):
    voice = Drifting(0.2)
    watch = guard(prompts, speakers_encoder=voice, similarity_fall=0.1)
    _, trainer = setup.fit(watch, [0.1])
    assert trainer.global_step == 3  # 1 - cos .6 = .175, 1 - cos .4 = .079
    assert "the voice has moved: its similarity to the start fell by 0.175" in caplog.text
    similar = [metrics["guard/similarity"] for _, metrics in trainer.logger.logged if "guard/similarity" in metrics]
    assert similar == pytest.approx([1.0, math.cos(0.2), math.cos(0.4), math.cos(0.6)], abs=1e-5)
    assert all(length % 2 == 0 for length in voice.lengths)  # resampled from 8 to 16 kHz


def test_listening_does_not_disturb_the_training(setup: Setup, prompts: str, tmp_path: Path):
    watched, _ = setup.fit(guard(prompts, stop=False), [0.1])
    parts = {"reward": make_reward()}
    alone, data = build(DiffRO(), setup.policy, setup.rows, tmp_path / "cache", parts=parts, rows_per_step=4)
    make_trainer(tmp_path).fit(alone, datamodule=data)
    assert gap(weights(watched), weights(alone)) == 0
    assert watched.policy.training


def test_a_resumed_run_compares_with_the_same_start(setup: Setup, prompts: str, tmp_path: Path):
    first = guard(prompts)
    _, trainer = setup.fit(first, [0.1, 0.105], max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["HackingGuard"]
    again = guard(prompts)
    again.load_state_dict(kept)
    assert [one["cer"] for one in again.heard] == [one["cer"] for one in first.heard]
    assert [one["step"] for one in again.heard] == [0, 1, 2]


def test_what_was_stopped_stays_stopped(setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch):
    give_rewards(monkeypatch, [-3.0, -2.0, -1.0, -0.5, -0.1])
    first = guard(prompts)
    setup.fit(first, [0.1, 0.9])
    again = guard(prompts)
    again.load_state_dict(first.state_dict())
    _, trainer = setup.fit(again, [0.1])
    assert trainer.global_step == 0


def test_the_reward_is_the_models_own_of_what_was_spoken(setup: Setup, prompts: str):
    """Of the same utterances that the judge hears, under the text that is wanted of them."""
    watch = guard(prompts, stop=False)
    module, trainer = setup.fit(watch, [0.1], max_steps=1)
    model: Any = module.parts["reward"]
    chosen = [read_prompts(prompts)[i] for i in (0, 1, 2, 4, 5, 7)]
    items = utterance_requests(chosen, (), 1, 7)
    spoken = [one for part in speak(module.policy, module.sampling, items, 3) for one in part]
    expected = []
    for one in spoken:
        if one.speech:
            labels = model.encode_labels([one.prompt.text], [{}])
            speech_tokens = torch.tensor(one.speech)[None]
            with torch.no_grad():
                expected.append(model.score(speech_tokens, speech_tokens >= 0, labels).reward().item())
    assert watch.heard[-1]["reward"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    logged = [metrics["guard/reward"] for _, metrics in trainer.logger.logged if "guard/reward" in metrics]
    assert logged == [one["reward"] for one in watch.heard]


def test_without_a_reward_model_there_is_nothing_to_guard(setup: Setup, prompts: str, tmp_path: Path):
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", parts={"judge": Scripted([0.1], 6)})
    with pytest.raises(ValueError, match="no reward to compare with"):
        make_trainer(tmp_path, guard(prompts)).fit(module, datamodule=data)


def test_nobody_to_listen(setup: Setup, prompts: str, tmp_path: Path):
    parts = {"reward": make_reward()}
    module, data = build(DiffRO(), setup.policy, setup.rows, tmp_path / "cache", parts=parts)
    with pytest.raises(ValueError, match=r"no judge configured: the recipe must set model\.judge"):
        make_trainer(tmp_path, guard(prompts)).fit(module, datamodule=data)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"every_steps": 0}, "every_steps, sentences and patience must be at least 1, got 0, 6, 1"),
        ({"cer_rise": -0.1}, "cer_rise and similarity_fall must not be negative"),
        ({"similarity_fall": 0.2}, "similarity_fall has no effect without speakers_encoder"),
    ],
)
def test_wrong_knobs_of_the_hacking_guard(knobs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        guard("nowhere", **knobs)


# --- collapse ---


def looks(watch: CollapseGuard, numbers: Sequence[tuple[float, Sequence[float]]]) -> tuple[Any, Memory]:
    """Let it see logs, one for each step: share of saturated rewards, and their histogram."""
    memory = Memory()
    trainer: Any = Mock(spec=Trainer)
    trainer.configure_mock(callback_metrics={}, log_every_n_steps=1, loggers=[memory], should_stop=False)
    for step, (saturated, bins) in enumerate(numbers, start=1):
        trainer.global_step = step
        trainer.callback_metrics |= {"train/saturated": torch.tensor(saturated)}
        trainer.callback_metrics |= {f"train/reward_bin{i}": torch.tensor(share) for i, share in enumerate(bins)}
        for _ in range(2):  # two micro-batches of one step
            watch.on_train_batch_end(trainer, Mock(spec=AlignModule))
    return trainer, memory


FLAT, SPIKE = (0.2,) * 5, (1.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("numbers", "collapsed"),
    [
        ([(0.1, FLAT)] * 5, False),
        ([(0.99, FLAT)] * 3, True),
        ([(0.1, SPIKE)] * 3, True),
        ([(0.99, FLAT)] * 2 + [(0.1, FLAT)] + [(0.99, FLAT)] * 2, False),
    ],
    ids=["healthy", "saturated", "all the same", "not three in a row"],
)
def test_collapse(numbers: Any, collapsed: bool, caplog: pytest.LogCaptureFixture):
    trainer, memory = looks(CollapseGuard(stop=True), numbers)
    assert trainer.should_stop == collapsed
    assert ("the rewards have collapsed" in caplog.text) == collapsed
    spread = [metrics["train/reward_entropy_nats"] for _, metrics in memory.logged]
    assert len(spread) == len(numbers)
    assert spread[0] == pytest.approx(histogram_entropy(numbers[0][1]), abs=1e-6)


def test_by_default_it_only_warns(caplog: pytest.LogCaptureFixture):
    trainer, _ = looks(CollapseGuard(), [(0.99, FLAT)] * 4)
    assert not trainer.should_stop
    assert "99 % are saturated, their entropy is 1.61 nats" in caplog.text


def test_collapse_goes_on_counting_after_a_pause():
    first, again = CollapseGuard(), CollapseGuard()
    looks(first, [(0.99, FLAT)] * 2)
    again.load_state_dict(first.state_dict())
    assert (again.bad, again._seen) == (2, 2)


def test_it_sees_what_diffro_logs(setup: Setup, tmp_path: Path):
    parts = {"reward": make_reward()}
    module, data = build(DiffRO(), setup.policy, setup.rows, tmp_path / "cache", parts=parts, rows_per_step=4)
    trainer = make_trainer(tmp_path, CollapseGuard())
    trainer.fit(module, datamodule=data)
    assert 0 <= trainer.callback_metrics["train/reward_entropy_nats"] <= math.log(5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_looks_at_each_log_once_and_at_once(
    accumulate: int, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lightning calls callbacks before the module, which logs: a guard that does not ask sees the log before."""
    module, data = build(
        DiffRO(), setup.policy, setup.rows, tmp_path / "cache", parts={"reward": make_reward()}, rows_per_step=2
    )
    logged: list[int] = []
    log = AlignModule._log

    def noted(self: AlignModule, stage: str) -> None:
        logged.append(self.trainer.global_step)
        log(self, stage)
        self.trainer.callback_metrics["train/saturated"] = torch.tensor(1.0)

    monkeypatch.setattr(AlignModule, "_log", noted)
    watch = CollapseGuard(patience=2, stop=True)
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": accumulate, "limit_val_batches": 0, "max_steps": 4}
    trainer = make_trainer(tmp_path, watch, **options)
    trainer.fit(module, datamodule=data)
    assert (watch.bad, trainer.global_step, logged) == (2, 2, [1, 2])


def test_what_has_collapsed_stays_stopped():
    trainer, _ = looks(CollapseGuard(), [])
    watch = CollapseGuard(stop=True)
    watch.load_state_dict({"bad": 3, "seen": 30})
    watch.on_train_start(trainer, Mock(spec=AlignModule))
    assert trainer.should_stop


def test_without_rewards_there_is_nothing_to_watch(setup: Setup, tmp_path: Path):
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", rows_per_step=4)
    with pytest.raises(ValueError, match="CollapseGuard has no effect: the objective logs no rewards"):
        make_trainer(tmp_path, CollapseGuard()).fit(module, datamodule=data)


def test_wrong_knobs_of_the_collapse_guard():
    with pytest.raises(ValueError, match=r"expected saturated in \(0, 1\], .* got 0.0, 0.05 and 3"):
        CollapseGuard(saturated=0.0)


def test_a_policy_that_has_fallen_silent_stops_the_training(prompts: str):
    guard = HackingGuard(prompts)
    errors = {"a": 0.1, "b": 0.1}
    guard.heard = [{"step": 0, "cer": errors, "vectors": {}, "reward": -1.0}]
    assert guard.reason() == ""
    guard.heard.append({"step": 50, "cer": {"a": 1.0, "b": 1.0}, "vectors": {}, "reward": -math.inf})
    assert "fallen silent" in guard.reason()  # and not fooled, though its errors have risen
