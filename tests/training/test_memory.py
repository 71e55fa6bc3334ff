# SPDX-License-Identifier: Apache-2.0
"""The estimate of memory, against what a training step really takes, and what it advises."""

import ctypes
import gc
import logging
import os
from pathlib import Path

import pytest
import torch
from processes import side_by_side
from tiny import build, make_trainer

from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes
from tts_align.objectives import SFT
from tts_align.training.memory import MemoryEstimate, available, estimate, free_memory

pytestmark = pytest.mark.whole_runs

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since :func:`forget`."""
    line = next(one for one in STATUS.read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) * 1024


def forget() -> None:
    """Let the largest size be that of now, without what other tests have freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")


@pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize(
    ("width", "layers", "rows", "recompute"), [(128, 2, 16, False), (256, 4, 12, False), (256, 4, 12, True)]
)
def test_a_step_takes_what_was_estimated(width: int, layers: int, rows: int, recompute: bool):
    """In a process of its own: what other tests have left behind moves by itself."""
    side_by_side(_steps, width, layers, rows, recompute, count=1)


def _steps(_: int, width: int, layers: int, rows: int, recompute: bool) -> None:
    sizes = Sizes(1000, 100, hidden_size=width, layers=layers, intermediate_size=4 * width)
    model = Qwen2CodecLM(sizes=sizes, recompute=recompute)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = collate([TokenRow((1, 2, 3), (4,) * 100)] * rows, model.layout)
    found = estimate(model, model.parameters(), [optimizer], len(batch.token))
    assert found is not None
    assert found.total > 25e6  # else it would drown in what Python does
    forget()
    before = resident("VmRSS")
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        model(batch).logp.sum().backward()
        optimizer.step()
    measured = resident("VmHWM") - before
    assert 0.5 < found.total / measured < 2, (found, measured)
    later = estimate(model, model.parameters(), [optimizer], len(batch.token))
    assert later is not None
    assert later.optimizer == 0  # it is there now


def test_the_parts():
    model = Qwen2CodecLM(sizes=Sizes(1000, 100))
    weights = sum(one.nbytes for one in model.parameters())
    sgd, adam = torch.optim.SGD(model.parameters(), momentum=0.9), torch.optim.Adam(model.parameters(), amsgrad=True)
    plain, rich = (estimate(model, model.parameters(), [one], 100, copies=2) for one in (sgd, adam))
    assert plain is not None
    assert rich is not None
    assert (plain.optimizer, rich.optimizer, plain.gradients) == (weights, 3 * weights, 2 * weights)
    full = estimate(model, model.parameters(), [sgd], 100, wants_logits=True)
    half = estimate(model, model.parameters(), [sgd], 100, half=True)
    assert full is not None
    assert half is not None
    assert full.logits == 5 * plain.logits
    assert half.activations < plain.activations
    assert plain.recomputed < plain.activations
    assert estimate(torch.nn.Linear(2, 2), [], [], 1) is None


def test_advice_names_what_is_large():
    many = MemoryEstimate(1, 2, 100, 10, 5000, 20)
    assert many.advice(200) == ""
    assert "tokens_per_micro_batch" in many.advice(100)
    assert "recompute, which saves 0 MB" in many.advice(100)
    assert "lora" not in many.advice(100)
    heavy = MemoryEstimate(4 * 10**9, 8 * 10**9, 10**8, 0, 10, 10**8)
    assert heavy.advice(10**10) == (
        "only 10.0 GB are free: train adapters (recipes/lora.yaml) or share the weights (recipes/strategy/fsdp.yaml)"
    )
    assert str(heavy).startswith("about 12.1 GB beside the weights (gradients 4.0 GB, optimizer 8.0 GB, activations")


def test_what_is_free(tmp_path: Path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:  1000 kB\n")
    assert free_memory(tmp_path) == 1000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    assert free_memory(tmp_path) == 1000 * 1024
    (group / "memory.max").write_text("600\n")
    assert free_memory(tmp_path) == 500
    assert free_memory(tmp_path / "nowhere") is None
    assert available(torch.device("meta")) is None


def test_a_training_says_it(
    tiny_policy: Path, tiny_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from tts_align.training.callbacks import tell_memory

    monkeypatch.setattr(tell_memory, "available", lambda device: 1000)
    module, data = build(SFT(), tiny_policy, tiny_rows, tmp_path)
    trainer = make_trainer(tmp_path, tell_memory.TellMemory(), max_steps=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.fit(module, data)
    said = [one.getMessage() for one in caplog.records if one.getMessage().startswith("memory: ")]
    assert "tokens at once" in said[0]
    assert said[1].startswith("memory: only 0 MB are free: ")
