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
from lightning.pytorch import Callback, Trainer
from tiny import Memory, build, gap, make_reward, make_trainer, weights
from torch import Tensor

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.prompts import SentencePrompt, read_prompts, write_prompts
from tts_align.evaluation.speaking import speak, utterance_requests
from tts_align.models.base.vocoder import Vocoder
from tts_align.objectives import SFT, DiffRO
from tts_align.training.callbacks.guards import CollapseGuard, HackingGuard, histogram_entropy
from tts_align.training.callbacks.hearings import Hearing, harm, rise
from tts_align.training.callbacks.keep_last import KeepLast
from tts_align.training.means import StageMeans
from tts_align.training.module import AlignModule

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")]


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

    def fit(
        self,
        guard: HackingGuard,
        rates: Sequence[float],
        callbacks: Sequence[Callback] = (),
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> tuple[AlignModule, Any]:
        guard.judge = Scripted(rates, guard.sentences)
        parts = {"reward": make_reward(), "vocoder": Tone()}
        module, data = build(DiffRO(), self.policy, self.rows, self.folder / "cache", parts=parts, rows_per_step=4)
        saves = any(isinstance(one, KeepLast) for one in callbacks)
        trainer = make_trainer(self.folder, guard, *callbacks, **({"enable_checkpointing": saves} | options))
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
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
    assert "step 3: hacking: the reward model is being fooled: its reward rose from -3 to -0.5" in caplog.text
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


def test_rising_errors_with_a_falling_reward_are_harm_not_hacking(
    setup: Setup, prompts: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    give_rewards(monkeypatch, [-0.5, -1.0, -1.5, -2.0, -3.0])
    _, trainer = setup.fit(guard(prompts), [0.1, 0.1, 0.3, 0.5])
    assert trainer.global_step == 2
    assert "step 2: harm: the listener's error rate is up by 0.200" in caplog.text
    assert "hacking" not in caplog.text


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
    assert again.heard == first.heard
    assert [one.step for one in again.heard] == [0, 1, 2]


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
    assert watch.heard[-1].reward == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    logged = [metrics["guard/reward"] for _, metrics in trainer.logger.logged if "guard/reward" in metrics]
    assert logged == [one.reward for one in watch.heard]


def test_without_a_reward_model_it_still_hears_harm(setup: Setup, prompts: str, tmp_path: Path, caplog: Any):
    watch = guard(prompts, judge=Scripted([0.1, 0.3], 6))
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", rows_per_step=4)
    trainer = make_trainer(tmp_path, watch)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    assert "step 1: harm: the listener's error rate is up by 0.200" in caplog.text
    assert watch.heard[0].reward is None


class Deaf(Scripted):
    """Fails from a hearing on."""

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        if self.asked // self.utterances >= len(self.rates):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().judge(samples, expected)


@pytest.mark.parametrize("hearings", [0, 2])
def test_a_fault_of_the_listener_is_raised_not_heard(setup: Setup, prompts: str, tmp_path: Path, hearings: int):
    """It used to log guard/cer 1.0 at every step, without a word."""
    watch = guard(prompts, judge=Deaf([0.1] * hearings, 6))
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", rows_per_step=4)
    trainer = make_trainer(tmp_path, watch)
    with pytest.raises(RuntimeError, match="on the same device") as caught:
        trainer.fit(module, datamodule=data)
    assert len(watch.heard) == hearings
    refused = "the guard cannot hear the untrained policy, so training does not start"
    assert (refused in caught.value.__notes__) == (hearings == 0)


class HardOfHearing(Scripted):
    """Fails on some utterances, in every hearing on the same, each for a reason of its own."""

    def __init__(self, rates: Sequence[float], utterances: int, deaf_to: Sequence[str]) -> None:
        super().__init__(rates, utterances)
        self.deaf_to = deaf_to

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        for one in expected:
            if one.text in self.deaf_to:
                raise RuntimeError(f"{one.text} crackles")
        return super().judge(samples, expected)


def test_failures_are_counted_and_no_numbers(setup: Setup, prompts: str, tmp_path: Path):
    watch = guard(prompts, stop=False, judge=HardOfHearing([0.2], 10**6, "b"))
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", rows_per_step=4)
    trainer: Any = make_trainer(tmp_path, watch)
    trainer.fit(module, datamodule=data)
    for one in watch.heard:
        assert (one.failed, len(one.cer)) == (1, 5)
        assert max(one.cer.values()) < 0.25 or one.silent
    assert {metrics["guard/failed"] for _, metrics in trainer.logger.logged if "guard/failed" in metrics} == {1.0}


def test_more_failures_than_may_be_refuse_to_start(setup: Setup, prompts: str, tmp_path: Path):
    watch = guard(prompts, judge=HardOfHearing([0.2], 10**6, "bc"))
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", rows_per_step=4)
    with pytest.raises(ValueError, match=r"training does not start: 2 of 6 candidates could not be judged, 1 may"):
        make_trainer(tmp_path, watch).fit(module, datamodule=data)


# --- who listens ---


def test_nobody_to_listen(setup: Setup, prompts: str, tmp_path: Path):
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"the guard has no listener: .*init_args.judge\)$"):
        make_trainer(tmp_path, guard(prompts)).fit(module, datamodule=data)


def test_the_judge_of_the_test_listens_only_when_told_to(setup: Setup, prompts: str, tmp_path: Path):
    tests = Scripted([0.1], 6)
    module, data = build(SFT(), setup.policy, setup.rows, tmp_path / "cache", parts={"judge": tests})
    with pytest.raises(ValueError, match=r"let model.judge both choose and test with use_test_judge: true"):
        make_trainer(tmp_path, guard(prompts)).fit(module, datamodule=data)
    alike = guard(prompts, judge=Scripted([0.1], 6))
    with pytest.raises(ValueError, match=r"the guard's judge is the same as model\.judge, which tests"):
        make_trainer(tmp_path, alike).fit(module, datamodule=data)
    assert tests.asked == 0
    make_trainer(tmp_path, guard(prompts, use_test_judge=True)).fit(module, datamodule=data)
    assert tests.asked > 0


def test_both_listeners_at_once_make_no_sense(prompts: str):
    with pytest.raises(ValueError, match="use_test_judge has no effect: the guard has a judge of its own"):
        guard(prompts, judge=Scripted([0.1], 6), use_test_judge=True)


# --- the best weights ---


def test_the_best_weights_come_back_before_they_are_saved(setup: Setup, prompts: str, tmp_path: Path):
    """Heard best at step 2 of 4, harmful at 3: the run's last checkpoint and the module hold those of step 2."""
    kept: dict[int, Any] = {}

    class Notes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            kept[trainer.global_step] = weights(pl_module)

    last = tmp_path / "checkpoints" / "last.ckpt"
    watch = guard(prompts)
    module, trainer = setup.fit(watch, [0.2, 0.2, 0.1, 0.5], callbacks=(Notes(), KeepLast(last, 1)))
    assert trainer.global_step == 3
    assert gap(weights(module), kept[2]) == 0
    assert gap(kept[1], kept[2]) > 0
    assert gap(kept[3], kept[2]) == 0  # at once
    saved = torch.load(last, weights_only=True)
    assert gap(saved["state_dict"], kept[2]) == 0
    assert saved["global_step"] == 3
    assert watch.stopped.startswith("step 3: ")
    assert sorted(path.name for path in last.parent.iterdir()) == ["best-2.ckpt", "last.ckpt"]


def test_harm_from_the_start_gives_back_the_start(setup: Setup, prompts: str):
    before = weights(build(DiffRO(), setup.policy, setup.rows, setup.folder, parts={"reward": make_reward()})[0])
    module, _ = setup.fit(guard(prompts), [0.1, 0.5])
    assert gap(weights(module), before) == 0


@pytest.mark.parametrize("epochs", [1, 3], ids=["in the last epoch", "in an earlier one"])
def test_a_stopped_run_does_not_continue_when_the_command_is_given_again(
    epochs: int, setup: Setup, prompts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    last = tmp_path / "checkpoints" / "last.ckpt"
    first, _ = setup.fit(guard(prompts), [0.2, 0.1, 0.5], callbacks=(KeepLast(last, 100),), max_epochs=epochs)
    caplog.clear()
    again = guard(prompts)
    module, trainer = setup.fit(again, [0.1], callbacks=(KeepLast(last, 100),), ckpt_path=last, max_epochs=epochs)
    assert trainer.global_step == 2
    assert gap(weights(module), weights(first)) == 0
    assert len(again.heard) == 3
    assert "this run was stopped, it does not continue: step 2: " in caplog.text


def test_the_last_step_is_heard_too_and_there_one_harmful_hearing_is_enough(setup: Setup, prompts: str, caplog: Any):
    watch = guard(prompts, every_steps=3, patience=2)
    _, trainer = setup.fit(watch, [0.1, 0.1, 0.5])
    assert trainer.global_step == 4
    assert [one.step for one in watch.heard] == [0, 3, 4]
    assert "the policy is that of step 3 again" in caplog.text
    watch = guard(prompts, every_steps=3)
    setup.fit(watch, [0.1], max_steps=2)
    assert [one.step for one in watch.heard] == [0, 2]


def test_a_file_that_an_earlier_checkpoint_refers_to_is_kept(setup: Setup, prompts: str, tmp_path: Path):
    """Killed between the hearing of step 2 and the next checkpoint, the run resumes where step 1 was the best."""
    seen: list[list[str]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoints/best-*.ckpt")))

    save = KeepLast(tmp_path / "checkpoints" / "last.ckpt", 2)
    setup.fit(guard(prompts), [0.5, 0.4, 0.3, 0.2, 0.1], callbacks=(Look(), save))
    assert seen == [["best-1.ckpt"], ["best-2.ckpt"], ["best-2.ckpt", "best-3.ckpt"], ["best-2.ckpt", "best-4.ckpt"]]
    assert [path.name for path in tmp_path.glob("checkpoints/best-*.ckpt")] == ["best-4.ckpt"]


def test_the_interval_resamples_sentences_not_utterances():
    """One sentence of four got worse in all its eight voices: that may be chance, however many voices there are."""
    names = {f"s{i}-v{voice}": f"s{i}" for i in range(4) for voice in range(8)}
    first = Hearing(0, dict.fromkeys(names, 0.1), names)
    now = Hearing(5, {name: 0.9 if sentence == "s0" else 0.1 for name, sentence in names.items()}, names)
    assert rise(first, now).value == pytest.approx(0.2)
    assert rise(first, now).low == 0
    assert harm(first, now, 0.01, 0.05) == ""
    apart = {name: name for name in names}
    assert "error rate is up" in harm(Hearing(0, first.cer, apart), now, 0.01, 0.05)


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
    log = StageMeans.log

    def noted(self: StageMeans, trainer: Trainer) -> None:
        if not self.sums:
            return
        logged.append(trainer.global_step)
        log(self, trainer)
        trainer.callback_metrics["train/saturated"] = torch.tensor(1.0)

    monkeypatch.setattr(StageMeans, "log", noted)
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


def test_a_policy_that_has_fallen_silent_is_harmed():
    names = {"a": "a", "b": "b"}
    first = Hearing(0, {"a": 0.1, "b": 0.1}, names, reward=-1.0)
    now = Hearing(50, {"a": 1.0, "b": 1.0}, names, silent=2)
    assert harm(first, first, 0.01, 0.05) == ""
    assert "fallen silent" in harm(first, now, 0.01, 0.05)
