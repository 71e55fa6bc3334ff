# SPDX-License-Identifier: Apache-2.0
"""Guards of a training: what a reward model likes may get worse to hear, and then training stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils.rnn import pad_sequence

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.listening import (
    MAX_FAILED_SHARE,
    Failures,
    TooManyFailuresError,
    speak_and_judge,
)
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import UtteranceRequest, evenly_spread, utterance_requests
from tts_align.objectives.base import Part
from tts_align.training.callbacks.best_weights import BestWeights, refuse_minimum, save_again
from tts_align.training.callbacks.hearings import (
    Hearing,
    SpeakerVectors,
    harm,
    prepare_listener,
    rise,
    similarity,
    voice_vectors,
)
from tts_align.training.callbacks.watched import Watched, planned_end
from tts_align.utils.distributed import gathered
from tts_align.utils.seeds import part_seed
from tts_align.utils.sharded import whole

log = logging.getLogger(__name__)
_DEAF = "the guard cannot hear the untrained policy, so training does not start"


class HackingGuard(Callback):
    """Listens to the policy while it trains, and stops the training when what it hears gets worse.

    At the start, every ``every_steps`` and at the end it speaks held-out sentences, always with the same seeds,
    and compares each utterance with its first one. Harm is a character error rate that is higher than at the start by
    more than chance, silence, or a voice that has moved; harm while the reward model likes the utterances better is
    hacking. Then the training stops, for good, and the policy gets back the weights it was heard best with
    (``checkpoints/best-STEP.ckpt``): those are what ``test`` and ``export`` use.

    The listener must not be the judge of ``test``: who chooses the weights may not grade them.

    Args:
        prompts: JSONL file of held-out sentences; demo: names an embedded one.
        every_steps: optimiser steps between two hearings.
        sentences: number of sentences that are spoken, evenly spread.
        speakers: voices, as for ``test``.
        judge: listener of the guard, used for nothing else.
        use_test_judge: listen with ``model.judge`` for want of another; what ``test`` reports is then no longer
            independent of what was chosen.
        cer_rise: tolerated rise of the mean character error rate; harm is a larger one whose 95 % interval, which
            resamples sentences, lies above 0.
        speakers_encoder: tells voices apart; without one only the error rate is watched.
        similarity_fall: tolerated fall of the mean similarity of the voices to their first utterances.
        patience: harmful hearings in a row after which training stops; after the last step one is enough.
        stop: whether to stop the training and restore the best weights; otherwise only warn.
        seed: seed of the utterances; by default 7 plus that of the run (seed_everything).
        batch_rows: utterances at a time.
        max_failed_share: largest share of the utterances that vocoder or judge may fail on; see ``judge``.
    """

    def __init__(
        self,
        prompts: str,
        every_steps: int = 50,
        sentences: int = 64,
        speakers: Sequence[str] = (),
        judge: Judge | None = None,
        use_test_judge: bool = False,
        cer_rise: float = 0.01,
        speakers_encoder: SpeakerVectors | None = None,
        similarity_fall: float = 0.05,
        patience: int = 1,
        stop: bool = True,
        seed: int | None = None,
        batch_rows: int = 128,
        max_failed_share: float = MAX_FAILED_SHARE,
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
        if judge is not None and use_test_judge:
            raise ValueError("use_test_judge has no effect: the guard has a judge of its own; leave one out")
        self.prompts, self.every_steps, self.sentences, self.speakers = prompts, every_steps, sentences, speakers
        self.judge, self.use_test_judge, self.max_failed_share = judge, use_test_judge, max_failed_share
        self.cer_rise, self.encoder, self.similarity_fall = cer_rise, speakers_encoder, similarity_fall
        self.patience, self.stop, self.seed, self.batch_rows = patience, stop, seed, batch_rows
        self.heard: list[Hearing] = []
        self.best = BestWeights()
        self.stopped = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is nothing left to train."""
        if self.stopped and self.stop:
            log.warning("this run was stopped, it does not continue: %s", self.stopped)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the policy before it has moved; a run that was stopped once stays stopped.

        Raises:
            ValueError: there is no listener, or it is the judge of ``test``, or it cannot hear.
        """
        module = cast("Watched", pl_module)
        prepare_listener(module, self.judge, self.use_test_judge, "HackingGuard", "the guard")
        if self.stop:
            refuse_minimum(trainer, "HackingGuard")
        self.best.continue_here(trainer)
        if self.stopped and self.stop:
            trainer.should_stop = True
        elif not self.heard:
            try:
                self._hear(trainer, module)
            except TooManyFailuresError as error:
                raise ValueError(f"{_DEAF}: {error}") from error
            except Exception as error:
                error.add_note(_DEAF)
                raise

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Hear it again every ``every_steps`` steps, and after the last one."""
        step = trainer.global_step
        last = planned_end(trainer)
        if step and (last or step % self.every_steps == 0) and step != self.heard[-1].step:
            self._hear(trainer, cast("Watched", pl_module), last)

    def _hear(self, trainer: Trainer, module: Watched, last: bool = False) -> None:
        hearing = self._listen(trainer, module)
        self.heard.append(hearing)
        numbers = hearing.numbers
        if hearing.vectors:
            numbers["guard/similarity"] = similarity(hearing.vectors, self.heard[0].vectors)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=hearing.step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
        if hearing.failed:
            log.warning("step %d: the guard's listener failed on %d utterances", hearing.step, hearing.failed)
        self._keep_if_best(trainer)
        if not (reason := self.reason(1 if last else self.patience)):
            return
        log.warning("step %d: %s", hearing.step, reason)
        if self.stop:
            self.stopped = f"step {hearing.step}: {reason}"
            trainer.should_stop = True
            if path := self.best.restore(trainer):
                log.warning("the policy is that of step %s again, the best that was heard: %s", self.best.step, path)

    def requests(self) -> list[UtteranceRequest]:
        """What is spoken at every hearing."""
        prompts = evenly_spread(read_prompts(self.prompts), self.sentences)
        return utterance_requests(prompts, self.speakers, 1, part_seed(self.seed, 7))

    def _listen(self, trainer: Trainer, module: Watched) -> Hearing:
        """Error rate, voice (if there is an encoder) and reward of each utterance; the same on every rank."""
        requests = self.requests()[trainer.global_rank :: trainer.world_size]
        failures = Failures(len(requests), self.max_failed_share)
        with whole(module.policy):
            heard = speak_and_judge(module.policy, module, requests, self.batch_rows, self.judge, failures)
        spoken = [one for one in heard if one.speech and one.verdict is not None]
        found: tuple[dict[str, Any], ...] = (
            {one.id: one.verdict.cer for one in heard if one.verdict is not None},
            {one.id: one.prompt.id for one in heard},
            self._vectors(module, spoken),
            self._rewards(module, spoken),
            {one.id: "" for one in heard if not one.speech},
            failures.reasons,
        )
        pairs = zip(*gathered(found), strict=True)
        found = tuple({name: value for part in parts for name, value in part.items()} for parts in pairs)
        errors, sentences, vectors, rewards, silent, failed = (dict(sorted(part.items())) for part in found)
        reward = sum(rewards.values()) / len(rewards) if rewards else None
        return Hearing(trainer.global_step, errors, sentences, reward, vectors, len(silent), len(failed))

    @torch.no_grad()
    def _rewards(self, module: Watched, spoken: Sequence[Candidate]) -> dict[str, float]:
        """What the reward model says of the same utterances; nothing without one."""
        if Part.REWARD not in module.parts:
            return {}
        model = module.parts.reward
        found: dict[str, float] = {}
        for start in range(0, len(spoken), self.batch_rows):
            some = spoken[start : start + self.batch_rows]
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
        if self.encoder is None or not spoken:
            return {}
        if module.vocoder is None:
            raise ValueError("speakers_encoder hears sound: the recipe must set model.vocoder")
        return voice_vectors(self.encoder, module.vocoder, spoken)

    def reason(self, patience: int) -> str:
        """Why to stop, if each of the last hearings heard harm; empty if not."""
        heard = [self._harm(one) for one in self.heard[1:][-patience:]]
        return heard[-1] if len(heard) == patience and all(heard) else ""

    def _harm(self, one: Hearing) -> str:
        return harm(self.heard[0], one, self.cer_rise, self.similarity_fall)

    def _keep_if_best(self, trainer: Trainer) -> None:
        """Save the weights if they have just been heard better than ever."""
        if not self.stop or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        first = self.heard[0]
        well = [one for one in self.heard if one is first or not self._harm(one)]
        if min(well, key=lambda one: (rise(first, one).value, -one.step)) is self.heard[-1]:
            self.best.keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the last step if something else has ended the training at it."""
        if trainer.global_step != self.heard[-1].step and not self.stopped:
            self._hear(trainer, cast("Watched", pl_module), last=True)
            save_again(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep no weights but the best, now that the last checkpoint refers to these."""
        self.best.clean(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What has been heard so far, so that a resumed run compares with the same start."""
        heard = [one.to_state() for one in self.heard]
        return {"heard": heard, "best": self.best.to_state(), "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.heard = [Hearing(**one) for one in state_dict["heard"]]
        self.best.from_state(state_dict["best"])
        self.stopped = state_dict["stopped"]


class CollapseGuard(Callback):
    """Watches the rewards themselves: when all are the same, or all are certain, they teach nothing more.

    Args:
        saturated: share of saturated rewards from which on they have collapsed.
        entropy_nats: entropy of the histogram of rewards, in nats, under which they have collapsed; at most ln 5.
        patience: number of logs in a row that must say so.
        stop: whether to stop the training; otherwise only warn.
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
        """What was stopped once does not continue when the command is given again."""
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
        """Continue from there."""
        self.bad, self._seen = state_dict["bad"], state_dict["seen"]


def histogram_entropy(shares: Sequence[float]) -> float:
    """Entropy of a histogram in nats.

    >>> round(histogram_entropy([0.5, 0.5, 0.0]), 3)
    0.693
    """
    total = sum(shares)
    return -sum(share / total * math.log(share / total) for share in shares if share > 0) if total > 0 else 0.0
