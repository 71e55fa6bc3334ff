# SPDX-License-Identifier: Apache-2.0
"""NaN and infinities in loss, gradients or weights: found before anything is saved, named by step and rows."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from tts_align.batch import Batch
from tts_align.utils.distributed import gathered
from tts_align.utils.sharded import is_share

log = logging.getLogger(__name__)
OnNotFinite = Literal["stop", "skip"]
_NAMED = 5


class NotFiniteError(ValueError):
    """The training has met numbers that are not finite."""


@dataclass(frozen=True)
class _Seen:
    """What of a micro-batch is kept until it is known to be good.

    Args:
        number: of the micro-batch in the training.
        step: optimiser step that it belongs to, from 1.
        rows: keys of its rows.
    """

    number: int
    step: int
    rows: tuple[str, ...]


class FiniteGuard(Callback):
    """Looks at the loss of every micro-batch and at the gradient of every step.

    To stop costs no waiting for the device: the first micro-batch and the first step that were not finite are noted
    there, and looked at when losses are logged and before anything is saved. To skip has to know before each step, and
    waits for the device once in each.

    Args:
        on_not_finite: reaction to a loss or gradient that is not finite: stop the training, which keeps its last
            checkpoint; or skip the step, which leaves weights and optimiser as they are.
    """

    def __init__(self, on_not_finite: OnNotFinite = "stop") -> None:
        super().__init__()
        self.on_not_finite = on_not_finite
        self.skipped = 0
        self._means: dict[str, Any] = {}
        self._recent: deque[_Seen] = deque()
        self._checked = 0
        self._bad_loss: Tensor | None = None
        self._bad_step: Tensor | None = None

    # --- what is noted on the device ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the rows of a micro-batch until they are known to be good."""
        rows = batch.rows.keys if isinstance(batch, Batch) else ()
        if self.on_not_finite == "skip" and (not isinstance(batch, Batch) or batch.first):
            self._means = dict(cast("Any", pl_module).means["train"].sums)
        self._recent.append(_Seen(self._number(trainer), trainer.global_step + 1, rows))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Float[Tensor, ""]) -> None:
        """Note the first micro-batch whose loss is no finite number, without asking the device."""
        self._bad_loss = _first(self._bad_loss, loss.detach(), self._number(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the first step whose gradient is not finite; or skip it."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # which skips such steps itself: they are how it finds its scale
        values = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        if values:
            largest = _largest([one.grad for one in values])
            self._bad_step = _first(self._bad_step, largest, trainer.global_step + 1)
        if self.on_not_finite == "skip" and (where := self._where(trainer)):
            for one in values:
                one.grad = None
            self.skipped += 1
            cast("Any", pl_module).means["train"].sums = self._means  # as if the step had not been
            log.warning("%s: the step is skipped, %d so far", where, self.skipped)
            self._forget()

    # --- when it is looked at ---

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Look when losses are logged: the device is asked then anyway."""
        step = trainer.global_step
        if step != self._checked and step % int(trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._checked = step
            self.check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what came after the last log."""
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Raise if anything since the last call was not finite; every process must call it.

        Raises:
            NotFiniteError: the message names step and rows.
        """
        where = self._where(trainer) or self._weights(trainer)
        self._forget()
        if where:
            raise NotFiniteError(
                f"{where}; nothing of it was saved. Look at these rows, lower model.optimizer's lr, or leave such "
                "steps out with --run.on_not_finite skip; the same command resumes from the last checkpoint"
            )

    def _where(self, trainer: Trainer) -> str:
        """Where the first number that is not finite was met, in any process; empty if there was none."""
        found = [value for value in (self._bad_loss, self._bad_step) if value is not None]
        loss, step = (int(value) for value in torch.stack(found).tolist()) if len(found) == 2 else (-1, -1)
        if len(found) == 1:
            loss, step = int(found[0]), -1
        mine = self._said(loss, step, trainer) if max(loss, step) >= 0 else ""
        return min((one for one in gathered(mine) if one), default="") if trainer.world_size > 1 else mine

    @staticmethod
    def _weights(trainer: Trainer) -> str:
        """Whether a weight that trains is not finite, although loss and gradient were."""
        values = [one.detach() for one in trainer.lightning_module.parameters() if one.requires_grad]
        bad = bool(values) and not bool(torch.isfinite(_largest(values)))
        mine = f"step {trainer.global_step}: a weight is not finite" if bad else ""
        return max(gathered(mine)) if trainer.world_size > 1 else mine

    def _said(self, loss: int, step: int, trainer: Trainer) -> str:
        sources = cast("Any", trainer).datamodule.sources("train") if cast("Any", trainer).datamodule else {}
        by_number = next((one for one in self._recent if one.number == loss), None)
        if by_number is not None and (step < 0 or by_number.step <= step):
            return f"step {by_number.step}: the loss is not finite, of {_listed(by_number.rows, sources)}"
        rows = [name for one in self._recent if one.step == step for name in one.rows]
        return f"step {step}: the gradient is not finite, of {_listed(rows, sources)}"

    def _forget(self) -> None:
        self._recent.clear()
        self._bad_loss = self._bad_step = None

    @staticmethod
    def _number(trainer: Trainer) -> int:
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def _first(found: Tensor | None, value: Tensor, number: int) -> Tensor:
    """The number of the first value that was not finite, -1 before; stays on the device."""
    found = torch.full_like(value, -1, dtype=torch.long) if found is None else found
    return torch.where((found < 0) & ~torch.isfinite(value), number, found)


def _largest(values: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in any of them, of the shares of this process; NaN if there is one."""
    return torch.stack(
        [one.float() for one in torch._foreach_norm([v.to_local() if is_share(v) else v for v in values], math.inf)]  # type: ignore[attr-defined]
    ).max()


def _listed(keys: Iterable[str], sources: Mapping[str, Any]) -> str:
    """Names of rows in the manifest, by their keys."""
    names = list(dict.fromkeys(sources[key].row.id if key in sources else key for key in keys))
    shown = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return f"{'row' if len(names) == 1 else 'rows'} {shown}" if names else "rows without names"
