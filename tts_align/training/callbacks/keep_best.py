# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint to keep: the policy speaks a few dev sentences while it trains, and the best one is chosen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge, Reading
from tts_align.evaluation.listening import MAX_FAILED_SHARE, Failures, speak_and_judge
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import UtteranceRequest, evenly_spread, utterance_requests
from tts_align.training.callbacks.best_weights import BestWeights, KeptWeights, save_again
from tts_align.training.callbacks.hearings import prepare_listener
from tts_align.training.callbacks.watched import Watched
from tts_align.training.run import Run
from tts_align.utils.distributed import gathered
from tts_align.utils.files import write_json
from tts_align.utils.readers import load_tensors
from tts_align.utils.seeds import part_seed
from tts_align.utils.sharded import is_sharded, whole

log = logging.getLogger(__name__)
Metric = Literal["wrong_readings", "nearest_cer", "cer"]


@dataclass(frozen=True)
class DevHearing:
    """What was heard of the dev sentences at one step; the same on every rank.

    Args:
        step: optimiser steps done by then.
        wrong_readings: share of the utterances with a marked word whose reading was wrong; NaN without any.
        nearest_cer: mean character error rate against the nearest reading.
        cer: mean character error rate against the right reading.
        judged: utterances with a verdict.
        failed: utterances that vocoder or judge failed on; they are in none of the numbers.
        averaged: whether it was the mean of the last weights that spoke.
    """

    step: int
    wrong_readings: float
    nearest_cer: float
    cer: float
    judged: int
    failed: int = 0
    averaged: bool = False

    @property
    def numbers(self) -> dict[str, float]:
        """What is logged of it."""
        names = ("wrong_readings", "nearest_cer", "cer", "failed")
        found = {f"dev/{name}": float(getattr(self, name)) for name in names}
        return {name: value for name, value in found.items() if value == value}  # without NaN

    @classmethod
    def of(cls, step: int, heard: Iterable[Mapping[str, Any]], failed: int, averaged: bool) -> DevHearing:
        """Means of what the utterances are like, whichever process heard them."""
        rows = sorted(heard, key=lambda one: str(one["id"]))
        marked = [one for one in rows if one["reading"] != Reading.UNMARKED]
        return cls(
            step=step,
            wrong_readings=_mean([float(one["reading"] == Reading.WRONG) for one in marked]),
            nearest_cer=_mean([one["nearest_cer"] for one in rows]),
            cer=_mean([one["cer"] for one in rows]),
            judged=len(rows),
            failed=failed,
            averaged=averaged,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def best_of(heard: Sequence[DevHearing], metric: Metric, cer_tolerance: float) -> DevHearing:
    """The best hearing: lowest in the metric among those that are as intelligible as the first, the earliest of equals.

    Args:
        heard: at least one; the first is from before the training and always counts.
        metric: number that is to be low; of equals the lower nearest error rate decides.
        cer_tolerance: by how much the nearest error rate may be above that of the first.
    """
    highest = heard[0].nearest_cer + cer_tolerance
    clear = [one for one in heard if one is heard[0] or one.nearest_cer <= highest]
    return min(clear, key=lambda one: (getattr(one, metric), one.nearest_cer))


class KeepBest(Callback):
    """Speaks and judges a few dev sentences while the policy trains, and keeps the checkpoint that was heard best.

    Before the first step, every ``every_steps`` and after the last it speaks the sentences, always with the same seeds.
    Best are the fewest wrong readings among the steps whose nearest character error rate is no higher than at the start
    plus a tolerance. The weights of the best step lie in ``checkpoints/chosen-STEP.ckpt``, which
    ``checkpoints/chosen.json`` names, and ``test``, ``export``, ``sample``, ``validate`` and ``predict`` use them; the
    training itself continues, and resumes, from the last ones. Logs ``dev/wrong_readings``, ``dev/nearest_cer``
    and ``dev/cer``.

    The listener must not be the judge of ``test``: who chooses the checkpoint may not grade it.

    Args:
        prompts: JSONL or text file of dev sentences; demo: names an embedded one.
        every_steps: optimiser steps between two hearings; none by default.
        every_epochs: epochs between two hearings; 1 by default if ``every_steps`` is not given.
        sentences: number of sentences that are spoken, evenly spread.
        speakers: voices, as for ``test``.
        judge: listener of this callback, used for nothing else.
        use_test_judge: listen with ``model.judge`` for want of another; what ``test`` reports is then no longer
            independent of what was chosen.
        metric: number that is to be low: wrong_readings, nearest_cer or cer.
        cer_tolerance: tolerated rise of the mean nearest character error rate since the start.
        average: number of the last hearings whose weights are averaged at the end, to be heard once more; the mean is
            chosen if it is better than all of them. 0 for no mean.
        seed: seed of the utterances; by default 9 plus that of the run (seed_everything).
        batch_rows: utterances at a time.
        max_failed_share: largest share of the utterances that vocoder or judge may fail on; see ``judge``.
    """

    def __init__(
        self,
        prompts: str,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        sentences: int = 32,
        speakers: Sequence[str] = (),
        judge: Judge | None = None,
        use_test_judge: bool = False,
        metric: Metric = "wrong_readings",
        cer_tolerance: float = 0.01,
        average: int = 0,
        seed: int | None = None,
        batch_rows: int = 128,
        max_failed_share: float = MAX_FAILED_SHARE,
    ) -> None:
        super().__init__()
        if every_steps is None and every_epochs is None:
            every_epochs = 1
        if min(sentences, batch_rows, *(one for one in (every_steps, every_epochs) if one is not None)) < 1:
            raise ValueError("KeepBest: every_steps, every_epochs, sentences and batch_rows must be at least 1")
        if cer_tolerance < 0:
            raise ValueError(f"KeepBest: cer_tolerance must not be negative, got {cer_tolerance}")
        if average < 0 or average == 1:
            raise ValueError(f"KeepBest: average must be 0, for no mean, or at least 2, got {average}")
        if judge is not None and use_test_judge:
            raise ValueError("use_test_judge has no effect: KeepBest has a judge of its own; leave one out")
        self.prompts, self.every_steps, self.every_epochs = prompts, every_steps, every_epochs
        self.sentences, self.speakers, self.judge, self.use_test_judge = sentences, speakers, judge, use_test_judge
        self.metric, self.cer_tolerance, self.average = metric, cer_tolerance, average
        self.seed, self.batch_rows, self.max_failed_share = seed, batch_rows, max_failed_share
        self.heard: list[DevHearing] = []
        self.chosen, self.averaged = BestWeights("chosen"), BestWeights("averaged")
        self.snapshots, self.steps = KeptWeights("snapshot"), list[int]()

    # --- when it listens ---

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the policy before it has moved.

        Raises:
            ValueError: there is no listener, or it is the judge of ``test``, or there is nothing to choose by.
            FileNotFoundError: the weights that a resumed run has chosen are not there any more.
        """
        module = cast("Watched", pl_module)
        if not module.objective.scores and module.trained_tokenizer is None:
            raise ValueError("KeepBest has no effect: the policy is not trained by this objective; leave it out")
        if self.average and is_sharded(module.policy):
            raise ValueError("KeepBest: average needs whole weights, and these are sharded: set average to 0")
        prepare_listener(module, self.judge, self.use_test_judge, "KeepBest")
        for kept in (self.chosen, self.averaged):
            kept.continue_here(trainer)
        self.snapshots.adopt(trainer, self.steps)
        if not self.heard:
            self._hear(trainer, module)
        self._say_which(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Hear it again when it is time."""
        step = trainer.global_step
        if not step or step == self.heard[-1].step:
            return
        epochs = trainer.current_epoch + 1
        by_epochs = self.every_epochs is not None and trainer.is_last_batch and epochs % self.every_epochs == 0
        if by_epochs or (self.every_steps is not None and step % self.every_steps == 0):
            self._hear(trainer, cast("Watched", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear the last step if nobody has, and the mean of the last weights."""
        module, heard = cast("Watched", pl_module), len(self.heard)
        if trainer.global_step != self.heard[-1].step:
            self._hear(trainer, module)
        if self.average and len(self.steps) > 1:
            self._hear_average(trainer, module)
        if len(self.heard) > heard:
            save_again(trainer)
        best = self.best
        if best is self.heard[0] and len(self.heard) > 1:
            log.warning(
                "no step was heard better than the start, by %s with a nearest error rate of at most %.3f: test, "
                "export and sample use the policy as it was before the training",
                *(self.metric, self.heard[0].nearest_cer + self.cer_tolerance),
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep no weights but those that are chosen, and what the last checkpoint refers to."""
        self.chosen.clean(trainer)
        self.averaged.clean(trainer)
        self.snapshots.remove_others(trainer, self.steps)

    # --- what it hears ---

    @property
    def best(self) -> DevHearing:
        """The hearing that was the best so far."""
        return best_of(self.heard, self.metric, self.cer_tolerance)

    def requests(self) -> list[UtteranceRequest]:
        """What is spoken at every hearing."""
        prompts = evenly_spread(read_prompts(self.prompts), self.sentences)
        return utterance_requests(prompts, self.speakers, 1, part_seed(self.seed, 9))

    def _hear(self, trainer: Trainer, module: Watched, averaged: bool = False) -> None:
        hearing = self._listen(trainer, module, averaged)
        value = getattr(hearing, self.metric)
        if value != value:
            raise ValueError(
                f"KeepBest cannot choose by {self.metric}: no utterance of {self.prompts} "
                + ("marks a word; choose by metric: nearest_cer" if hearing.judged else "was judged")
            )
        self.heard.append(hearing)
        prefix = "dev_averaged/" if averaged else "dev/"
        numbers = {name.replace("dev/", prefix): number for name, number in hearing.numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=hearing.step)
        trainer.callback_metrics.update({name: torch.tensor(number) for name, number in numbers.items()})
        if hearing.failed:
            log.warning("step %d: the listener of KeepBest failed on %d utterances", hearing.step, hearing.failed)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.best is hearing:
            (self.averaged if averaged else self.chosen).keep(trainer)
            self._say_which(trainer)
        if self.average and not averaged and hearing.step:
            self.snapshots.save(trainer, hearing.step)
            self.steps = [*self.steps, hearing.step][-self.average :]
            self.snapshots.remove_others(trainer, self.steps)

    def _listen(self, trainer: Trainer, module: Watched, averaged: bool) -> DevHearing:
        requests = self.requests()[trainer.global_rank :: trainer.world_size]
        failures = Failures(len(requests), self.max_failed_share)
        with whole(module.policy), module.objective.merged(module.policy, module.parts):
            heard = speak_and_judge(module.policy, module, requests, self.batch_rows, self.judge, failures)
        found = gathered(([_plain(one) for one in heard if one.verdict is not None], len(failures.reasons)))
        rows = [row for part, _ in found for row in part]
        return DevHearing.of(trainer.global_step, rows, sum(failed for _, failed in found), averaged)

    def _hear_average(self, trainer: Trainer, module: Watched) -> None:
        """Let the mean of the last weights speak; the module has its own again afterwards."""
        states = [self.snapshots.load(trainer, step)["state_dict"] for step in self.steps]
        mean = {name: mean_of([state[name] for state in states]) for name in states[-1]}
        # Not those of the last hearing: a guard may have given the module others since.
        now = cast("LightningModule", module).state_dict()
        own = {name: value.detach().clone() for name, value in now.items() if name in mean}
        trainer.strategy.load_model_state_dict({"state_dict": mean}, strict=False)
        try:
            self._hear(trainer, module, averaged=True)
        finally:
            trainer.strategy.load_model_state_dict({"state_dict": own}, strict=False)

    def _say_which(self, trainer: Trainer) -> None:
        """Write down which file ``test`` and the others use."""
        best = self.best
        kept = self.averaged if best.averaged else self.chosen
        if not trainer.is_global_zero or kept.step is None:
            return
        file = kept.path(trainer, kept.step)
        write_json(Run(trainer.default_root_dir).choice, {"file": file.name, "metric": self.metric, **vars(best)})

    # --- its state ---

    def state_dict(self) -> dict[str, Any]:
        """What has been heard so far, and which files belong to it."""
        return {
            "heard": [dataclasses.asdict(one) for one in self.heard],
            "chosen": self.chosen.to_state(),
            "averaged": self.averaged.to_state(),
            "snapshot": list(self.steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.heard = [DevHearing(**one) for one in state_dict["heard"]]
        self.chosen.from_state(state_dict["chosen"])
        self.averaged.from_state(state_dict["averaged"])
        self.steps = list(state_dict["snapshot"])


def _plain(one: Candidate) -> dict[str, Any]:
    assert one.verdict is not None
    verdict = one.verdict
    return {"id": one.id, "reading": str(verdict.reading), "cer": verdict.cer, "nearest_cer": verdict.nearest_cer}


def mean_of(values: Sequence[Tensor]) -> Tensor:
    """Mean of a weight's values, summed in double precision; of whole numbers, which are counters, the last one.

    >>> mean_of([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])])
    tensor([2., 4.])
    """
    last = values[-1]
    if not last.is_floating_point():
        return last
    return torch.stack([value.double() for value in values]).mean(0).to(last.dtype)


def use_chosen(trainer: Trainer, model: LightningModule) -> Path | None:
    """Give a module that has just been trained the weights that were heard best; in every process.

    Returns:
        Where they were; ``None`` if none were chosen, and the module keeps its own.
    """
    run = Run(trainer.default_root_dir)
    found = str(run.chosen) if trainer.is_global_zero and run.choice.is_file() else ""
    if not (found := trainer.strategy.broadcast(found)):
        return None
    path = Path(found)
    shared = all(gathered(path.exists()))
    own = load_tensors(path) if shared or trainer.is_global_zero else {}
    saved = own if shared else trainer.strategy.broadcast(own)
    model.load_state_dict(saved["state_dict"], strict=False)
    return path
