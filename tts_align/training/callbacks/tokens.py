# SPDX-License-Identifier: Apache-2.0
"""While a speech tokenizer is part of the training: how its speech tokens are used, and its weights at the end."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from tts_align.evaluation.metrics.tokens import TokenCounts
from tts_align.models.base.tokenizer import Tokenised
from tts_align.training.callbacks.watched import Watched
from tts_align.training.means import log_numbers
from tts_align.utils.sharded import plain
from tts_align.utils.weights import PARTS, write_weights

log = logging.getLogger(__name__)


@runtime_checkable
class Saves(Protocol):
    """A model that writes a directory from which it can be built; published ones write files of their own kinds."""

    directory: Path | None

    def save(self, directory: Path) -> None:
        """Write it, whole or not at all."""


class TokenStatistics(Callback):
    """Counts the tokenizer's speech tokens on the held-out rows at every validation.

    Logs ``val/token_entropy_bits``, ``val/token_information_bits`` (what a token tells about the next one) and
    ``val/token_used_share`` of the codebook, all plug-in estimates: compare those of the same rows. Warns when the
    speech tokens collapse.

    Args:
        entropy_share: smallest share of the entropy possible with this codebook and number of tokens without a
            warning.
        fall: smallest share of their highest values so far that entropy and used share may have without a warning.
    """

    def __init__(self, entropy_share: float = 0.5, fall: float = 0.7) -> None:
        super().__init__()
        if not (0 <= entropy_share <= 1 and 0 <= fall <= 1):
            raise ValueError(f"entropy_share and fall must lie in 0..1, got {entropy_share} and {fall}")
        self.entropy_share, self.fall = entropy_share, fall
        self.highest: dict[str, float] = {}
        self._counts: TokenCounts | None = None
        self._handle: Any = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count what the tokenizer makes."""
        tokenizer = cast("Watched", pl_module).trained_tokenizer
        if tokenizer is None:
            return
        self._counts = TokenCounts.none(tokenizer.codebook_size).to(pl_module.device)
        self._handle = tokenizer.register_forward_hook(self._count)

    def _count(self, _: Any, __: Any, made: Tokenised) -> None:
        assert self._counts is not None
        self._counts = self._counts + TokenCounts.of(made.tokens, made.mask, len(self._counts.tokens))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and warn."""
        if self._handle is None or self._counts is None:
            return
        self._handle.remove()
        counts, self._handle, self._counts = self._counts.across_ranks(), None, None
        found = {
            "entropy_bits": float(counts.entropy_bits()),
            "information_bits": float(counts.mutual_information_bits()),
            "used_share": float(counts.used_share()),
        }
        numbers = {f"val/token_{name}": value for name, value in found.items()}
        log_numbers(trainer, numbers)
        most = math.log2(max(2, min(len(counts.tokens), int(counts.tokens.sum()))))
        for reason in self._reasons(found, most):
            log.warning("step %d: the speech tokens collapse: %s", trainer.global_step, reason)
        self.highest = {name: max(value, self.highest.get(name, value)) for name, value in found.items()}

    def _reasons(self, found: dict[str, float], most: float) -> list[str]:
        """Why these numbers look like a collapse."""
        reasons = []
        if found["entropy_bits"] < self.entropy_share * most:
            reasons.append(f"their entropy is {found['entropy_bits']:.2f} bits where {most:.2f} are possible")
        reasons += [
            f"{what} fell from {self.highest[name]:.3g} to {found[name]:.3g}"
            for name, what in (("entropy_bits", "entropy"), ("used_share", "the share of the codebook in use"))
            if name in self.highest and found[name] < self.fall * self.highest[name]
        ]
        return reasons

    def state_dict(self) -> dict[str, Any]:
        """The highest numbers so far."""
        return {"highest": self.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.highest = dict(state_dict["highest"])


class KeepParts(Callback):
    """Writes every model as it works alone to ``parts/`` in the run's directory, when the training ends.

    A later stage starts from there. ``parts/policy``, ``parts/tokenizer``, ``parts/reward`` and ``parts/flow`` can
    stand in a recipe as directories.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module, folder = cast("Watched", pl_module), Path(trainer.default_root_dir, PARTS)
        policy = plain(module.policy)
        with module.objective.merged(policy, module.parts):
            if trainer.is_global_zero:
                policy.save(folder / "policy")
                for name, part in module.parts.items():
                    if isinstance(part, Saves):
                        part.save(folder / name)
                write_weights(folder, {"policy": policy, **module.parts})
        trainer.strategy.barrier()
