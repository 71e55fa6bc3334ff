# SPDX-License-Identifier: Apache-2.0
"""Lightning's trainer with commands of its own: what needs models and devices, but no training."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, TensorDataset

from tts_align.cli.commands import WITHOUT_OBJECTIVE
from tts_align.cli.devices import of_the_trainer
from tts_align.cli.writing import writing
from tts_align.evaluation.calibration import CALIBRATION
from tts_align.training.callbacks.keep_last import KeepLast, StopOnSignal
from tts_align.training.callbacks.logs import TrainingLog, continue_logs
from tts_align.training.callbacks.movement import Movement
from tts_align.training.callbacks.progress import StepBar
from tts_align.training.callbacks.tell_memory import TellMemory
from tts_align.training.checkpoint import CheckpointFiles, read_checkpoint
from tts_align.training.finite import FiniteGuard
from tts_align.training.module import AlignModule
from tts_align.training.run import Run, RunSettings
from tts_align.utils import agreement, signals
from tts_align.utils.assets import resolve
from tts_align.utils.files import check_inside, check_not_source, remove_leftovers, write_json
from tts_align.utils.messages import first_process, say
from tts_align.utils.seeds import run_seed


class _Work(LightningModule):
    """Carries a function into the processes and onto the devices of a trainer, as one step of a prediction.

    Args:
        module: what the function works with.
        function: called with ``module``, ``rank``, ``world`` and ``barrier``.
        datamodule: attached to the trainer; by Lightning's own way it would have to have rows to predict.
    """

    def __init__(
        self, module: LightningModule, function: Callable[..., object], datamodule: LightningDataModule | None
    ) -> None:
        super().__init__()
        self.module, self.function, self.datamodule = module, function, datamodule

    def configure_model(self) -> None:
        """Leave the module whole in every process, whatever the strategy."""

    def predict_step(self, batch: Any, *_: Any) -> Any:
        """Do this process's share."""
        trainer = self.trainer
        if self.datamodule is not None:
            trainer.datamodule, self.datamodule.trainer = self.datamodule, trainer  # type: ignore[attr-defined]
        barrier = agreement.barrier if trainer.world_size > 1 else None
        with signals.at_once():  # what works item by item says so itself
            self.function(self.module, rank=trainer.global_rank, world=trainer.world_size, barrier=barrier)
        return batch


def load_trained(model: AlignModule, checkpoint: str | Path) -> None:
    """Give a module the weights of a checkpoint, and nothing else of it.

    Args:
        model: the module.
        checkpoint: what its training left.

    Raises:
        ValueError: it is another model's, or in several files.
    """
    if Path(checkpoint).is_dir():
        raise ValueError(
            f"{checkpoint} is sharded: join it with `python -m lightning.pytorch.utilities.consolidate_checkpoint "
            f"{checkpoint}` and pass the result as --ckpt_path"
        )
    saved = read_checkpoint(checkpoint)
    model.on_load_checkpoint(saved)
    model.load_state_dict(saved["state_dict"], strict=model.strict_loading)


class _Signals(_SignalConnector):
    """Lightning's handlers for Slurm, and ours for what asks the process to end."""

    def register_signal_handlers(self) -> None:
        """Handle signals while the trainer runs."""
        super().register_signal_handlers()
        signals.forward(self._tell)
        signals.install()

    def _tell(self, number: int) -> None:
        """Tell the processes that this one has started; those of a terminal's Ctrl-C know."""
        launcher = self.trainer.strategy.launcher
        if launcher is not None and number == signal.SIGTERM:
            launcher.kill(signal.SIGTERM)


class AlignTrainer(Trainer):
    """Lightning's trainer, which also samples and judges on whatever devices it trains on, and exports."""

    def _run(self, model: LightningModule, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        """Start where the first process says: others may see the folder of the run a moment later."""
        self._signal_connector = _Signals(self)
        if self.world_size > 1:
            self.strategy.setup_environment()
        with agreement.ending_together():
            if self.world_size > 1:
                ckpt_path = self.strategy.broadcast(ckpt_path)
            if self.state.fn == TrainerFn.FITTING and ckpt_path is not None and Path(ckpt_path).is_file():
                continue_logs(self.loggers, int(read_checkpoint(ckpt_path)["global_step"]))
            return super()._run(model, ckpt_path, weights_only)

    def sample(
        self,
        model: AlignModule,
        prompts: Path,
        out: Path,
        samples: int = 5,
        speakers: Sequence[str] | str = (),
        batch_rows: int = 64,
        seed: int | None = None,
        overwrite: bool = False,
        audio: bool = False,
        ckpt_path: Path | None = None,
    ) -> None:
        """Speak every sentence several times in every voice with the recipe's policy; resumes.

        Args:
            model: module whose policy speaks, as its sampling says.
            prompts: file of sentences: JSONL, or plain text with one sentence per line.
            out: JSONL file of candidates to write, whole or not at all.
            samples: utterances per sentence and voice.
            speakers: voices to speak in; a sentence that names its own is spoken in that one only.
            batch_rows: utterances spoken together on each device; does not change them.
            seed: seed of all utterances; that of the run (seed_everything) by default.
            overwrite: whether to replace a file that was made with other settings.
            audio: whether to write a WAV file of each utterance, made by the recipe's vocoder, in a folder beside
                ``out`` that has its name: drawn.jsonl and drawn.jsonl.audio.
            ckpt_path: checkpoint to speak with; the run's last one by default if the recipe is a run's own, otherwise
                the policy as its directory holds it.
        """
        from tts_align.cli.sample import recordings_of, sample

        check_not_source(out, resolve(prompts))
        check_inside(recordings_of(out), out.parent)
        work = partial(
            sample,
            prompts=prompts,
            out=out,
            samples=samples,
            speakers=[speakers] if isinstance(speakers, str) else speakers,
            batch_rows=batch_rows,
            seed=seed,
            overwrite=overwrite,
            audio=audio,
        )
        with writing(out, "sample"):
            self._work_trained(model, ckpt_path, work)
        say(f"candidates:   {out}")
        if audio:
            say(f"audio:        {recordings_of(out)}")

    def judge(
        self,
        model: AlignModule,
        candidates: Path | None = None,
        out: Path | None = None,
        batch_rows: int = 64,
        overwrite: bool = False,
        max_failed_share: float = 0.01,
        calibrate: Path | None = None,
        accuracy: Path | None = None,
        speakers: Sequence[str] | str = (),
        ckpt_path: Path | None = None,
    ) -> None:
        """Listen to every candidate with the recipe's judge, and write what was heard; resumes.

        Args:
            model: module whose judge listens, and whose vocoder speaks if the judge hears sound.
            candidates: JSONL file that ``sample`` wrote; this and out, or calibrate, must be given.
            out: JSONL file of judged candidates to write, whole or not at all.
            batch_rows: candidates judged together on each device; does not change the verdicts.
            overwrite: whether to replace a file that was made from other candidates or with another judge.
            max_failed_share: largest share of the candidates that may go without a verdict because vocoder or judge
                failed on them.
            calibrate: recordings whose reading is known (a JSONL file with columns id, text, spans and audio, or a
                folder with recordings.jsonl), or sentences with marked words, which the policy speaks with each reading
                written out: instead of listening to candidates, measure how often the judge itself hears the right
                reading.
            accuracy: file of the judge's own accuracy, which calibrate writes and test and label show beside theirs; by
                default judge_accuracy.json in run.directory.
            speakers: voices to calibrate with; a sentence that names its own is spoken in that one only.
            ckpt_path: checkpoint of the models that the vocoder is made of.
        """
        accuracy = accuracy or Path(self.default_root_dir, CALIBRATION)
        if calibrate is not None:
            if candidates is not None or out is not None:
                raise ValueError("calibrate listens to no candidates: leave out candidates and out")
            from tts_align.cli.calibrate import calibrate as measure

            check_not_source(accuracy, resolve(calibrate), option="accuracy", inside=True)
            voices = [speakers] if isinstance(speakers, str) else speakers
            measured = partial(measure, source=calibrate, out=accuracy, speakers=voices, batch_rows=batch_rows)
            self._work_trained(model, ckpt_path, partial(measured, seed=run_seed()))
            return
        if candidates is None or out is None:
            raise ValueError("judge needs --candidates and --out, or --calibrate")
        if speakers:
            raise ValueError("speakers has no effect without calibrate: candidates have their voices")
        from tts_align.cli.judge import judge

        work = partial(
            judge,
            candidates=candidates,
            out=out,
            batch_rows=batch_rows,
            overwrite=overwrite,
            max_failed_share=max_failed_share,
            accuracy=accuracy,
        )
        check_not_source(out, resolve(candidates))
        with writing(out, "judge"):
            self._work_trained(model, ckpt_path, work)
        say(f"judged:       {out}")

    def export(
        self,
        model: AlignModule,
        to: Path,
        format: Literal["cosyvoice", "vllm"] | None = None,
        overwrite: bool = False,
        ckpt_path: Path | None = None,
        manifest: str | None = None,
        report: Path | None = None,
    ) -> None:
        """Write the policy as a model directory, read it back, and compare the two; nothing is kept if they differ.

        Args:
            model: its policy is written.
            to: directory to write; for vllm best the folder vllm in a directory exported before.
            format: layout of the directory: cosyvoice (a whole directory as the runtime loads it, with everything but
                llm.pt from the policy's own) or vllm (its language model alone); the policy's own by default.
            overwrite: whether to replace an earlier export.
            ckpt_path: checkpoint to export; the run's last one by default.
            manifest: rows on which the models are compared.
            report: JSON file for what was found.
        """
        if not first_process():
            return
        if ckpt_path is not None:
            load_trained(model, ckpt_path)
        remove_leftovers(Path(to).resolve().parent)
        model.parts.clear()  # a reference is as large as the policy, and not needed
        from tts_align.cli.export import export

        found = export(model.policy, Path(to), format, overwrite, manifest)
        say("\n".join(found.lines()))
        if report is not None:
            write_json(report, {**vars(found), "checkpoint": None if ckpt_path is None else str(ckpt_path)})

    def _work_trained(self, model: AlignModule, checkpoint: Path | None, function: Callable[..., object]) -> None:
        """The same as :meth:`work` with the weights of a checkpoint, each model on its own, as in a test."""
        if checkpoint is None:
            self.work(model, function)
            return
        load_trained(model, checkpoint)
        with model.objective.merged(model.policy, model.parts):
            self.work(model, function)

    def work(
        self, model: LightningModule, function: Callable[..., object], datamodule: LightningDataModule | None = None
    ) -> None:
        """Call a function in every process, with the model on its device and in the trainer's precision.

        Args:
            model: what the function works with; knows this trainer while it works.
            function: called with the model, and ``rank``, ``world`` and ``barrier`` by name.
            datamodule: attached to the trainer meanwhile.
        """
        nothing = DataLoader(TensorDataset(torch.zeros(1)))
        self.predict(_Work(model, function, datamodule), dataloaders=nothing, return_predictions=False)


def make_trainer(recipe: Namespace, run: Run, settings: RunSettings, command: str) -> AlignTrainer:
    """Build a trainer that logs and saves in a run's directory, unless the recipe says otherwise.

    Args:
        recipe: its ``trainer:``.
        run: where it works.
        settings: the recipe's ``run:``.
        command: what it is built for.
    """
    if recipe.default_root_dir is not None:
        raise ValueError("trainer.default_root_dir has no effect: set run.directory instead")
    callbacks = recipe.callbacks or []
    callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    callbacks.append(StopOnSignal())
    if command == "fit":
        callbacks.insert(0, FiniteGuard(settings.on_not_finite))
    if command == "fit" and recipe.enable_checkpointing is not False and not recipe.fast_dev_run:
        callbacks.append(KeepLast(run.checkpoint, settings.checkpoint_every))
    if command not in WITHOUT_OBJECTIVE:  # without it Lightning would miss it in a checkpoint
        callbacks.append(Movement())
    shows_bar = recipe.enable_progress_bar is not False and command not in WITHOUT_OBJECTIVE
    if shows_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(StepBar())
    loggers = _loggers(recipe.logger, run) if command in ("fit", "test") else False
    if loggers:
        callbacks.append(TrainingLog())
    if command == "fit":
        callbacks.append(TellMemory())
    ours: dict[str, Any] = {
        "default_root_dir": run.directory,
        "logger": loggers,
        "callbacks": callbacks,
        "enable_progress_bar": shows_bar,
    }
    given = recipe.plugins or []
    plugins = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not any(isinstance(one, CheckpointIO) for one in plugins):
        ours["plugins"] = [*plugins, CheckpointFiles()]
    if command == "export":  # without the devices that a training wants
        ours |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
    options = {**recipe, **ours}
    with of_the_trainer(options):
        return AlignTrainer(**options)


def _loggers(given: Any, run: Run) -> list[Logger] | bool:
    """TensorBoard's logger, which the figures of a test are drawn from, and beside it those of the recipe."""
    if given is False:
        return False
    more = [] if given is None or given is True else list(given) if isinstance(given, Sequence) else [given]
    if any(isinstance(one, TensorBoardLogger) for one in more):
        return more
    return [TensorBoardLogger(run.directory, "", run.logs.name), *more]
