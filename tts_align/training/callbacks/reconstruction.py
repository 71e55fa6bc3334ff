# SPDX-License-Identifier: Apache-2.0
"""What end-to-end training does to its own speech tokens, and what is heard of them, from before the first step on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tts_align.batch import Batch
from tts_align.evaluation.judges.base import Expected, Judge, SpeechSample
from tts_align.models.base.device import evaluation_mode
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.objectives.base import Part, Step
from tts_align.training.callbacks.watched import Watched
from tts_align.training.means import log_numbers
from tts_align.utils.distributed import gathered
from tts_align.utils.messages import say
from tts_align.utils.sharded import whole

log = logging.getLogger(__name__)


@dataclass
class ReconstructionSums:
    """Sums over held-out rows, of one rank or of all.

    Args:
        nats: sum of the language model's cross-entropies.
        targets: of how many targets.
        same: speech tokens that are those of the tokenizer as it was given.
        tokens: of how many.
        errors: character error rate of each reconstructed utterance.
    """

    nats: float = 0.0
    targets: int = 0
    same: int = 0
    tokens: int = 0
    errors: list[float] = field(default_factory=list)

    def add(self, other: ReconstructionSums) -> None:
        """Take another rank's in."""
        self.nats, self.targets = self.nats + other.nats, self.targets + other.targets
        self.same, self.tokens = self.same + other.same, self.tokens + other.tokens
        self.errors = self.errors + other.errors

    @property
    def numbers(self) -> dict[str, float]:
        """What is logged."""
        found = {"watch/tokens_unchanged": self.same / max(self.tokens, 1)}
        if self.targets:
            found["watch/lm"] = self.nats / self.targets
        if self.errors:
            found["watch/reconstruction_cer"] = sum(self.errors) / len(self.errors)
        return found


class ReconstructionWatch(Callback):
    """Hears held-out rows through tokenizer, flow and vocoder at the start, every ``every_steps`` and at the end.

    Logs ``watch/lm`` (cross-entropy of the policy on the speech tokens as they are now, in nats),
    ``watch/tokens_unchanged`` (share of speech tokens that are those of the tokenizer as it was given)
    and, with a listener and a flow, ``watch/reconstruction_cer``.

    Args:
        judge: listener, used for nothing else; without one nothing is listened to.
        vocoder: makes sound of the flow that trains; without one nothing is listened to.
        every_steps: optimiser steps between two hearings.
        rows: held-out rows that are heard.
    """

    def __init__(
        self,
        judge: Judge | None = None,
        vocoder: Vocoder | None = None,
        every_steps: int = 100,
        rows: int = 64,
    ) -> None:
        super().__init__()
        if min(every_steps, rows) < 1:
            raise ValueError(f"every_steps and rows must be at least 1, got {every_steps} and {rows}")
        if (judge is None) != (vocoder is None):
            raise ValueError("ReconstructionWatch needs judge and vocoder, or neither")
        self.judge, self.vocoder, self.every_steps, self.rows = judge, vocoder, every_steps, rows
        self.steps: dict[int, dict[str, float]] = {}
        self._given: TokenizerHead | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear what was given.

        Raises:
            ValueError: no speech tokens are made here, or there are no held-out rows.
        """
        module = cast("Watched", pl_module)
        tokenizer = module.trained_tokenizer
        if tokenizer is None:
            raise ValueError("ReconstructionWatch has no effect: this objective makes no speech tokens; leave it out")
        if trainer.datamodule.validation is None:  # type: ignore[attr-defined]
            raise ValueError("ReconstructionWatch hears held-out rows: the recipe must set data.validation")
        directory = getattr(tokenizer, "directory", None)
        given: Any = copy.deepcopy(tokenizer) if directory is None else type(tokenizer)(str(directory))
        self._given = given.to(module.device).requires_grad_(False).eval()
        if self.vocoder is not None and self.judge is not None and Part.FLOW in module.parts:
            self.vocoder.attach(module.parts.flow, tokenizer, module.objective.voices)
            for one in (self.vocoder, self.judge):
                one.to(module.device).requires_grad_(False).eval()
        if trainer.global_step not in self.steps:
            self._hear(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Hear again when it is time."""
        if trainer.global_step % self.every_steps == 0 and trainer.global_step not in self.steps:
            self._hear(trainer, cast("Watched", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear what has become of it."""
        if trainer.global_step not in self.steps:
            self._hear(trainer, cast("Watched", pl_module))

    def _hear(self, trainer: Trainer, module: Watched) -> None:
        found = ReconstructionSums()
        precision = trainer.precision_plugin.forward_context
        with torch.no_grad(), evaluation_mode(cast("LightningModule", module)), whole(module.policy), precision():
            for batch in self._batches(trainer):
                found.add(self._heard(module, module.score(batch.to(module.device))))  # type: ignore[attr-defined]
        total = ReconstructionSums()
        for one in gathered(found):
            total.add(one)
        numbers = total.numbers
        self.steps[trainer.global_step] = numbers
        log_numbers(trainer, numbers)
        said = [f"LM loss {numbers['watch/lm']:.2f} nats"] if "watch/lm" in numbers else []
        said.append(f"{100 * numbers['watch/tokens_unchanged']:.0f} % of the speech tokens unchanged")
        if "watch/reconstruction_cer" in numbers:
            said.append(f"reconstruction CER {100 * numbers['watch/reconstruction_cer']:.1f} %")
        say(f"step {trainer.global_step}: {', '.join(said)}")

    def _batches(self, trainer: Trainer) -> Iterator[Batch]:
        """Held-out micro-batches of this rank until there are rows enough."""
        left = -(-self.rows // trainer.world_size)
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            yield batch
            left -= batch.rows.count
            if left <= 0:
                return

    def _heard(self, module: Watched, step: Step) -> ReconstructionSums:
        assert self._given is not None
        sound, said = step.recordings, step.utterances
        now, before = sound.tokenised, self._given(sound.features, sound.frames)
        found = ReconstructionSums(
            same=int((now.tokens == before.tokens)[now.mask].sum()),
            tokens=int(now.mask.sum()),
            errors=self._errors(module, step),
        )
        if module.objective.scores:
            good = step.batch.desirable
            found.nats, found.targets = -float(step.policy.logp[good].sum()), int(step.policy.mask[good].sum())
        assert len(said.speech) == len(now.tokens)
        return found

    def _errors(self, module: Watched, step: Step) -> list[float]:
        """Error rate of each row with a known transcript, made again of its speech tokens."""
        if self.vocoder is None or self.judge is None or Part.FLOW not in module.parts:
            return []
        said = step.utterances
        speech: list[Tensor] = [row[mask].cpu() for row, mask in zip(said.speech, said.mask, strict=True)]
        with module.objective.merged(module.policy, module.parts):
            sounds = self.vocoder.speak(speech, list(said.speakers))
        known = [row for row, text in enumerate(said.transcripts) if text is not None]
        rate = self.vocoder.sample_rate
        samples = [SpeechSample(speech[row], sounds[row], rate, said.speakers[row]) for row in known]
        expected = [Expected("", {"": str(said.transcripts[row])}, ("",)) for row in known]
        return [verdict.cer for verdict in self.judge.judge(samples, expected)]

    def state_dict(self) -> dict[str, Any]:
        """What has been heard."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.steps = dict(state_dict["steps"])
