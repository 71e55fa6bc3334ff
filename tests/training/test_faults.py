# SPDX-License-Identifier: Apache-2.0
"""Kills, signals, damaged checkpoints and numbers that are none: nothing is lost, and nothing broken is kept."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import Memory, checkpoint_weights, gap, make_rows, save_recipe, save_rows

from tts_align.cli.entry import main, run
from tts_align.training.checkpoint import LAST, PREVIOUS, CheckpointFiles
from tts_align.training.finite import FiniteGuard, NotFiniteError
from tts_align.training.run import Run
from tts_align.utils.locks import LOCK

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches.*"),
]


class Dying(Callback):
    """Does something at the end of a batch, before or after the checkpoint."""

    step, act = -1, staticmethod(lambda trainer, module: None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == type(self).step:
            type(self).step = -1
            type(self).act(trainer, pl_module)


class Killed(BaseException):
    """Nothing is saved or cleaned."""


@pytest.fixture
def fit(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, dict]]]:
    """Fit in a folder of the test, and give what was logged by then in it, for each step the last time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tts-align"])
    manifest = save_rows(tmp_path, make_rows(sentences=8))
    held_out = save_rows(tmp_path, make_rows(sentences=2, seed=5), "held_out.jsonl")

    def call(name: str, *flags: str, kill: int = -1, act: Any = None, command: Any = run) -> list[tuple[int, dict]]:
        path = save_recipe(tmp_path, "kto", tiny_policy, manifest, data__validation=held_out)
        changes = {"log_every_n_steps": 3, "max_epochs": 3, "check_val_every_n_epoch": 1}
        logger = [{"class_path": "test_faults.Book", "init_args": {"path": f"{name}.jsonl"}}]
        callbacks = [{"class_path": "test_faults.Dying"}]
        Dying.step, Dying.act = kill, staticmethod(act or _kill)
        args = ["fit", "--config", path, "--run.directory", name, "--run.checkpoint_every", "2"]
        args += [f"--trainer.{key}={value}" for key, value in changes.items()]
        args += [f"--trainer.logger={json.dumps(logger)}", f"--trainer.callbacks={json.dumps(callbacks)}", *flags]
        command(args)
        return logged(Path(f"{name}.jsonl"))

    return call


def _kill(trainer: Trainer, module: LightningModule) -> None:
    raise Killed


class Book(Memory):
    """Writes down what is logged, for readers after the process has ended."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([step, metrics]) + "\n")


def logged(path: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(step, name): value for step, numbers in lines for name, value in numbers.items()}


def last(name: str) -> Path:
    return Run(name).checkpoint


@pytest.fixture
def undisturbed(fit: Callable[..., Any]) -> dict[tuple[int, str], float]:
    return fit("whole")


def test_logs_after_a_kill_and_a_signal_equal_those_of_an_undisturbed_run(fit: Any, undisturbed: Any) -> None:
    """Windows of three steps, checkpoints of two, epochs of four with a validation: every way of meeting."""
    for step in (1, 2, 3, 4, 5, 8, 9):
        name = f"killed{step}"
        with pytest.raises(Killed):
            fit(name, kill=step)
        assert fit(name) == undisturbed, step
        assert gap(checkpoint_weights(Path(name)), checkpoint_weights(Path("whole"))) == 0
    for step in (1, 4, 5):
        name = f"stopped{step}"
        with pytest.raises(SystemExit) as raised:
            fit(name, kill=step, act=lambda *_: os.kill(os.getpid(), signal.SIGTERM), command=main)
        assert raised.value.code == 143
        assert Run(name).progress()[1] == step
        assert fit(name) == undisturbed, step
        assert gap(checkpoint_weights(Path(name)), checkpoint_weights(Path("whole"))) == 0
        assert not (Path(name) / LOCK).exists()


def test_tensorboard_forgets_what_came_after_the_checkpoint(fit: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(f"{name}/tensorboard").Reload()
        return [(one.step, one.value) for one in events.Scalars("train/loss")]

    flags = ["--trainer.logger=true", "--trainer.log_every_n_steps=1", "--run.checkpoint_every=5"]
    Path("whole.jsonl").touch()
    Path("cut.jsonl").touch()
    fit("whole", *flags)
    with pytest.raises(Killed):
        fit("cut", *flags, kill=9)
    fit("cut", *flags)
    assert curve("cut") == curve("whole")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    fit: Any, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        fit("cut", kill=7)
    assert Run("cut").progress()[1] == 6
    assert Run("cut").progress(last("cut").with_name(PREVIOUS))[1] == 4
    content = bytearray(last("cut").read_bytes())
    content[len(content) // 2] ^= 255
    last("cut").write_bytes(content)
    capsys.readouterr()
    assert fit("cut") == undisturbed
    said = capsys.readouterr().out
    assert f"{last('cut')}: is damaged" in said
    assert "the checkpoint before it is used: cut/checkpoints/previous.ckpt" in said
    assert "continuing cut from step 4" in said
    for name in (LAST, PREVIOUS):
        last("cut").with_name(name).write_bytes(b"cut")
    with pytest.raises(SystemExit) as raised:
        fit("cut")
    assert raised.value.code == 2
    assert "there is no whole one beside it: begin anew with --run.overwrite true" in capsys.readouterr().err


def test_the_last_checkpoint_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any change of the file system leaves a whole checkpoint, and no folder for temporary files is used."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    path, files = tmp_path / LAST, CheckpointFiles()
    state = {"state_dict": {}, "epoch": 0}
    files.save_checkpoint({**state, "global_step": 1}, path)
    for step in range(9):
        found = {}
        with monkeypatch.context() as patch:
            for name in ("replace", "link", "fsync", "unlink", "rename"):
                patch.setattr(os, name, _dying(getattr(os, name), found, step))
            try:
                files.save_checkpoint({**state, "global_step": 2}, path)
            except Killed:
                pass
            else:
                break
        steps = [
            files.load_checkpoint(tmp_path / name)["global_step"]
            for name in (LAST, PREVIOUS)
            if (tmp_path / name).exists()
        ]
        assert steps[0] in (1, 2)
        assert set(steps) <= {1, 2}
        files.save_checkpoint({**state, "global_step": 1}, path)
    assert step > 4
    assert files.load_checkpoint(path)["global_step"] == 2


def _dying(change: Callable[..., Any], found: dict[str, int], step: int) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        found["calls"] = found.get("calls", 0) + 1
        if found["calls"] > step:
            raise Killed
        return change(*args, **options)

    return call


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    import resource

    path, files = tmp_path / LAST, CheckpointFiles()
    state = {"state_dict": {"a": torch.ones(10**6)}, "epoch": 0, "global_step": 1}
    files.save_checkpoint({**state, "state_dict": {}}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            files.save_checkpoint(state, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert files.load_checkpoint(path)["state_dict"] == {}
    assert [one.name for one in tmp_path.iterdir()] == [LAST]


def test_a_second_fit_and_a_test_are_told(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def twice(trainer: Trainer, module: LightningModule) -> None:
        with pytest.raises(SystemExit) as raised:
            run(["fit", "--config", "recipe.yaml", "--run.directory", "one"])
        seen.append((raised.value.code, capsys.readouterr().err))

    fit("one", kill=2, act=twice)
    assert seen[0][0] == 2
    assert "one is being written by `tts-align fit` of " in seen[0][1]
    assert "wait for it, or choose another --run.directory" in seen[0][1]


def test_an_empty_directory_is_refused(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit("one", "--run.directory=")
    assert "run.directory is empty" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["checkpoints", "contrast/desirable", "test/audio/1.wav", "parts/tokenizer"])
def test_a_link_out_of_the_run_is_refused_however_deep(
    link: str, fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "one" / link).parent.mkdir(parents=True)
    (tmp_path / "one" / link).symlink_to(tmp_path / "out")
    with pytest.raises(SystemExit):
        fit("one")
    assert f"one/{link} leads out of one" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


# --- NaN and infinities ---


class Spoiling(Callback):
    """Makes a number not finite, in the loss of one micro-batch, a gradient or a weight."""

    def __init__(self, what: str = "loss", batch: int = 5, every: int = 10**9) -> None:
        self.what, self.batch, self.rows = what, batch, ()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            self.rows = batch.rows.keys
            if self.what == "weight":
                with torch.no_grad():
                    next(pl_module.policy.parameters()).fill_(float("nan"))
            if self.what == "loss":
                step = pl_module.step
                pl_module.step = lambda *given: step(*given) + float("inf")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        vars(pl_module).pop("step", None)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.what == "gradient" and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            next(value for value in pl_module.parameters() if value.grad is not None).grad[0, 0] = float("nan")


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_the_first_number_that_is_none_is_named_and_nothing_after_it_saved(
    what: str, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 5, although losses are logged in steps 3 and 6 only, and saved in 2, 4 and 6."""
    spoiling = [{"class_path": "test_faults.Spoiling", "init_args": {"what": what}}]
    with pytest.raises(SystemExit) as raised:
        fit("one", f"--trainer.callbacks={json.dumps(spoiling)}")
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert f"step 5: the {'loss' if what == 'weight' else what} is not finite, of rows '" in said
    named = said.partition("of rows ")[2].partition(";")[0].replace("'", "").split(", ")
    assert len(named) == 4
    assert set(named) <= {row.id for row in make_rows(sentences=8)}
    assert Run("one").progress()[1] == 4
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint_weights(Path("one")).values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_skipped_changes_nothing(what: str, fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    spoiling = [{"class_path": "test_faults.Spoiling", "init_args": {"what": what}}]
    numbers = fit("one", f"--trainer.callbacks={json.dumps(spoiling)}", "--run.on_not_finite=skip")
    assert f"step 5: the {what} is not finite, of rows" in caplog.text
    assert "the step is skipped, 1 so far" in caplog.text
    assert all(abs(value) < 1e9 for value in numbers.values())
    assert Run("one").progress()[1] == 12
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint_weights(Path("one")).values())


def test_no_test_and_no_export_of_weights_that_are_none(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit("one")
    saved = torch.load(last("one"), weights_only=True)
    next(iter(saved["state_dict"].values())).fill_(float("nan"))
    torch.save(saved, last("one"))
    for command in (["validate"], ["export", "--to", "exported"], ["fit", "--trainer.max_epochs", "4"]):
        with pytest.raises(SystemExit):
            run([*command, "--config", "one/config.yaml"])
        assert "weights hold numbers that are not finite, policy." in capsys.readouterr().err
    assert not Path("exported").exists()


def test_a_guard_keeps_nothing_of_good_steps(fit: Any) -> None:
    seen = []
    fit("one", kill=12, act=lambda trainer, _: seen.extend(trainer.callbacks))
    guard = next(one for one in seen if isinstance(one, FiniteGuard))
    assert len(guard._recent) == 0
    assert issubclass(NotFiniteError, ValueError)
