# SPDX-License-Identifier: Apache-2.0
"""What is trained by one process and by several, and what each of several processes does: run as a script, a rank.

    python sharded.py FOLDER ACTION...

``train`` trains every case; ``resume N [CASE...]`` continues what N processes saved in the middle; ``check`` is about
what needs no comparison with one process; anything else is a command of tts-align.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import forked, ranks
from tiny import LORA, build, make_reward, make_trainer, weights
from tiny_sound import VOICES, build_e2e
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tts_align.data.datamodule import AlignData
from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.models.base.generation import Sampling
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.objectives import DPO, E2E, KTO, MTR, SFT, TKTO, DiffRO
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.keep_best import KeepBest
from tts_align.training.callbacks.moving_average import MovingAverage
from tts_align.training.gradients import average_gradients
from tts_align.training.module import AlignModule
from tts_align.training.sharding import ShardedStrategy
from tts_align.utils.messages import quiet
from tts_align.utils.sharded import is_sharded, plain, shard, whole

Built = tuple[AlignModule, AlignData]
STEPS, HALF = 4, 2


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """SGD with a state, so that there is one to resume."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.5)


class Undivided(Qwen2CodecLM):
    """A policy that does not say what its blocks are."""

    blocks = ()


class Silent(Judge):
    """Hears the length of what is said, and finds nothing wrong."""

    needs_audio = False

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        return [Verdict("", Reading.UNMARKED, 0.0, 0.0) for _ in samples]


def plain_case(objective: Any, folder: Path, out: Path, validation: str | None = None, **options: Any) -> Built:
    rows = str(folder / "rows.jsonl")
    held_out = None if validation is None else str(folder / validation)
    cache = out / "cache"
    return build(objective(), folder / "policy", rows, cache, optimizer=momentum, validation=held_out, **options)


def undivided(folder: Path, out: Path) -> Built:
    module, data = plain_case(KTO, folder, out)
    module.policy.__class__ = Undivided
    return module, data


def rewarded(objective: Any, folder: Path, out: Path) -> Built:
    parts = {"reward": make_reward(dropout=0.0), "judge": Silent(), "sampling": Sampling(max_ratio=3.0)}
    if objective is MTR:
        parts = {"reward": parts["reward"]}
    return plain_case(objective, folder, out, parts=parts)


def end_to_end(stage: Any, folder: Path, out: Path) -> Built:
    manifest, objective = str(folder / "sounds.jsonl"), E2E(stage=stage, voices=VOICES)
    return build_e2e(objective, folder / "policy", manifest, optimizer=momentum, validation=manifest)


def guard(folder: Path) -> list[Callback]:
    """Three sentences: two for one process, one for the other, none for the rest."""
    how = {"every_steps": 1, "sentences": 3, "use_test_judge": True}
    prompts = str(folder / "prompts.jsonl")
    return [HackingGuard(prompts, **how), KeepBest(prompts, metric="nearest_cer", **how)]


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        build: makes module and data of the folders for what is given and for what is made.
        sharded: whether the policy is cut when there are several processes.
        four: whether four processes train it, too.
        trainer: its options.
        callbacks: makes them.
        averaged: whether the training ends with a moving average of the weights.
    """

    build: Callable[[Path, Path], Built]
    sharded: bool = True
    four: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Path], list[Callback]] = lambda _: []
    averaged: bool = False


CASES = {
    "sft": Case(partial(plain_case, SFT, validation="held_out.jsonl")),
    "dpo": Case(partial(plain_case, DPO)),
    "dpo, unclipped": Case(partial(plain_case, DPO), four=False, trainer={"gradient_clip_val": None}),
    "dpo, clipped by value": Case(
        partial(plain_case, DPO), four=False, trainer={"gradient_clip_val": 0.002, "gradient_clip_algorithm": "value"}
    ),
    "dpo, accumulated": Case(
        partial(plain_case, partial(DPO, sft_weight=1.0)), four=False, trainer={"accumulate_grad_batches": 2}
    ),
    "dpo, adapters": Case(partial(plain_case, DPO, lora=LORA), sharded=False),
    "kto": Case(partial(plain_case, KTO, validation="held_out.jsonl"), averaged=True),
    "kto, undivided": Case(undivided, four=False),
    "tkto": Case(partial(plain_case, TKTO)),
    "diffro": Case(partial(rewarded, DiffRO), callbacks=guard),
    "diffro, free": Case(partial(rewarded, partial(DiffRO, rollout="free"))),
    "mtr": Case(partial(rewarded, MTR), sharded=False),
    "e2e stage 1": Case(partial(end_to_end, 1)),
    "e2e stage 2": Case(partial(end_to_end, 2)),
    "e2e stage 3": Case(partial(end_to_end, 3)),
}


class Watch(Callback):
    """Saves in the middle, and notes whether the policy is cut."""

    def __init__(self, path: Path) -> None:
        self.path, self.sharded = path, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sharded = is_sharded(pl_module.policy)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == HALF and not self.path.exists():
            trainer.strategy.barrier()
            trainer.save_checkpoint(self.path)


def train(name: str, folder: Path, out: Path, world: int = 0, checkpoint: Path | None = None) -> None:
    """Train a case, from a checkpoint if there is one; leaves ``result.pt``, and a checkpoint of the middle.

    Args:
        name: of the case.
        folder: what is given.
        out: what is made.
        world: processes that share the policy; 0 for a plain training in this one.
        checkpoint: where to begin.
    """
    case, out = CASES[name], out / name
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    module, data = case.build(folder, out)
    watch = Watch(out / "half.ckpt")
    options = {"gradient_clip_val": 0.3, "max_epochs": -1, "max_steps": STEPS, "devices": world or 1, **case.trainer}
    strategy = ShardedStrategy() if world else "auto"
    callbacks = [*([MovingAverage(0.5)] if case.averaged else []), watch, *case.callbacks(folder)]
    trainer = make_trainer(out, *callbacks, strategy=strategy, **options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert watch.sharded is (case.sharded and world > 0), name
    assert not is_sharded(module)
    if trainer.is_global_zero:
        result = {"weights": weights(module), "logged": [one for _, one in trainer.logger.logged]}
        torch.save(result, out / "result.pt")


def unequal_work(folder: Path, out: Path) -> None:
    """One rank speaks before and behind the forward of a step, the other does not; the gradients stay the same."""
    gradients = []
    for speaks in (False, os.environ["RANK"] == "1"):
        module, data = plain_case(SFT, folder, out / str(speaks))
        trainer = make_trainer(out, strategy=ShardedStrategy(), devices=2, max_steps=2)
        told: list[Any] = []

        def note(_: Any, module: AlignModule = module, told: list[Any] = told) -> None:
            told.extend(value.grad.full_tensor().clone() for value in module.parameters() if value.grad is not None)

        def speak(module: AlignModule, times: int) -> None:
            with whole(module.policy):
                for _ in range(times):
                    module.policy.generate([module.policy.encode_text("abc").prompt(0)], Sampling(max_ratio=3.0))

        def score(batch: Any, module: AlignModule = module, score: Any = module.score, times: int = 3 * speaks) -> Any:
            speak(module, times)
            step = score(batch)
            speak(module, times)
            return step

        module.on_before_optimizer_step, module.score = note, score
        trainer.fit(module, datamodule=data)
        gradients.append(told)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def missing_gradients(folder: Path, out: Path) -> None:
    """Gradients of replicated weights: of both processes, of one, of none."""
    both, first, none = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0]) * (1 + dist.get_rank())
    if dist.get_rank() == 0:
        first.grad = torch.tensor([4.0, 6.0])
    average_gradients([both, first, none])
    assert both.grad is not None
    assert first.grad is not None
    assert both.grad.tolist() == [1.5, 3.0]
    assert first.grad.tolist() == [2.0, 3.0]
    assert none.grad is None


def refusals(folder: Path, out: Path) -> None:
    """What cannot update both kinds of weights is refused before the training; what is left open is chosen."""
    for knob in ("fused", "foreach"):
        for kind, stage in ((torch.optim.AdamW, 3), (torch.optim.SGD, 2)):
            optimizer = partial(kind, **{knob: True})
            objective = E2E(stage=stage, voices=VOICES)
            module, data = build_e2e(
                objective, folder / "policy", str(folder / "sounds.jsonl"), optimizer=optimizer, lr=0.01
            )
            trainer = make_trainer(out, strategy=ShardedStrategy(), devices=2, max_steps=1)
            with pytest.raises(ValueError, match=f"model.optimizer cannot be {knob}"):
                trainer.fit(module, datamodule=data)
    foreign = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    halved = {"strategy": ShardedStrategy(), "precision": "bf16-true"}
    for options, reason in ((foreign, "must not be ModelParallelStrategy"), (halved, "must be 32-true or bf16-mixed")):
        module, data = plain_case(SFT, folder, out)
        trainer = make_trainer(out, devices=2, max_steps=1, **options)
        with pytest.raises(ValueError, match=reason):
            trainer.fit(module, datamodule=data)


def plain_copies(folder: Path, out: Path) -> None:
    """A copy of a cut policy is a whole model that says the same and can be written; the policy itself is not moved."""

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            rows = _[1].rows
            copied = plain(pl_module.policy)
            assert not is_sharded(copied)
            with torch.no_grad():
                assert torch.allclose(copied(rows).logp, pl_module.policy(rows).logp, atol=1e-6)
                copied.table.weight.zero_()
            assert plain(pl_module.policy).table.weight.abs().sum() > 0

    module, data = plain_case(SFT, folder, out)
    make_trainer(out, Copy(), strategy=ShardedStrategy(), devices=2, max_steps=2).fit(module, datamodule=data)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[0].weight
    shard(tied, [], init_device_mesh("cpu", (2,)))
    copied = plain(tied)
    assert copied[2].weight is copied[0].weight
    assert len(list(copied.parameters())) == 1


def main(folder: Path, actions: Sequence[str]) -> None:
    """What one of the processes does."""
    world = int(os.environ["WORLD_SIZE"])
    quiet()
    warnings.filterwarnings("ignore")
    for action in actions:
        command, *rest = shlex.split(action)
        if command == "train":
            for name in CASES:
                train(name, folder, folder / f"processes{world}", world)
        elif command == "check":
            for check in (unequal_work, plain_copies, missing_gradients, refusals):
                check(folder, folder / check.__name__)
        elif command == "resume":  # what so many processes saved
            many, *names = rest
            made = folder / (f"resumed{world}" if world > 1 else "resumed1/sharded")
            for name in names or [name for name, case in CASES.items() if case.four]:
                train(name, folder, made, world, folder / f"processes{many}" / name / "half.ckpt")
        else:
            from tts_align.cli.entry import run

            run([command, *rest])


def processes(count: int, folder: Path, *actions: str) -> None:
    """Let so many processes do something, each told its rank as torchrun tells it."""
    command = [sys.executable, str(Path(__file__)), str(folder), *actions]
    for rank, done in enumerate(forked([command] * count, [folder] * count, ranks(count))):
        assert done.returncode == 0, f"rank {rank}: " + (done.stdout + done.stderr)[-5000:]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
