# SPDX-License-Identifier: Apache-2.0
"""One test: what speaks before and after the training, what listens, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tts_align.data.datamodule import AlignData
from tts_align.evaluation.html.report import write_folder_report
from tts_align.evaluation.reward import RewardEvaluation
from tts_align.evaluation.speech import Evaluation, TestSettings
from tts_align.models.base.policy import CodecLM
from tts_align.objectives.base import Part
from tts_align.training.cache import TokenCache
from tts_align.training.callbacks import contrast_figures
from tts_align.training.callbacks.watched import Watched
from tts_align.training.forgetting import probe_forgetting


@runtime_checkable
class Tested(Watched, Protocol):
    """An ``AlignModule`` as its test sees it."""

    test_settings: TestSettings | None


class Testing:
    """One test of a module on its trainer: of its policy, or of its reward model if nothing else is trained.

    Args:
        module: whose models are tested.
        trainer: which rank of how many this is, and where the run lives.
        datamodule: its held-out rows are those that a reward model is tested on.

    Raises:
        ValueError: the recipe lacks what a test needs.
    """

    def __init__(self, module: Tested, trainer: Trainer, datamodule: AlignData | None) -> None:
        self.module, self.trainer, self.datamodule = module, trainer, datamodule
        self.evaluation: Evaluation | RewardEvaluation
        self.loader: DataLoader[Any]
        if module.objective.trains_reward_only:
            assert datamodule is not None
            self.loader = datamodule.held_out(module.policy, module.objective.rows_wanted)
            self.evaluation = RewardEvaluation(module.parts.reward)
            return
        if module.test_settings is None or module.judge is None:
            raise ValueError("nothing to test with: the recipe must set model.test.prompts and model.judge")
        self.evaluation = Evaluation(module, self._before(), module.test_settings)
        self.loader = self.evaluation.loader(trainer.global_rank, trainer.world_size)

    def _before(self) -> CodecLM | None:
        """The policy before the training; ``None`` when it is the one without its adapter, or there was none."""
        module = self.module
        if Part.REFERENCE in module.parts:
            return module.parts.reference
        before = None if module.policy.adapted else module.objective.initial_policy(module.policy)
        return None if before is None else before.requires_grad_(False).eval()

    def start(self) -> None:
        """What is tested are models on their own."""
        self._merged = self.module.objective.merged(self.module.policy, self.module.parts)
        self._merged.__enter__()
        if isinstance(self.evaluation, Evaluation):
            self.evaluation.begin(Path(self.trainer.default_root_dir))

    def end(self) -> None:
        """Put back what was learnt besides."""
        self._merged.__exit__(None, None, None)

    def finish(self, cache: TokenCache | None) -> None:
        """Gather all ranks; the first writes table and audio, and draws.

        Args:
            cache: log-ratios of the contrastive pair, if the training had any.
        """
        run, first = Path(self.trainer.default_root_dir), self.trainer.is_global_zero
        self.evaluation.finish(run, first)
        if not isinstance(self.evaluation, Evaluation):
            return
        probe_forgetting(self.evaluation, self.loader.dataset, run, self.trainer)  # type: ignore[arg-type]
        if first:
            contrast_figures.draw(run, cache, self.datamodule, self.module.policy, self.module.objective)
            write_folder_report(run)
