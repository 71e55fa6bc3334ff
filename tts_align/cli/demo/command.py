# SPDX-License-Identifier: Apache-2.0
"""The command ``demo build``: everything that ships with the package, from nothing but eSpeak NG and a seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from tts_align.cli.demo.build import build
from tts_align.cli.demo.gates import SAMPLING
from tts_align.cli.demo.manner_build import build_manner
from tts_align.cli.demo.symbolic_build import build_symbolic
from tts_align.cli.judge import judge
from tts_align.cli.label import label
from tts_align.cli.sample import sample
from tts_align.data.demo.sentences import SPEAKERS
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.parts import Parts
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.assets import ASSETS

DRAWN_TOP_P = 0.97
"""Candidates are drawn a little wilder than tests: at 0.9 hardly a sentence has both a right and a wrong one."""


def build_demo(
    directory: Path = ASSETS,
    seed: int = 0,
    corpus: Literal["audio", "symbolic", "both", "manner"] = "both",
    work: Path = Path("demo/build"),
    threads: int = 1,
) -> None:
    """Build the embedded experiments: models, sentences, and the labelled rows that the recipes train on.

    The audio experiment needs `pip install -e '.[demo]'` for its voice (eSpeak NG, GPL, in a process of its own) and
    about twenty minutes of one core; killed and started again it continues. It ships only what passes its gates.

    Args:
        directory: folder for the finished artefacts; the package's own by default.
        seed: seed of everything random.
        corpus: experiment to build: audio, symbolic, both of these, or manner, which does not ship: sentences in two
            manners and three qualities, for recipes/diffro/manner.yaml; up to an hour.
        work: folder for work in progress.
        threads: threads of PyTorch; these models are small: two threads are slower than one when anything else runs.
    """
    torch.set_num_threads(threads)
    if corpus == "manner":
        build_manner(directory / "manner", seed, work=work.with_name(f"{work.name}-manner"), threads=threads)
        return
    if corpus != "symbolic":
        build(directory / "audio", seed, work=work, threads=threads)
        label_audio(directory / "audio", seed, work)
    if corpus != "audio":
        build_symbolic(directory / "symbolic", seed)


def label_audio(directory: Path, seed: int, work: Path, samples: int = 5) -> None:
    """Draw, judge and label candidates of the preference and dev sentences with the labelling recogniser.

    Args:
        directory: of the built experiment; gets ``preference.parquet`` and ``dev.parquet``.
        seed: of the candidates.
        work: where work in progress lies.
        samples: candidates per sentence and voice.
    """
    module = Parts(
        policy=Qwen2CodecLM(str(directory / "base")).eval(),
        judge=CTCJudge(str(directory / "labeller")),
        sampling=dataclasses.replace(SAMPLING, top_p=DRAWN_TOP_P),
        vocoder=MelVocoder(str(directory / "codec")),
    )
    for split in ("preference", "dev"):
        drawn, heard = work / f"{split}-drawn.jsonl", work / f"{split}-heard.jsonl"
        sample(module, directory / f"sentences/{split}.jsonl", drawn, samples, SPEAKERS, 256, seed, overwrite=True)
        judge(module, drawn, heard, 256, overwrite=True)
        label(heard, directory / f"{split}.parquet")
