# SPDX-License-Identifier: Apache-2.0
"""Learning rate, warm-up and clip of each part; parts that wait; and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback
from tiny import gap, make_trainer, weights
from tiny_sound import VOICES, Tones, build_e2e, spoken_rows

from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.objectives import SFT
from tts_align.objectives.e2e import E2E
from tts_align.training.module import AlignModule
from tts_align.training.optimizers import PartOptimizer, part_of

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:The '.*' does not have many workers",
        "ignore:The number of training batches .* is smaller than the logging interval",
    ),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_manifest(spoken_rows(sentences=8), tmp_path_factory.mktemp("groups") / "rows.jsonl"))


@pytest.fixture
def build(tiny_policy: Path, manifest: str):
    def built(groups: dict[str, PartOptimizer] | None = None, **knobs: Any) -> tuple[AlignModule, AlignData]:
        objective = E2E(stage=1, voices=VOICES, **knobs)
        options: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 0.01, "rows_per_step": 4}
        module, data = build_e2e(objective, tiny_policy, manifest, vocoder=Tones(), **options)
        module.optimizer_groups = dict(groups or {})
        torch.nn.init.normal_(module.objective.bridges["policy"].weight, std=0.1)
        return module, data

    return built


class Watch(Callback):
    """Notes the weights and the gradients of every step."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, _: Any) -> None:
        self.before.append({name: value.detach().clone() for name, value in module.named_parameters()})
        self.gradients.append(
            {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
        )


def moved(watch: Watch, module: AlignModule, step: int) -> dict[str, torch.Tensor]:
    """By how much each weight moved in a step."""
    last = {name: value.detach() for name, value in module.named_parameters()}
    after = watch.before[step + 1] if step + 1 < len(watch.before) else last
    return {name: after[name] - value for name, value in watch.before[step].items()}


def fit(module: AlignModule, data: AlignData, folder: Path, steps: int = 3, **options: Any) -> Watch:
    watch = Watch()
    make_trainer(folder, watch, max_steps=steps, max_epochs=-1, **options).fit(module, datamodule=data)
    return watch


def test_each_part_moves_by_its_own_rate_warm_up_and_clip(build: Any, tmp_path: Path):
    """Plain gradient descent, typed again from the gradients of each step."""
    groups = {
        "tokenizer": PartOptimizer(lr=0.001, warm_up_steps=2),
        "flow": PartOptimizer(clip=0.01),
        "policy": PartOptimizer(lr=0.02, clip=0.5),
    }
    module, data = build(groups)
    watch = fit(module, data, tmp_path, gradient_clip_val=0.3)
    limits = {"flow": 0.01, "policy": 0.5, "rest": 0.3}
    for step in range(3):
        given = watch.gradients[step]
        sides: dict[str, list[str]] = {"flow": [], "policy": [], "rest": []}
        for name in given:
            part = part_of(name)
            sides[part if part in sides else "rest"].append(name)
        for side, names in sides.items():
            norm = torch.stack([given[name].square().sum() for name in names]).sum().sqrt()
            scale = min(1.0, limits[side] / float(norm))
            for name in names:
                rate = {"policy": 0.02, "tokenizer": 0.001 * min(1, (step + 1) / 2)}.get(part_of(name), 0.01)
                expected = -rate * scale * given[name]
                torch.testing.assert_close(moved(watch, module, step)[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_part_that_waits_does_not_move_and_warms_up_afterwards(build: Any, tmp_path: Path):
    groups = {"tokenizer": PartOptimizer(warm_up_steps=4)}
    module, data = build(groups, unfreeze_after={"tokenizer": 2, "reward": 1})
    watch = fit(module, data, tmp_path, steps=4)
    for step in range(4):
        still = {part_of(name) for name, change in moved(watch, module, step).items() if change.abs().max() > 0}
        waiting = {name for name, first in (("tokenizer", 2), ("reward", 1)) if step < first}
        assert still == {"policy", "flow", "objective", "tokenizer", "reward"} - waiting
    name = "parts.tokenizer.tokenizer.stem.weight"
    for step, share in ((2, 0.25), (3, 0.5)):
        torch.testing.assert_close(
            moved(watch, module, step)[name], -0.01 * share * watch.gradients[step][name], rtol=1e-3, atol=1e-7
        )


def test_a_schedule_and_a_warm_up_do_not_disturb_each_other(build: Any, tmp_path: Path):
    module, data = build({"policy": PartOptimizer(lr=0.04, warm_up_steps=2)})
    module.lr_scheduler = functools.partial(
        torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.5, total_iters=2
    )
    watch = fit(module, data, tmp_path)
    for step, factor in enumerate((1.0, 0.75, 0.5)):
        for name, gradient in watch.gradients[step].items():
            rate = factor * (0.04 * min(1, (step + 1) / 2) if name.startswith("policy.") else 0.01)
            torch.testing.assert_close(
                moved(watch, module, step)[name], -rate * gradient, rtol=1e-3, atol=1e-6, msg=name
            )


def test_a_killed_training_with_groups_continues_bit_for_bit(build: Any, tmp_path: Path):
    groups = {"tokenizer": PartOptimizer(lr=0.001, warm_up_steps=3), "policy": PartOptimizer(clip=0.1)}

    def made() -> tuple[AlignModule, AlignData]:
        module, data = build(groups, unfreeze_after={"tokenizer": 2})
        module.optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
        return module, data

    whole, data = made()
    fit(whole, data, tmp_path / "a", 5)
    first, data = made()
    saved = tmp_path / "mid.ckpt"
    trainer = make_trainer(tmp_path / "b", max_steps=3, max_epochs=-1)
    trainer.fit(first, datamodule=data)
    trainer.save_checkpoint(saved)
    resumed, data = made()
    make_trainer(tmp_path / "c", max_steps=5, max_epochs=-1).fit(
        resumed, datamodule=data, ckpt_path=saved, weights_only=True
    )
    assert gap(weights(whole), weights(resumed)) == 0


def test_what_cannot_work(build: Any, tiny_policy: Path):
    for knobs in ({"lr": 0.0}, {"clip": -1.0}, {"warm_up_steps": -1}):
        with pytest.raises(ValueError, match="optimizer_groups"):
            PartOptimizer(**knobs)
    with pytest.raises(ValueError, match=r"unfreeze_after of tokenizer has no effect in stage 2"):
        E2E(stage=2, unfreeze_after={"tokenizer": 3})
    from tts_align.models.policy.qwen2 import Qwen2CodecLM
    from tts_align.objectives.sft import SFT

    with pytest.raises(ValueError, match=r"optimizer_groups of flow have no effect: SFT has only objective, policy"):
        AlignModule(SFT(), Qwen2CodecLM(str(tiny_policy)), optimizer_groups={"flow": PartOptimizer()})


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (functools.partial(torch.optim.AdamW, lr=-1.0), "refuses .*: Invalid learning rate"),
        (
            functools.partial(torch.optim.AdamW, fused=True, foreach=True),
            "refuses .* cannot be `True` tog",
        ),
        (torch.optim.Muon, "refuses its settings or these weights: Muon only supports 2D parameters"),
        (torch.optim.SparseAdam, "SparseAdam cannot make a step: SparseAdam does not support dense gradients"),
    ],
)
def test_an_optimiser_that_cannot_is_the_recipes_fault(
    optimizer: Any, told: str, tiny_policy: Path, tiny_rows: str, tmp_path: Path
):
    module, data = tiny.build(SFT(), tiny_policy, tiny_rows, tmp_path)
    module.optimizer = optimizer
    with pytest.raises(ValueError, match=f"model.optimizer {told}"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


def test_faults_of_the_loss_are_not_the_optimisers(tiny_policy: Path, tiny_rows: str, tmp_path: Path):
    module, data = tiny.build(SFT(), tiny_policy, tiny_rows, tmp_path)

    def broken(*_: Any) -> Any:
        raise TypeError("of the loss")

    module.training_step = broken  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="of the loss"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.Rprop, torch.optim.ASGD])
def test_optimisers_without_a_joint_kernel_train(optimizer: Any, tiny_policy: Path, tiny_rows: str, tmp_path: Path):
    module, data = tiny.build(SFT(), tiny_policy, tiny_rows, tmp_path, optimizer=optimizer)
    before = weights(module)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert gap(before, weights(module)) > 0
