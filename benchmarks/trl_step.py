# SPDX-License-Identifier: Apache-2.0
"""What one optimiser step costs here and in TRL: KTO and DPO at equal settings, in one process, turn by turn.

    pip install trl    # in an environment of its own that also holds this package
    OMP_NUM_THREADS=1 python benchmarks/trl_step.py    # some minutes of one core; writes results/trl_step.json

Both train all weights in float32, without gradient checkpointing, on the same rows in batches of the same size, with
AdamW and clipping at 1. Each shuffles by itself, so that a round compares one step of ours with one step of TRL's on
other rows of the same kind. TRL's model has one vocabulary for text and speech (8 % more head); it computes the
reference's numbers beforehand (precomputed) or in every step (online, its default). Ours always has them beforehand,
which the clock of neither counts. TRL reads text, so each token is a word.
"""

from __future__ import annotations

import functools
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from machine import Clock, machine, ratio, save
from step import LARGER, Shape
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import read_manifest
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.objectives import Objective
from tts_align.training.module import AlignModule
from tts_align.utils.messages import quiet

Name = Literal["kto", "dpo"]


class Turns:
    """Hands the turn to and fro between two trainers in threads of one process, and times each step."""

    def __init__(self) -> None:
        self.turn = {"ours": threading.Semaphore(1), "trl": threading.Semaphore(0)}
        self.times: dict[str, list[float]] = {"ours": [], "trl": []}
        self.clock = Clock()

    def begin(self, name: str) -> None:
        """Wait for the turn, and start the clock."""
        self.turn[name].acquire()
        self.clock.start()

    def end(self, name: str) -> None:
        """Stop the clock, and pass the turn on."""
        self.times[name].append(self.clock.read()["cpu"])
        self.turn["trl" if name == "ours" else "ours"].release()


class Ours(Callback):
    """A step of ours is a turn, the reading of its batch included."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_start(self, *_: Any) -> None:
        """The first turn."""
        self.turns.begin("ours")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Pass the turn on, and wait for the next."""
        self.turns.end("ours")
        if trainer.global_step < trainer.max_steps:
            self.turns.begin("ours")


def texts(manifest: str, sizes: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A tokenizer of words, and the rows of a manifest in its words: one for each text and speech token."""
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", *(f"t{i}" for i in range(sizes.text_vocabulary)), *(f"s{i}" for i in range(sizes.codebook_size))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    rows = [
        {
            "prompt": " ".join(f"t{ord(letter) - 0x4E00}" for letter in row.text),
            "completion": " " + " ".join(f"s{token}" for token in row.speech),
            "label": bool(row.desirable),
        }
        for row in read_manifest(manifest).rows
    ]
    return fast, rows


def theirs(name: Name, shape: Shape, manifest: str, precomputed: bool, steps: int, folder: Path, turns: Turns) -> Any:
    """A trainer of TRL's whose steps are turns."""
    from datasets import Dataset
    from transformers import Qwen2ForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    tokenizer, rows = texts(manifest, shape.sizes)

    class Turn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin("trl")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end("trl")

    config = shape.sizes.backbone()
    config.vocab_size = len(tokenizer)
    if name == "dpo":
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [
            {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
            for good, bad in pairs
        ]
    kind, settings = (DPOTrainer, DPOConfig) if name == "dpo" else (KTOTrainer, KTOConfig)
    items = shape.rows_per_step // (2 if name == "dpo" else 1)
    arguments = settings(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=items,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        max_steps=steps,
        max_length=None,
        precompute_ref_log_probs=precomputed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "theirs")  # TRL reads the reference from the policy's directory
    return kind(
        model=Qwen2ForCausalLM.from_pretrained(folder / "theirs"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Turn()],
    )


def train(name: Name, shape: Shape, folder: Path, precomputed: bool, steps: int, turns: Turns) -> None:
    """Train both turn by turn."""
    manifest = str(folder / "rows.jsonl")
    other = theirs(name, shape, manifest, precomputed, steps, folder, turns)
    objective: Objective = Objective.registry[name]()
    data = AlignData(manifest, rows_per_step=shape.rows_per_step)
    module = AlignModule(
        objective,
        Qwen2CodecLM(str(folder / "policy")),
        cache=str(folder / "cache"),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-4),
    )
    quiet()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[Ours(turns)],
        default_root_dir=folder,
    )
    thread = threading.Thread(target=other.train)
    thread.start()
    trainer.fit(module, datamodule=data)
    thread.join()


def compare(name: Name, shape: Shape, folder: Path, precomputed: bool, rounds: int) -> dict[str, Any]:
    """What a step of either takes; the first two rounds warm up."""
    turns = Turns()
    train(name, shape, folder, precomputed, rounds + 2, turns)
    counted = {one: found[2:] for one, found in turns.times.items()}
    return {
        "objective": name,
        "reference": "precomputed" if precomputed else "online",
        "seconds_per_step": {one: round(median(found), 4) for one, found in counted.items()},
        "ratio_of_sums": round(sum(counted["ours"]) / sum(counted["trl"]), 3),
        "ratio_to_trl": ratio(counted["ours"], counted["trl"]),
    }


def shapes_of(rounds: int) -> dict[str, Shape]:
    """Both sizes of model, with no more sentences than steps: what TRL computes beforehand takes no longer then."""
    return {"small": Shape(sentences=8 * rounds), "larger": Shape(LARGER, rows_per_step=8, sentences=4 * rounds)}


class Case(NamedTuple):
    """What is compared, with its models and rows in a folder.

    Args:
        size: of the model.
        shape: of model and rows.
        objective: its name.
        folder: where they lie.
    """

    size: str
    shape: Shape
    objective: Name
    folder: Path


def cases(sizes: Sequence[str], objectives: Sequence[Name], rounds: int) -> Iterator[Case]:
    """Every objective at every size; models and rows of a size are there while its cases are worked on."""
    for size in sizes:
        shape = shapes_of(rounds)[size]
        with tempfile.TemporaryDirectory() as scratch:
            shape.save_models(Path(scratch))
            shape.save_rows(Path(scratch))
            yield from (Case(size, shape, name, Path(scratch)) for name in objectives)


def main(
    objectives: tuple[Name, ...] = ("kto", "dpo"),
    sizes: tuple[Literal["small", "larger"], ...] = ("small", "larger"),
    rounds: int = 6,
    out: str = "trl_step",
) -> None:
    """Measure, print and save.

    Args:
        objectives: which.
        sizes: of the model, those of ``step.py``.
        rounds: of turns that count.
        out: name of the results.
    """
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    for case in cases(sizes, objectives, rounds):
        for precomputed in (True, False):
            found = compare(case.objective, case.shape, case.folder, precomputed, rounds)
            rows.append({"size": case.size, "rounds": rounds, **found})
            print(rows[-1], flush=True)
            result = {"machine": machine(), "trl": version("trl"), "rounds": rounds, "rows": rows}
            path = save(out, result)
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
