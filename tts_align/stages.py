# SPDX-License-Identifier: Apache-2.0
"""What ``fit`` does before token-level KTO: the contrastive pair, its separation, and the token weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from lightning.pytorch import seed_everything

from tts_align.contrast import (
    SIDES,
    WEIGHTS,
    Contrast,
    describe,
    separation,
    trained_weights,
    undesirable_weight,
    write_log_ratios,
)
from tts_align.files import write_json
from tts_align.objectives.kto import KTO
from tts_align.objectives.tkto import TKTO

if TYPE_CHECKING:
    from tts_align.trainer import AlignCLI


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


def _write(module: Any, pair: Any, folder: Path, made: list[Any], **_: Any) -> None:
    made.append(write_log_ratios(module, pair, folder))


def fit_side(cli: AlignCLI, contrast: Contrast, side: str) -> Path:
    """Fit π⁺ (KTO on the labels) or π⁻ (KTO on the flipped labels), or take what an earlier call has finished."""
    from tts_align.trainer import say

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
    from tts_align.trainer import say

    held_out = cli.datamodule.validation is not None
    sources = cli.datamodule.sources("validation" if held_out else "train")
    objective = cli.model.objective
    lower, upper = (objective.lower, objective.upper) if isinstance(objective, TKTO) else (-2.0, 2.0)
    say(f"separation of the pair on {'held-out' if held_out else 'training'} rows")
    say(describe(separation(cache, sources), lower, upper))
