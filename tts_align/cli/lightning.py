# SPDX-License-Identifier: Apache-2.0
"""Everything a recipe names, built and set to work: a LightningCLI whose runs live in directories of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tts_align.cli.alphabet import with_alphabet
from tts_align.cli.classes import check_classes
from tts_align.cli.commands import DESCRIPTIONS, TRAINER_DEFAULTS, WITHOUT_OBJECTIVE
from tts_align.cli.errors import RecipeError, root_cause
from tts_align.cli.parser import PlainParser
from tts_align.cli.places import check_places
from tts_align.cli.recipe import MODE, expand, objective_path
from tts_align.cli.restore import checkpoint_of, own_checkpoint, restore_contrast, show_test, stored_test
from tts_align.cli.trainer import AlignTrainer, make_trainer
from tts_align.data.datamodule import AlignData
from tts_align.objectives import Objective, Part
from tts_align.training.module import AlignModule
from tts_align.training.run import EXPORT, Run, RunSettings, finished, how_to_test, where
from tts_align.utils.distributed import agreed
from tts_align.utils.messages import first_process, quiet, say


def objective_class(objective: Namespace | None) -> type[Objective]:
    """Class that a recipe names; without one, the base."""
    if objective is None:
        return Objective
    module, _, name = objective.class_path.rpartition(".")
    return getattr(import_module(module), name)


class AlignParser(PlainParser, LightningArgumentParser):
    """Lightning's parser with short errors."""


class AlignCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict``, ``sample``, ``judge`` and ``export`` for an :class:`AlignModule`.

    Args:
        args: command line, without the name of the program.
    """

    settings: RunSettings
    run: Run
    model: AlignModule
    datamodule: AlignData
    trainer: AlignTrainer

    def __init__(self, args: list[str]) -> None:
        quiet()
        self.command = args[0] if args else ""
        common = {"parser_mode": MODE, "allow_abbrev": False}
        own = {
            command: {"usage": f"tts-align {command} --config RECIPE [options]", "description": text, **common}
            for command, text in DESCRIPTIONS.items()
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
        """Lightning's commands and ours, with the arguments that do not come from the command line."""
        lightning = {command: {*given, "weights_only"} for command, given in LightningCLI.subcommands().items()}
        return {
            **lightning,
            "sample": {"model"},
            "judge": {"model", "ckpt_path"},
            "export": {"model", "manifest", "report"},
        }

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put what a recipe begins with first, and the trainer's many options last."""
        trains = self.command not in WITHOUT_OBJECTIVE
        parser.add_subclass_arguments(Objective, "objective", instantiate=False, required=trains)
        if not trains:
            parser.set_defaults({"objective": {"class_path": objective_path("sft")}})
        parser.add_class_arguments(RunSettings, "run")
        parser.add_lightning_class_args(AlignModule, "model")
        parser.add_class_arguments(AlignData, "data", fail_untyped=False, sub_configs=True, skip={"wants"})
        parser.add_lightning_class_args(AlignTrainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser of the chosen command only, its own options before the recipe's."""
        if subcommand != self.command:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        groups = cast("list[Any]", parser._action_groups)
        groups.insert(2, groups.pop())
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the model follow the objective; what the data bring follows the model."""
        parser.link_arguments("objective", "model.objective")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line and name the run."""
        self.config = parser.parse_args(expand(args))
        chosen = self.config[self.config.subcommand]
        recipes = chosen.get("config") or []
        if chosen.run.directory is None:
            stem = Path(str(recipes[0])).stem if recipes else objective_class(chosen.objective).__name__.lower()
            stem = stem.strip(".") or "run"  # never the folder above
            chosen.run.directory = str(Path("runs", stem))

    @property
    def chosen(self) -> Namespace:
        """The recipe in full, as it was parsed for this command."""
        return self.config[self.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would set the checkpoint's hyper-parameters over recipe and flags."""

    def instantiate_classes(self) -> None:
        """Build everything the recipe names; what is wrong then is the recipe's fault."""
        try:
            check_places(self.config[self.command].as_dict(), self.command)
            check_classes(self.chosen, self.chosen.run.modules)
            recipe = self.config
            self.config = self._with_alphabet(recipe, Path(str(self.chosen.run.directory)))
            try:
                super().instantiate_classes()
            finally:
                self.config = recipe  # what the run's directory keeps says `auto`, too
            if self.subcommand not in WITHOUT_OBJECTIVE:
                self.datamodule.follow(self.model.rows_wanted)
        except (ValueError, FileNotFoundError, MisconfigurationException) as error:
            raise RecipeError(str(root_cause(error))) from error

    def _with_alphabet(self, recipe: Namespace, run: Path) -> Namespace:
        filled = recipe.clone()
        filled[self.command] = with_alphabet(recipe[self.command], run, self.command)
        return filled

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """Build the trainer; logs and checkpoints go to the run's directory."""
        self.settings = self._get(self.config_init, "run")
        self.run = Run(str(self.settings.directory))
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        return make_trainer(self._get(self.config_init, "trainer"), self.run, self.settings, str(self.subcommand))

    def saved_recipe(self) -> str:
        """The recipe of this run in full: what its directory keeps, and what can be run again."""
        chosen = self.config[self.subcommand].clone()
        for key in ("config", *self._subcommand_method_arguments[str(self.subcommand)]):
            chosen.pop(key, None)
        chosen.run.overwrite = False
        return self._parser(self.subcommand).dump(chosen, skip_none=False)

    def fit(self, model: AlignModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train, from where an earlier call stopped; then test."""
        with self._claimed():
            self._fit(model, ckpt_path, **kwargs)

    def _claimed(self) -> AbstractContextManager[None]:
        """The run's directory, for this command alone; its first process speaks for all."""
        trial = self._get(self.config_init, "trainer").fast_dev_run
        return nullcontext() if trial or not first_process() else self.run.claimed(self.command)

    def _fit(self, model: AlignModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        stored = None if ckpt_path else self._stored_test()
        ckpt_path = self._begin(ckpt_path)
        held_out = model.objective.trains_reward_only and kwargs["datamodule"].validation is not None
        tests = self.settings.test_after_fit and (model.test_settings is not None or held_out)
        if tests and not self._get(self.config_init, "trainer").fast_dev_run:
            from tts_align.training.interfaces import check_test

            check_test(model.objective, model.policy, model.parts)
        try:
            for part, prepare in self._stages().items():
                if part in model.objective.needs - model.objective.trains:
                    prepare(self)
            self.trainer.fit(model, ckpt_path=ckpt_path, weights_only=True, **kwargs)
        except SystemExit as end:
            say(f"\n{end or 'interrupted'}; the same command continues in {self.run.directory}")
            raise
        if self._get(self.config_init, "trainer").fast_dev_run:
            return
        from tts_align.training.callbacks.keep_best import use_chosen
        from tts_align.training.stages import keep_reward

        keep_reward(self)
        stored = self.trainer.strategy.broadcast(stored)  # others may have read the recipe that the first has saved
        if stored is not None and self.settings.test_after_fit:
            if first_process():
                show_test(stored)
        elif tests:
            if (chosen := use_chosen(self.trainer, model)) is not None:
                say(f"checkpoint:   {chosen}")
            self.trainer.test(model, datamodule=kwargs["datamodule"], verbose=False)
        elif self.settings.test_after_fit and not model.objective.trains_reward_only:
            say(how_to_test(self.run, model.judge is not None))
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
        """Fit this recipe with some keys changed, in a directory of its own; resumes where it was interrupted.

        Args:
            directory: of the variant's run.
            changes: dotted keys and their values. Links do not follow: a new objective needs ``objective`` and
                ``model.objective``.

        Returns:
            Its last checkpoint.
        """
        config = self._with_alphabet(self.config, Path(str(self.chosen.run.directory)))  # this run's, whatever it reads
        own = {"trainer.logger": self.chosen.trainer.logger is not False}  # a service would mix it into the run's steps
        for key, value in {**own, **changes}.items():
            config[f"{self.subcommand}.{key}"] = value
        if (seed := config[f"{self.subcommand}.seed_everything"]) is not False:
            seed_everything(seed, workers=True, verbose=False)
        built = self.parser.instantiate(config)[self.subcommand]
        run = Run(directory)
        trainer = make_trainer(built.trainer, run, self.settings, "fit")
        checkpoint = agreed(run.newest())
        if checkpoint is not None:
            run.continued(checkpoint, trainer)
            if finished(trainer, *run.progress(checkpoint)):
                return checkpoint
        trainer.fit(built.model, datamodule=built.data, ckpt_path=checkpoint, weights_only=True)
        return run.checkpoint

    def _begin(self, given: str | None) -> str | None:
        """Claim the run's directory, and say from which checkpoint to continue: the given one or the run's last."""
        from tts_align.training.stages import check_ends

        start = checkpoint_of(self.run, given) if given else None
        if self._get(self.config_init, "trainer").fast_dev_run:
            return given
        check_ends(self)
        start = self.run.begin(self.saved_recipe(), self.settings.overwrite, start)
        return None if start is None else self.run.continued(start, self.trainer)

    def _stored_test(self) -> Mapping[str, Any] | None:
        """Results of the test of a run with nothing left to train, if it was tested as the recipe says."""
        run, trainer = self.run, self._get(self.config_init, "trainer")
        if self.settings.overwrite or trainer.fast_dev_run or not run.begun or not run.checkpoint.is_file():
            return None
        newest = run.newest()
        over = newest is not None and (finished(self.trainer, *run.progress(newest)) or run.stopped())
        return stored_test(run, self.saved_recipe()) if over else None

    def validate(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Validate the run's last checkpoint, or another."""
        from tts_align.training.stages import restore_reward

        checkpoint = self._trained(ckpt_path)
        restore_reward(self)
        restore_contrast(self)
        self._prepare_stages()
        self.trainer.validate(ckpt_path=checkpoint, weights_only=True, **kwargs)

    def test(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Test the run's last checkpoint, or another; where nothing was trained yet, the policy as it is."""
        with self._claimed():
            self._test(ckpt_path, **kwargs)
        where(self.run, say)

    def _test(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        untrained = ckpt_path is None and self.run.newest() is None and Part.TOKENIZER not in self.model.parts
        if untrained and self.model.test_settings is not None:
            say("policy:       as model.policy names it; nothing was trained yet, so there is no before and after")
            self.trainer.test(weights_only=True, **kwargs)
        else:
            checkpoint = self._trained(ckpt_path)
            self._prepare_stages()
            self.trainer.test(ckpt_path=checkpoint, weights_only=True, **kwargs)

    def predict(self, model: AlignModule, datamodule: AlignData, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Score the held-out rows with the run's last checkpoint, or another."""
        checkpoint = self._trained(ckpt_path)
        if datamodule.validation is None:
            raise ValueError("nothing to predict: the recipe must set data.validation")
        self._prepare_stages()
        datamodule.trainer = self.trainer
        datamodule.prepare(model.policy, model.rows_wanted, model.trained_tokenizer)
        self.trainer.predict(model, datamodule.val_dataloader(), ckpt_path=checkpoint, weights_only=True, **kwargs)

    def _prepare_stages(self) -> None:
        """The parts that are frozen in the run's stage are not in its checkpoint."""
        from tts_align.training.stages import prepare_stages

        prepare_stages(self)

    def sample(self, datamodule: AlignData, ckpt_path: Path | None = None, **kwargs: Any) -> None:
        """Speak with what the run has trained if the recipe is a run's own, with the recipe's policy otherwise."""
        self.trainer.sample(ckpt_path=self._own_checkpoint(ckpt_path), **kwargs)

    def judge(self, datamodule: AlignData, **kwargs: Any) -> None:
        """Listen with the recipe's judge; a vocoder made of models that the run has trained speaks with these."""
        vocal = {Part.FLOW, Part.TOKENIZER} & set(map(Part, self.model.parts))
        self.trainer.judge(ckpt_path=self._own_checkpoint(None) if vocal else None, **kwargs)

    def _own_checkpoint(self, given: Path | None) -> Path | None:
        """The checkpoint to speak with; the stages of the run that made it are there, too."""
        chosen = self.config[self.command]
        found = own_checkpoint(self.run, given, chosen.get("config") or [], chosen.model.policy.as_dict())
        if found is not None:
            self._prepare_stages()
        return found

    def export(self, datamodule: AlignData, ckpt_path: Path | None = None, **kwargs: Any) -> None:
        """Write the run's last checkpoint, or another, as a model directory."""
        with self._claimed():
            self._export(ckpt_path, datamodule, **kwargs)

    def _export(self, ckpt_path: Path | None, datamodule: AlignData, **kwargs: Any) -> None:
        checkpoint = self._trained(ckpt_path)
        report = self.run.directory / EXPORT
        self.trainer.export(ckpt_path=checkpoint, manifest=datamodule.manifest, report=report, **kwargs)

    def _trained(self, given: str | Path | None) -> Path:
        """The checkpoint to look at, after a line that says which."""
        path = checkpoint_of(self.run, given)
        say(f"checkpoint:   {path}")
        return path
