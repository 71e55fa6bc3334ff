# SPDX-License-Identifier: Apache-2.0
"""One seed moves everything random, unless a part has its own; seed 0 draws what was always drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from talker import Module, make_prompts
from tiny import build, make_reward, make_rows, make_trainer, save_recipe, save_rows

from tts_align.batch import Batch, Reads, RowsWanted, Totals
from tts_align.cli.entry import run
from tts_align.cli.sample import sample
from tts_align.data.collate import MicroBatch, MicroBatches, row_seed
from tts_align.data.datamodule import AlignData
from tts_align.evaluation.candidates import read_candidates
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import utterance_requests
from tts_align.evaluation.speech import Evaluation, TestSettings
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.objectives import MTR
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.utils.seeds import drawn_for_step, part_seed, run_seed

pytestmark = pytest.mark.whole_runs

SEEDS = (0, 0, 1, 2)


@pytest.fixture
def data(tmp_path: Path, tiny_policy: Path) -> Callable[..., Any]:
    """Rows as they are drawn: a data module that has read them, and their split."""
    manifest = save_rows(tmp_path, make_rows(sentences=8, per_side=(3, 3), longest=40))

    def made(**options: Any) -> Any:
        facts = {name: options.pop(name) for name in ("reads", "mismatched", "utterances") if name in options}
        wants = RowsWanted(**{"reads": Reads.LABELLED} | facts)
        knobs: dict[str, Any] = {"wants": wants, "rows_per_step": 4, "bucket_steps": 1}
        module = AlignData(manifest, **(knobs | options))
        module.prepare(Qwen2CodecLM(str(tiny_policy)))
        return module._splits["train"]

    return made


def after(seed: int, draw: Callable[[], Any]) -> Any:
    """What is drawn in a run of this seed."""
    seed_everything(seed, verbose=False)
    return draw()


def check(draw: Callable[[], Any], always: Callable[[], Any] | None = None, own: Callable[[], Any] | None = None):
    """Other seeds, other draws; seed 0 draws as ever; a part with its own seed is not moved."""
    first, again, *others = (after(seed, draw) for seed in SEEDS)
    assert first == again
    assert all(other != first for other in others)
    assert others[0] != others[1]
    if always is not None:
        assert first == after(0, always)
    if own is not None:
        assert after(0, own) == after(1, own)


def test_shuffles(data: Any):
    check(
        lambda: [step.tolist() for step in data().plan.steps(0)],
        lambda: [step.tolist() for step in data(seed=0).plan.steps(0)],
        lambda: [step.tolist() for step in data(seed=5).plan.steps(0)],
    )


def test_pairs(data: Any):
    def pairs(**options: Any) -> list[str]:
        return [source.row.id for source in data(reads=Reads.PAIR, **options).examples.sources]

    check(pairs, lambda: pairs(seed=0), lambda: pairs(seed=5))


def test_mismatched_partners(data: Any):
    def partners(**options: Any) -> list[Any]:
        return [row.speech for row in data(mismatched=True, **options).examples.mismatched]

    check(partners, lambda: partners(seed=0), lambda: partners(seed=5))


def test_rows_that_a_trial_uses(data: Any):
    def used(**options: Any) -> list[str]:
        return [source.row.id for source in data(max_rows=10, **options).examples.sources]

    check(used, lambda: used(seed=0), lambda: used(seed=5))


def test_rows_that_are_bistream(data: Any):
    def bistream(**options: Any) -> list[bool]:
        return [row.bistream for row in data(bistream_share=0.5, **options).examples.rows]

    check(bistream, lambda: bistream(seed=0), lambda: bistream(seed=5))


def test_what_an_objective_draws_for_a_row(data: Any):
    """Gumbel noise, roll-outs and the flow's noise come from these seeds: they follow the run, not the data."""

    def seeds(**options: Any) -> tuple[int, ...]:
        split = data(utterances=True, **options)
        batches = MicroBatches(split.examples, split.layout)
        return batches[MicroBatch(tuple(range(6)), Totals(6, 6, 6, 6), epoch=3)].utterances.seeds

    def always() -> tuple[int, ...]:
        split = data()
        return tuple(row_seed(split.keys[row], 3) for row in range(6))

    check(seeds, always)
    check(lambda: seeds(seed=5))


def test_whether_a_step_of_e2e_streams():
    check(lambda: drawn_for_step(7), lambda: float(torch.rand((), generator=torch.Generator().manual_seed(7))))


def drawn(requests: Any) -> list[int]:
    return [one.seed for one in requests]


def test_test_utterances(tmp_path: Path):
    prompts = str(make_prompts(tmp_path))

    def seeds(**options: Any) -> list[int]:
        loader = Evaluation(Module(), None, TestSettings(prompts, **options)).loader(0, 1)  # type: ignore[arg-type]
        return sorted(one for batch in loader for one in drawn(batch))

    as_ever = sorted(drawn(utterance_requests(read_prompts(prompts), (), 1, 1)))
    check(seeds, lambda: as_ever, lambda: seeds(seed=3))


def test_utterances_of_the_guard(tmp_path: Path):
    prompts = str(make_prompts(tmp_path))
    check(
        lambda: drawn(HackingGuard(prompts).requests()),
        lambda: drawn(utterance_requests(read_prompts(prompts), (), 1, 7)),
        lambda: drawn(HackingGuard(prompts, seed=3).requests()),
    )


def test_candidates(tmp_path: Path):
    prompts = make_prompts(tmp_path)

    def speech(**options: Any) -> list[Any]:
        out = sample(Module(), prompts, tmp_path / "out.jsonl", 2, overwrite=True, **options)
        return [one.speech for one in read_candidates(out)]

    check(speech, lambda: speech(seed=0), lambda: speech(seed=4))


def test_what_pytorch_draws_in_a_step(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Dropout and the mixtures of a reward model."""

    def losses() -> list[Any]:
        module, data = build(
            MTR(mixup=0.5), tiny_policy, tiny_rows, tmp_path, parts={"reward": make_reward()}, seed=0, rows_per_step=16
        )
        trainer: Any = make_trainer(tmp_path, max_steps=1)
        trainer.fit(module, datamodule=data)
        return [metrics["train/loss"] for _, metrics in trainer.logger.logged if "train/loss" in metrics]

    check(losses)


def test_a_whole_run(tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch):
    """``--seed_everything`` as a person gives it."""
    monkeypatch.setattr("sys.argv", ["tts-align"])
    path = save_recipe(tmp_path, {"name": "dpo"}, tiny_policy, tiny_rows)

    def learnt(*flags: str) -> float:
        directory = ["--run.directory", str(tmp_path / "-".join(["run", *flags]))]
        module = run(["fit", "--config", path, *directory, *flags]).model
        return float(module.policy.backbone.norm.weight.detach().double().sum())

    assert learnt() == learnt("--seed_everything", "0") != learnt("--seed_everything", "1")
    assert learnt("--data.seed", "0", "--seed_everything", "0") == learnt("--data.seed", "0")


def test_a_seed_of_0_is_a_seed_of_ones_own():
    assert after(5, lambda: part_seed(0, 7)) == 0
    assert after(5, lambda: part_seed(None, 7)) == 12


def test_each_process_draws_its_own(tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch):
    """Two processes of one step must not drop out the same units."""
    module, _ = build(MTR(), tiny_policy, tiny_rows, tmp_path, parts={"reward": make_reward()})
    monkeypatch.setattr(module, "step", lambda *_: torch.rand(()))

    def drawn_by(rank: int, number: int = 4) -> Any:
        progress = SimpleNamespace(total=SimpleNamespace(ready=number))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        module._trainer = SimpleNamespace(fit_loop=loop, global_rank=rank)  # type: ignore[assignment]
        return module.training_step(object.__new__(Batch), 0)

    assert drawn_by(0) == drawn_by(0)
    assert len({float(drawn_by(*where)) for where in [(0,), (1,), (2,), (0, 5)]}) == 4


def test_without_any_seed_the_run_is_that_of_seed_0():
    assert (run_seed(), part_seed(None, 7), part_seed(3, 7)) == (0, 7, 3)
