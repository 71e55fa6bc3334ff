# SPDX-License-Identifier: Apache-2.0
"""The promise that a training ends no worse than it began: otherwise the models of the directories are kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge, Reading
from tts_align.evaluation.listening import speak_and_judge
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import evenly_spread, utterance_requests
from tts_align.models.base.device import evaluation_mode
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder
from tts_align.training.callbacks.watched import Watched, models_of, planned_end
from tts_align.training.means import log_numbers
from tts_align.utils.distributed import gathered
from tts_align.utils.messages import say
from tts_align.utils.seeds import part_seed
from tts_align.utils.sharded import whole

log = logging.getLogger(__name__)
Numbers = Mapping[str, float]


class KeepBase(Callback):
    """Hears the base as it ships beside what the training has made of it, at the end, and keeps the better of the two.

    The base is what the recipe's directories hold, heard through a vocoder of its own; the other is heard through
    ``model.vocoder``. If the character error rate is higher, or the nearest one is by more than a point of per cent
    (clarity, whatever the reading), it says so and gives every model its directory's weights again, before they are
    saved, tested or exported.

    Args:
        prompts: JSONL file of held-out sentences; demo: names an embedded one.
        judge: listener; not that of ``test``.
        vocoder: speaks the base's speech tokens.
        sentences: number of sentences that are spoken, evenly spread.
        speakers: voices, as for ``test``.
        cer_rise: tolerated rise of the mean character error rate.
        nearest_rise: tolerated rise of the mean nearest character error rate.
        seed: seed of the utterances; by default 11 plus that of the run (seed_everything).
        batch_rows: utterances at a time.
    """

    def __init__(
        self,
        prompts: str,
        judge: Judge,
        vocoder: Vocoder,
        sentences: int = 64,
        speakers: Sequence[str] = (),
        cer_rise: float = 0.0,
        nearest_rise: float = 0.01,
        seed: int | None = None,
        batch_rows: int = 128,
    ) -> None:
        super().__init__()
        if sentences < 1 or cer_rise < 0 or nearest_rise < 0:
            raise ValueError(
                "expected sentences of at least 1, cer_rise and nearest_rise of at least 0, got "
                f"{sentences}, {cer_rise} and {nearest_rise}"
            )
        self.prompts, self.judge, self.vocoder, self.sentences = prompts, judge, vocoder, sentences
        self.speakers, self.cer_rise, self.nearest_rise = speakers, cer_rise, nearest_rise
        self.seed, self.batch_rows = seed, batch_rows
        self.found: dict[str, dict[str, float]] = {}
        self.kept = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be kept, before anything is trained.

        Raises:
            ValueError: a model has no directory, the listener is the judge of the test, or there is no vocoder.
        """
        module = cast("Watched", pl_module)
        new = [name for name in models_of(module) if _directory(models_of(module)[name]) is None and name != "reward"]
        if new:
            raise ValueError(
                f"KeepBase has no base to keep: the recipe must name model.{new[0]}'s directory, or leave KeepBase out"
            )
        if module.vocoder is None:
            raise ValueError("KeepBase hears the trained models through model.vocoder: the recipe must set it")
        if module.judge is not None and self.judge.same_as(module.judge):
            raise ValueError("KeepBase's judge is the same as model.judge, which tests: give it another one")
        for one in (self.judge, self.vocoder):
            one.to(module.device).requires_grad_(False).eval()
        self.vocoder.bind(module.policy)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Decide after the last step, before anything else is done with the weights."""
        if not self.found and (planned_end(trainer) or trainer.should_stop):
            self._decide(trainer, cast("Watched", pl_module))

    def _decide(self, trainer: Trainer, module: Watched) -> None:
        base = module.policy.rebuild().to(module.device).requires_grad_(False).eval()
        with module.objective.merged(module.policy, module.parts):
            trained = self._heard(trainer, module, module.policy, cast("Vocoder", module.vocoder))
        shipped = self._heard(trainer, module, base, self.vocoder)
        self.found = {"trained": trained, "base": shipped}
        numbers = {f"kept/{who}_{name}": value for who, one in self.found.items() for name, value in one.items()}
        log_numbers(trainer, numbers)
        said = "; ".join(
            f"{who}: {100 * found['accuracy']:.1f} % read right, CER {100 * found['cer']:.2f} %, nearest CER "
            f"{100 * found['nearest_cer']:.2f} %"
            for who, found in self.found.items()
        )
        say(f"on held-out sentences, {said}")
        self.kept = self.reason(trained, shipped)
        if self.kept:
            _restore(module)
            log.warning(
                "step %d: %s; the base's models are kept, as its directories hold them", trainer.global_step, self.kept
            )

    def reason(self, trained: Numbers, shipped: Numbers) -> str:
        """Why the base is kept; empty if it is not."""
        for name, what, rise in (
            ("cer", "character error rate", self.cer_rise),
            ("nearest_cer", "nearest character error rate", self.nearest_rise),
        ):
            if trained[name] > shipped[name] + rise:
                return f"the training ends worse than it began, its {what} is {trained[name]:.4f} ({shipped[name]:.4f})"
        return ""

    def _heard(self, trainer: Trainer, module: Watched, policy: CodecLM, vocoder: Vocoder) -> dict[str, float]:
        """Means over the same held-out utterances; the same on every rank."""
        prompts = evenly_spread(read_prompts(self.prompts), self.sentences)
        requests = utterance_requests(prompts, self.speakers, 1, part_seed(self.seed, 11))
        mine = requests[trainer.global_rank :: trainer.world_size]
        parts = Parts(policy, self.judge, module.sampling, vocoder)
        with evaluation_mode(policy), whole(policy):
            heard: list[Candidate] = speak_and_judge(policy, parts, mine, self.batch_rows)
        verdicts = [one.verdict for part in gathered(heard) for one in part if one.verdict is not None]
        right = (Reading.RIGHT, Reading.UNMARKED)
        return {
            "accuracy": sum(one.reading in right for one in verdicts) / len(verdicts),
            "cer": sum(one.cer for one in verdicts) / len(verdicts),
            "nearest_cer": sum(one.nearest_cer for one in verdicts) / len(verdicts),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was decided."""
        return {"found": self.found, "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Decided once is decided."""
        self.found, self.kept = dict(state_dict["found"]), state_dict["kept"]


def _directory(model: nn.Module) -> Any:
    return getattr(model, "directory", None)


@torch.no_grad()
def _restore(module: Watched) -> None:
    """Give every model that has a directory the weights that it holds."""
    for model in models_of(module).values():
        place = _directory(model)
        if place is not None:
            again = model.rebuild() if isinstance(model, CodecLM) else type(model)(directory=str(place))
            model.load_state_dict(again.state_dict())
