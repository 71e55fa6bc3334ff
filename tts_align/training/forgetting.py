# SPDX-License-Identifier: Apache-2.0
"""The forgetting probe as a part of ``test``: in the languages and voices of the test set, on every process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from tts_align.evaluation.forgetting import SENTENCES, ForgettingProbe, probe_sentences, write_forgetting
from tts_align.evaluation.speaking import UtteranceRequest
from tts_align.evaluation.speech import STAGES, Evaluation
from tts_align.utils.distributed import gathered


def probe_forgetting(
    evaluation: Evaluation, batches: Iterable[Sequence[UtteranceRequest]], run: Path, trainer: Trainer
) -> None:
    """Speak and judge general sentences after a test; the first process adds their numbers to its summary.

    Args:
        evaluation: that has ended.
        batches: what this process has spoken.
        run: directory of the run.
        trainer: which process of how many this is.
    """
    settings = evaluation.settings
    if not settings.forgetting:
        return
    asked = gathered([(one.prompt.language, one.speaker) for batch in batches for one in batch])
    known = sorted({pair for part in asked for pair in part})
    count = min(SENTENCES, settings.sentences or SENTENCES)
    sentences = probe_sentences(settings.prompts, [language for language, _ in known], count)
    if not sentences:
        if trainer.is_global_zero:
            print("general sentences: none in the language of the test set; its sentences may name it (language: ja)")
        return
    voices = list(dict.fromkeys(speaker for _, speaker in known))
    probe = ForgettingProbe(
        evaluation.module, evaluation.reference, sentences, voices, settings.seed, settings.batch_rows
    )
    voices_digest = evaluation.voices_digest(probe.requests)
    judged = probe.run(run / "test" / STAGES, voices_digest, trainer.global_rank, trainer.world_size)
    if trainer.is_global_zero:
        write_forgetting(run / "test", judged)
