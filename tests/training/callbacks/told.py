"""A tiny policy that trains while a judge that is told what to say listens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from tiny import build, make_trainer

from tts_align.data.records import Span
from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.prompts import SentencePrompt, write_prompts
from tts_align.objectives import SFT, Objective
from tts_align.training.callbacks.keep_last import KeepLast
from tts_align.training.module import AlignModule

SENTENCES = 6


class Told(Judge):
    """Says in each hearing how many utterances are misread, and which error rate all of them have.

    Args:
        hearings: (misread, error rate) of each hearing; the last one for all that follow.
        skipped: hearings of an earlier process.
    """

    needs_audio = False

    def __init__(self, hearings: Sequence[tuple[int, float]], skipped: int = 0, utterances: int = SENTENCES) -> None:
        super().__init__()
        self.hearings, self.asked, self.utterances = list(hearings), skipped * utterances, utterances

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        verdicts = []
        for one in expected:
            misread, rate = self.hearings[min(self.asked // self.utterances, len(self.hearings) - 1)]
            reading = Reading.WRONG if self.asked % self.utterances < misread else Reading.RIGHT
            verdicts.append(Verdict("", reading if one.right else Reading.UNMARKED, rate, rate))
            self.asked += 1
        return verdicts


def save_prompts(folder: Path, marked: bool = True) -> str:
    """Sentences of one letter, a marked word each."""
    spans = (Span(0, 1, ("x",), ("y",)),) if marked else ()
    texts = {"x": "x", "y": "y"} if marked else {}
    prompts = [SentencePrompt(f"s{n}", "abcdefgh"[n], spans=spans, transcripts=texts) for n in range(8)]
    write_prompts(folder / "prompts.jsonl", prompts)
    return str(folder / "prompts.jsonl")


class Notes(Callback):
    """Keeps the weights after each step, and the files that there were.

    Args:
        folder: of the run.
        stop_at: step at which the training is ended by this callback; never if it is 0.
        die_at: step at which the process dies.
    """

    def __init__(self, folder: Path, stop_at: int = 0, die_at: int = 0) -> None:
        self.folder, self.stop_at, self.die_at = folder, stop_at, die_at
        self.weights: dict[int, dict[str, Any]] = {}
        self.files: dict[int, list[str]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        named = pl_module.named_parameters()
        self.weights[step] = {name: value.detach().clone() for name, value in named if value.requires_grad}
        self.files[step] = sorted(path.name for path in (self.folder / "checkpoints").glob("*.ckpt"))
        trainer.should_stop = trainer.should_stop or step == self.stop_at
        if step == self.die_at:
            raise KeyboardInterrupt("killed")


def fit(
    folder: Path,
    policy: Path,
    rows: str,
    *callbacks: Callback,
    every: int = 0,
    ckpt_path: Path | None = None,
    objective: Objective | None = None,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[AlignModule, Any]:
    """Train four steps in a folder; with ``every`` the run's last checkpoint is kept."""
    cache = folder / "cache"
    module, data = build(objective or SFT(), policy, rows, cache, parts=parts, rows_per_step=2)
    last = [KeepLast(folder / "checkpoints/last.ckpt", every)] if every else []
    settings = {"enable_checkpointing": bool(last) or bool(options.pop("checkpoints", False))} | options
    trainer = make_trainer(folder, *callbacks, *last, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer
