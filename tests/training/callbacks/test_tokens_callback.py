# SPDX-License-Identifier: Apache-2.0
"""How speech tokens are used, counted at every validation; warnings when they collapse; the parts that are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Memory, make_trainer
from tiny_sound import VOICES, Tones, build_e2e, spoken_rows

from tts_align.data.manifest import write_manifest
from tts_align.evaluation.metrics.tokens import TokenCounts
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.reward.model import RewardModel
from tts_align.objectives.e2e import E2E
from tts_align.training.callbacks.tokens import KeepParts, TokenStatistics

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
)


def fit(tiny_policy: Path, folder: Path, stage: int = 1, **options: Any) -> Any:
    train = str(write_manifest(spoken_rows(sentences=8), folder / "train.jsonl"))
    held_out = str(write_manifest(spoken_rows(sentences=5, seed=7), folder / "held_out.jsonl"))
    objective = E2E(stage=stage, voices=VOICES)  # type: ignore[arg-type]
    module, data = build_e2e(objective, tiny_policy, train, vocoder=Tones(), validation=held_out, rows_per_step=4)
    trainer = make_trainer(folder, **options)
    trainer.fit(module, datamodule=data)
    return trainer, module, data


def test_every_validation_counts_the_codes_of_the_held_out_rows(tiny_policy: Path, tmp_path: Path):
    trainer, module, data = fit(tiny_policy, tmp_path, max_epochs=2)
    logger = trainer.logger
    assert isinstance(logger, Memory)
    logged = [metrics for _, metrics in logger.logged if "val/token_entropy_bits" in metrics]
    assert len(logged) == 2
    heard = data._splits["validation"].examples.recordings
    with torch.no_grad():
        made = [
            module.trained_tokenizer(one.features.float()[None], torch.tensor([len(one.features)])) for one in heard
        ]
    counts = TokenCounts.none(20)
    for one in made:
        counts = counts + TokenCounts.of(one.tokens, one.mask, 20)
    assert logged[-1] == {
        "val/token_entropy_bits": pytest.approx(float(counts.entropy_bits())),
        "val/token_information_bits": pytest.approx(float(counts.mutual_information_bits())),
        "val/token_used_share": pytest.approx(float(counts.used_share())),
    }
    assert not module.trained_tokenizer._forward_hooks
    kinds = [type(one) for one in trainer.callbacks]
    assert kinds.count(TokenStatistics) == kinds.count(KeepParts) == 1


def test_it_warns_of_a_collapse(caplog: pytest.LogCaptureFixture):
    watch = TokenStatistics(entropy_share=0.5, fall=0.7)
    fine = {"entropy_bits": 4.0, "information_bits": 1.0, "used_share": 0.9}
    assert watch._reasons(fine, 4.3) == []
    watch.highest = dict(fine)
    assert watch._reasons({**fine, "used_share": 0.7}, 4.3) == []
    assert watch._reasons({**fine, "used_share": 0.6}, 4.3) == ["the share of the codebook in use fell from 0.9 to 0.6"]
    assert watch._reasons({**fine, "entropy_bits": 2.0}, 4.3) == [
        "their entropy is 2.00 bits where 4.30 are possible",
        "entropy fell from 4 to 2",
    ]
    again = TokenStatistics()
    again.load_state_dict(watch.state_dict())
    assert again.highest == fine
    with pytest.raises(ValueError, match=r"lie in 0\.\.1"):
        TokenStatistics(fall=2.0)


def test_the_warning_is_said(tiny_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    train = str(write_manifest(spoken_rows(sentences=6), tmp_path / "train.jsonl"))
    module, data = build_e2e(
        E2E(stage=2, voices=VOICES), tiny_policy, train, vocoder=Tones(), validation=train, rows_per_step=3
    )
    with torch.no_grad():
        module.parts["tokenizer"].tokenizer.down.weight.zero_()  # one token for everything
    make_trainer(tmp_path, max_steps=1, max_epochs=-1, val_check_interval=1).fit(module, datamodule=data)
    assert "the speech tokens collapse: their entropy is 0.00 bits where 4.32 are possible" in caplog.text


def test_parts_stand_alone(tiny_policy: Path, tmp_path: Path):
    _, module, _ = fit(tiny_policy, tmp_path, max_steps=1, max_epochs=-1)
    folder = tmp_path / "parts"
    reward = RewardModel(str(folder / "reward"))
    speech_tokens = torch.arange(6)[None]
    image = module.objective.bridges["reward"](module.trained_tokenizer.codebook())
    torch.testing.assert_close(reward.embed(speech_tokens)[0], image[:6])
    assert isinstance(module.trained_tokenizer, MelFSQ)
    from tts_align.models.policy.qwen2 import Qwen2CodecLM

    policy = Qwen2CodecLM(str(folder / "policy"))
    image = module.objective.bridges["policy"](module.trained_tokenizer.codebook())
    torch.testing.assert_close(policy.table.weight[:20], module.policy.table.weight[:20] + image)
    torch.testing.assert_close(policy.table.weight[20:], module.policy.table.weight[20:])
