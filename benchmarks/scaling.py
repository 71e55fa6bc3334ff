# SPDX-License-Identifier: Apache-2.0
"""How long a fit takes until its first step, and how much memory, as the manifest grows to a million rows.

Each size is written as Parquet shards of rows of 100 to 250 speech tokens, four to a sentence, and fitted twice with a
tiny model: the first call checks the rows and stores them as a table, the second finds it. CPU seconds are those of the
whole process, imports included; the smallest size shows what does not depend on the rows. The largest size is then
fitted undisturbed, killed with SIGKILL and resumed, and the rows of every step compared.

    python benchmarks/scaling.py --rows '[1000, 125000, 250000, 500000, 1000000]'
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from machine import HERE, machine, save
from pyarrow import parquet

CODEBOOK, SHARD, STEPS, KILLED, SAVED_EVERY = 6561, 50_000, 60, 37, 10
LETTERS = "abcdefghijklmnopqrstuvwxyz "
SECONDS, AGAIN_SECONDS, RESIDENT_MB = 60.0, 5.0, 1024.0
"""Bounds at a million rows: CPU seconds of the first call and of the second, and resident memory."""


def memory() -> dict[str, float]:
    """Resident memory of this process in MB: all of it, its own, and what it looks at in files, now and at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "own": "RssAnon", "files": "RssFile", "most": "VmHWM"}
    return {name: round(int(lines[key].split()[0]) / 1024, 1) for name, key in names.items()}


class Watch(Callback):
    """Notes when the first step begins, and the rows of every step; kills the process where it is told to.

    The environment says where notes go (``SCALING_NOTES``, JSON lines) and before which optimiser step the process is
    killed (``SCALING_KILL_AT``, 0 for none): a run that resumes must have the recipe of the one that was killed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path, self.kill_at = Path(os.environ["SCALING_NOTES"]), int(os.environ["SCALING_KILL_AT"])
        self.ready = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write down what is known before the step is made."""
        note: dict[str, Any] = {"step": trainer.global_step}
        note["rows"] = hashlib.blake2b("".join(batch.rows.keys).encode(), digest_size=8).hexdigest()
        if not self.ready:
            spent = resource.getrusage(resource.RUSAGE_SELF)
            note |= {"cpu_seconds": round(spent.ru_utime + spent.ru_stime, 2), "memory_mb": memory()}
            self.ready = True
        with self.path.open("a") as file:
            file.write(json.dumps(note) + "\n")
        if self.kill_at and trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Memory after all steps."""
        with self.path.open("a") as file:
            file.write(json.dumps({"memory_mb_at_the_end": memory()}) + "\n")


def write_corpus(folder: Path, count: int, seed: int = 0) -> Path:
    """Parquet shards of labelled rows."""
    if (folder / "whole").exists():
        return folder
    draw = np.random.default_rng([seed, count])
    for start in range(0, count, SHARD):
        rows = np.arange(start, min(start + SHARD, count))
        lengths = draw.integers(100, 251, len(rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = draw.integers(0, CODEBOOK, offsets[-1]).astype(np.int32)
        columns = {
            "id": [f"u{row}" for row in rows],
            "text": [_sentence(row // 4) for row in rows],
            "speaker": [("anna", "bert")[row // 4 % 2] for row in rows],
            "speech": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
            "label": draw.random(len(rows)) < 0.5,
        }
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(columns), folder / f"rows-{start // SHARD:04}.parquet")
    (folder / "whole").touch()
    return folder


def _sentence(number: int) -> str:
    """Different words for each number, about 25 letters."""
    words = hashlib.blake2b(str(number).encode(), digest_size=11).digest()
    return f"{''.join(LETTERS[one % 27] for one in words).strip()} {np.base_repr(number, 26).lower()} said".strip()


def write_model(folder: Path) -> Path:
    """A policy of a few thousand weights, one text token per letter."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes

    if not folder.exists():
        letters = LETTERS + "0123456789"
        tokenizer = Tokenizer(WordLevel({one: i for i, one in enumerate(letters)}, unk_token=" "))
        tokenizer.pre_tokenizer = Split("", "isolated")
        tokenizer.save(str(folder.with_suffix(".json")))
        sizes = Sizes(
            CODEBOOK, len(letters), hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=24
        )
        Qwen2CodecLM(sizes=sizes, tokenizer=str(folder.with_suffix(".json"))).save(folder)
    return folder


def recipe(work: Path, manifest: Path | str, objective: str, note: Path, steps: int) -> Path:
    """Write the recipe of a fit."""
    made = {
        "objective": objective,
        "model": {
            "policy": {"class_path": "Qwen2CodecLM", "init_args": {"directory": str(write_model(work / "model"))}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"manifest": str(manifest), "rows_per_step": 4},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "scaling.Watch"}],
        },
        "run": {"checkpoint_every": SAVED_EVERY, "threads": 1, "test_after_fit": False},
    }
    path = note.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(made))
    return path


def fit(
    work: Path, run: str, name: str, manifest: Path | str, steps: int, objective: str = "sft", kill_at: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """Run a fit in a process of its own, if that was not done; gives what it noted, and its exit status."""
    note = work / f"{run}-{name}.jsonl"
    done = note.with_suffix(".status")
    if done.exists():
        return [json.loads(line) for line in note.read_text().splitlines()], int(done.read_text())
    note.unlink(missing_ok=True)
    given = recipe(work, manifest, objective, note, steps)
    command = [sys.executable, "-m", "tts_align", "fit", "--config", str(given), "--run.directory", str(work / run)]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    told = {"PYTHONPATH": path, "SCALING_NOTES": str(note), "SCALING_KILL_AT": str(kill_at)}
    ended = subprocess.run(command, env=os.environ | told, capture_output=True, text=True)
    if ended.returncode not in (0, -signal.SIGKILL) or not note.exists():
        raise RuntimeError(f"fit ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    done.write_text(f"{ended.returncode}\n")
    return [json.loads(line) for line in note.read_text().splitlines()], ended.returncode


def starts(work: Path, count: int, objective: str) -> dict[str, Any]:
    """First and second start of a fit of so many rows."""
    manifest, run = write_corpus(work / f"rows{count}", count), f"{objective}{count}"
    if not (work / f"{run}-first.status").exists():
        shutil.rmtree(work / run, ignore_errors=True)
    found: dict[str, Any] = {"rows": count, "objective": objective}
    for name in ("first", "again"):
        shutil.rmtree(work / run / "checkpoints", ignore_errors=True)
        notes, _ = fit(work, run, name, manifest, 2, objective)
        found[name] = {key: notes[0][key] for key in ("cpu_seconds", "memory_mb")}
    cache = work / run / "cache"
    found["stored_mb"] = round(sum(one.stat().st_size for one in cache.glob("*") if one.is_file()) / 2**20, 1)
    print(json.dumps(found), flush=True)
    return found


def killed(work: Path, count: int) -> dict[str, Any]:
    """A fit that is killed and started again, against one that is not."""
    manifest = write_corpus(work / f"rows{count}", count)
    for run, name in (("whole", "whole"), ("cut", "killed")):
        if not (work / f"{run}-{name}.status").exists():
            shutil.rmtree(work / run, ignore_errors=True)
    whole, _ = fit(work, "whole", "whole", manifest, STEPS)
    cut, status = fit(work, "cut", "killed", manifest, STEPS, kill_at=KILLED)
    resumed, _ = fit(work, "cut", "resumed", manifest, STEPS)
    rows = {note["step"]: note["rows"] for note in whole if "rows" in note}
    after = [(note["step"], note["rows"]) for note in resumed if "rows" in note]
    found = {
        "rows": count,
        "steps": STEPS,
        "killed_before_step": KILLED,
        "status": status,
        "resumed_at_step": after[0][0],
        "steps_compared": len(after),
        "same_rows": all(rows[step] == these for step, these in after) and after[-1][0] == STEPS - 1,
        "same_rows_before": all(rows[note["step"]] == note["rows"] for note in cut),
        "resumed": {key: resumed[0][key] for key in ("cpu_seconds", "memory_mb")},
        "memory_mb_at_the_end": resumed[-1].get("memory_mb_at_the_end"),
    }
    print(json.dumps(found), flush=True)
    return found


def growth(sizes: list[int], seconds: list[float]) -> dict[str, float]:
    """Straight line through seconds over rows: seconds per million rows, those of no rows, and how well it fits."""
    x, y = np.asarray(sizes) / 1e6, np.asarray(seconds)
    slope, start = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - slope * x - start) ** 2).sum())
    return {
        "seconds_per_million_rows": round(float(slope), 2),
        "seconds_of_no_rows": round(float(start), 2),
        "r_squared": round(1 - rest / spread, 4) if spread else 1.0,
    }


def main(rows: list[int], work: Path, objectives: list[str], out: str = "scaling", kill: bool = True) -> dict[str, Any]:
    """Measure all sizes, save what was found, and print the fit.

    Args:
        rows: sizes.
        work: folder of corpora and runs.
        objectives: of the fits; the first one's growth is fitted.
        out: name of the results.
        kill: whether to kill and resume the largest size, too.
    """
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "sizes": [], "growth": {}}
    for objective in objectives:
        some = [starts(work, count, objective) for count in (rows if objective == objectives[0] else rows[-1:])]
        found["sizes"] += some
        if len(some) > 1:
            counts = [one["rows"] for one in some]
            found["growth"] = {
                name: growth(counts, [one[name]["cpu_seconds"] for one in some]) for name in ("first", "again")
            }
    if kill:
        found["killed"] = killed(work, rows[-1])
    print(json.dumps(found["growth"]))
    if out:
        print(save(out, found))
    return found


if __name__ == "__main__":
    from jsonargparse import auto_cli

    def measure(
        rows: list[int] = [1000, 125_000, 250_000, 500_000, 1_000_000],  # noqa: B006
        work: Path = Path("runs/scaling"),
        objectives: list[str] = ["sft"],  # noqa: B006
        out: str = "scaling",
        kill: bool = True,
    ) -> None:
        """Measure all sizes."""
        main(rows, work, objectives, out, kill)

    auto_cli(measure, as_positional=False)
