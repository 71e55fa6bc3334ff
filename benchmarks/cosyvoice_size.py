# SPDX-License-Identifier: Apache-2.0
"""Memory and time that a model of CosyVoice's full size takes: one step of token-level KTO, and decoding.

    OMP_NUM_THREADS=1 python benchmarks/cosyvoice_size.py    # some ten minutes; writes results/cosyvoice_size.json

Without ``--directory`` a CosyVoice2 directory of random weights is made, of which only the language model is there:
sizes, files and code are the real ones. Every case runs in a process of its own, whose largest resident memory is what
the system counted, Python and libraries included. The policy trains as a recipe makes it train: AlignModule, AlignData,
Lightning's trainer, AdamW; π⁺ and π⁻ come from a cache, the reference runs in every step. ``--device cuda`` also notes
what the GPU's memory held at most; untested so far.
"""

from __future__ import annotations

import functools
import gc
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from machine import Clock, machine, save
from step import random_log_ratios

from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.models.base.generation import Sampling
from tts_align.models.cosyvoice.directory import BACKBONE
from tts_align.models.cosyvoice.lm import CosyVoiceLM, published_names
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM, Sizes
from tts_align.objectives import TKTO
from tts_align.training.contrast import Contrast
from tts_align.training.module import AlignModule
from tts_align.utils.messages import quiet

SIZES = Sizes(
    codebook_size=6561,
    text_vocabulary=151936,
    hidden_size=896,
    layers=24,
    heads=14,
    key_value_heads=2,
    intermediate_size=4864,
)
Case = Literal["full", "lora", "lora_bfloat16", "decoding"]
CASES: tuple[Case, ...] = ("full", "lora", "lora_bfloat16", "decoding")


def make_directory(path: Path, sizes: Sizes = SIZES) -> Path:
    """Write a CosyVoice directory of random weights, with a tokenizer that has bytes for tokens, and no vocoder."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backbone = path / BACKBONE
    backbone.mkdir(parents=True)
    (path / f"{sizes.family}.yaml").write_text("sample_rate: 24000\n")
    config = {
        "model_type": "qwen2",
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "intermediate_size": sizes.intermediate_size,
        "vocab_size": sizes.text_vocabulary,
    }
    (backbone / "config.json").write_text(json.dumps(config))
    (backbone / "vocab.json").write_text(json.dumps({byte: i for i, byte in enumerate(bytes_to_unicode().values())}))
    (backbone / "merges.txt").write_text("#version: 0.2\n")
    (backbone / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    torch.manual_seed(0)
    torch.save(published_names(Qwen2CodecLM(sizes=sizes).state_dict()), path / "llm.pt")
    gc.collect()
    return path


def make_rows(path: Path, codebook_size: int, rows: int, text: int, speech: int) -> str:
    """Write a manifest of random labelled rows."""
    random = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return str(
        write_manifest(
            [
                Row(
                    id=str(number),
                    text="".join(random.choice(letters, text)),
                    speech=tuple(random.integers(0, codebook_size, speech).tolist()),
                    desirable=number % 2 == 0,
                )
                for number in range(rows)
            ],
            path,
        )
    )


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """The same to a tenth of a second."""
    return {name: round(value, 1) for name, value in seconds.items()}


class Timed(Callback):
    """Seconds of every step, from its batch to the new weights."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin to count."""
        self.clock.start()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the seconds."""
        self.steps.append(rounded(self.clock.read()))


def train(
    case: Case, directory: Path, rows: int, text: int, speech: int, device: str, steps: int = 2
) -> dict[str, Any]:
    """Train some steps of token-level KTO; the first also makes the optimiser's state.

    Args:
        case: all weights, or adapters on a base in float32 or bfloat16.
        directory: of the model.
        rows: in a step, which is one micro-batch.
        text: tokens of each.
        speech: speech tokens of each.
        device: cpu or cuda.
        steps: how many.
    """
    lora = None if case == "full" else LoRA(rank=16, alpha=32)
    policy = CosyVoiceLM(str(directory), dtype="bfloat16" if case == "lora_bfloat16" else "float32", lora=lora)
    objective = TKTO()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = make_rows(folder / "rows.jsonl", policy.layout.codebook_size, rows * steps, text, speech)
        data = AlignData(
            manifest,
            wants=objective.rows_wanted,
            rows_per_step=rows,
        )
        data.prepare(policy)
        module = AlignModule(
            objective,
            policy,
            contrast=Contrast(weights=str(random_log_ratios(data, policy, folder).path)),
            cache=str(folder / "cache"),
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-6, weight_decay=0),
        )
        timed = Timed(Clock(device))
        trainer = Trainer(
            accelerator="gpu" if device.startswith("cuda") else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            max_steps=steps,
            callbacks=[timed],
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    trained = sum(value.numel() for value in policy.parameters() if value.requires_grad)
    return {"trained_parameters": trained, "seconds": timed.steps[-1], "seconds_first": timed.steps[0]}


def decode(directory: Path, rows: int, text: int, device: str) -> dict[str, Any]:
    """Read prompts and speak as many speech tokens for each as it has text tokens."""
    policy = CosyVoiceLM(str(directory)).to(device).eval()
    letters = "the quick brown fox jumps over the lazy dog " * text
    prompts = [policy.encode_text(letters[row : row + text]).prompt(seed=row) for row in range(rows)]
    clock = Clock(device)
    spoken = policy.generate(prompts, Sampling(min_ratio=0.9, max_ratio=1.0))
    return {"codes": sum(len(one.speech) for one in spoken), "seconds": rounded(clock.read())}


def measure(case: Case, directory: Path, rows: int, text: int, speech: int, device: str) -> dict[str, Any]:
    """Run one case in this process, and say what it took."""
    quiet()
    took = (
        decode(directory, rows, text, device)
        if case == "decoding"
        else train(case, directory, rows, text, speech, device)
    )
    unit = 1 if sys.platform == "darwin" else 1024
    took["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda"):
        took["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return {"case": case, "rows": rows, "text": text, "speech": speech, **took}


def apart(case: Case, directory: Path, *sizes: Any) -> dict[str, Any]:
    """The same in a fresh process."""
    names = ("rows", "text", "speech", "device")
    options = [f"--{name}={value}" for name, value in zip(names, sizes, strict=True)]
    command = [sys.executable, __file__, f"--only={case}", f"--directory={directory}", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    directory: Path | None = None,
    rows: int = 4,
    text: int = 20,
    speech: int = 100,
    device: str = "cpu",
    out: str = "cosyvoice_size",
    only: Case | None = None,
) -> None:
    """Measure every case, print and save.

    Args:
        directory: of a CosyVoice model; one of random weights is made without.
        rows: in a step.
        text: characters of each.
        speech: speech tokens of each, 25 a second.
        device: cpu or cuda.
        out: name of the results.
        only: measure this case in this process, and print what it took.
    """
    if only is not None:
        assert directory is not None
        print(json.dumps(measure(only, directory, rows, text, speech, device)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = make_directory(Path(scratch) / "model") if directory is None else directory
        found = []
        for case in CASES:
            found.append(apart(case, model, rows, text, speech, device))
            one = found[-1]
            peak = one.get("peak_device_bytes", one["peak_bytes"]) / 1e9
            print(f"{case:15}{peak:6.1f} GB {one['seconds']['wall']:7.1f} s", flush=True)
    weights = "random" if directory is None else str(directory.name)
    print(save(out, {"machine": machine(device), "weights": weights, "rows": found}))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
