# SPDX-License-Identifier: Apache-2.0
"""Guards of training by reward: what a reward model likes may get worse to hear, and then training stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils.rnn import pad_sequence

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.listening import listen
from tts_align.evaluation.metrics.functional import paired_difference
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import speak, utterance_requests
from tts_align.objectives.base import Part
from tts_align.training.callbacks.watched import Watched
from tts_align.utils.distributed import gathered
from tts_align.utils.sharded import whole

log = logging.getLogger(__name__)


@runtime_checkable
class SpeakerVectors(Protocol):
    """What tells voices apart: a vector for each waveform."""

    sample_rate: int

    def encode(self, waveforms: Sequence[torch.Tensor]) -> torch.Tensor:
        """Vectors, one row for each waveform."""


class HackingGuard(Callback):
    """Listens to the policy while it trains, with the recipe's judge, which must not be the reward model.

    Before the first step and then every so many it speaks held-out sentences, always with the same seeds, and compares
    each utterance with its first one. It stops the training when the error rate has risen for sure while the reward
    model likes the same utterances better ("hacking"), or when the voice has moved too far from where it was. The last
    checkpoint is then the one of the step at which it stopped.

    Args:
        prompts: JSONL file of held-out sentences; demo: names an embedded one.
        every_steps: optimiser steps between two hearings.
        sentences: how many of them are spoken, evenly spread.
        speakers: voices, as for ``test``.
        cer_rise: rise of the mean error rate, beyond its 95 % interval, from which on it is hacking.
        speakers_encoder: tells voices apart; without one only the error rate is watched.
        similarity_fall: largest fall of the mean similarity of the voice to its first utterances.
        patience: so many hearings in a row must say that the reward model is being fooled.
        stop: stop the training; otherwise only warn.
        seed: of the utterances.
        batch_rows: utterances at a time.
    """

    def __init__(
        self,
        prompts: str,
        every_steps: int = 50,
        sentences: int = 64,
        speakers: Sequence[str] = (),
        cer_rise: float = 0.01,
        speakers_encoder: SpeakerVectors | None = None,
        similarity_fall: float = 0.05,
        patience: int = 1,
        stop: bool = True,
        seed: int = 7,
        batch_rows: int = 128,
    ) -> None:
        super().__init__()
        if min(every_steps, sentences, patience) < 1:
            raise ValueError(
                f"every_steps, sentences and patience must be at least 1, got {every_steps}, {sentences}, {patience}"
            )
        if cer_rise < 0 or similarity_fall < 0:
            raise ValueError(f"cer_rise and similarity_fall must not be negative, got {cer_rise}, {similarity_fall}")
        if speakers_encoder is None and similarity_fall != 0.05:
            raise ValueError("similarity_fall has no effect without speakers_encoder")
        self.prompts, self.every_steps, self.sentences, self.speakers = prompts, every_steps, sentences, speakers
        self.cer_rise, self.encoder, self.similarity_fall = cer_rise, speakers_encoder, similarity_fall
        self.patience, self.stop, self.seed, self.batch_rows = patience, stop, seed, batch_rows
        self.heard: list[dict[str, Any]] = []
        self._reward: list[torch.Tensor] = []
        self._checked = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the policy before it has moved."""
        if pl_module.judge is None:
            raise ValueError("HackingGuard has nobody to listen: the recipe must set model.judge")
        if Part.REWARD not in cast("Watched", pl_module).parts:
            raise ValueError("HackingGuard has no reward to compare with: it needs an objective with a reward model")
        if not self.heard:
            self._hear(trainer, cast("Watched", pl_module))
        elif self.stop and self.reason():  # what was stopped once does not go on when the command is given again
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Hear it again every so many steps."""
        step = trainer.global_step
        if step and step % self.every_steps == 0 and step != self._checked:
            self._hear(trainer, cast("Watched", pl_module))

    def _hear(self, trainer: Trainer, module: Watched) -> None:
        self._checked = trainer.global_step
        errors, vectors, rewards = self._listen(trainer, module)
        reward = float(np.mean(list(rewards.values()))) if rewards else -math.inf
        self.heard.append({"step": trainer.global_step, "cer": errors, "vectors": vectors, "reward": reward})
        numbers = {"guard/cer": float(np.mean(list(errors.values()))), "guard/reward": reward}
        if vectors:
            numbers["guard/similarity"] = similarity(vectors, self.heard[0]["vectors"])
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
        if reason := self.reason():
            log.warning("step %d: %s", trainer.global_step, reason)
            trainer.should_stop = trainer.should_stop or self.stop

    def _listen(
        self, trainer: Trainer, module: Watched
    ) -> tuple[dict[str, float], dict[str, list[float]], dict[str, float]]:
        """Error rate, voice (if there is an encoder) and reward of each utterance; the same on every rank."""
        prompts = read_prompts(self.prompts)
        if self.sentences < len(prompts):
            prompts = [prompts[i] for i in np.linspace(0, len(prompts) - 1, self.sentences).astype(int)]
        items = utterance_requests(prompts, self.speakers, 1, self.seed)[trainer.global_rank :: trainer.world_size]
        with whole(module.policy):
            spoken = [one for part in speak(module.policy, module.sampling, items, self.batch_rows) for one in part]
        assert module.judge is not None
        judged = [one for part in listen(module.judge, module.vocoder, spoken, 64) for one in part]
        # What cannot be judged, such as silence, is as wrong as can be.
        mine = {one.id: 1.0 if one.verdict is None else one.verdict.cer for one in judged}
        found: tuple[dict[str, Any], ...] = (mine, self._vectors(module, spoken), self._rewards(module, spoken))
        pairs = zip(*gathered(found), strict=True)
        found = tuple({name: value for part in parts for name, value in part.items()} for parts in pairs)
        errors, vectors, rewards = (dict(sorted(part.items())) for part in found)
        return errors, vectors, rewards

    @torch.no_grad()
    def _rewards(self, module: Watched, spoken: Sequence[Candidate]) -> dict[str, float]:
        """What the reward model says of the same utterances."""
        model = module.parts.reward
        heard = [one for one in spoken if one.speech]
        found: dict[str, float] = {}
        for start in range(0, len(heard), self.batch_rows):
            some = heard[start : start + self.batch_rows]
            speech = pad_sequence([torch.tensor(one.speech) for one in some], batch_first=True)
            lengths = torch.tensor([len(one.speech) for one in some])
            mask = torch.arange(speech.shape[1]) < lengths[:, None]
            targets = getattr(module.objective, "targets", {})
            labels = model.encode_labels(
                [one.prompt.target_text or one.prompt.text for one in some], [targets] * len(some)
            )
            tasks = getattr(module.objective, "tasks", None)
            device = module.device
            scores = model.score(speech.to(device), mask.to(device), labels.to(device), tasks)
            found |= dict(zip([one.id for one in some], scores.reward().tolist(), strict=True))
        return found

    def _vectors(self, module: Watched, spoken: Sequence[Candidate]) -> dict[str, list[float]]:
        if self.encoder is None:
            return {}
        if module.vocoder is None:
            raise ValueError("speakers_encoder hears sound: the recipe must set model.vocoder")
        heard = [one for one in spoken if one.speech]
        sounds = module.vocoder.speak([torch.tensor(one.speech) for one in heard], [one.speaker for one in heard])
        if module.vocoder.sample_rate != self.encoder.sample_rate:
            import torchaudio

            change = torchaudio.transforms.Resample(module.vocoder.sample_rate, self.encoder.sample_rate)
            sounds = [change(sound) for sound in sounds]
        vectors = self.encoder.encode(sounds)
        return {one.id: vector for one, vector in zip(heard, vectors.tolist(), strict=True)}

    def reason(self) -> str:
        """Why to stop, judged by the last hearings and the first; empty if there is no reason."""
        first, last = self.heard[0], self.heard[-1]
        if len(self.heard) < 2:
            return ""
        if last["reward"] == -math.inf:
            return "the policy has fallen silent: not one utterance holds any speech"
        fooled = [self._fooled(one) for one in self.heard[1:][-self.patience :]]
        if len(fooled) == self.patience and all(fooled):
            return fooled[-1]
        if last["vectors"]:
            fall = 1 - similarity(last["vectors"], first["vectors"])
            if fall > self.similarity_fall:
                return f"the voice has moved: its similarity to the start fell by {fall:.3f}"
        return ""

    def _fooled(self, one: Mapping[str, Any]) -> str:
        """Whether the reward had risen and the judge's error rate too, by then, and how much."""
        first = self.heard[0]
        names = sorted(first["cer"].keys() & one["cer"].keys())
        rise = paired_difference([first["cer"][name] for name in names], [one["cer"][name] for name in names], names)
        if rise.value <= self.cer_rise or rise.low <= 0 or one["reward"] <= first["reward"]:
            return ""
        return (
            f"the reward model is being fooled: its reward rises, but the judge's error rate is up by "
            f"{rise.value:.3f} ({rise.low:.3f} to {rise.high:.3f}) since step {first['step']}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What has been heard so far, so that a resumed run compares with the same start."""
        return {"heard": self.heard, "checked": self._checked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.heard, self._checked = list(state_dict["heard"]), state_dict["checked"]


def similarity(vectors: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> float:
    """Mean cosine of the same utterances' vectors.

    >>> similarity({"a": [1.0, 0.0]}, {"a": [2.0, 0.0]})
    1.0
    """
    names = sorted(vectors.keys() & first.keys())
    if not names:
        return 0.0
    one, other = (torch.tensor([side[name] for name in names]) for side in (vectors, first))
    return float(torch.nn.functional.cosine_similarity(one, other).mean())


class CollapseGuard(Callback):
    """Watches the rewards themselves: when all are the same, or all are certain, they teach nothing more.

    Args:
        saturated: share of saturated rewards from which on they have collapsed.
        entropy_nats: entropy of the histogram of rewards, in nats, under which they have collapsed; at most ln 5.
        patience: so many logs in a row.
        stop: stop the training; otherwise only warn.
    """

    def __init__(
        self, saturated: float = 0.95, entropy_nats: float = 0.05, patience: int = 3, stop: bool = False
    ) -> None:
        super().__init__()
        if not 0 < saturated <= 1 or entropy_nats < 0 or patience < 1:
            raise ValueError(
                "expected saturated in (0, 1], entropy_nats of at least 0 and patience of at least 1, got "
                f"{saturated}, {entropy_nats} and {patience}"
            )
        self.saturated, self.entropy_nats, self.patience, self.stop = saturated, entropy_nats, patience, stop
        self.bad, self._seen = 0, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was stopped once does not go on when the command is given again."""
        if self.stop and self.bad >= self.patience:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look at what has just been logged."""
        metrics, step = trainer.callback_metrics, trainer.global_step
        if not step or step == self._seen or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        logged = cast("Watched", pl_module).log_when_due()  # its own turn comes after that of all callbacks
        if "train/saturated" not in metrics:
            if not logged:  # a resumed run, before its first log
                return
            raise ValueError("CollapseGuard has no effect: the objective logs no rewards, as diffro does; leave it out")
        self._seen = step
        bins = [float(metrics[name]) for name in sorted(metrics) if name.startswith("train/reward_bin")]
        share, spread = float(metrics["train/saturated"]), histogram_entropy(bins)
        trainer.callback_metrics["train/reward_entropy_nats"] = torch.tensor(spread)
        for logger in trainer.loggers:
            logger.log_metrics({"train/reward_entropy_nats": spread}, step=step)
        self.bad = self.bad + 1 if share >= self.saturated or spread <= self.entropy_nats else 0
        if self.bad >= self.patience:
            log.warning(
                "step %d: the rewards have collapsed: %.0f %% are saturated, their entropy is %.2f nats",
                *(step, 100 * share, spread),
            )
            trainer.should_stop = trainer.should_stop or self.stop

    def state_dict(self) -> dict[str, Any]:
        """How often in a row."""
        return {"bad": self.bad, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.bad, self._seen = state_dict["bad"], state_dict["seen"]


def histogram_entropy(shares: Sequence[float]) -> float:
    """Entropy of a histogram in nats.

    >>> round(histogram_entropy([0.5, 0.5, 0.0]), 3)
    0.693
    """
    total = sum(shares)
    return -sum(share / total * math.log(share / total) for share in shares if share > 0) if total > 0 else 0.0
