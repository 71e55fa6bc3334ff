# SPDX-License-Identifier: Apache-2.0
"""What ``fit`` does before token-level KTO: the contrastive pair, its separation, and the token weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import seed_everything

from tts_align.objectives import Part
from tts_align.objectives.e2e import E2E
from tts_align.objectives.kto import KTO
from tts_align.objectives.mtr import MTR
from tts_align.objectives.tkto import TKTO
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.contrast import (
    SIDES,
    WEIGHTS,
    Contrast,
    describe,
    separation,
    trained_weights,
    undesirable_weight,
    write_log_ratios,
)
from tts_align.training.reward_fit import RewardFit
from tts_align.training.stage_fit import StageFit
from tts_align.utils.files import write_json
from tts_align.utils.messages import say
from tts_align.utils.weights import PARTS

if TYPE_CHECKING:
    from tts_align.cli.lightning import AlignCLI
    from tts_align.models.base.reward import RewardHead

REWARD, MODEL = "reward", "model"
"""Run of the reward model inside another run; directory of the reward model inside its own."""


def prepare_contrast(cli: AlignCLI) -> None:
    """Give the module its token weights: those the recipe names, or of the pair it names, or of a pair fitted here."""
    model, contrast = cli.model, cli.model.contrast or Contrast()
    model.contrast = contrast
    if contrast.weights is not None:
        return
    cli.datamodule.prepare(model.policy)
    if contrast.fits:
        pair = {side: fit_side(cli, contrast, side) for side in SIDES}
    else:
        pair = {side: Path(getattr(contrast, side)) for side in SIDES}
    folder = Path(model.cache_folder or cli.run.directory / "cache")
    weights = {side: trained_weights(path) for side, path in pair.items()}
    made: list[Any] = []
    cli.work(model, partial(_write, pair=weights, folder=folder, made=made), cli.datamodule)
    contrast.weights = str(made[0].path)
    if cli.trainer.is_global_zero:
        write_json(cli.run.directory / WEIGHTS, {"weights": contrast.weights})
    report(cli, made[0])
    seed_everything(int(cli.config[cli.subcommand].seed_everything), workers=True, verbose=False)


def prepare_reward(cli: AlignCLI) -> None:
    """Give the module a trained reward model: the one the recipe names, or one that is trained here first."""
    model = cli.model
    reward = cast("RewardHead", model.parts[Part.REWARD])
    if _trained(reward) or isinstance(model.objective, E2E):  # E2E trains its own; see prepare_stages
        return
    fit = model.reward_fit or RewardFit()
    say("the reward model: mtr")
    knobs = {name: getattr(fit, name) for name in ("label_smoothing", "mixup", "adversarial")}
    chosen = Namespace(class_path=f"{MTR.__module__}.{MTR.__qualname__}", init_args=Namespace(**knobs))
    changes: dict[str, Any] = {
        "objective": chosen,
        "model.objective": chosen,
        **dict.fromkeys(NOT_FOR_REWARDS),
        "data.reads": MTR.reads,
        "data.wants_mismatched": False,
        "data.paired_only": False,
        "trainer.max_epochs": fit.epochs,
        "trainer.max_steps": -1,
        "trainer.callbacks": None,
    }
    if fit.learning_rate is not None:
        changes["model.optimizer.init_args.lr"] = fit.learning_rate
    if fit.decay_steps is not None:
        falls = Namespace(start_factor=1.0, end_factor=0.05, total_iters=fit.decay_steps)
        changes["model.lr_scheduler"] = Namespace(class_path="torch.optim.lr_scheduler.LinearLR", init_args=falls)
    if fit.rows_per_step is not None:
        changes |= {"data.rows_per_step": fit.rows_per_step, "data.tokens_per_step": None}
    if fit.manifest is not None:
        changes["data.manifest"] = fit.manifest
    saved = torch.load(cli.fit_variant(cli.run.directory / REWARD, changes), map_location="cpu", weights_only=True)
    own = f"parts.{Part.REWARD}."
    weights = {key.removeprefix(own): value for key, value in saved["state_dict"].items() if key.startswith(own)}
    reward.load_state_dict(weights)
    if cli.trainer.is_global_zero:
        reward.save(cli.run.directory / REWARD / MODEL)
    seed_everything(int(cli.config[cli.subcommand].seed_everything), workers=True, verbose=False)


def restore_reward(cli: AlignCLI) -> None:
    """Give the module the reward model that an earlier ``fit`` of this run has trained, if the recipe names none."""
    model = cli.model
    if Part.REWARD not in model.objective.needs - model.objective.trains or isinstance(model.objective, E2E):
        return
    reward = cast("RewardHead", model.parts[Part.REWARD])
    if _trained(reward):
        return
    place = cli.run.directory / REWARD / MODEL
    if not place.is_dir():
        raise ValueError(f"there is no trained reward model in {place}: run `tts-align fit` on this recipe first")
    reward.load_state_dict(type(reward)(str(place)).state_dict())


def keep_reward(cli: AlignCLI) -> None:
    """Write a reward model that has just been trained as a directory that other recipes name."""
    if cli.model.objective.trains_reward_only and cli.trainer.is_global_zero:
        place = cli.run.directory / MODEL
        cast("RewardHead", cli.model.parts[Part.REWARD]).save(place)
        say(f"reward model: {place}")


def _trained(reward: RewardHead) -> bool:
    return getattr(reward, "directory", None) is not None


NOT_FOR_REWARDS = tuple(
    f"model.{name}"
    for name in ("reference", "contrast", "flow", "tokenizer", "reward_fit", "vocoder", "judge", "test", "lr_scheduler")
)
"""What a recipe holds for the policy, and a reward model's training has no use for."""


def prepare_stages(cli: AlignCLI) -> None:
    """Give the objective e2e what the earlier stages make: of the run that the recipe names, or made here first."""
    model, objective = cli.model, cli.model.objective
    if not isinstance(objective, E2E) or objective.stage == 1:
        return
    fit = model.stage_fit or StageFit()
    if objective.start is not None:
        if model.stage_fit is not None:
            raise ValueError("model.stage_fit has no effect: objective.start names the run of the earlier stage")
        return
    start = cli.run.directory
    for stage in range(1, objective.stage):
        earlier, start = start, cli.run.directory / f"stage{stage}"
        if not (start / PARTS / f"{Part.TOKENIZER}.safetensors").is_file():
            say(f"stage {stage} of end-to-end training")
            cli.fit_variant(start, _stage_changes(cli, fit, stage, earlier))
    objective.load(model.policy, {Part(name): part for name, part in model.parts.items()}, start)
    seed_everything(int(cli.config[cli.subcommand].seed_everything), workers=True, verbose=False)


def _stage_changes(cli: AlignCLI, fit: StageFit, stage: int, earlier: Path) -> dict[str, Any]:
    """What of the recipe is different in an earlier stage."""
    config = cli.config[cli.subcommand]
    knobs = Namespace(**vars(config.objective.init_args))
    knobs.stage, knobs.start = stage, None if stage == 1 else str(earlier)
    if stage == 1:
        knobs.losses = list(fit.losses)
    chosen = Namespace(class_path=config.objective.class_path, init_args=knobs)
    changes: dict[str, Any] = {
        "objective": chosen,
        "model.objective": chosen,
        **dict.fromkeys(NOT_FOR_STAGES),
        "trainer.max_epochs": fit.epochs if stage == 1 else fit.second_epochs,
        "trainer.max_steps": -1,
    }
    if stage == 1:
        changes |= {f"model.{name}": None for name in ("reward", "flow") if name not in fit.losses}
    callbacks = config.trainer.callbacks
    if isinstance(callbacks, list):  # guards listen with the judge, which belongs to the last stage
        guards = HackingGuard.__module__
        changes["trainer.callbacks"] = [one for one in callbacks if not one.class_path.startswith(f"{guards}.")]
    rate = fit.learning_rate if stage == 1 else fit.second_learning_rate
    if rate is not None:
        changes["model.optimizer.init_args.lr"] = rate
    return changes


NOT_FOR_STAGES = tuple(f"model.{name}" for name in ("stage_fit", "vocoder", "judge", "test"))
"""What a recipe holds for its last stage only."""


def _write(module: Any, pair: Any, folder: Path, made: list[Any], **_: Any) -> None:
    made.append(write_log_ratios(module, pair, folder))


def fit_side(cli: AlignCLI, contrast: Contrast, side: str) -> Path:
    """Fit π⁺ (KTO on the labels) or π⁻ (KTO on the flipped labels), or take what an earlier call has finished."""
    objective = cli.model.objective
    flipped = side == SIDES[1]
    say(f"π{'⁻' if flipped else '⁺'}: KTO on the {'flipped ' if flipped else ''}labels")
    knobs: dict[str, Any] = {"sft_weight": contrast.sft_weight}
    if isinstance(objective, TKTO):
        knobs["beta"] = objective.beta
    if contrast.balance == "both" or (contrast.balance == "flipped" and flipped):
        labels = cli.datamodule.labels
        knobs["undesirable_weight"] = undesirable_weight(~labels if flipped else labels)
    chosen = Namespace(class_path=f"{KTO.__module__}.{KTO.__qualname__}", init_args=Namespace(**knobs))
    changes: dict[str, Any] = {
        "objective": chosen,
        "model.objective": chosen,
        "model.contrast": None,
        "model.test": None,
        "model.vocoder": None,
        "model.judge": None,
        "model.cache": str(cli.model.cache_folder or cli.run.directory / "cache"),
        "data.reads": KTO.reads,
        "data.wants_mismatched": True,
        "data.flip_labels": flipped,
    }
    if contrast.epochs is not None:
        changes |= {"trainer.max_epochs": contrast.epochs, "trainer.max_steps": -1}
    if contrast.learning_rate is not None:
        changes["model.optimizer.init_args.lr"] = contrast.learning_rate
    return cli.fit_variant(cli.run.directory / "contrast" / side, changes)


def report(cli: AlignCLI, cache: Any) -> None:
    """Print how the pair tells tokens apart, on held-out rows if there are any."""
    held_out = cli.datamodule.validation is not None
    sources = cli.datamodule.sources("validation" if held_out else "train")
    objective = cli.model.objective
    lower, upper = (objective.lower, objective.upper) if isinstance(objective, TKTO) else (-2.0, 2.0)
    say(f"separation of the pair on {'held-out' if held_out else 'training'} rows")
    say(describe(separation(cache, sources), lower, upper))
