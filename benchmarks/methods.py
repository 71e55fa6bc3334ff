# SPDX-License-Identifier: Apache-2.0
"""Methods as ``equal_compute.py`` compares them: their knobs, and the settings that are tried on dev sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tts_align.objectives import DPO, KTO, SFT, TKTO, Objective


@dataclass(frozen=True)
class Setting:
    """Every knob of a method; those it lacks stay as they are.

    Args:
        rate: learning rate at the first step.
        anchor: weight of the SFT loss.
        final: share of the learning rate that is left at the last step; it falls linearly.
        beta: of DPO, KTO and TKTO.
        undesirable: weight of undesirable rows.
        mu: TKTO's strength of the token weights.
        clamp: TKTO's bounds, plus and minus.
        pair_rate: learning rate of TKTO's contrastive pair.
        pair_anchor: SFT anchor of the pair.
        average: decay of the moving average of the weights that the training ends with, 0 for none.
    """

    rate: float
    anchor: float = 0.0
    final: float = 0.05
    beta: float = 0.1
    undesirable: float = 1.0
    mu: float = 1.0
    clamp: float = 3.0
    pair_rate: float = 2e-3
    pair_anchor: float = 1.0
    average: float = 0.0

    def name(self) -> str:
        """Part of a file's name: rate and anchor, then what differs from the usual."""
        usual = Setting(self.rate, self.anchor)
        other = [f"{key}{value:g}" for key, value in asdict(self).items() if value != getattr(usual, key)]
        return "-".join([f"{self.rate:g}", f"{self.anchor:g}", *other])


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        objective: made of a setting.
        grid: settings tried first.
        knobs: factors of single knobs tried around the best of the grid.
    """

    objective: Callable[[Setting], Objective]
    grid: tuple[Setting, ...]
    knobs: tuple[tuple[str, float], ...]


def grid(rates: Sequence[float], anchors: Sequence[float]) -> tuple[Setting, ...]:
    """Every pair of a learning rate and an anchor."""
    return tuple(Setting(rate, anchor) for rate in rates for anchor in anchors)


AVERAGE = 0.99
GRID = grid((1e-3, 2e-3, 4e-3, 8e-3), (30.0, 60.0, 120.0, 240.0))
DPO_GRID = grid((2.5e-5, 1e-4, 2.5e-4, 1e-3), (3.0, 30.0, 300.0, 3000.0))
GRIDS: Mapping[tuple[str, str, str], tuple[Setting, ...]] = {
    # Pairs are few: three passes over them are 93 steps, not 795.
    ("audio", "dpo", "epochs"): grid((2.5e-4, 5e-4, 1e-3, 2e-3), (1.0, 3.0, 10.0, 30.0)),
    ("symbolic", "dpo", "epochs"): grid((2.5e-4, 5e-4, 1e-3, 2e-3), (1.0, 3.0, 10.0, 30.0)),
    # Weaker anchors were the better ones there in one epoch.
    ("symbolic", "tkto", "updates"): grid((5e-4, 1e-3, 2e-3, 4e-3), (10.0, 30.0, 100.0, 300.0)),
    ("symbolic", "kto", "updates"): grid((5e-4, 1e-3, 2e-3, 4e-3), (1.0, 3.0, 10.0, 30.0)),
}
"""Where a corpus and a budget need another one than the method's."""
SFT_GRID = tuple(
    Setting(rate, final=final) for rate in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2) for final in (0.05, 0.3)
)
TABLE: Mapping[str, Method] = {
    "tkto": Method(
        lambda s: TKTO(
            beta=s.beta, undesirable_weight=s.undesirable, mu=s.mu, lower=-s.clamp, upper=s.clamp, sft_weight=s.anchor
        ),
        GRID,
        (("mu", 0.5), ("mu", 2), ("clamp", 2 / 3), ("clamp", 2), ("pair_rate", 0.5), ("pair_rate", 2)),
    ),
    "kto": Method(
        lambda s: KTO(beta=s.beta, undesirable_weight=s.undesirable, sft_weight=s.anchor),
        GRID,
        (("beta", 0.5), ("beta", 2), ("undesirable", 0.5), ("undesirable", 2), ("final", 6), ("final", 20)),
    ),
    "dpo": Method(
        lambda s: DPO(beta=s.beta, sft_weight=s.anchor),
        DPO_GRID,
        (("beta", 0.25), ("beta", 0.5), ("beta", 2), ("beta", 4), ("final", 6), ("final", 20)),
    ),
    "sft": Method(
        lambda s: SFT(),
        SFT_GRID,
        (("rate", 0.7), ("rate", 0.85), ("rate", 1.2), ("rate", 1.4), ("final", 6), ("final", 20)),
    ),
}


def setting_of(trial: Mapping[str, Any]) -> Setting:
    """The setting of a saved trial; a knob that came later was as it is by default."""
    return Setting(**{one.name: trial[one.name] for one in fields(Setting) if one.name in trial})
