# SPDX-License-Identifier: Apache-2.0
"""The files of the best weights: none is lost that a checkpoint refers to, and none is left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Killed, killed_at
from lightning.pytorch.callbacks import ModelCheckpoint
from places import ROOT
from processes import forked, free_port
from tiny import gap, save_policy, save_rows, weights
from told import Notes, Told, fit, save_prompts

from tts_align.training.callbacks.best_weights import _copy
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.hearings import Hearing, harm
from tts_align.utils import files

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:The '.*' does not have many workers", "ignore:Checkpoint directory .* exists and is not empty"
    ),
]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return save_prompts(tmp_path)


def guard(prompts: str, rates: list[float], skipped: int = 0, **knobs: Any) -> HackingGuard:
    """A guard that hears these error rates."""
    judge = Told([(0, rate) for rate in rates], skipped)
    return HackingGuard(prompts, **({"every_steps": 1, "sentences": 6, "judge": judge} | knobs))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_run_that_continues_in_another_directory_takes_the_best_weights_along(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    """Best at step 1, continued elsewhere from step 2, harmful at 3."""
    one, other = tmp_path / "one", tmp_path / "other"
    notes = Notes(one)
    fit(one, tiny_policy, tiny_rows, guard(prompts, [0.3, 0.1, 0.2]), notes, every=1, max_steps=2)
    assert names(one) == ["best-1.ckpt", "last.ckpt"]
    again = guard(prompts, [0.3, 0.1, 0.2, 0.9], skipped=3)
    module, _ = fit(other, tiny_policy, tiny_rows, again, every=1, ckpt_path=one / "checkpoints/last.ckpt")
    assert again.stopped.startswith("step 3: ")
    assert gap(weights(module), notes.weights[1]) == 0
    assert names(other) == names(one) == ["best-1.ckpt", "last.ckpt"]


def test_weights_that_are_nowhere_are_missed_before_the_training(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    fit(tmp_path, tiny_policy, tiny_rows, guard(prompts, [0.3, 0.1, 0.2]), every=1, max_steps=2)
    (tmp_path / "checkpoints/best-1.ckpt").unlink()
    again, notes = guard(prompts, [0.1], skipped=3), Notes(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"refers to the weights of step 1, .* put the file best-1\.ckpt"):
        fit(tmp_path, tiny_policy, tiny_rows, again, notes, every=1, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert notes.weights == {}


def test_another_callback_that_saves_does_not_lose_the_file_that_the_last_checkpoint_needs(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    """Last checkpoint at step 2, another callback's at 3, a better policy at 3 and 4, killed before the next."""
    more = ModelCheckpoint(tmp_path / "more", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    notes = Notes(tmp_path, die_at=4)
    watch = guard(prompts, [0.5, 0.4, 0.3, 0.2, 0.1])
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_policy, tiny_rows, watch, notes, more, every=2)
    assert watch.best.step == 4
    left = names(tmp_path)
    for path in (tmp_path / "checkpoints/last.ckpt", *(tmp_path / "more").glob("*.ckpt")):
        states = torch.load(path, weights_only=True)["callbacks"]
        assert f"best-{states['HackingGuard']['best']}.ckpt" in left, path
    assert left == ["best-2.ckpt", "best-3.ckpt", "best-4.ckpt", "last.ckpt"]
    # And the run resumes, as if it had not been killed.
    again = guard(prompts, [0.5, 0.4, 0.3, 0.2, 0.1], skipped=3)
    more = ModelCheckpoint(tmp_path / "more", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    last = tmp_path / "checkpoints/last.ckpt"
    module, _ = fit(tmp_path, tiny_policy, tiny_rows, again, more, every=2, ckpt_path=last)
    assert [one.step for one in again.heard] == [0, 1, 2, 3, 4]
    assert gap(weights(module), notes.weights[4]) == 0
    assert names(tmp_path) == ["best-3.ckpt", "best-4.ckpt", "last.ckpt"]  # that of step 3 for the other callback


def test_a_resumed_run_still_knows_what_its_checkpoint_refers_to(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    """Resumed from a checkpoint that needs step 1, better at step 3, killed again before the next checkpoint."""
    fit(tmp_path, tiny_policy, tiny_rows, guard(prompts, [0.3, 0.1, 0.2]), every=1, max_steps=2)
    notes, again = Notes(tmp_path, die_at=3), guard(prompts, [0.3, 0.1, 0.2, 0.05], skipped=3)
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_policy, tiny_rows, again, notes, every=9, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert names(tmp_path) == ["best-1.ckpt", "best-3.ckpt", "last.ckpt"]


def test_a_users_file_of_a_like_name_stays(prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    (tmp_path / "checkpoints").mkdir()
    for name in ("best-of-all.ckpt", "best-9.ckpt.bak"):
        (tmp_path / "checkpoints" / name).write_bytes(b"mine")
    fit(tmp_path, tiny_policy, tiny_rows, guard(prompts, [0.3, 0.2, 0.1]), every=1)
    assert {"best-of-all.ckpt", "best-9.ckpt.bak"} < set(names(tmp_path))


def test_a_checkpoint_that_cannot_be_read_may_refer_to_anything(tmp_path: Path):
    from tts_align.training.callbacks.best_weights import callback_states

    (tmp_path / "broken.ckpt").write_bytes(b"PK, but not a checkpoint")
    assert callback_states(tmp_path / "broken.ckpt") is None
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    assert callback_states(tmp_path / "plain.ckpt") == {}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_copy_that_was_killed_is_known_as_one(sharded: bool, tmp_path: Path):
    """The next fit removes it; what it holds is in nobody's way."""
    source, target = tmp_path / "one/best-4.ckpt", tmp_path / "two/best-4.ckpt"
    file = source / "shard" if sharded else source
    for folder in (file.parent, target.parent):
        folder.mkdir(parents=True)
    file.write_text("weights")
    with pytest.raises(Killed), killed_at(0):
        _copy(source, target)
    (left,) = target.parent.iterdir()
    assert files._SCRATCH.fullmatch(left.name)
    _copy(source, target)
    assert (target / "shard" if sharded else target).read_text() == "weights"
    assert sorted(target.parent.iterdir()) == sorted([left, target])


@pytest.mark.parametrize("minimum", [{"min_steps": 3}, {"min_epochs": 2, "max_epochs": 2}])
def test_a_minimum_that_would_train_on_after_a_stop_is_refused(
    minimum: dict[str, int], prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    with pytest.raises(ValueError, match=r"cannot stop a training before trainer\.min_steps or trainer\.min_epochs"):
        fit(tmp_path, tiny_policy, tiny_rows, guard(prompts, [0.1, 0.9]), **minimum)
    _, trainer = fit(tmp_path, tiny_policy, tiny_rows, guard(prompts, [0.1, 0.9], stop=False), **minimum)
    assert trainer.global_step >= 3


def test_the_last_step_is_heard_whoever_ends_the_training(
    prompts: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    """Ended at step 3 by another callback; the last checkpoint, written at step 3, gets the best weights, too."""
    notes = Notes(tmp_path, stop_at=3)
    watch = guard(prompts, [0.1, 0.1, 0.9], every_steps=2)
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch, notes, every=1)
    assert trainer.global_step == 3
    assert [one.step for one in watch.heard] == [0, 2, 3]
    assert watch.stopped.startswith("step 3: ")
    assert gap(weights(module), notes.weights[2]) == 0
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert gap(saved["state_dict"], notes.weights[2]) == 0
    assert [one["step"] for one in saved["callbacks"]["HackingGuard"]["heard"]] == [0, 2, 3]


def test_hearings_without_a_common_utterance_are_said_to_be_deaf(caplog: pytest.LogCaptureFixture):
    first = Hearing(0, {"a": 0.1}, {"a": "a"})
    now = Hearing(5, {"b": 0.9}, {"b": "b"})
    assert harm(first, now, 0.01, 0.05) == (
        "harm: nothing to compare: no utterance was judged both at step 0 and at step 5"
    )


APART = """
import sys
from pathlib import Path
from tiny import gap, weights
from told import Notes, Told, fit
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.keep_best import KeepBest, use_chosen

folder, shared = Path(sys.argv[1]), Path(sys.argv[2])
prompts = str(shared / "prompts.jsonl")
rates = [(0, 0.1)] * 3 + [(0, 0.9)] * 9
watch = HackingGuard(prompts, every_steps=1, sentences=6, judge=Told(rates, utterances=3))
wrong = [(2, 0.1), (1, 0.1), (2, 0.1), (2, 0.1), (0, 0.1)]  # of three on each machine; at the end the mean speaks
best = KeepBest(prompts, every_steps=1, sentences=6, average=2, judge=Told(wrong, utterances=3))
notes = Notes(folder)
options = {"devices": 1, "num_nodes": 2, "strategy": "ddp"}
module, trainer = fit(folder, shared / "policy", str(shared / "rows.jsonl"), notes, best, watch, every=1, **options)
assert watch.stopped.startswith("step 3: "), watch.stopped
assert gap(weights(module), notes.weights[2]) == 0
assert [one.wrong_readings * 6 for one in best.heard] == [4, 2, 4, 4, 0]
assert best.best.averaged
use_chosen(trainer, module)
means = {name: (notes.weights[2][name].double() + notes.weights[3][name].double()) / 2 for name in notes.weights[2]}
assert gap(weights(module), means) < 1e-6
print(trainer.global_rank, sorted(path.name for path in folder.glob("checkpoints/*")))
"""


def test_machines_without_a_shared_disk(tmp_path: Path):
    """Two machines, each with its own folder: files lie on the first only, and both restore and average the same."""
    save_policy(tmp_path / "policy")
    save_rows(tmp_path)
    save_prompts(tmp_path)
    (tmp_path / "apart.py").write_text(APART)
    port, here = free_port(), str(Path(__file__).parent)
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    together |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{here}"}
    folders = [tmp_path / f"machine{rank}" for rank in (0, 1)]
    commands = [[sys.executable, "../apart.py", str(folder), str(tmp_path)] for folder in folders]
    done = forked(commands, folders, [together | {"NODE_RANK": str(rank)} for rank in (0, 1)], 120)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    files = ["averaged-3.ckpt", "best-2.ckpt", "chosen-1.ckpt", "chosen.json", "last.ckpt"]
    files += ["snapshot-2.ckpt", "snapshot-3.ckpt"]
    assert done[0].stdout.strip().splitlines()[-1] == f"0 {files}"
    assert done[1].stdout.strip().splitlines()[-1] == "1 []"
