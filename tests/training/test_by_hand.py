# SPDX-License-Identifier: Apache-2.0
"""Three lines of Python do what a recipe does: what the data bring follows the objective."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from tiny import Memory, make_trainer, save_log_ratios, save_recipe
from tiny_sound import VOICES, build_e2e, save_recordings, spoken_rows

import tts_align
from tts_align import DPO, E2E, KTO, SFT, TKTO, AlignData, AlignModule, Objective, Qwen2CodecLM, RowsWanted
from tts_align.batch import Batch, Reads
from tts_align.training.contrast import Contrast

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")]
SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Seen(AlignModule):
    """Keeps its micro-batches."""

    def training_step(self, batch: Batch, number: int) -> Any:
        self.seen = [*getattr(self, "seen", ()), batch]
        return super().training_step(batch, number)


def by_hand(objective: Objective, policy: Path, rows: str, folder: Path, **options: Any) -> tuple[Seen, list[Any]]:
    """The three lines of the documentation; gives the module and what it logged."""
    seed_everything(0, verbose=False)
    module = Seen(objective, Qwen2CodecLM(str(policy)), optimizer=SGD, **options)
    data = AlignData(rows, rows_per_step=4)
    trainer = make_trainer(folder, gradient_clip_val=1.0)
    trainer.fit(module, data)
    assert isinstance(trainer.logger, Memory)
    return module, trainer.logger.logged


def losses(logged: list[tuple[int, dict[str, float]]]) -> list[float]:
    return [numbers["train/loss"] for _, numbers in logged if "train/loss" in numbers]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_it_is_what_the_recipe_does(
    name: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch
):
    """The data are labelled rows: taken for good speech, they would be half as many for DPO, and another loss."""
    kinds = {"sft": SFT, "dpo": DPO, "kto": KTO}
    monkeypatch.chdir(tmp_path)
    logged: list[Any] = []
    monkeypatch.setattr(
        "lightning.pytorch.loggers.TensorBoardLogger.log_metrics",
        lambda _, metrics, step=None: logged.append((step, dict(metrics))),
    )
    recipe = save_recipe(tmp_path, name, tiny_policy, tiny_rows)
    # The parser carries the weight decay of the default optimizer, AdamW, over to whatever the recipe names.
    fitted = tts_align.fit(recipe, model__optimizer__init_args__weight_decay=0.0)
    module, own = by_hand(kinds[name](), tiny_policy, tiny_rows, tmp_path / "own")
    assert len(own) > 1
    assert losses(own) == losses(logged)
    for ours, theirs in zip(module.parameters(), fitted.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dpo_reads_pairs(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, _ = by_hand(DPO(), tiny_policy, tiny_rows, tmp_path)
    assert sum(batch.rows.count for batch in module.seen) == 16  # eight pairs
    for batch in module.seen:
        good, bad = batch.desirable.chunk(2)
        assert good.all()
        assert not bad.any()
    assert module.trainer.datamodule.wants == RowsWanted(Reads.PAIR)


def test_kto_gets_speech_of_other_sentences(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, _ = by_hand(KTO(), tiny_policy, tiny_rows, tmp_path)
    assert all(batch.mismatched for batch in module.seen)


def test_tkto_reads_labelled_rows(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Whoever prepares the data before they are attached says for whom."""
    policy, data = Qwen2CodecLM(str(tiny_policy)), AlignData(tiny_rows, rows_per_step=4)
    data.prepare(policy, TKTO().rows_wanted)
    contrast = Contrast(str(save_log_ratios(data, policy, tmp_path).path))
    module, logged = by_hand(TKTO(), tiny_policy, tiny_rows, tmp_path, contrast=contrast)
    assert sum(batch.rows.count for batch in module.seen) == 16
    assert len(losses(logged)) == 4


def test_e2e_gets_sound(tmp_path: Path, tiny_policy: Path):
    rows = save_recordings(tmp_path, spoken_rows(sentences=4))
    module, data = build_e2e(E2E(stage=1, voices=VOICES), tiny_policy, rows, rows_per_step=4)
    make_trainer(tmp_path).fit(module, data)
    assert data.wants.sound
    assert data.wants.utterances


def test_a_contradiction_is_refused(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module = AlignModule(DPO(), Qwen2CodecLM(str(tiny_policy)), optimizer=SGD)
    data = AlignData(tiny_rows, rows_per_step=4, wants=RowsWanted(Reads.LABELLED))
    with pytest.raises(ValueError, match=r"made for RowsWanted\(reads=.*labelled.*but the objective wants .*pair"):
        make_trainer(tmp_path).fit(module, data)
    same = AlignData(tiny_rows, rows_per_step=4, wants=DPO().rows_wanted)
    make_trainer(tmp_path).fit(module, same)


def test_without_a_module_somebody_must_say(tiny_policy: Path, tiny_rows: str):
    data = AlignData(tiny_rows, rows_per_step=4)
    with pytest.raises(ValueError, match="nothing says which rows to read: attach the data to the trainer"):
        data.prepare(Qwen2CodecLM(str(tiny_policy)))


@pytest.mark.parametrize("objective", [SFT(), DPO(), KTO(), TKTO(), E2E()])
def test_what_is_wanted_is_what_the_objective_says(objective: Objective):
    wants = objective.rows_wanted
    assert wants == RowsWanted(
        objective.reads, objective.wants_mismatched, objective.wants_utterances, objective.wants_sound
    )
    assert wants.readers[Reads.PAIR] == ("dpo",)
    assert {"kto", "tkto"} <= set(wants.readers[Reads.LABELLED])
