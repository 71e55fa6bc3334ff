# SPDX-License-Identifier: Apache-2.0
"""The models of a training: which of them there must be, which have no effect, and which are frozen."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from tts_align.models.base.flow import FlowHead
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.reward import RewardHead
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.objectives.base import Objective, Part, Parts
from tts_align.training.contrast import Contrast
from tts_align.training.settings import RewardFit, StageFit
from tts_align.utils.precision import check_precision, check_trained_weights


def check_settings(
    objective: Objective,
    policy: CodecLM,
    reference: CodecLM | None,
    contrast: Contrast | None,
    reward: RewardHead | None,
    reward_fit: RewardFit | None,
    stage_fit: StageFit | None,
    optimizer_groups: Collection[str] = (),
) -> None:
    """Raise ``ValueError`` for what a recipe sets and the objective has no use for."""
    name = type(objective).__name__
    if "_modules" not in vars(objective):
        raise ValueError(f"{name}.__init__ must begin with super().__init__(), as that of every module of PyTorch")
    frozen = objective.needs - objective.trains
    if reward_fit is not None and (Part.REWARD not in frozen or Part.TOKENIZER in objective.needs):
        raise ValueError(f"model.reward_fit has no effect: {name} does not train one first")
    if reward_fit is not None and reward is not None and reward.directory is not None:
        raise ValueError(
            f"model.reward_fit has no effect: the reward model of {reward.directory} is trained already; leave it out, "
            "or pass --model.reward_fit null"
        )
    # An earlier stage may train what this one only needs: one recipe is for all stages.
    there = objective.trainable | {*map(str, objective.needs - {Part.REFERENCE, Part.CONTRAST}), "objective"}
    if idle := sorted(set(optimizer_groups) - there):
        raise ValueError(
            f"model.optimizer_groups of {', '.join(idle)} have no effect: {name} has only {', '.join(sorted(there))}"
        )
    if stage_fit is not None and Part.TOKENIZER not in frozen:
        raise ValueError("model.stage_fit has no effect: there is no stage before the one that is to be trained")
    if contrast is not None and Part.CONTRAST not in objective.needs:
        raise ValueError(f"model.contrast has no effect: {name} does not use it; leave it out")
    if reference is not None and policy.adapted:
        raise ValueError("model.reference has no effect: with adapters the reference is the policy's frozen base")


def make_parts(
    objective: Objective,
    policy: CodecLM,
    reference: CodecLM | None,
    reward: RewardHead | None,
    flow: FlowHead | None,
    tokenizer: TokenizerHead | None,
) -> Parts:
    """What the objective needs besides the policy; models that are not trained are frozen, the policy too if it is not.

    Args:
        objective: says what it needs and trains.
        policy: the model that is trained; the reference, unless one is given, is what its directory holds.
        reference: frozen model the policy is compared with.
        reward: scores speech tokens.
        flow: turns speech tokens into mel frames.
        tokenizer: turns sound into speech tokens.

    Raises:
        ValueError: a model has no effect, or is missing.
    """
    parts, name = Parts(), type(objective).__name__
    for part, given in {Part.REWARD: reward, Part.FLOW: flow, Part.TOKENIZER: tokenizer}.items():
        if given is None:
            continue
        if part not in objective.needs:
            raise ValueError(f"model.{part} has no effect: {name} does not use it; leave it out")
        parts[part] = given
    if not objective.scores:
        policy.requires_grad_(False).eval()
    if reference is not None:
        parts[Part.REFERENCE] = reference
    elif Part.REFERENCE in objective.needs and not policy.adapted:
        parts[Part.REFERENCE] = policy.rebuild()
    missing = objective.needs - {Part.REFERENCE, Part.CONTRAST} - {Part(key) for key in parts}
    if missing:
        keys = " and ".join(f"model.{part}" for part in sorted(missing))
        raise ValueError(f"{name} cannot run: the recipe must set {keys}")
    for key, model in parts.items():
        if Part(key) not in objective.trains:
            model.requires_grad_(False).eval()
    return parts


def check_can_learn(policy: CodecLM, parts: Parts, precision: str | int | None) -> None:
    """Raise ``ValueError`` for weights, or a trainer's precision, in which small steps would be lost.

    Args:
        policy: the model that is trained.
        parts: the others, some of which may train.
        precision: ``trainer.precision`` of the recipe.
    """
    check_precision(precision)
    for name, model in {"policy": policy, **parts}.items():
        check_trained_weights(model, f"model.{name}")


def keep_double(module: nn.Module, precision: str | int | None) -> None:
    """Make a module double if it is to be: Lightning does so only after it has put a checkpoint into float32.

    Args:
        module: about to be trained or tested.
        precision: ``trainer.precision`` of the recipe.
    """
    if str(precision) == "64-true":
        module.double()
