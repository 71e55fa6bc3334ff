# SPDX-License-Identifier: Apache-2.0
"""A folder with everything that the commands need, small enough to be worked through in seconds."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
for _folder in (ROOT / "tests", ROOT / "tests/models/cosyvoice"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

COMMANDS = ("fit", "test", "sample", "judge", "label", "prepare", "score", "export")
SIGNALLED = (*COMMANDS, "validate")
"""Commands that are asked to end; ``validate`` leaves nothing that could be compared."""


_RHYTHM = "tts_align.evaluation.measures.rhythm.DurationRatio"


@dataclass(frozen=True)
class Place:
    """Inputs of all commands, and where they write.

    Args:
        inputs: models, sentences, rows, recordings; never written to.
        work: where runs and files appear.
        steps: optimiser steps of a fit.
    """

    inputs: Path
    work: Path
    steps: int = 12

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.work / "run"

    def args(self, command: str) -> list[str]:
        """The command line of a command."""
        recipe = ["--config", str(self.inputs / "recipe.yaml"), "--run.directory", str(self.run)]
        drawn, heard = self.inputs / "drawn.jsonl", self.inputs / "heard.jsonl"
        sentences, recordings = self.inputs / "sentences.jsonl", self.inputs / "recordings.jsonl"
        drawing = ["--samples", "2", "--speakers", '["sakura"]', "--batch_rows", "2"]
        preparing = ["--batch_size=1", "--num_workers=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        scoring = ["--prompts", str(sentences), "--measures+", _RHYTHM, "--batch_rows", "1"]
        scoring += ["--out", str(self.work / "scored"), "--trainer.accelerator=cpu", "--trainer.devices=1"]
        directory = ["--directory", str(self.inputs / "cosyvoice")]
        return {
            "fit": ["fit", *recipe, "--run.test_after_fit", "false"],
            "test": ["test", *recipe],
            "sample": ["sample", *recipe, "--prompts", str(sentences), *self._out("drawn"), *drawing],
            "judge": ["judge", *recipe, "--candidates", str(drawn), *self._out("heard"), "--batch_rows", "2"],
            "label": ["label", "--judged", str(heard), *self._out("rows")],
            "prepare": ["prepare", *directory, "--source", str(recordings), *self._out("prepared"), *preparing],
            "score": ["score", str(self.inputs / "spoken"), *scoring],
            "validate": ["validate", *recipe],
            "export": ["export", *recipe, "--to", str(self.work / "exported"), "--overwrite", "true"],
        }[command]

    def _out(self, name: str) -> list[str]:
        return ["--out", str(self.work / f"{name}.jsonl")]

    def outputs(self, command: str) -> list[Path]:
        """What a command leaves when it has ended well."""
        return {
            "fit": [self.run / "checkpoints/last.ckpt"],
            "test": [self.run / "test/utterances.jsonl", self.run / "test/summary.json"],
            "sample": [self.work / "drawn.jsonl"],
            "judge": [self.work / "heard.jsonl"],
            "label": [self.work / "rows.jsonl"],
            "prepare": [self.work / "prepared.jsonl"],
            "score": [self.work / "scored/utterances.jsonl", self.work / "scored/summary.json"],
            "validate": [],
            "export": [self.work / "exported/model.safetensors", self.work / "exported/config.json"],
        }[command]


def make_inputs(folder: Path, steps: int = 12, sentences: int = 8) -> Path:
    """Write the inputs: the embedded symbolic experiment, a part of its rows, and a few recordings."""
    from onnx_models import save_directory
    from sources import save_sounds

    from tts_align.data.manifest import read_manifest, write_manifest
    from tts_align.evaluation.prompts import read_prompts, write_prompts

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_manifest("demo:symbolic/preference.parquet").rows if row.desirable is not None]
    write_manifest(rows[: 4 * steps], folder / "rows.jsonl")
    write_manifest(rows[-8:], folder / "held_out.jsonl")
    write_prompts(folder / "sentences.jsonl", islice(read_prompts("demo:audio/sentences/test.jsonl"), sentences))
    names = save_sounds(folder / "sounds", 6)
    recordings = [{"id": f"u{i}", "text": f"say {i}", "audio": f"sounds/{name}"} for i, name in enumerate(names)]
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recordings))
    for number, one in enumerate(read_prompts(folder / "sentences.jsonl")):
        (folder / "spoken").mkdir(exist_ok=True)
        shutil.copy(folder / "sounds" / names[number % len(names)], folder / "spoken" / f"{one.id}.wav")
    save_directory(folder / "cosyvoice", "cosyvoice2")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe(folder, steps), allow_unicode=True))
    return folder


def _recipe(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "objective": "kto",
        "model": {
            "policy": {"class_path": "Qwen2CodecLM", "init_args": {"directory": "demo:symbolic/base"}},
            "judge": {"class_path": "SymbolicJudge"},
            "test": {
                "prompts": str(folder / "sentences.jsonl"),
                "speakers": ["sakura"],
                "sentences": 4,
                "batch_rows": 2,
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "manifest": str(folder / "rows.jsonl"),
            "validation": str(folder / "held_out.jsonl"),
            "rows_per_step": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "enable_progress_bar": False,
            "log_every_n_steps": 5,
        },
        "run": {"checkpoint_every": 3, "threads": 1},
    }
