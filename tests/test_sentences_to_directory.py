# SPDX-License-Identifier: Apache-2.0
"""From nothing but sentences to a better directory, with the package's own recogniser and no Python of the user."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path

import pytest
import soundfile
import torch
from places import RECIPES
from sources import sound
from tiny_directory import make_directory
from tiny_whisper import save_whisper

from tts_align.cli.entry import label, run
from tts_align.data.manifest import read_manifest
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.utils.files import read_json_lines

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
SMALL = {
    "model.sampling.max_ratio": 3,
    "model.optimizer.init_args.lr": 0.01,
    "data.rows_per_step": 4,
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
}
"""What a recipe for 0.5B parameters and a GPU needs to run here in a blink."""


def test_from_sentences_to_a_better_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Version 2; ``test_readme.py`` goes the same way with version 3."""
    family = "cosyvoice2"
    directory, ears = make_directory(tmp_path / "model", family), save_whisper(tmp_path / "whisper")
    soundfile.write(tmp_path / "anna.wav", sound(1, 0.6, 16_000), 16_000)
    (tmp_path / "voices.jsonl").write_text(json.dumps({"speaker": "anna", "audio": "anna.wav", "text": "Hello."}))
    (tmp_path / "sentences.txt").write_text("Hello there.\n\nGood bye.\nHell\n", "utf-8")
    (tmp_path / "held_out.txt").write_text("Hello you.\n", "utf-8")
    recipe = ["--config", str(RECIPES / "tkto.yaml"), "--config", str(RECIPES / "models" / f"{family}.yaml")]
    recipe += flags({"model.policy.init_args.directory": directory, **SMALL})
    recipe += flags({"model.policy.init_args.voices": tmp_path / "voices.jsonl"})
    listener = flags(
        {
            "model.judge": "WhisperJudge",
            "model.judge.model": ears,
            "model.judge.language": "en",
            "model.judge.max_tokens": 8,
        }
    )
    drawn, heard, rows = (tmp_path / f"{name}.jsonl" for name in ("drawn", "heard", "rows"))

    words = {"prompts": tmp_path / "sentences.txt", "samples": 4, "out": drawn, "audio": "true"}
    run(["sample", *recipe, *flags(words)])
    assert {row["speaker"] for _, row in read_json_lines(drawn)} == {"anna"}
    run(["judge", *recipe, *listener, *flags({"candidates": drawn, "out": heard})])
    verdicts = [row for _, row in read_json_lines(heard)]
    assert len(verdicts) == 12
    assert all(row["audio"] for row in verdicts)
    limit = statistics.median(row["cer"] for row in verdicts)
    rule = {"rule.keep": "all", "rule.neither": "undesirable", "rule.max_cer": limit}
    label(flags({"judged": heard, "out": rows, **rule}))
    assert {row.desirable for row in read_manifest(rows).rows} == {True, False}

    before = torch.get_num_threads()
    run(["fit", *recipe, *flags({"data.manifest": rows, "run.directory": tmp_path / "run"})])
    assert torch.get_num_threads() == before
    printed = capsys.readouterr().out
    hint = next(line for line in printed.splitlines() if line.strip().startswith("tts-align test"))
    places = {"sentences.txt": str(tmp_path / "held_out.txt"), "FOLDER": str(ears), "CODE": "en"}
    words_of_hint = [places.get(word, word) for word in shlex.split(hint)]
    run([*words_of_hint[1:], "--model.judge.max_tokens", "8"])
    assert list((tmp_path / "run" / "test" / "audio").iterdir())
    run(["export", "--config", str(tmp_path / "run" / "config.yaml"), "--to", str(tmp_path / "better")])

    old, new = (CosyVoiceLM(str(tmp_path / name)).state_dict() for name in ("model", "better"))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)


def flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]
