# SPDX-License-Identifier: Apache-2.0
"""What ``fit`` does before the objective: the contrastive pair, the reward model, the earlier stages of e2e."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from tts_align.data.datamodule import AlignData
from tts_align.models.base.reward import RewardHead
from tts_align.objectives.base import Objective, Part
from tts_align.objectives.e2e import E2E
from tts_align.objectives.e2e_losses import SHAPERS, used
from tts_align.objectives.kto import KTO
from tts_align.objectives.mtr import MTR
from tts_align.objectives.tkto import TKTO
from tts_align.training.cache import TokenCache
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.keep_base import KeepBase
from tts_align.training.callbacks.keep_best import KeepBest
from tts_align.training.callbacks.moving_average import MovingAverage
from tts_align.training.checkpoint import read_checkpoint
from tts_align.training.contrast import (
    SIDES,
    WEIGHTS,
    Contrast,
    describe,
    separation,
    trained_weights,
    undesirable_weight,
)
from tts_align.training.module import AlignModule
from tts_align.training.numbers import Difference, StoredNumbers
from tts_align.training.run import Run
from tts_align.training.scoring import identity
from tts_align.training.settings import RewardFit, StageFit
from tts_align.utils.files import write_json
from tts_align.utils.messages import say
from tts_align.utils.model_directory import check_replaceable
from tts_align.utils.weights import PARTS

REWARD, MODEL = "reward", "model"
"""Run of the reward model inside another run; directory of the reward model inside its own."""
NOT_FOR_PAIRS = ("contrast", "test", "vocoder", "judge")
NOT_FOR_REWARDS = ("reference", "contrast", "flow", "tokenizer", "reward_fit", "vocoder", "judge", "test")
NOT_FOR_STAGES = ("stage_fit", "vocoder", "judge", "test", "lr_scheduler")
"""What a recipe holds under ``model:`` for the last fit only, and the fits before it have no use for."""


@runtime_checkable
class Fitting(Protocol):
    """A command that fits: what a recipe names, built, and a way to fit variants of the recipe."""

    model: AlignModule
    datamodule: AlignData
    run: Run

    @property
    def trainer(self) -> Trainer:
        """The trainer of the fit itself."""

    @property
    def chosen(self) -> Namespace:
        """The recipe in full, as it was parsed."""

    def fit_variant(self, directory: Path, changes: Mapping[str, Any]) -> Path:
        """Fit the recipe with some keys changed, in a directory of its own; gives its last checkpoint."""

    def work(self, model: AlignModule, function: Callable[..., object], datamodule: AlignData) -> None:
        """Call a function in every process of the trainer, with the module on its device."""


def _variant(
    objective: Namespace,
    without: Iterable[str],
    epochs: int | None,
    learning_rate: float | None,
    decay_steps: int | None = None,
) -> dict[str, Any]:
    """Dotted keys of a recipe that another fit changes, and their values.

    Args:
        objective: its class and knobs.
        without: keys under ``model:`` that it has no use for.
        epochs: how long it trains; as long as the recipe by default.
        learning_rate: that of the recipe by default.
        decay_steps: optimiser steps over which it falls to a twentieth; the recipe's schedule by default.
    """
    changes: dict[str, Any] = {"objective": objective, "model.objective": objective}
    changes |= {f"model.{name}": None for name in without}
    if epochs is not None:
        changes |= {"trainer.max_epochs": epochs, "trainer.max_steps": -1}
    if learning_rate is not None:
        changes["model.optimizer.init_args.lr"] = learning_rate
    if decay_steps is not None:
        falls = Namespace(start_factor=1.0, end_factor=0.05, total_iters=decay_steps)
        changes["model.lr_scheduler"] = Namespace(class_path="torch.optim.lr_scheduler.LinearLR", init_args=falls)
    return changes


def _without_guards(recipe: Namespace, *others: type) -> dict[str, Any]:
    """The recipe's callbacks but for those that listen to the policy of the fit itself, and some others."""
    callbacks = recipe.trainer.callbacks
    if not callbacks:
        return {}
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    left_out = (HackingGuard, KeepBest, KeepBase, *others)
    return {"trainer.callbacks": [one for one in listed if not issubclass(_class(one.class_path), left_out)]}


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def _named(objective: type[Objective], knobs: Mapping[str, Any]) -> Namespace:
    """An objective as a recipe has it."""
    return Namespace(class_path=f"{objective.__module__}.{objective.__qualname__}", init_args=Namespace(**knobs))


def _reseed(fitting: Fitting) -> None:
    """Let the fit itself draw what it would have drawn without the fits before it."""
    seed = fitting.chosen.seed_everything
    if seed is not False:
        seed_everything(int(seed), workers=True, verbose=False)


# ---------------------------------------------------------------------- the contrastive pair


def prepare_contrast(fitting: Fitting) -> None:
    """Give the module its token weights: those the recipe names, or of the pair it names, or of a pair fitted here."""
    model, contrast = fitting.model, fitting.model.contrast or Contrast()
    model.contrast = contrast
    if contrast.weights is not None:
        return
    folder = Path(model.cache_folder or fitting.run.directory / "cache")
    fitting.datamodule.folder = folder
    fitting.datamodule.prepare(model.policy, model.rows_wanted)
    if contrast.fits:
        pair = {side: fit_side(fitting, contrast, side) for side in SIDES}
    else:
        pair = {side: Path(getattr(contrast, side)) for side in SIDES}
    weights = {side: trained_weights(path) for side, path in pair.items()}
    made: list[TokenCache] = []
    fitting.work(model, partial(_write, pair=weights, folder=folder, made=made), fitting.datamodule)
    contrast.weights = str(made[0].path)
    if fitting.trainer.is_global_zero:
        write_json(fitting.run.directory / WEIGHTS, {"weights": contrast.weights})
    report(fitting, made[0])
    _reseed(fitting)


def fit_side(fitting: Fitting, contrast: Contrast, side: str) -> Path:
    """Fit π⁺ (KTO on the labels) or π⁻ (KTO on the flipped labels), or take what an earlier call has finished."""
    model, flipped = fitting.model, side == SIDES[1]
    say(f"π{'⁻' if flipped else '⁺'}: KTO on the {'flipped ' if flipped else ''}labels")
    knobs: dict[str, Any] = {"sft_weight": contrast.sft_weight}
    if isinstance(model.objective, TKTO):
        knobs["beta"] = model.objective.beta
    if contrast.balance == "both" or (contrast.balance == "flipped" and flipped):
        labels = fitting.datamodule.labels
        knobs["undesirable_weight"] = undesirable_weight(~labels if flipped else labels)
    changes = _variant(_named(KTO, knobs), NOT_FOR_PAIRS, contrast.epochs, contrast.learning_rate, contrast.decay_steps)
    changes["model.cache"] = str(model.cache_folder or fitting.run.directory / "cache")
    changes["data.flip_labels"] = flipped
    # π⁻ is meant to get worse, and an average of the weights would bring the two nearer to each other.
    changes |= _without_guards(fitting.chosen, MovingAverage)
    return fitting.fit_variant(fitting.run.directory / "contrast" / side, changes)


def _write(
    module: AlignModule, pair: Mapping[str, Mapping[str, Tensor]], folder: Path, made: list[TokenCache], **_: Any
) -> None:
    made.append(write_log_ratios(module, pair, folder))


def write_log_ratios(module: AlignModule, pair: Mapping[str, Mapping[str, Tensor]], folder: Path) -> TokenCache:
    """Compute log π⁺ − log π⁻ of every row of the module's data, or load it, on the module's trainer.

    Args:
        module: its policy takes on the weights of the pair, one after the other.
        pair: trained weights by side.
        folder: where the files lie.
    """
    trainer, policy = module.trainer, module.policy.eval()
    rows = trainer.datamodule.rows()  # type: ignore[attr-defined]
    sides = {}
    for side in SIDES:
        with policy.with_weights(pair[side]):
            sides[side] = TokenCache(folder, side, identity(policy.digest(), trainer))
            what = f"log-probabilities of the {side} side"
            module.scoring.fill(sides[side], rows, lambda these: policy(these).logp, what, trainer)
    good, bad = (sides[side].numbers for side in SIDES)
    ratios = TokenCache(folder, "contrast", {side: cache.path.stem for side, cache in sides.items()})
    ratios.numbers = StoredNumbers([Difference(good, bad)])
    if trainer.is_global_zero:
        ratios.save()
    return ratios


def report(fitting: Fitting, cache: TokenCache) -> None:
    """Print how the pair tells tokens apart, on held-out rows if there are any."""
    held_out = fitting.datamodule.validation is not None
    sources = fitting.datamodule.sources("validation" if held_out else "train")
    objective = fitting.model.objective
    lower, upper = (objective.lower, objective.upper) if isinstance(objective, TKTO) else (-2.0, 2.0)
    say(f"separation of the pair on {'held-out' if held_out else 'training'} rows")
    say(describe(separation(cache, sources), lower, upper))


# ---------------------------------------------------------------------- the reward model


def prepare_reward(fitting: Fitting) -> None:
    """Give the module a trained reward model: the one the recipe names, or one that is trained here first."""
    model = fitting.model
    reward = model.parts.reward
    if _trained(reward) or isinstance(model.objective, E2E):  # E2E trains its own; see prepare_stages
        return
    say("the reward model: mtr")
    changes = _reward_changes(model.reward_fit or RewardFit())
    checkpoint = fitting.fit_variant(fitting.run.directory / REWARD, changes)
    saved = read_checkpoint(checkpoint)["state_dict"]
    own = f"parts.{Part.REWARD}."
    reward.load_state_dict({key.removeprefix(own): value for key, value in saved.items() if key.startswith(own)})
    if fitting.trainer.is_global_zero:
        reward.save(fitting.run.directory / REWARD / MODEL)
    _reseed(fitting)


def _reward_changes(fit: RewardFit) -> dict[str, Any]:
    """What of the recipe is different while the reward model trains."""
    knobs = {name: getattr(fit, name) for name in ("label_smoothing", "mixup", "adversarial")}
    without = (*NOT_FOR_REWARDS, "lr_scheduler")
    changes = _variant(_named(MTR, knobs), without, fit.epochs, fit.learning_rate, fit.decay_steps)
    changes |= {"data.paired_only": False, "trainer.callbacks": None}
    if fit.rows_per_step is not None:
        changes |= {"data.rows_per_step": fit.rows_per_step, "data.tokens_per_step": None}
    if fit.manifest is not None:
        changes["data.manifest"] = fit.manifest
    return changes


def restore_reward(fitting: Fitting) -> None:
    """Give the module the reward model that an earlier ``fit`` of this run has trained, if the recipe names none."""
    model = fitting.model
    if Part.REWARD not in model.objective.needs - model.objective.trains or isinstance(model.objective, E2E):
        return
    reward = model.parts.reward
    if _trained(reward):
        return
    place = fitting.run.directory / REWARD / MODEL
    if not place.is_dir():
        raise ValueError(f"there is no trained reward model in {place}: run `tts-align fit` on this recipe first")
    reward.load_state_dict(type(reward)(str(place)).state_dict())


def check_ends(fitting: Fitting) -> None:
    """Look, before the training, at what is written when it is over.

    Raises:
        ValueError: something is mounted there, or would be lost.
    """
    objective = fitting.model.objective
    if objective.trains_reward_only:
        check_replaceable(fitting.run.directory / MODEL)
    elif Part.REWARD in objective.needs - objective.trains:
        check_replaceable(fitting.run.directory / REWARD / MODEL)


def keep_reward(fitting: Fitting) -> None:
    """Write a reward model that has just been trained as a directory that other recipes name."""
    if fitting.model.objective.trains_reward_only and fitting.trainer.is_global_zero:
        place = fitting.run.directory / MODEL
        fitting.model.parts.reward.save(place)
        say(f"reward model: {place}")


def _trained(reward: RewardHead) -> bool:
    return reward.directory is not None


# ---------------------------------------------------------------------- the earlier stages of e2e


def prepare_stages(fitting: Fitting) -> None:
    """Give the objective e2e what the earlier stages make: of the run that the recipe names, or made here first."""
    model, objective = fitting.model, fitting.model.objective
    if not isinstance(objective, E2E) or objective.stage == 1:
        return
    if objective.start is not None:
        if model.stage_fit is not None:
            raise ValueError("model.stage_fit has no effect: objective.start names the run of the earlier stage")
        return
    start = fitting.run.directory
    for stage in range(1, objective.stage):
        earlier, start = start, fitting.run.directory / f"stage{stage}"
        if not (start / PARTS / f"{Part.TOKENIZER}.safetensors").is_file():
            say(f"stage {stage} of end-to-end training")
            fitting.fit_variant(start, _stage_changes(fitting.chosen, model.stage_fit or StageFit(), stage, earlier))
    objective.load(model.policy, model.parts, start)
    _reseed(fitting)


def _stage_changes(recipe: Namespace, fit: StageFit, stage: int, earlier: Path) -> dict[str, Any]:
    """What of the recipe is different in an earlier stage."""
    knobs = Namespace(**vars(recipe.objective.init_args))
    knobs.stage, knobs.start = stage, None if stage == 1 else str(earlier)
    knobs.unfreeze_after = dict(fit.unfreeze_after) if stage == 1 else {}
    losses = fit.losses if stage == 1 else SHAPERS
    for name in used(3, SHAPERS) | used(2, SHAPERS):  # what only a later stage uses
        if name not in used(stage, losses):
            setattr(knobs, name, None)
    without: tuple[str, ...] = NOT_FOR_STAGES
    epochs, rate, decay = fit.second_epochs, fit.second_learning_rate, fit.second_decay_steps
    if stage == 1:
        knobs.losses = list(fit.losses)
        without = (*without, *(name for name in ("reward", "flow") if name not in fit.losses))
        epochs, rate, decay = fit.epochs, fit.learning_rate, None
    objective = Namespace(class_path=recipe.objective.class_path, init_args=knobs)
    changes = _variant(objective, without, epochs, rate, decay)
    changes |= _without_guards(recipe)  # they listen with the judge, which belongs to the last stage
    if groups := recipe.model.get("optimizer_groups"):
        trains = {"policy", "reward", "flow"} if stage == 2 else {"tokenizer", "objective", *losses}
        changes["model.optimizer_groups"] = {name: one for name, one in groups.items() if name in trains}
    return changes
