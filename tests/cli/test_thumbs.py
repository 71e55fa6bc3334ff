# SPDX-License-Identifier: Apache-2.0
"""Recordings with a thumb up or down, and no speech tokens, become training rows by two commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from places import RECIPES
from sources import sound
from test_cosyvoice_round_trip import TINY, save_lines
from tiny_directory import make_directory

from tts_align.cli.entry import prepare, run
from tts_align.data.manifest import read_manifest

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_from_thumbs_to_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_directory(tmp_path / "DIR", "cosyvoice3", voices=True)
    thumbs = [True, False, 1, 0, "desirable", "undesirable", True, False]
    rows = []
    for number, thumb in enumerate(thumbs):
        soundfile.write(tmp_path / f"{number}.wav", np.asarray(sound(number, 0.8, 16_000)), 16_000)
        rows.append({"id": f"r{number}", "text": f"Hello {number // 2}", "audio": f"{number}.wav", "label": thumb})
    save_lines(tmp_path / "thumbs.jsonl", rows)
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    prepare(["--directory", "DIR", "--source", "thumbs.jsonl", "--out", "rows.jsonl", *cpu])
    prepared = read_manifest(tmp_path / "rows.jsonl").rows
    assert [row.desirable for row in prepared] == [bool(thumb) and thumb != "undesirable" for thumb in thumbs]
    assert all(row.speech for row in prepared)
    options = {"model.policy.init_args.directory": "DIR", "data.manifest": "rows.jsonl", **TINY}
    config = [f"--config={RECIPES / name}" for name in ("kto.yaml", "models/cosyvoice3.yaml")]
    fitted = run(["fit", *config, *(f"--{key}={value}" for key, value in options.items())])
    assert fitted.trainer.global_step == 2
