# SPDX-License-Identifier: Apache-2.0
"""What one optimiser step of each objective costs, against a lean loop that does only the passes it needs.

    OMP_NUM_THREADS=1 python benchmarks/step.py    # some ten minutes of one core; writes results/step.json

Ours is the whole of it: AlignModule, AlignData and Lightning's trainer, frozen numbers in their cache. The lean loop
(``lean.py``) trains the same weights on the same rows. Both take turns in one process: some steps of ours, then as
many of the lean loop on the rows ours has just seen; the first round is warming up. As both begin with equal weights
and see equal rows, their losses and gradient norms must agree, which is checked.

Two sizes of model, rows of similar length together (as recipes have it) and rows in random order.
``--device cuda`` runs the same on a GPU and takes ratios of the wall clock around a synchronisation; untested so far.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from lean import Loop, Model, Rows
from lightning.pytorch import Callback, Trainer
from machine import Clock, machine, ratio, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from tts_align.batch import Batch
from tts_align.cli.lightning import quiet
from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.models.base.layout import TokenRow
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes
from tts_align.objectives import Objective, Part
from tts_align.training.cache import TokenCache
from tts_align.training.contrast import Contrast
from tts_align.training.module import AlignModule

Name = Literal["sft", "dpo", "kto", "tkto"]
PASSES = {"sft": 3, "dpo": 3, "kto": 4, "tkto": 4}
SIZES = Sizes(
    codebook_size=6561,
    text_vocabulary=500,
    hidden_size=256,
    layers=4,
    heads=4,
    key_value_heads=2,
    intermediate_size=1024,
)
LARGER = Sizes(
    codebook_size=6561,
    text_vocabulary=500,
    hidden_size=512,
    layers=6,
    heads=8,
    key_value_heads=2,
    intermediate_size=2048,
)
AGREES = 1e-4
"""Largest relative difference of the first step's loss and gradient norm."""


@dataclass(frozen=True)
class Shape:
    """What is trained on what.

    Args:
        sizes: of the model.
        sentences: each has one desirable and one undesirable row.
        text: fewest and most text tokens.
        speech: fewest and most speech tokens.
        rows_per_step: of one optimiser step; a pair is two.
    """

    sizes: Sizes = SIZES
    sentences: int = 256
    text: tuple[int, int] = (10, 40)
    speech: tuple[int, int] = (40, 250)
    rows_per_step: int = 16

    def letters(self) -> str:
        """One letter for each text token."""
        return "".join(chr(0x4E00 + i) for i in range(self.sizes.text_vocabulary))

    def save_models(self, folder: Path) -> None:
        """Write ``policy`` and, with other weights, ``reference``, so that nothing is 0 or ln 2 by chance."""
        letters = self.letters()
        tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
        tokenizer.pre_tokenizer = Split("", "isolated")
        tokenizer.save(str(folder / "tokenizer.json"))
        torch.manual_seed(0)
        model = Qwen2CodecLM(sizes=self.sizes, tokenizer=str(folder / "tokenizer.json"))
        model.save(folder / "policy")
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.005 * torch.randn_like(value))
        model.save(folder / "reference")

    def save_rows(self, folder: Path) -> str:
        """Write random rows and give their path."""
        random, letters = np.random.default_rng(0), np.array(list(self.letters()))
        rows = []
        for sentence in range(self.sentences):
            text = "".join(random.choice(letters, random.integers(self.text[0], self.text[1] + 1)))
            for desirable in (True, False):
                count = random.integers(self.speech[0], self.speech[1] + 1)
                speech = tuple(random.integers(0, self.sizes.codebook_size, count).tolist())
                rows.append(Row(id=f"{sentence}-{desirable}", text=text, speech=speech, desirable=desirable))
        return str(write_manifest(rows, folder / "rows.jsonl"))


@dataclass
class TakingTurns(Callback):
    """After some steps of the trainer the lean loop does the same steps.

    Args:
        loop: the lean one, such as ``lean.Loop``.
        data: knows the rows behind a batch.
        steps: in a turn.
        clock: of all.
        log_ratios: by key of the row, for TKTO.
    """

    loop: Any
    data: AlignData
    steps: int
    clock: Clock
    log_ratios: TokenCache | None = None
    times: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, list[Any]] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    useful: int = 0
    waiting: list[Batch] = field(default_factory=list)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """From here on the clock runs."""
        self.rows = self.data.rows()
        objective = trainer.lightning_module.objective
        self.cached = Part.REFERENCE in objective.needs and not objective.wants_logits
        self.clock.start()

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        """Note the first gradient norm, before clipping; the first round does not count."""
        if not self.norms:
            grads = [value.grad for value in trainer.lightning_module.parameters() if value.grad is not None]
            self.norms["ours"] = torch.nn.utils.get_total_norm(grads)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        """Keep the rows, and pass the turn on."""
        self.waiting.append(batch)
        self.losses.setdefault("ours", []).append(outputs["loss"])
        if len(self.waiting) < self.steps:
            return
        self.times.setdefault("ours", []).append(self.clock.read())
        rows = [self.rows_of(batch) for batch in self.waiting]
        if self.cached:
            self.loop.prepare([row for one in rows for row in (*one.rows, *one.mismatched)])
        self.useful += sum(len(text) + len(speech) + 2 for one in rows for text, speech in one.rows)
        self.clock.start()
        found = [self.loop.step(one) for one in rows]
        self.times.setdefault("lean", []).append(self.clock.read())
        self.losses.setdefault("lean", []).extend(loss for loss, _ in found)
        self.norms.setdefault("lean", found[0][1])
        self.waiting.clear()
        self.clock.start()

    def rows_of(self, batch: Batch) -> Any:
        """What the lean loop sees of a batch."""
        numbers = [] if self.log_ratios is None else [self.log_ratios.numbers[key] for key in batch.rows.keys]
        return Rows(
            rows=[_plain(self.rows[key]) for key in batch.rows.keys],
            desirable=batch.desirable.cpu(),
            mismatched=[_plain(self.rows[key]) for rows in batch.mismatched for key in rows.keys],
            log_ratio=[torch.from_numpy(one) for one in numbers],
        )


def _plain(row: TokenRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return row.text, row.speech


def compare(
    name: Name,
    bucketed: bool,
    folder: Path,
    shape: Shape,
    steps: int = 2,
    rounds: int = 6,
    learning_rate: float = 1e-4,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train ours and the lean loop turn by turn.

    Args:
        name: of the objective.
        bucketed: whether rows of similar length meet, as is the default; otherwise any rows.
        folder: holds the models and rows of ``shape``.
        shape: what is trained on what.
        steps: in a turn.
        rounds: of turns that count; one more is for warming up.
        learning_rate: of all.
        device: of all.
    """
    objective: Objective = Objective.registry[name]()
    policy = Qwen2CodecLM(str(folder / "policy"))
    reference = Qwen2CodecLM(str(folder / "reference"))
    data = AlignData(
        str(folder / "rows.jsonl"),
        wants=objective.rows_wanted,
        rows_per_step=shape.rows_per_step,
        bucket_steps=8 if bucketed else 1,
    )
    data.prepare(policy)
    log_ratios = random_log_ratios(data, policy, folder) if Part.CONTRAST in objective.needs else None
    module = AlignModule(
        objective,
        policy,
        reference=reference if Part.REFERENCE in objective.needs else None,
        contrast=None if log_ratios is None else Contrast(weights=str(log_ratios.path)),
        cache=str(folder / "cache"),
        optimizer=functools.partial(torch.optim.AdamW, lr=learning_rate),
    )
    loop = Loop(name, Model(policy), Model(reference), learning_rate, device)
    turns = TakingTurns(loop, data, steps, Clock(device), log_ratios)
    fit(module, turns, steps * (rounds + 1), folder)
    return {"objective": name, "bucketed": bucketed, "passes": PASSES[name], **summary(turns)}


def fit(module: AlignModule, turns: TakingTurns, steps: int, folder: Path) -> None:
    """Train for so many steps, taking turns; Lightning writes into the folder."""
    quiet()
    trainer = Trainer(
        accelerator="gpu" if turns.clock.device.startswith("cuda") else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        max_epochs=-1,
        max_steps=steps,
        callbacks=[turns],
        default_root_dir=folder,
    )
    trainer.fit(module, turns.data)


def random_log_ratios(data: AlignData, policy: Qwen2CodecLM, folder: Path) -> TokenCache:
    """Random log π⁺ − log π⁻ of every row, saved in a folder."""
    cache = TokenCache(folder, "contrast", {"made": "up"})
    for key, row in data.rows().items():
        random = np.random.default_rng(int(key, 16))
        cache.numbers[key] = random.normal(0, 1, policy.layout.target_count(row)).astype(np.float32)
    cache.save()
    return cache


def summary(turns: TakingTurns) -> dict[str, Any]:
    """Losses compared, seconds and ratios.

    Raises:
        AssertionError: the first step's loss or gradient norm differs between ours and the lean loop.
    """
    measure = "wall" if turns.clock.device.startswith("cuda") else "cpu"
    losses = {name: torch.stack(values).double().cpu() for name, values in turns.losses.items()}
    gap = ((losses["lean"] - losses["ours"]) / losses["ours"]).abs()
    first = {"loss": float(gap[0]), "norm": abs(float(turns.norms["lean"] / turns.norms["ours"]) - 1)}
    wrong = {name: one for name, one in first.items() if not one <= AGREES}
    assert not wrong, f"ours and the lean loop do not do the same work: relative differences {wrong}"
    counted = {name: times[1:] for name, times in turns.times.items()}
    done = turns.steps * len(turns.times["ours"])
    return {
        "first_loss": float(losses["ours"][0]),
        "first_step_differs": max(first.values()),
        "any_step_differs": float(gap.max()),
        "useful_tokens_per_step": round(turns.useful / done),
        "seconds_per_step": {
            name: {kind: round(median(one[kind] for one in times) / turns.steps, 4) for kind in ("cpu", "wall")}
            for name, times in counted.items()
        },
        "ratio_to_lean": {
            kind: ratio([one[kind] for one in counted["ours"]], [one[kind] for one in counted["lean"]])
            for kind in ("cpu", "wall")
        },
        "measure": measure,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ratios, one line each."""
    lines = []
    for row in rows:
        measure = row["measure"]
        lengths = row.get("lengths") or ("bucketed" if row["bucketed"] else "random")
        name = f"{row['objective']} {row['size']} {lengths}"
        seconds = {kind: times[measure] for kind, times in row["seconds_per_step"].items()}
        ratios = row["ratio_to_lean"][measure]
        lines.append(
            f"{name:24}{seconds['ours']:8.3f} s, lean {seconds['lean']:.3f} s: {ratios['median']:.2f} times "
            f"[{ratios['low']:.2f}-{ratios['high']:.2f}]"
        )
    return "\n".join(lines)


def main(
    objectives: tuple[Name, ...] = ("sft", "dpo", "kto", "tkto"),
    sizes: tuple[Literal["small", "larger"], ...] = ("small", "larger"),
    rounds: int = 6,
    device: str = "cpu",
    out: str = "step",
) -> None:
    """Measure, print a table, and save it.

    Args:
        objectives: which.
        sizes: of the model; the larger one trains on half as many rows in a step.
        rounds: of turns that count.
        device: cpu or cuda.
        out: name of the results.
    """
    shapes = {"small": Shape(), "larger": Shape(LARGER, rows_per_step=8)}
    rows: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            shapes[size].save_models(Path(scratch))
            shapes[size].save_rows(Path(scratch))
            for name in objectives:
                for bucketed in (True, False):
                    found = compare(name, bucketed, Path(scratch), shapes[size], 1, rounds, device=device)
                    rows.append({"size": size, **found})
                    print(table(rows[-1:]), flush=True)
                    path = save(out, {"machine": machine(device), "rounds": rounds, "rows": rows})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
