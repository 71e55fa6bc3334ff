# SPDX-License-Identifier: Apache-2.0
"""What the test after a training needs of the models, seen to before the training begins."""

from __future__ import annotations

from tts_align.evaluation.reward import RewardEvaluation
from tts_align.models.base.policy import CodecLM
from tts_align.objectives.base import Objective, Part, Parts


def check_test(objective: Objective, policy: CodecLM, parts: Parts) -> None:
    """Build what the test builds, so that a model that lacks a part of its interface fails now, not after hours.

    Args:
        objective: about to train.
        policy: the model that is trained.
        parts: the others.

    Raises:
        ValueError: the reward model cannot say what it hears, or the policy cannot be built again as it was.
    """
    if objective.trains_reward_only:
        RewardEvaluation(parts.reward)
    elif Part.REFERENCE not in parts and not policy.adapted:
        _check_rebuilt(policy, objective.initial_policy(policy))


def _check_rebuilt(policy: CodecLM, before: CodecLM | None) -> None:
    """The test compares with the policy before its training; ``None`` when there was none worth hearing."""
    if before is None:
        return
    name = type(policy).__name__
    if not isinstance(before, CodecLM) or before is policy:
        raise ValueError(
            f"{name}.rebuild must give another model, as its directory holds it, got "
            f"{'the policy itself' if before is policy else type(before).__name__}"
        )
    mine, its = ({key: value.shape for key, value in one.state_dict().items()} for one in (policy, before))
    if mine != its:
        other = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
        raise ValueError(
            f"{name}.rebuild must give a model of the same weights, got other ones at {len(other)} names, "
            f"{other[0]} first"
        )
