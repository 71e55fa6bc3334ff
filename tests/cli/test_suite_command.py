# SPDX-License-Identifier: Apache-2.0
"""A published test set with a CosyVoice directory, in one command and without a training."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from places import RECIPES
from sources import sound
from test_cosyvoice_round_trip import make_rows
from tiny_directory import make_directory

from tts_align.cli.entry import run
from tts_align.data.manifest import write_manifest
from tts_align.evaluation.judges.base import Judge, Reading, Verdict
from tts_align.evaluation.measures.base import UtteranceMeasure
from tts_align.evaluation.report import read_utterances

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]


class Counter(Judge):
    """Hears as many words as the sound has tenths of a second, three at most."""

    def judge(self, samples, expected):
        words = [" ".join(["hello"] * min(3, len(one.waveform) * 10 // one.sample_rate)) for one in samples]
        return [Verdict(said, Reading.UNMARKED, 0.0, 0.0) for said in words]


class Longer(UtteranceMeasure):
    """Length over that of the voice's recording."""

    name = "longer"
    needs_prompt = True

    def measure(self, samples):
        return [{"longer": one.waveform.numel() / one.prompt.waveform.numel()} for one in samples]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tts-align"])
    make_directory(tmp_path / "DIR", "cosyvoice2")
    write_manifest(make_rows(), tmp_path / "FILE.jsonl")
    for name in ("anna", "bert"):
        soundfile.write(tmp_path / f"{name}.wav", np.asarray(sound(len(name), 0.6, 16_000)), 16_000)
    lines = ["u1|Hello.|anna.wav|Hello, hello!", "u2|Bye.|bert.wav|Hello hello hello", "u3|Hello.|anna.wav|Bye"]
    (tmp_path / "meta.lst").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_one_command(work: Path):
    threads = torch.get_num_threads()
    words = ["test", "--config", str(RECIPES / "sft.yaml"), "--config", str(RECIPES / "models/cosyvoice2.yaml")]
    words += ["--model.policy.init_args.directory", "DIR", "--data.manifest", "FILE.jsonl", "--run.threads", "1"]
    words += ["--run.directory", "run", "--model.judge", "test_suite_command.Counter", "--trainer.accelerator", "cpu"]
    words += ["--model.test.suite", "seed", "--model.test.prompts", "meta.lst", "--model.test.language", "en"]
    words += ["--model.test.measures", '[{"class_path": "test_suite_command.Longer"}]', "--model.test.audio", "all"]
    words += ["--model.sampling.max_ratio", "3", "--trainer.enable_progress_bar", "false"]
    try:
        run(words)
        before = {path: path.read_bytes() for path in Path("run/test").rglob("*.jsonl")}
        run(words)
    finally:
        torch.set_num_threads(threads)
    assert {path: path.read_bytes() for path in Path("run/test").rglob("*.jsonl")} == before
    rows = read_utterances(work / "run/test/utterances.jsonl")
    assert [(one.id, one.system) for one in rows] == [(f"u{number}", "base") for number in (1, 2, 3)]
    assert all(one.error_rate >= 0 and one.seconds > 0 and Path("run/test", one.audio).is_file() for one in rows)
    assert all(one.measures["longer"] > 0 for one in rows)
    voices = [json.loads(line) for line in Path("run/test/voices.jsonl").read_text().splitlines()]
    assert [(one["speaker"], one["text"]) for one in voices] == [("anna", "Hello."), ("bert", "Bye.")]
    summary = json.loads(Path("run/test/summary.json").read_text())
    assert (summary["protocol"]["name"], summary["suite"]["name"]) == ("seed", "seed")
    assert summary["rates"]["base"]["utterances"] == 3
