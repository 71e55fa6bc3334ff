# SPDX-License-Identifier: Apache-2.0
"""The figures that ``test`` leaves: likelihoods over training, and the token weights of a contrastive pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tts_align.data.datamodule import AlignData
from tts_align.data.select import LabelledUtterance
from tts_align.models.base.policy import CodecLM
from tts_align.objectives.base import Objective
from tts_align.objectives.tkto import TKTO, token_weights
from tts_align.training.cache import TokenCache
from tts_align.training.callbacks import figures
from tts_align.training.contrast import WEIGHTS, Separation, separation
from tts_align.utils.readers import read_json_object


def draw(
    run: Path, cache: TokenCache | None, datamodule: AlignData | None, policy: CodecLM, objective: Objective
) -> None:
    """Draw what there is to draw, into ``test/`` of a run.

    Args:
        run: directory of the run.
        cache: log-ratios of the contrastive pair; those that the run names by default.
        datamodule: the rows they belong to; without it there are no figures of tokens.
        policy: arranges the rows.
        objective: its clamp is that of the weights that are shown.
    """
    folder, logs = run / "test", run / "tensorboard"
    if any(logs.glob("events*")):
        with suppress(FileNotFoundError):  # an objective of the user's may log no likelihoods
            figures.likelihood_figure(figures.read_history(logs), folder / "likelihood.png")
    cache = cache or _weights_of(run)
    if cache is None or datamodule is None:
        return
    datamodule.prepare(policy, objective.rows_wanted)
    sources = datamodule.sources()
    sides = separation(cache, sources, partly=True)
    draw_rewards(sides, folder / "token_rewards.png")
    if marked := sides["undesirable"].marked:
        key = _typical(marked, sides["undesirable"].target)
        draw_weights(cache, sources[key], key, objective, folder / "token_weights.png")


def _weights_of(run: Path) -> TokenCache | None:
    """Those that the policy was trained with by an earlier call."""
    if not (run / WEIGHTS).is_file():
        return None
    weights = Path(str(read_json_object(run / WEIGHTS)["weights"]))
    return TokenCache.read(weights, needed=()) if weights.is_file() else None


def draw_rewards(sides: Mapping[str, Separation], path: Path) -> None:
    """Where the pair sees the difference: log-ratios at deciding tokens against those of all tokens."""
    desirable, undesirable = (figures.TokenRewards(one.target, one) for one in sides.values())
    figures.reward_figure(desirable, undesirable, path)


def draw_weights(cache: TokenCache, source: LabelledUtterance, key: str, objective: Objective, path: Path) -> None:
    """The token weights of one utterance along time."""
    values = torch.from_numpy(np.array(cache.numbers[key]))
    knobs = (objective.mu, objective.lower, objective.upper) if isinstance(objective, TKTO) else (1.0, -2.0, 2.0)
    weights = token_weights(values[None], torch.tensor([source.desirable]), *knobs)[0]
    count, scores = len(weights) - 1, source.row.scores
    place = (scores["target_start"] * count, scores["target_end"] * count)
    kana = _spread(source, place, count)
    figures.weight_figure(weights.numpy(), kana, path, target=place, desirable=source.desirable)


def _typical(keys: Sequence[str], rewards: NDArray[np.float32]) -> str:
    """The row whose deciding token has the median reward: neither the best nor the worst example."""
    order = sorted(range(len(keys)), key=lambda place: (float(rewards[place]), keys[place]))
    return keys[order[len(keys) // 2]]


def _spread(source: LabelledUtterance, place: tuple[float, float], count: int) -> list[tuple[str, float, float]]:
    """What was heard, kana by kana, with the marked word at its place and the rest spread evenly around it."""
    transcript, span = source.row.notes.get("transcript", ""), source.row.spans[0]
    word = next((reading for reading in (*span.wrong, *span.right) if reading in transcript), "")
    first = transcript.find(word) if word else len(transcript)
    pieces = (
        (transcript[:first], 0.0, place[0] if word else float(count)),
        (word, *place),
        (transcript[first + len(word) :], place[1], float(count)),
    )
    return [
        (kana, start + (end - start) * i / len(text), start + (end - start) * (i + 1) / len(text))
        for text, start, end in pieces
        for i, kana in enumerate(text)
    ]
