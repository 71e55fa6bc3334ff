# SPDX-License-Identifier: Apache-2.0
"""Everything a recipe names, built and set to work: a LightningCLI whose runs live in directories of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tts_align.batch import Reads
from tts_align.cli.recipe import (
    MODE,
    PlainParser,
    RecipeError,
    expand_flags,
    expand_sections,
    objective_path,
    root_cause,
)
from tts_align.cli.trainer import AlignTrainer
from tts_align.data.datamodule import AlignData
from tts_align.objectives import Objective, Part
from tts_align.training.callbacks.movement import Movement
from tts_align.training.callbacks.progress import progress_bar
from tts_align.training.module import AlignModule
from tts_align.training.run import EXPORT, KeepLast, Run, RunSettings, finished, where
from tts_align.utils.messages import first_process, quiet, say

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the data module cuts the rows over ranks itself, exactly
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def objective_class(objective: Namespace | None) -> type[Objective]:
    """Class that a recipe names; without one, the base."""
    if objective is None:
        return Objective
    module, _, name = objective.class_path.rpartition(".")
    return getattr(import_module(module), name)


def reads(objective: Namespace | None) -> Reads:
    """Which rows the chosen objective uses; the data module follows it."""
    return objective_class(objective).reads


def wants_mismatched(objective: Namespace | None) -> bool:
    """Whether the chosen objective wants speech under another sentence's text; the data module follows it."""
    return objective_class(objective).wants_mismatched


def wants_utterances(objective: Namespace | None) -> bool:
    """Whether the chosen objective reads rows as speech tokens and words, too; the data module follows it."""
    return objective_class(objective).wants_utterances


def wants_sound(objective: Namespace | None) -> bool:
    """Whether the chosen objective makes the speech tokens itself, of recordings; the data module follows it."""
    return objective_class(objective).wants_sound


DESCRIPTIONS = {
    "fit": (
        "Train the policy with an objective, then test it. Everything is kept in run.directory: started again on the "
        "same recipe it continues from the last checkpoint, on another recipe it refuses. --ckpt_path continues from "
        "another checkpoint of the same recipe; to start from another run's weights name them in model.policy."
    ),
    "validate": "Loss and metrics of the run's last checkpoint, or of --ckpt_path, on the held-out rows.",
    "test": (
        "Test the run's last checkpoint, or --ckpt_path: speak the test sentences before and after, judge them, and "
        "write table, figures and audio to run.directory. A saved recipe will do: --config runs/NAME/config.yaml"
    ),
    "predict": (
        "Score the held-out rows (data.validation) with the run's last checkpoint, or --ckpt_path. Nothing is written "
        "but by a callback of yours (on_predict_batch_end) among trainer.callbacks."
    ),
    "sample": "Speak every sentence several times in every voice with model.policy; the first of sample, judge, label.",
    "judge": "Listen to candidates with model.judge and write what was heard; the second of sample, judge, label.",
    "export": (
        "Write the policy with the weights of the run's last checkpoint, or of --ckpt_path, as a model directory that "
        "its runtime loads; adapters are merged. What was written is read back and compared with the model in memory "
        "on rows of data.manifest; the numbers are in export.json in run.directory. Needs neither GPU nor objective."
    ),
}
"""What the help of each verb says first."""


WITHOUT_OBJECTIVE = ("sample", "judge", "export")
"""Verbs for which a recipe need not say what is optimised, nor on what."""


class AlignParser(PlainParser, LightningArgumentParser):
    """Lightning's parser with short errors."""


class AlignCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict``, ``sample``, ``judge`` and ``export`` for an :class:`AlignModule`.

    Args:
        args: command line, without the name of the program.
    """

    settings: RunSettings
    run: Run
    trainer: AlignTrainer

    def __init__(self, args: list[str]) -> None:
        quiet()
        self.verb = args[0] if args else ""
        common = {"parser_mode": MODE, "allow_abbrev": False}
        own = {
            verb: {"usage": f"tts-align {verb} --config RECIPE [options]", "description": text, **common}
            for verb, text in DESCRIPTIONS.items()
        }
        super().__init__(
            AlignModule,
            AlignData,
            args=args,
            trainer_class=AlignTrainer,
            parser_class=AlignParser,
            parser_kwargs={**common, **own},
            seed_everything_default=0,
            save_config_callback=None,  # the run's directory keeps the recipe
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the recipe rebuilds the module, not its checkpoint
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs and ours, with the arguments that do not come from the command line."""
        lightning = {verb: {*given, "weights_only"} for verb, given in LightningCLI.subcommands().items()}
        return {**lightning, "sample": {"model"}, "judge": {"model"}, "export": {"model", "manifest", "report"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put what a recipe begins with first, and the trainer's many options last."""
        trains = self.verb not in WITHOUT_OBJECTIVE
        parser.add_subclass_arguments(Objective, "objective", instantiate=False, required=trains)
        if not trains:
            parser.set_defaults({"objective": {"class_path": objective_path("sft")}})
        parser.add_class_arguments(RunSettings, "run")
        parser.add_lightning_class_args(AlignModule, "model")
        parser.add_lightning_class_args(AlignData, "data")
        parser.add_lightning_class_args(AlignTrainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser of the chosen verb only, its own options before the recipe's."""
        if subcommand != self.verb:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        groups = cast("list[Any]", parser._action_groups)
        groups.insert(2, groups.pop())
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let model and data follow the objective."""
        parser.link_arguments("objective", "model.objective")
        parser.link_arguments("objective", "data.reads", compute_fn=reads)
        parser.link_arguments("objective", "data.wants_mismatched", compute_fn=wants_mismatched)
        parser.link_arguments("objective", "data.wants_utterances", compute_fn=wants_utterances)
        parser.link_arguments("objective", "data.wants_sound", compute_fn=wants_sound)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line and name the run."""
        self.config = parser.parse_args(expand_flags(expand_sections(args)))
        chosen = self.config[self.config.subcommand]
        recipes = chosen.get("config") or []
        if chosen.run.directory is None:
            stem = Path(str(recipes[0])).stem if recipes else objective_class(chosen.objective).__name__.lower()
            chosen.run.directory = str(Path("runs", stem))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would set the checkpoint's hyper-parameters over recipe and flags."""

    def instantiate_classes(self) -> None:
        """Build everything the recipe names; what is wrong then is the recipe's fault."""
        try:
            super().instantiate_classes()
        except (ValueError, FileNotFoundError, MisconfigurationException) as error:
            raise RecipeError(str(root_cause(error))) from error

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """Build the trainer; logs and checkpoints go to the run's directory."""
        self.settings = self._get(self.config_init, "run")
        self.run = Run(str(self.settings.directory))
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        return self.make_trainer(self._get(self.config_init, "trainer"), self.run)

    def make_trainer(self, recipe: Namespace, run: Run) -> AlignTrainer:
        """Build a trainer that logs and saves in a run's directory, unless the recipe says otherwise.

        Args:
            recipe: its ``trainer:``.
            run: where it works.
        """
        if recipe.default_root_dir is not None:
            raise ValueError("trainer.default_root_dir has no effect: set run.directory instead")
        callbacks = recipe.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        if self.subcommand == "fit" and recipe.enable_checkpointing is not False and not recipe.fast_dev_run:
            callbacks.append(KeepLast(run.checkpoint, self.settings.checkpoint_every))
        if self.subcommand not in WITHOUT_OBJECTIVE:  # without it Lightning would miss it in a checkpoint
            callbacks.append(Movement())
        shows_bar = recipe.enable_progress_bar is not False and self.subcommand not in ("sample", "judge", "export")
        if shows_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(progress_bar())
        logger = recipe.logger
        if logger is None or logger is True:
            logger = self.subcommand in ("fit", "test") and TensorBoardLogger(run.directory, "", run.logs.name)
        ours = {
            "default_root_dir": run.directory,
            "logger": logger,
            "callbacks": callbacks,
            "enable_progress_bar": shows_bar,
        }
        if self.subcommand == "export":  # without the devices that a training wants
            ours |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
        return AlignTrainer(**{**recipe, **ours})

    def saved_recipe(self) -> str:
        """The recipe of this run in full: what its directory keeps, and what can be run again."""
        chosen = self.config[self.subcommand].clone()
        for key in ("config", *self._subcommand_method_arguments[str(self.subcommand)]):
            chosen.pop(key, None)
        chosen.run.overwrite = False
        return self._parser(self.subcommand).dump(chosen, skip_none=False)

    def fit(self, model: AlignModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train, from where an earlier call stopped; then test."""
        ckpt_path = ckpt_path or self._begin()
        try:
            for part, prepare in self._stages().items():
                if part in model.objective.needs - model.objective.trains:
                    prepare(self)
            self.trainer.fit(model, ckpt_path=ckpt_path, weights_only=True, **kwargs)
        except SystemExit as end:  # Ctrl-C, or a SIGTERM, after which Lightning would end as if all were well
            say(f"\ninterrupted; the same command continues in {self.run.directory}")
            raise SystemExit(end.code or 1) from None
        if self._get(self.config_init, "trainer").fast_dev_run:
            return
        from tts_align.training.stages import keep_reward

        keep_reward(self)
        held_out = model.objective.trains_reward_only and kwargs["datamodule"].validation is not None
        if self.settings.test_after_fit and (model.test_settings is not None or held_out):
            self.trainer.test(model, datamodule=kwargs["datamodule"], verbose=False)
        where(self.run, say)

    @staticmethod
    def _stages() -> dict[Part, Callable[[AlignCLI], None]]:
        """What has to be there before an objective that needs the part, and is made if it is not."""
        from tts_align.training.stages import prepare_contrast, prepare_reward, prepare_stages

        return {Part.CONTRAST: prepare_contrast, Part.REWARD: prepare_reward, Part.TOKENIZER: prepare_stages}

    def work(self, model: AlignModule, function: Callable[..., object], datamodule: AlignData) -> None:
        """Call a function in every process of this run's trainer; see :meth:`AlignTrainer.work`."""
        self.trainer.work(model, function, datamodule)

    def fit_variant(self, directory: Path, changes: Mapping[str, Any]) -> Path:
        """Fit this recipe with some keys changed, in a directory of its own; goes on where it stopped.

        Args:
            directory: of the variant's run.
            changes: dotted keys and their values. Links do not follow: a new objective needs ``objective``,
                ``model.objective`` and what of ``data`` depends on it.

        Returns:
            Its last checkpoint.
        """
        config = self.config.clone()
        for key, value in changes.items():
            config[f"{self.subcommand}.{key}"] = value
        seed_everything(config[f"{self.subcommand}.seed_everything"], workers=True, verbose=False)
        built = self.parser.instantiate(config)[self.subcommand]
        run = Run(directory)
        trainer = self.make_trainer(built.trainer, run)
        checkpoint = run.checkpoint if run.checkpoint.exists() else None
        if checkpoint is not None and finished(trainer, *run.progress()):
            say(f"{directory} is finished: {run.progress()[1]} steps; nothing left to train")
        else:
            if checkpoint is not None:
                say(f"continuing {directory} from step {run.progress()[1]}")
            trainer.fit(built.model, datamodule=built.data, ckpt_path=checkpoint, weights_only=True)
        return run.checkpoint

    def _begin(self) -> str | None:
        """Claim the run's directory, and say from which checkpoint to continue."""
        if self._get(self.config_init, "trainer").fast_dev_run:
            return None
        recipe = self.saved_recipe()
        anew = self.settings.overwrite
        if not anew:
            self.run.check(recipe)
        if first_process():
            if anew:
                self.run.clear()
            self.run.save_recipe(recipe)
        if anew or not self.run.checkpoint.exists():
            return None
        epoch, step = self.run.progress()
        if finished(self.trainer, epoch, step):
            say(f"{self.run.directory} is finished: {step} steps; nothing left to train")
        else:
            say(f"continuing {self.run.directory} from step {step}")
        return str(self.run.checkpoint)

    def validate(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Validate the run's last checkpoint, or another."""
        from tts_align.training.stages import restore_reward

        ckpt_path = self._trained(ckpt_path)
        restore_reward(self)
        self._prepare_stages()
        self.trainer.validate(ckpt_path=ckpt_path, weights_only=True, **kwargs)

    def test(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Test the run's last checkpoint, or another."""
        ckpt_path = self._trained(ckpt_path)
        self._prepare_stages()
        self.trainer.test(ckpt_path=ckpt_path, weights_only=True, **kwargs)
        where(self.run, say)

    def predict(self, model: AlignModule, datamodule: AlignData, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Score the held-out rows with the run's last checkpoint, or another."""
        ckpt_path = self._trained(ckpt_path)
        if datamodule.validation is None:
            raise ValueError("nothing to predict: the recipe must set data.validation")
        self._prepare_stages()
        datamodule.trainer = self.trainer
        datamodule.prepare(model.policy, model.trained_tokenizer if datamodule.wants_sound else None)
        self.trainer.predict(model, datamodule.val_dataloader(), ckpt_path=ckpt_path, weights_only=True, **kwargs)

    def _prepare_stages(self) -> None:
        """The parts that are frozen in the run's stage are not in its checkpoint."""
        from tts_align.training.stages import prepare_stages

        prepare_stages(self)

    def sample(self, datamodule: AlignData, **kwargs: Any) -> None:
        """Speak with the recipe's policy."""
        self.trainer.sample(**kwargs)

    def judge(self, datamodule: AlignData, **kwargs: Any) -> None:
        """Listen with the recipe's judge."""
        self.trainer.judge(**kwargs)

    def export(self, datamodule: AlignData, ckpt_path: Path | None = None, **kwargs: Any) -> None:
        """Write the run's last checkpoint, or another, as a model directory."""
        checkpoint = Path(self._trained(None if ckpt_path is None else str(ckpt_path)))
        report = self.run.directory / EXPORT
        self.trainer.export(ckpt_path=checkpoint, manifest=datamodule.manifest, report=report, **kwargs)

    def _trained(self, given: str | None) -> str:
        """The checkpoint to look at."""
        path = Path(given) if given else self.run.checkpoint
        if not path.exists():
            raise FileNotFoundError(
                f"no checkpoint at {path}: "
                + ("check --ckpt_path" if given else "train first with `tts-align fit`, or pass --ckpt_path")
            )
        return str(path)
