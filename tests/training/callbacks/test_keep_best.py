# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is heard best: which one it is, where it lies, and who uses it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import OBJECTIVES, checkpoint_weights, gap, make_reward, make_trainer, weights
from tiny_sound import VOICES, Tones, build_e2e, spoken_rows
from told import SENTENCES, Notes, Told, fit, save_prompts

from tts_align.data.manifest import write_manifest
from tts_align.objectives import MTR, SFT, DiffRO
from tts_align.objectives.e2e import E2E
from tts_align.training.callbacks.keep_best import DevHearing, KeepBest, best_of, mean_of
from tts_align.training.callbacks.keep_last import KeepLast
from tts_align.training.run import Run

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return save_prompts(tmp_path)


def keeper(prompts: str, hearings: list[tuple[int, float]], skipped: int = 0, **knobs: Any) -> KeepBest:
    """Hears these numbers of misread utterances and error rates."""
    knobs = {"every_steps": 1, "sentences": SENTENCES, "judge": Told(hearings, skipped)} | knobs
    return KeepBest(prompts, **knobs)


def choice(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints/chosen.json").read_text("utf-8"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def chosen_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(Run(folder).chosen, weights_only=True)["state_dict"]


# --- which one ---


def heard(step: int, wrong: float, nearest: float) -> DevHearing:
    return DevHearing(step, wrong, nearest, nearest, 6)


def test_fewest_wrong_readings_among_those_that_are_as_clear():
    start, babble, fair, good = heard(0, 0.5, 0.1), heard(1, 0.0, 0.4), heard(2, 0.3, 0.1), heard(3, 0.2, 0.109)
    assert best_of([start, babble, fair, good], "wrong_readings", 0.01) is good
    assert best_of([start, babble, fair, good], "wrong_readings", 0.005) is fair
    assert best_of([start, babble, fair, good], "wrong_readings", 1.0) is babble
    assert best_of([start, babble, fair, good], "nearest_cer", 0.01) is start
    assert best_of([start, heard(1, 0.5, 0.1)], "wrong_readings", 0.01) is start  # the earliest of equals
    assert best_of([start, heard(1, 0.5, 0.05)], "wrong_readings", 0.01).step == 1
    assert best_of([start, heard(1, 0.0, math.nan)], "wrong_readings", 0.01) is start


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20)), min_size=1, max_size=8))
def test_the_best_is_never_less_clear_nor_worse_than_the_start(numbers: list[tuple[int, int]]):
    some = [heard(step, wrong / 6, rate / 100) for step, (wrong, rate) in enumerate(numbers)]
    best = best_of(some, "wrong_readings", 0.02)
    assert best.nearest_cer <= some[0].nearest_cer + 0.02
    assert best.wrong_readings <= some[0].wrong_readings
    for one in some:
        assert one.nearest_cer > some[0].nearest_cer + 0.02 or one.wrong_readings >= best.wrong_readings


def test_numbers_are_means_over_utterances_whoever_heard_them():
    rows = [
        {"id": "b", "reading": "wrong", "cer": 0.5, "nearest_cer": 0.25},
        {"id": "a", "reading": "right", "cer": 0.25, "nearest_cer": 0.25},
        {"id": "c", "reading": "unmarked", "cer": 0.0, "nearest_cer": 0.25},
        {"id": "d", "reading": "neither", "cer": 0.25, "nearest_cer": 0.25},
    ]
    one, other = (DevHearing.of(3, some, 1, False) for some in (rows, reversed(rows)))
    assert one == other
    assert (one.wrong_readings, one.nearest_cer, one.cer, one.judged) == (1 / 3, 0.25, 0.25, 4)
    assert one.numbers == {"dev/wrong_readings": 1 / 3, "dev/nearest_cer": 0.25, "dev/cer": 0.25, "dev/failed": 1.0}
    assert "dev/wrong_readings" not in DevHearing.of(3, rows[2:3], 0, False).numbers


# --- where it lies ---


def test_the_best_is_kept_while_the_training_goes_on(prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Best at step 2; 3 has fewer wrong readings, but mumbles."""
    notes = Notes(tmp_path)
    watch = keeper(prompts, [(4, 0.1), (3, 0.1), (1, 0.105), (0, 0.3), (2, 0.1)])
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch, notes, every=1)
    assert trainer.global_step == 4
    assert [one.step for one in watch.heard] == [0, 1, 2, 3, 4]
    assert names(tmp_path) == ["chosen-2.ckpt", "chosen.json", "last.ckpt"]
    assert gap(chosen_weights(tmp_path), notes.weights[2]) == 0
    assert gap(weights(module), notes.weights[4]) == 0 == gap(checkpoint_weights(tmp_path), notes.weights[4])
    found = choice(tmp_path)
    assert (found["file"], found["step"], found["metric"]) == ("chosen-2.ckpt", 2, "wrong_readings")
    assert (found["wrong_readings"], found["nearest_cer"]) == (1 / 6, pytest.approx(0.105))
    for name, values in {"wrong_readings": (4, 3, 1, 0, 2), "nearest_cer": (0.1, 0.1, 0.105, 0.3, 0.1)}.items():
        logged = [metrics[f"dev/{name}"] for _, metrics in trainer.logger.logged if f"dev/{name}" in metrics]
        assert logged == pytest.approx([value / (6 if name == "wrong_readings" else 1) for value in values])


def test_nothing_better_than_the_start_is_said(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str, caplog: pytest.LogCaptureFixture
):
    watch = keeper(prompts, [(1, 0.1), (2, 0.1)], every_steps=2)
    fit(tmp_path, tiny_policy, tiny_rows, watch, every=9)
    assert choice(tmp_path)["step"] == 0
    assert "no step was heard better than the start, by wrong_readings with a nearest error rate of at most 0.110" in (
        caplog.text
    )
    before = torch.load(tmp_path / "checkpoints/chosen-0.ckpt", weights_only=True)["state_dict"]
    assert gap(before, checkpoint_weights(tmp_path)) > 0


def test_it_listens_when_an_epoch_ends_and_at_the_end(prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    watch = keeper(prompts, [(3, 0.1)], every_steps=None)
    _, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch, max_epochs=2)
    assert [one.step for one in watch.heard] == [0, trainer.global_step // 2, trainer.global_step]
    watch = keeper(prompts, [(3, 0.1)], every_steps=None, every_epochs=5)
    _, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch, Notes(tmp_path, stop_at=3), max_epochs=2)
    assert [one.step for one in watch.heard] == [0, 3]


def test_listening_does_not_disturb_the_training(prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    watched, _ = fit(tmp_path / "one", tiny_policy, tiny_rows, keeper(prompts, [(3, 0.1), (2, 0.1)], average=2))
    alone, _ = fit(tmp_path / "two", tiny_policy, tiny_rows)
    assert gap(weights(watched), weights(alone)) == 0


@pytest.mark.parametrize("death", [1, 3])
def test_a_killed_run_chooses_what_an_undisturbed_one_does(
    death: int, prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    """Checkpoints at steps 2 and 4; killed after a hearing, before the next checkpoint."""
    script = [(4, 0.1), (1, 0.1), (3, 0.1), (0, 0.1), (2, 0.1), (5, 0.1)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = keeper(prompts, script, average=2)
    fit(whole, tiny_policy, tiny_rows, first, every=2)
    with pytest.raises(SystemExit):
        fit(killed, tiny_policy, tiny_rows, keeper(prompts, script, average=2), Notes(killed, die_at=death), every=2)
    last = killed / "checkpoints/last.ckpt"
    saved = 1 + 2 * (death > 2) if last.exists() else 0
    again = keeper(prompts, script, skipped=saved, average=2)
    fit(killed, tiny_policy, tiny_rows, again, every=2, ckpt_path=last if last.exists() else None)
    assert again.heard == first.heard
    assert choice(killed) == choice(whole)
    assert names(killed) == names(whole)
    assert gap(chosen_weights(killed), chosen_weights(whole)) == 0
    assert gap(checkpoint_weights(killed), checkpoint_weights(whole)) == 0


def test_a_run_that_continues_elsewhere_takes_the_chosen_weights_along(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    one, other, notes = tmp_path / "one", tmp_path / "other", Notes(tmp_path / "one")
    fit(one, tiny_policy, tiny_rows, keeper(prompts, [(3, 0.1), (1, 0.1), (2, 0.1)]), notes, every=1, max_steps=2)
    again = keeper(prompts, [(3, 0.1), (1, 0.1), (2, 0.1)], skipped=3)
    fit(other, tiny_policy, tiny_rows, again, every=1, ckpt_path=one / "checkpoints/last.ckpt")
    assert gap(chosen_weights(other), notes.weights[1]) == 0
    (other / "checkpoints/chosen-1.ckpt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"chosen-1\.ckpt, which .*chosen\.json says was heard best: put it back"
    ):
        _ = Run(other).chosen


# --- the mean of the last ---


@pytest.mark.parametrize("misread", [0, 5])
def test_the_mean_of_the_last_weights_is_chosen_if_it_is_better(
    misread: int, prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    notes = Notes(tmp_path)
    watch = keeper(prompts, [(4, 0.1), (3, 0.1), (2, 0.1), (1, 0.1), (2, 0.1), (misread, 0.1)], average=3)
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch, notes, every=1)
    assert gap(weights(module), notes.weights[4]) == 0 == gap(checkpoint_weights(tmp_path), notes.weights[4])
    kept = ["averaged-4.ckpt"] * (misread == 0) + ["chosen-3.ckpt", "chosen.json", "last.ckpt"]
    assert names(tmp_path) == sorted(kept + [f"snapshot-{step}.ckpt" for step in (2, 3, 4)])
    assert choice(tmp_path)["averaged"] == (misread == 0)
    expected = notes.weights[3]
    if misread == 0:
        expected = {name: sum(notes.weights[n][name].double() for n in (2, 3, 4)) / 3 for name in notes.weights[4]}
    found = chosen_weights(tmp_path)
    assert max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items()) < 1e-6
    logged = [one["dev_averaged/wrong_readings"] for _, one in trainer.logger.logged if "dev_averaged/cer" in one]
    assert logged == [misread / 6]


def test_a_mean_of_counters_is_the_last():
    assert mean_of([torch.tensor(3), torch.tensor(8)]) == 8
    half = mean_of([torch.tensor(1.0).half(), torch.tensor(2.0).half()])
    assert (half.dtype, half.item()) == (torch.float16, 1.5)


# --- every objective; several processes: test_best_weights and test_sharding ---


@pytest.mark.parametrize("name", [*OBJECTIVES, "diffro"])
def test_every_objective(name: str, prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    objective = {**OBJECTIVES, "diffro": DiffRO}[name]()
    parts = {"reward": make_reward()} if name == "diffro" else {}
    watch, notes = keeper(prompts, [(3, 0.1), (1, 0.1), (2, 0.1)], every_steps=1), Notes(tmp_path)
    fit(tmp_path, tiny_policy, tiny_rows, watch, notes, every=1, objective=objective, parts=parts, max_steps=2)
    assert gap(chosen_weights(tmp_path), notes.weights[1]) == 0


def test_end_to_end_training_keeps_its_best_too(prompts: str, tmp_path: Path, tiny_policy: Path):
    """All that trains lies in one checkpoint, as it was at the best step."""
    manifest = str(write_manifest(spoken_rows(sentences=4), tmp_path / "rows.jsonl"))
    module, data = build_e2e(E2E(stage=2, voices=VOICES), tiny_policy, manifest, vocoder=Tones(), rows_per_step=2)
    watch, notes = keeper(prompts, [(3, 0.1), (1, 0.1), (2, 0.1)]), Notes(tmp_path)
    last = KeepLast(tmp_path / "checkpoints/last.ckpt", 1)
    trainer = make_trainer(tmp_path, watch, notes, last, max_steps=2, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    assert choice(tmp_path)["step"] == 1
    chosen = chosen_weights(tmp_path)
    assert all(torch.equal(chosen[name], value) for name, value in notes.weights[1].items())
    assert gap(notes.weights[1], notes.weights[2]) > 0


def test_a_policy_that_is_not_trained_has_no_best(prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    with pytest.raises(ValueError, match="KeepBest has no effect: the policy is not trained by this objective"):
        fit(
            tmp_path, tiny_policy, tiny_rows, keeper(prompts, [(0, 0.1)]),
            objective=MTR(), parts={"reward": make_reward()},
        )  # fmt: skip


# --- what cannot work ---


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"every_steps": 0}, "every_steps, every_epochs, sentences and batch_rows must be at least 1"),
        ({"cer_tolerance": -0.1}, "cer_tolerance must not be negative, got -0.1"),
        ({"average": 1}, "average must be 0, for no mean, or at least 2, got 1"),
        ({"use_test_judge": True}, "use_test_judge has no effect: KeepBest has a judge of its own"),
    ],
)
def test_wrong_knobs(knobs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        keeper("nowhere", [], **knobs)


def test_nobody_to_listen_and_nothing_to_choose_by(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    with pytest.raises(ValueError, match=r"KeepBest has no listener: .*init_args.judge\)$"):
        fit(tmp_path, tiny_policy, tiny_rows, KeepBest(save_prompts(tmp_path)))
    unmarked = save_prompts(tmp_path, marked=False)
    message = (
        r"KeepBest cannot choose by wrong_readings: no utterance of .* marks a word; choose by metric: nearest_cer"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tiny_policy, tiny_rows, keeper(unmarked, [(0, 0.1)]))
    watch = keeper(unmarked, [(0, 0.3), (0, 0.1), (0, 0.2)], metric="nearest_cer")
    fit(tmp_path, tiny_policy, tiny_rows, watch, every=1, objective=SFT())
    assert choice(tmp_path)["step"] == 1
