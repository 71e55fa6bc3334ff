# SPDX-License-Identifier: Apache-2.0
"""What is said of end-to-end training from before its first step on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_trainer
from tiny_sound import VOICES, Tones, build_e2e, spoken_rows

from tts_align.data.manifest import write_manifest
from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.models.base.vocoder import Vocoder
from tts_align.objectives.e2e import E2E
from tts_align.training.callbacks.reconstruction import ReconstructionWatch

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:The '.*' does not have many workers",
        "ignore:The number of training batches .* is smaller than the logging interval",
    ),
]


class Counting(Judge):
    """Error rate: a hundredth of the number of samples of the first utterance's sound, so that sound must arrive."""

    needs_audio = True

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        assert len(samples) == len(expected)
        return [Verdict("", Reading.NEITHER, len(one.waveform) / 100, 0.0) for one in samples]


class Lengths(Vocoder):
    """As many samples as there are speech tokens, and notes whose flow it was given."""

    sample_rate = 4000

    def attach(self, flow: Any, tokenizer: Any, voices: Sequence[str]) -> None:
        self.given = flow, tokenizer, tuple(voices)

    def speak(self, speech: Sequence[torch.Tensor], speakers: Sequence[str]) -> list[torch.Tensor]:
        assert set(speakers) <= set(VOICES)
        return [torch.zeros(len(one)) for one in speech]


@pytest.mark.parametrize("stage", [1, 2])
def test_numbers_are_known_before_the_first_step_and_at_the_end(
    stage: int, tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    manifest = str(write_manifest(spoken_rows(sentences=6), tmp_path / "rows.jsonl"))
    objective = E2E(stage=stage, voices=VOICES)  # type: ignore[arg-type]
    module, data = build_e2e(objective, tiny_policy, manifest, vocoder=Tones(), validation=manifest, rows_per_step=4)
    vocoder = Lengths()
    watch = ReconstructionWatch(Counting(), vocoder, every_steps=2, rows=6)
    trainer = make_trainer(tmp_path, watch, max_steps=3, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    assert list(watch.steps) == [0, 2, 3]
    assert vocoder.given == (module.parts["flow"], module.parts["tokenizer"], VOICES)
    first, *_, last = watch.steps.values()
    assert first["watch/tokens_unchanged"] == 1
    assert (last["watch/tokens_unchanged"] < 1) == (stage == 1)
    assert last["watch/lm"] < first["watch/lm"]
    # Typed again from the rows themselves.
    rows, counts, nats, targets = 0, 0, 0.0, 0
    module.eval()
    for batch in data.val_dataloader():
        with torch.no_grad():
            step = module.score(batch)
        counts += int(step.recordings.tokenised.mask.sum())
        nats, targets = nats - step.policy.logp.sum().item(), targets + int(step.policy.mask.sum())
        rows += batch.rows.count
        if rows >= 6:
            break
    assert last["watch/reconstruction_cer"] == pytest.approx(counts / rows / 100)
    assert last["watch/lm"] == pytest.approx(nats / targets, rel=1e-5)
    said = capsys.readouterr().out
    assert "step 0: LM loss" in said
    assert "100 % of the speech tokens unchanged" in said


def test_what_cannot_be_heard(tiny_policy: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="at least 1"):
        ReconstructionWatch(rows=0)
    with pytest.raises(ValueError, match="judge and vocoder"):
        ReconstructionWatch(Counting())
    manifest = str(write_manifest(spoken_rows(sentences=6), tmp_path / "rows.jsonl"))
    module, data = build_e2e(E2E(stage=2, voices=VOICES), tiny_policy, manifest, vocoder=Tones())
    with pytest.raises(ValueError, match=r"data\.validation"):
        make_trainer(tmp_path, ReconstructionWatch(), max_steps=1, max_epochs=-1).fit(module, datamodule=data)
