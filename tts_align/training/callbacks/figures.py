# SPDX-License-Identifier: Apache-2.0
"""The three figures of a run, as PNG: likelihoods over training, token rewards, weights along one utterance.

The numbers follow figures 3 to 5 of the TKTO paper (arXiv 2510.05799). All functions take plain arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tts_align.training.callbacks.romaji import morae
from tts_align.utils.files import written_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD, BAD, ALL, INK = "#1b7f79", "#c2452d", "#b9bec7", "#333a45"
"""Colours of desirable and undesirable speech, of what is neither, and of lines and letters; told apart without colour
vision by their lightness."""

Place = float | int

_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class History:
    """Mean log-probability per token over training.

    Args:
        step: optimiser steps, rising.
        desirable: nats, of desirable tokens, at each step.
        undesirable: nats, of undesirable tokens, at each step.
    """

    step: NDArray[np.int64]
    desirable: NDArray[np.float64]
    undesirable: NDArray[np.float64]


@dataclass(frozen=True)
class TokenRewards:
    """log π⁺ − log π⁻ of tokens, in nats.

    Args:
        target: of tokens at marked words, or at the mora that decides.
        everywhere: of all tokens, in pieces that need not be in memory together; looked through more than once.
    """

    target: NDArray[Any]
    everywhere: Iterable[NDArray[Any]]


def likelihood_figure(history: History, path: Path) -> Path:
    """Figure 3: how likely desirable and undesirable tokens are while the policy trains."""
    with _drawing(path, 5.4, 3.2) as (axes,):
        for values, colour, name in (
            (history.desirable, GOOD, "desirable"),
            (history.undesirable, BAD, "undesirable"),
        ):
            known = np.isfinite(values)
            step, kept = history.step[known], values[known]
            if not len(kept):
                continue
            smooth = _smooth(kept)
            axes.plot(step, kept, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(step, smooth, color=colour, linewidth=1.8, label=name)
            axes.annotate(f"{smooth[-1]:.2f}", (step[-1], smooth[-1]), (4, 0), color=colour, **_BESIDE)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("mean log-probability per token, nats")
        axes.set_title("Likelihood over training")
        _legend(axes)
    return Path(path)


def reward_figure(desirable: TokenRewards, undesirable: TokenRewards, path: Path) -> Path:
    """Figure 4: where the contrastive pair sees the difference: rewards at target words against all tokens."""
    every = [[desirable.target], desirable.everywhere, [undesirable.target], undesirable.everywhere]
    ends = [(piece.min(), piece.max()) for pieces in every for piece in pieces if len(piece)]
    low, high = min([-1.0, *(float(one) for one, _ in ends)]), max([1.0, *(float(one) for _, one in ends)])
    bins = np.linspace(low, high, 61)
    with _drawing(path, 5.4, 4.4, rows=2) as (upper, lower):
        for axes, rewards, colour, name in (
            (upper, desirable, GOOD, "Desirable"),
            (lower, undesirable, BAD, "Undesirable"),
        ):
            _shares(axes, rewards.everywhere, bins, ALL, "all tokens")
            _shares(axes, [rewards.target], bins, colour, "target")
            axes.set_title(name)
            axes.set_ylabel("share of tokens")
            axes.axvline(0, color=INK, linewidth=0.6, linestyle=":")
            _legend(axes)
        lower.set_xlabel("token reward  log π⁺ − log π⁻, nats")
    return Path(path)


def weight_figure(
    weights: ArrayLike,
    kana: Sequence[tuple[str, Place, Place]],
    path: Path,
    target: tuple[Place, Place] | None = None,
    desirable: bool = False,
    seconds_per_token: float | None = None,
    title: str = "",
) -> Path:
    """Figure 5: the weight of every token of one utterance along time, with what is said under the axis.

    Args:
        weights: one per speech token, shape (tokens,).
        kana: (kana, first token, token after the last), in order; drawn in Latin letters.
        path: of the PNG.
        target: where the marked word begins and ends, in tokens.
        desirable: colours the line.
        seconds_per_token: time axis in seconds; tokens are counted when it is not known.
        title: above the figure; in Latin letters.
    """
    values = np.asarray(weights, np.float64)
    colour, unit = (GOOD if desirable else BAD), (seconds_per_token or 1.0)
    edges = unit * np.arange(len(values) + 1)
    with _drawing(path, max(5.4, 0.09 * len(values)), 2.9) as (axes,):
        if target is not None:
            axes.axvspan(unit * target[0], unit * target[1], color=colour, alpha=0.12, linewidth=0)
        axes.stairs(values, edges, baseline=1.0, color=colour, alpha=0.25, fill=True)
        axes.stairs(values, edges, baseline=None, color=colour, linewidth=1.4)
        axes.axhline(1, color=INK, linewidth=0.6, linestyle=":")
        axes.set_xlim(0, max(edges[-1], unit))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("token weight")
        axes.set_title(title or f"Token weights of an {'' if desirable else 'un'}desirable utterance")
        _write_kana(axes, kana, unit)
        axes.set_xlabel("time, s" if seconds_per_token else "speech token", labelpad=14)
    return Path(path)


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "annotation_clip": False}


def _write_kana(axes: Axes, kana: Sequence[tuple[str, Place, Place]], unit: float) -> None:
    """What is said, under the axis, between ticks where one mora ends and the next begins."""
    first = 0
    for label, count in morae("".join(one for one, _, _ in kana)):
        start, end = unit * kana[first][1], unit * kana[first + count - 1][2]
        first += count
        axes.axvline(start, ymax=0.03, color=INK, linewidth=0.5)
        place = axes.get_xaxis_transform()
        axes.text((start + end) / 2, -0.14, label, transform=place, ha="center", va="top", fontsize=7, clip_on=False)


def _legend(axes: Axes) -> None:
    """On the title's line, so that it never hides a number."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, borderaxespad=0, handlelength=1.2, fontsize=8)


def _shares(axes: Axes, pieces: Iterable[NDArray[Any]], bins: NDArray[np.float64], colour: str, name: str) -> None:
    counts, total = np.zeros(len(bins) - 1), 0.0
    for piece in pieces:
        values = np.asarray(piece, np.float64)
        counts += np.histogram(values, bins)[0]
        total += float(values.sum())
    if not counts.any():
        return
    mean, shares = total / counts.sum(), counts / counts.sum()
    label = f"{name}: mean {mean:+.2f}"
    axes.hist(bins[:-1].tolist(), bins.tolist(), weights=shares, color=colour, alpha=0.75, label=label)
    axes.axvline(mean, color=colour, linewidth=1.4)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running mean over a twentieth of the curve, narrower at the ends."""
    half = len(values) // 40
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


@contextmanager
def _drawing(path: Path, width: float, height: float, rows: int = 1) -> Iterator[tuple[Axes, ...]]:
    """Axes, one above the other, whose figure is saved when the block ends; needs no display and no pyplot."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield tuple(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        with written_atomically(path) as scratch:
            figure.savefig(scratch, format="png", facecolor="white")


def read_history(logs: Path) -> History:
    """Read the likelihoods that a run has logged to TensorBoard; after a restart the later number of a step counts.

    Args:
        logs: directory with event files.

    Raises:
        FileNotFoundError: there are none, or they hold no likelihoods.
    """
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    tags = ("train/desirable_logp", "train/undesirable_logp")
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
    events.Reload()
    known = set(events.Tags()["scalars"])
    if not known & set(tags):
        raise FileNotFoundError(f"no likelihoods are logged in {logs}: expected the scalars {' and '.join(tags)}")
    series = {tag: {one.step: one.value for one in events.Scalars(tag)} if tag in known else {} for tag in tags}
    return history(*(series[tag] for tag in tags))


def history(desirable: Mapping[int, float], undesirable: Mapping[int, float]) -> History:
    """Put two series of step -> value on one axis; NaN where a series has no value."""
    steps = sorted(desirable.keys() | undesirable.keys())
    columns = [np.array([series.get(step, np.nan) for step in steps]) for series in (desirable, undesirable)]
    return History(np.array(steps, np.int64), *columns)
