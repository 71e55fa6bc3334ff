# SPDX-License-Identifier: Apache-2.0
"""The data module under a real trainer: resume, ranks, limits."""

import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tts_align.batch import Batch, Reads, RowsWanted
from tts_align.data.datamodule import AlignData
from tts_align.models.base.policy import CodecLM

pytestmark = [
    # Not about our code: a loader without workers, no logger, short epochs.
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


class Recorder(lightning.LightningModule):
    """Notes the keys it sees; stops the process's training at a given micro-batch."""

    def __init__(self, policy: CodecLM, stop_after: int | None = None) -> None:
        super().__init__()
        self.policy, self.stop_after = policy, stop_after
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, ...]] = []
        self.mismatched: list[int] = []
        self.validated: list[tuple[str, ...]] = []
        self.totals: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.stop_after is not None and len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(batch.rows.keys)
        self.mismatched.append(len(batch.mismatched))
        self.totals.append(batch.totals.rows)
        return self.weight * batch.rows.count

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch.rows.keys)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # As schedulers do: it makes Lightning ask for the loader before it has restored where training stood.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 1.0)


def trainer(folder: Path, save: dict[str, Any] | None = None, **options: Any) -> lightning.Trainer:
    saving = [ModelCheckpoint(folder / "checkpoints", filename="{step}", save_top_k=-1, **save)] if save else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(
        default_root_dir=folder, callbacks=saving, enable_checkpointing=bool(save), **(quiet | options)
    )


def fit(policy: CodecLM, data: AlignData, stop_after: int | None = None, ckpt: Path | None = None, **options: Any):
    module = Recorder(policy, stop_after)
    run = trainer(**options)
    try:
        run.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    except SystemExit:
        assert stop_after is not None
    return module


def labelled(path: str, **knobs: Any) -> AlignData:
    return AlignData(path, wants=RowsWanted(Reads.LABELLED, mismatched=True), **({"rows_per_step": 8} | knobs))


LIMITS = [{"max_epochs": 2}, {"max_steps": 10, "max_epochs": -1}]


@pytest.mark.parametrize("limit", LIMITS, ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("save", "extra", "knobs"),
    [
        ({"every_n_train_steps": 1}, {}, {}),
        ({"every_n_train_steps": 1}, {"reload_dataloaders_every_n_epochs": 1}, {}),
        ({"every_n_train_steps": 2}, {"limit_train_batches": 8}, {"tokens_per_step": 200, "rows_per_step": None}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}, {}),
    ],
    ids=["plain", "reload", "limit", "epoch end"],
)
def test_resume_sees_the_same_rows(limit, save, extra, knobs, policy, manifest, tmp_path):
    path = manifest(40)
    options = {"accumulate_grad_batches": 2, "folder": tmp_path, "save": save, **limit, **extra}
    whole = fit(policy, labelled(path, **knobs), **options)
    kept = (tmp_path / "checkpoints").rename(tmp_path / "kept")
    checkpoints = sorted(kept.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        step = int(checkpoint.stem.split("=")[1])
        if step not in (4, 5):
            continue  # four or five steps are an epoch: before its end and at it is enough
        rest = fit(policy, labelled(path, **knobs), ckpt=checkpoint, **options)
        assert rest.seen == whole.seen[2 * step :], checkpoint
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)


def test_interrupted_inside_a_step_the_step_begins_again(policy, manifest, tmp_path):
    """The checkpoint of an interruption has lost the gradients of the first micro-batches of the step."""
    path = manifest(40)
    options = {"accumulate_grad_batches": 4, "folder": tmp_path, "max_epochs": 2}
    whole = fit(policy, labelled(path), **options)
    saved = tmp_path / "inside.ckpt"

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if len(module.seen) == 22:  # two micro-batches into the sixth step
                trainer.save_checkpoint(saved)

    run = trainer(**options)
    run.callbacks.append(Save())
    run.fit(Recorder(policy), datamodule=labelled(path))
    rest = fit(policy, labelled(path), ckpt=saved, **options)
    assert rest.seen == whole.seen[20:]
    assert rest.weight == whole.weight
    assert [count for count in rest.mismatched if count] == [4] * 5


def test_workers_change_nothing(policy, manifest, tmp_path):
    path = manifest(24)
    options = {"folder": tmp_path, "max_epochs": 2, "save": {"every_n_train_steps": 1}}
    alone = fit(policy, labelled(path), **options)
    kept = (tmp_path / "checkpoints").rename(tmp_path / "kept")
    helped = fit(policy, labelled(path, num_workers=1), ckpt=kept / "step=4.ckpt", **options)
    assert helped.seen == alone.seen[4:]


def test_other_data_cannot_be_resumed_on(policy, manifest, tmp_path):
    options = {"folder": tmp_path, "max_epochs": 2, "save": {"every_n_train_steps": 1}}
    fit(policy, labelled(manifest(24)), **options)
    kept = (tmp_path / "checkpoints").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"data\.rows_per_step was 8, is 6; rows and their layout was .*Set it back"):
        fit(policy, labelled(manifest(25), rows_per_step=6), ckpt=kept / "step=4.ckpt", **options)


def test_rows_that_were_labelled_anew_cannot_be_resumed_on(policy, manifest, tmp_path):
    options = {"folder": tmp_path, "max_epochs": 2, "save": {"every_n_train_steps": 1}}
    path = Path(manifest(24))
    fit(policy, labelled(str(path)), **options)
    kept = (tmp_path / "checkpoints").rename(tmp_path / "kept")
    first, rest = path.read_text().split("\n", 1)
    path.write_text(first.replace("true", "no").replace("false", "true").replace("no", "false") + "\n" + rest)
    with pytest.raises(ValueError, match=r"labels of the rows was \w+, is \w+\. Set it back"):
        fit(policy, labelled(str(path)), ckpt=kept / "step=4.ckpt", **options)


def test_every_row_once_and_again_in_another_order(policy, manifest, tmp_path):
    data = labelled(manifest(40), validation=manifest(20, seed=1))
    module = fit(policy, data, folder=tmp_path, max_epochs=2, accumulate_grad_batches=2, num_sanity_val_steps=0)
    epochs = [sum(module.seen[:10], ()), sum(module.seen[10:], ())]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(data._splits["train"].keys)
    assert epochs[0] != epochs[1]
    assert module.mismatched == [2, 0] * 10
    assert module.totals == [8] * 20
    assert module.validated[:2] == module.validated[2:]
    assert sorted(sum(module.validated[:2], ())) == sorted(data._splits["validation"].keys)


def test_rows_are_all_that_will_be_scored(policy, manifest):
    data = labelled(manifest(40), validation=manifest(20, seed=1), bistream_share=0.5)
    data.prepare(policy)
    found, sources = data.rows(), data.sources()
    assert len(data.rows("train")) == 80  # each row and its mismatched twin
    assert len(found) == 120
    assert all(policy.layout.key(row) == key for key, row in found.items())
    assert len(sources) == 60
    assert all(found[key].speech == source.sound.speech for key, source in sources.items())
    assert any(row.bistream for row in found.values())


def test_flipped_labels_keep_rows_and_partners(policy, manifest):
    plain, flipped = labelled(manifest(40)), labelled(manifest(40), flip_labels=True)
    for data in (plain, flipped):
        data.prepare(policy)
    assert plain.rows() == flipped.rows()
    ours, theirs = (data._splits["train"].examples.desirable for data in (plain, flipped))
    assert (ours == ~theirs).all()


def test_epoch_that_ends_inside_a_step_is_refused(policy, manifest, tmp_path):
    odd = {"accumulate_grad_batches": 2, "limit_train_batches": 3}
    with pytest.raises(ValueError, match=r"multiple of trainer\.accumulate_grad_batches, 2"):
        fit(policy, labelled(manifest()), folder=tmp_path, max_epochs=1, **odd)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"rows_per_step": None}, "exactly one of data.rows_per_step and data.tokens_per_step"),
        ({"bistream_share": 1.5}, "data.bistream_share must lie in 0..1"),
        ({"max_rows": 0}, "data.max_rows must be at least 1"),
    ],
)
def test_knobs_that_cannot_work_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        labelled("nowhere.jsonl", **knobs)


def test_max_rows(policy, manifest):
    data = labelled(manifest(40), max_rows=16)
    data.prepare(policy)
    assert len(data.sources()) == 16
    assert data.steps_per_epoch == 2


def test_two_processes_share_the_epoch(policy, manifest, tmp_path):
    """Real ranks: together they see every row once, and each step holds the rows that one process would see in it."""
    path = manifest(36)
    alone = fit(policy, labelled(path), folder=tmp_path, max_epochs=2)

    class Write(lightning.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            torch.save(module.seen, tmp_path / f"rank{trainer.global_rank}.pt")

    run = trainer(tmp_path, devices=2, strategy="ddp_fork", max_epochs=2)
    run.callbacks.append(Write())
    run.fit(Recorder(policy), datamodule=labelled(path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    together = [sorted(one + other) for one, other in zip(*ranks, strict=True)]
    assert together == [sorted(step) for step in alone.seen]
