# SPDX-License-Identifier: Apache-2.0
"""From sentences to labels with a Whisper that a recipe names, by the commands alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_readme import block, follow
from tiny_whisper import convert, save_whisper

from tts_align.cli.entry import label, run
from tts_align.evaluation.calibration import read_calibration
from tts_align.evaluation.candidates import read_candidates
from tts_align.evaluation.prompts import read_prompts, write_prompts
from tts_align.utils.files import read_json_lines

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
QUIET = ("--trainer.accelerator", "cpu", "--run.threads", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A converted Whisper, a recipe that names it, and two sentences with a marked word."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("whisper")
    convert(save_whisper(folder / "stored"), folder / "whisper")
    judge = {
        "class_path": "WhisperJudge",
        "init_args": {
            "model": str(folder / "whisper"),
            "language": "ja",
            "max_tokens": 4,
            "script": "written",
            "readings": {"min_margin": 0, "max_cer": 100},
        },
    }
    model = {
        "policy": {"class_path": "Qwen2CodecLM", "init_args": {"directory": "demo:audio/base"}},
        "vocoder": {"class_path": "MelVocoder"},
        "judge": judge,
        "sampling": {"max_ratio": 3},
        "test": None,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": model}))
    marked = [one for one in read_prompts("demo:audio/sentences/dev.jsonl") if one.spans][:2]
    write_prompts(folder / "marked.jsonl", [replace(one, speaker="sakura") for one in marked])
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--config", str(place / "recipe.yaml"), *QUIET]


def test_the_way_from_sentences_to_labels(
    place: Path, recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's commands; the judge is random, so any accuracy of its own will do."""
    (tmp_path / "marked.jsonl").write_bytes((place / "marked.jsonl").read_bytes())
    run(["sample", *recipe, "--prompts", "marked.jsonl", "--out", "drawn.jsonl", "--samples", "2"])
    rule = "--rule.keep all --rule.max_cer 100 --rule.neither undesirable"
    more = {"judge": " ".join(QUIET), "label": f"--min_judge_accuracy 0 {rule}"}
    commands = block("tts_align/evaluation/README.md", "--calibrate", "label")
    follow(commands, {"RECIPE": recipe[1]}, more, monkeypatch)
    stored = tmp_path / "runs/recipe/judge_accuracy.json"
    known = read_calibration(stored)
    assert known is not None
    assert known.judged + known.abstained == 4, "two sentences, each with both readings written out"
    judged = read_candidates("judged.jsonl")
    assert len(judged) == 4
    for one in judged:
        assert one.verdict is not None
        assert one.verdict.readings.keys() == {*one.prompt.spans[0].right, *one.prompt.spans[0].wrong}
    assert read_calibration(tmp_path / "judged.jsonl.judge_accuracy.json") == known
    assert len(list(read_json_lines(Path("rows.jsonl")))) == 4
    poor = json.loads(stored.read_text())
    poor["words"] = {"辛い/からい": {"right": 3, "wrong": 7, "abstained": 0}}
    (tmp_path / "poor.json").write_text(json.dumps(poor))
    with pytest.raises(SystemExit):
        label(["--judged", "judged.jsonl", "--out", "other.jsonl", "--judge_accuracy", "poor.json", *rule.split()])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("--candidates drawn.jsonl", "judge needs --candidates and --out, or --calibrate"),
        ("--calibrate a.jsonl --out b.jsonl", "calibrate listens to no candidates"),
        ("--candidates a --out b --speakers [sakura]", "speakers has no effect without calibrate"),
    ],
)
def test_judge_says_what_it_needs(
    recipe: list[str], capsys: pytest.CaptureFixture[str], options: str, fault: str
) -> None:
    with pytest.raises(SystemExit):
        run(["judge", *recipe, *options.split()])
    assert fault in capsys.readouterr().err


def test_missing_weights_end_without_a_traceback(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["judge", *recipe, "--model.judge.init_args.model", "whisper-large-v3", "--candidates", "a", "--out", "b"])
    said = capsys.readouterr().err
    assert "hf download Systran/faster-whisper-large-v3 --local-dir whisper-large-v3" in said
    assert "Traceback" not in said
