# SPDX-License-Identifier: Apache-2.0
"""Speaking by vLLM: the same most probable tokens as by the own engine, with the weights of the moment.

With ``TTS_ALIGN_VLLM_PYTHON`` set to the interpreter of an environment that has vLLM, all of it runs there. Without,
a stand-in of vLLM's interface is used (``stand_in_vllm``), so that everything but vLLM itself runs anywhere.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from tiny_directory import FAMILIES, make_directory

from tts_align.cli.entry import run
from tts_align.data.collate import MicroBatches, PlanSampler
from tts_align.data.datamodule import AlignData
from tts_align.models.base.generation import Sampling
from tts_align.models.cosyvoice import vllm
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.cosyvoice.vllm import PYTHON, VLLM, VLLMEngine
from tts_align.models.policy.qwen2 import LoRA
from tts_align.objectives import DiffRO
from tts_align.utils.files import read_json_lines

GREEDY = Sampling(temperature=0.0, repetition_window=0, min_ratio=1.0, max_ratio=5.0)
TEXTS = ("hello.", "hell", "he said hello to her", "o")
REAL = os.environ.get(PYTHON)


@pytest.fixture(autouse=True, scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """That of vLLM's environment, or this one with a stand-in."""
    stand_in = ROOT / "tests/models/cosyvoice/stand_in"
    script = executable(
        tmp_path_factory.mktemp("python") / "python", f'PYTHONPATH="{stand_in}" exec "{sys.executable}"'
    )
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            patch.setenv(PYTHON, str(script))
        yield


def executable(path: Path, command: str) -> Path:
    path.write_text(f'#!/bin/sh\n{command} "$@"\n')
    path.chmod(0o755)
    return path


def made(folder: Path, family: str = "cosyvoice2", **options: Any) -> CosyVoiceLM:
    """A model with heads of 32 channels, the fewest that vLLM computes on a CPU."""
    directory = make_directory(folder / family, family, hidden=64, heads=2, layers=2, codebook_size=30)
    return CosyVoiceLM(str(directory), vllm=VLLM(memory_gib=1.0), **options).eval()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CosyVoiceLM]:
    model = made(tmp_path_factory.mktemp("vllm"))
    yield model
    assert model.engine is not None
    model.engine.close()


def spoken(policy: CosyVoiceLM, sampling: Sampling = GREEDY, seed: int = 0) -> list[tuple[list[int], bool]]:
    prompts = [policy.encode_text(text).prompt(seed + number) for number, text in enumerate(TEXTS)]
    return [(one.speech.tolist(), one.finished) for one in policy.generate(prompts, sampling)]


def by_itself(policy: CosyVoiceLM, sampling: Sampling = GREEDY) -> list[tuple[list[int], bool]]:
    """By the own engine."""
    prompts = [policy.encode_text(text).prompt(number) for number, text in enumerate(TEXTS)]
    return [(one.speech.tolist(), one.finished) for one in super(CosyVoiceLM, policy).generate(prompts, sampling)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_probable_tokens_are_those_of_the_own_engine_whatever_the_weights(family: str, tmp_path: Path):
    policy = made(tmp_path, family)
    first = spoken(policy)
    assert first == by_itself(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, fused=True)
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert (moved := spoken(policy)) == by_itself(policy) != first
    for parameter in policy.parameters():
        parameter.data.mul_(0.5)  # which PyTorch's counters do not see
    assert spoken(policy) == by_itself(policy) != moved


def test_adapters_are_merged_and_taken_off(tmp_path: Path):
    policy = made(tmp_path, lora=LoRA(rank=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.5)
    with_adapter = spoken(policy)
    assert with_adapter == by_itself(policy)
    with policy.without_adapter():
        assert spoken(policy) == by_itself(policy) != with_adapter
    assert policy.engine is not None
    policy.engine.close()


def test_draws_follow_the_seed_and_keep_the_limits(policy: CosyVoiceLM):
    drawn = replace(GREEDY, temperature=1.0, top_p=0.9, top_k=5, min_ratio=3.0)
    assert spoken(policy, drawn) == spoken(policy, drawn) != spoken(policy, drawn, seed=100)
    for text, (tokens, finished) in zip(TEXTS, spoken(policy, drawn), strict=True):
        words = len(policy.encode_text(text).text) - policy.encode_text(text).prefix
        assert 3 * words <= len(tokens) <= 5 * words
        assert finished or len(tokens) == 5 * words
        assert all(0 <= token < policy.layout.codebook_size for token in tokens)


def test_longer_utterances_get_another_room(policy: CosyVoiceLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm, "_SHORTEST_ROOM", 64)
    assert policy.engine is not None
    policy.engine.close()
    assert spoken(policy, replace(GREEDY, max_ratio=2.0)) == by_itself(policy, replace(GREEDY, max_ratio=2.0))
    assert (room := policy.engine._room) < 256
    longer = replace(GREEDY, max_ratio=9.0, min_ratio=8.0)
    assert spoken(policy, longer) == by_itself(policy, longer)
    assert policy.engine._room > room


def test_sample_speaks_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And candidates of the two engines are not taken for each other."""
    monkeypatch.chdir(tmp_path)
    directory = made(tmp_path).directory
    Path("prompts.txt").write_text("hello.\nhe said\n")
    policy = f"--model.policy={{class_path: CosyVoiceLM, init_args: {{directory: {directory}}}}}"
    words = ["sample", policy, "--prompts", "prompts.txt", "--out", "out.jsonl", "--samples", "1"]
    words += ["--model.sampling.temperature", "0", "--model.sampling.repetition_window", "0"]
    run(words)
    own = [row["speech"] for _, row in read_json_lines(Path("out.jsonl"))]
    by_vllm = ["--model.policy.init_args.vllm", "{memory_gib: 1}"]
    with pytest.raises(SystemExit):
        run([*words, *by_vllm])  # made with other settings
    cli = run([*words, *by_vllm, "--overwrite", "true"])
    assert [row["speech"] for _, row in read_json_lines(Path("out.jsonl"))] == own
    cli.model.policy.engine.close()


def test_roll_outs_are_spoken_by_it(policy: CosyVoiceLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What free DiffRO trains on: new speech of the same texts, a row without end keeps what it had."""
    rows = [{"id": f"r{number}", "text": text, "speech": [1, 2, 3]} for number, text in enumerate(TEXTS)]
    (manifest := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = AlignData(str(manifest), wants=DiffRO(rollout="free", sft_weight=0.0).rows_wanted, rows_per_step=len(TEXTS))
    data.prepare(policy)
    split = data._splits["train"]
    batch = MicroBatches(split.examples, split.layout)[next(iter(PlanSampler(split.plan, split.examples)))]
    assert policy.engine is not None
    asked = []
    generate = policy.engine.generate
    monkeypatch.setattr(policy.engine, "generate", lambda *given: asked.append(given) or generate(*given))
    first, again = (policy.roll_out(batch).utterances for _ in range(2))
    assert len(asked) == 2
    assert first is not None
    assert again is not None
    assert [row.text for row in first.rows] == [row.text for row in batch.utterances.rows]
    assert [row.speech for row in first.rows] == [row.speech for row in again.rows]
    said = policy.generate(asked[0][1], asked[0][2])
    for row, one in zip(first.rows, said, strict=True):
        assert row.speech == (tuple(one.speech.tolist()) if one.finished and len(one.speech) else (1, 2, 3))
    assert any(one.finished for one in said)


def test_a_copy_speaks_by_a_process_of_its_own(policy: CosyVoiceLM):
    spoken(policy)
    assert policy.engine is not None
    for other in (copy.deepcopy(policy).engine, pickle.loads(pickle.dumps(policy.engine))):
        assert isinstance(other, VLLMEngine)
        assert (other.settings, other._process) == (VLLM(memory_gib=1.0), None)
    assert policy.engine._process is not None


def test_the_base_of_a_test_speaks_by_the_same_engine(policy: CosyVoiceLM):
    """Otherwise a test would compare engines."""
    again = policy.rebuild()
    assert again.engine is not None
    assert (again.engine.settings, again.engine._process) == (VLLM(memory_gib=1.0), None)
    assert again.speech_digest() == f"{again.digest()} vllm"


def test_the_process_ends_with_the_policy(policy: CosyVoiceLM):
    spoken(policy)
    engine = policy.engine
    assert engine is not None
    assert engine._process is not None
    process, engine._process = engine._process.process, None
    gc.collect()
    assert process.poll() == -9


def test_what_does_not_work_is_said(policy: CosyVoiceLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"set model.sampling.repetition_window to 0"):
        spoken(policy, Sampling())
    with pytest.raises(ValueError, match=r"neither with model.sampling.weights int8"):
        spoken(policy, replace(GREEDY, weights="int8"))
    with pytest.raises(ValueError, match=r"memory_gib must be a number of GiB above 0, got 0\.0"):
        VLLM(memory_gib=0.0)
    policy.engine.close()  # type: ignore[union-attr]
    monkeypatch.setenv(PYTHON, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"names .*nowhere, and there is no such file"):
        spoken(policy)
    monkeypatch.setenv(PYTHON, "")
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed here. .* set TTS_ALIGN_VLLM_PYTHON=VLLM/bin/python"):
        spoken(policy)


def test_a_fault_of_vllm_is_told(policy: CosyVoiceLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = policy.engine
    assert isinstance(engine, VLLMEngine)
    spoken(policy)
    assert engine._process is not None
    with pytest.raises(RuntimeError, match="vLLM cannot weights: "):
        engine._process.ask("weights", directory=str(tmp_path / "not there"))
    engine._process.process.kill()
    with pytest.raises(RuntimeError, match="vLLM ended with status -9; its last lines:"):
        spoken(policy)
    monkeypatch.setenv(PYTHON, str(executable(tmp_path / "broken", "echo no such module >&2; exit 3;")))
    engine.close()
    with pytest.raises(RuntimeError, match=r"(?s)vLLM ended with status 3; .*no such module"):
        spoken(policy)
