# SPDX-License-Identifier: Apache-2.0
"""What README.md and the READMEs of the rooms say is so: every command, every file format, every piece of Python."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from places import RECIPES, ROOT
from sources import sound
from test_cosyvoice_round_trip import make_rows, save_lines
from tiny_directory import make_directory
from tiny_whisper import convert, save_whisper

from tts_align.cli.entry import main, run
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.select import Selector
from tts_align.evaluation.prompts import read_prompts
from tts_align.models.cosyvoice.voice_rows import read_voice_rows
from tts_align.objectives import KTO, Objective

READMES = {
    path: (ROOT / path).read_text("utf-8")
    for path in (
        "README.md",
        "recipes/README.md",
        "tts_align/data/README.md",
        "tts_align/evaluation/README.md",
        "tts_align/models/cosyvoice/README.md",
    )
}
README = READMES["README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {path: FENCED.findall(text) for path, text in READMES.items()}
SHORT = {
    "fit": "--trainer.max_steps 1 --trainer.limit_val_batches 1 --trainer.accelerator cpu "
    "--trainer.enable_progress_bar false --run.threads 1",
    "sample": "--model.sampling.max_ratio 3",
}
"""What a command of a README needs to end in a blink."""
TINY = "--trainer.accumulate_grad_batches 1 --data.rows_per_step 4"
pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of the user's own, in which nothing of the checkout but its recipes can be seen."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(Objective, "registry", dict(Objective.registry))
    (tmp_path / "recipes").symlink_to(RECIPES)
    yield
    torch.set_num_threads(threads)


def block(path: str, *words: str) -> str:
    """The one fenced block of a README that holds all of these words."""
    found = [text for _, text in BLOCKS[path] if all(word in text for word in words)]
    assert len(found) == 1, f"{path}: {len(found)} blocks with {words}"
    return found[0]


def follow(text: str, replaced: Mapping[str, str], more: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command of a block, line by line, with its placeholders replaced and some options behind it."""
    variables: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.isidentifier():
            variables[f"${name}"] = value.strip('"')
            continue
        words = [part for word in shlex.split(line) for part in shlex.split(variables.get(word, shlex.quote(word)))]
        assert words[0] == "tts-align"
        words = [replaced.get(word, word) for word in words]
        monkeypatch.setattr(sys, "argv", [*words, *shlex.split(more.get(words[1], ""))])
        main()


@pytest.fixture
def cosyvoice(tmp_path: Path) -> dict[str, str]:
    """A tiny Fun-CosyVoice3 directory and everything of the user's that the READMEs name."""
    make_directory(tmp_path / "DIR", "cosyvoice3", voices=True)
    write_manifest(make_rows(), tmp_path / "FILE.jsonl")
    save_lines(tmp_path / "sentences.jsonl", [{"id": "a", "text": "Hello"}, {"id": "b", "text": "Bye"}])
    for name in ("anna.wav", "bert.wav"):
        soundfile.write(tmp_path / name, np.asarray(sound(len(name), 0.6, 16_000)), 16_000)
    voices = [{"speaker": "anna", "audio": "anna.wav", "text": "Hello."}, {"speaker": "bert", "audio": "bert.wav"}]
    save_lines(tmp_path / "voices.jsonl", voices)
    save_lines(tmp_path / "recordings.jsonl", [{"id": "r1", "text": "Hello", "audio": "anna.wav"}])
    return {"DIR": "DIR", "FILE": "FILE.jsonl"}


# --- README.md ---------------------------------------------------------------------------------------------------


def test_it_opens_with_one_sentence_and_two_commands() -> None:
    assert README.startswith("# tts-align\n\n`tts-align` ")
    sentence = README.split("\n\n")[1]
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert [text.strip() for _, text in BLOCKS["README.md"][:2]] == [
        "pip install -e . && tts-align fit --config recipes/tkto.yaml",
        "pip install -e '.[test]' && pytest",
    ]
    assert len(README.splitlines()) <= 180


def test_the_first_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = block("README.md", "pip install -e .").partition("&&")[2].strip().partition("&&")[0]
    small = f"{SHORT['fit']} --data.max_rows 120 --model.test.sentences 2"
    follow(first, {}, {"fit": small}, monkeypatch)
    assert {path.name for path in (tmp_path / "runs/tkto").iterdir()} >= {
        *("config.yaml", "checkpoints", "tensorboard", "contrast", "test")
    }


def test_a_directory_becomes_better_in_three_commands(
    cosyvoice: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = block("README.md", "export", "--to BETTER")
    assert text == block("tts_align/models/cosyvoice/README.md", "export", "spoken.jsonl")
    follow(text, cosyvoice, {**SHORT, "fit": f"{SHORT['fit']} {TINY}"}, monkeypatch)
    assert (tmp_path / "BETTER/llm.pt").is_file()
    assert len(read_manifest(tmp_path / "spoken.jsonl", unprepared=True).rows) == 10


def test_labels_are_made_by_speaking_and_judging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = yaml.safe_load((RECIPES / "kto.yaml").read_text("utf-8"))
    overlay = yaml.safe_load((RECIPES / "models/symbolic.yaml").read_text("utf-8"))
    recipe["model"] |= {key: value for key, value in overlay["model"].items() if key in ("vocoder", "judge")}
    recipe["model"]["policy"]["init_args"] = overlay["model"]["policy"]["init_args"]
    recipe["model"] |= {"test": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    prompts = read_prompts("demo:audio/sentences/dev.jsonl")[:30]
    save_lines(tmp_path / "sentences.jsonl", [{**one.to_row(), "speaker": "sakura"} for one in prompts])
    small = {"fit": f"{SHORT['fit']} --data.validation null --data.rows_per_step 8"}
    follow(block("recipes/README.md", "--config RECIPE", "--candidates"), {"RECIPE": "recipe.yaml"}, small, monkeypatch)
    rows = read_manifest(tmp_path / "manifest.jsonl").rows
    assert {row.desirable for row in rows} == {True, False}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_before_and_after(cosyvoice: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are compared and heard by people; a published test set is spoken, and others' recordings are scored."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tests/cli")])
    small = f"{SHORT['fit']} --data.max_rows 120 --model.test.sentences 4 --model.test.audio all"
    follow("tts-align fit --config recipes/sft.yaml --run.directory runs/tkto", {}, {"fit": small}, monkeypatch)
    shutil.copytree("runs/tkto", "runs/kto")
    mine = "--config recipes/sft.yaml --config recipes/models/cosyvoice3.yaml --run.directory runs/NAME"
    mine += " --model.policy.init_args.directory DIR --data.manifest FILE.jsonl --run.test_after_fit false"
    follow(f"tts-align fit {mine}", {}, {"fit": f"{SHORT['fit']} {TINY}"}, monkeypatch)
    for folder in ("seedtts_testset/zh", "theirs", "."):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "meta.lst").write_text("u1|Hello.|anna.wav|Hello, hello!\nu2|Bye.|bert.wav|Hello hello hello\n")
        for name, other in (("anna", "u1"), ("bert", "u2")):
            for file in (f"{name}.wav", f"{other}.wav"):
                soundfile.write(Path(folder, file), np.asarray(sound(len(name), 0.6, 16_000)), 16_000)
    Path("recipe.yaml").write_text("model: {judge: {class_path: test_suite_command.Counter}}\n")
    more = "--model.judge test_suite_command.Counter --model.test.language en --trainer.accelerator cpu"
    follow(block("README.md", "listen make", "compare"), {}, {"test": f"{more} {SHORT['sample']}"}, monkeypatch)
    assert len(list(Path("runs/tkto/test").glob("comparison-with-*/report.html"))) == 1
    assert Path("test.html").is_file()
    assert json.loads(Path("runs/NAME/test/summary.json").read_text())["suite"]["name"] == "seed"
    assert json.loads(Path("theirs.scored/summary.json").read_text())["suite"]["name"] == "seed"


def test_the_objective_of_15_lines_runs_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("README.md", "class FocalDPO")
    body = [line for line in code.split("class FocalDPO", 1)[1].splitlines() if line.strip()]
    assert len(body) <= 15
    (tmp_path / "focal.py").write_text(code)
    command = shlex.split(block("README.md", "focal.FocalDPO"))
    assert command[:2] == ["tts-align", "fit"]
    monkeypatch.setitem(sys.modules, "focal", None)  # put back as it was afterwards
    del sys.modules["focal"]
    short = shlex.split(f"{SHORT['fit']} --data.max_rows 1500 --run.test_after_fit false")
    cli = run([*command[1:], *short])
    assert type(cli.model.objective).__name__ == "FocalDPO"
    assert cli.model.objective.gamma == 1
    assert cli.trainer.global_step == 1
    saved = yaml.safe_load((tmp_path / "runs/focal/config.yaml").read_text())
    assert saved["objective"]["class_path"] == "focal.FocalDPO"


def test_fit_is_a_function_and_three_lines_train() -> None:
    code = block("README.md", "fitted = fit(", "Trainer(max_epochs=1")
    few = "trainer__max_steps=1, run__threads=1, data__max_rows=1500, run__test_after_fit=False"
    quiet = "max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False"
    code = code.replace('run__directory="runs/dpo_beta02"', f'run__directory="runs/dpo_beta02", {few}')
    found: dict[str, Any] = {}
    exec(code.replace("max_epochs=1", quiet), found)
    assert found["fitted"].model.objective.beta == 0.2
    assert "train/loss" in found["fitted"].trainer.callback_metrics
    assert found["data"].steps_per_epoch < 20, "DPO reads pairs, of which there are few"


def test_a_loss_works_alone() -> None:
    found: dict[str, Any] = {}
    exec(block("README.md", "import dpo_loss"), found)
    chosen, rejected = np.array([1.0, -1.0]), np.array([-2.0, 1.0])
    assert float(found["loss"]) == pytest.approx(float(np.log1p(np.exp(-0.1 * (chosen - rejected))).mean()), rel=1e-6)


def test_every_file_of_the_tree_is_there() -> None:
    for line in block("README.md", "tts_align/\n").splitlines():
        path = line.split("  ")[0] if not line.startswith("  ") else f"tts_align/{line.split()[0]}"
        assert (ROOT / path.strip()).exists(), line


# --- the rooms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READMES)
def test_every_format_is_read(path: str, tmp_path: Path) -> None:
    for number, (language, text) in enumerate(BLOCKS[path]):
        if language != "json":
            continue
        rows = [json.loads(row) for row in re.split(r"\n(?=\{)", text.strip())]
        file = tmp_path / f"{number}.jsonl"
        save_lines(file, rows)
        if "speech" in rows[0]:
            assert len(read_manifest(file).rows) == len(rows)
        elif "speaker" in rows[0]:
            for row in rows:
                soundfile.write(tmp_path / row["audio"], np.asarray(sound(0, 0.6, 16_000)), 16_000)
            assert len(read_voice_rows(file)) == len(rows)
        else:
            assert len(read_prompts(file)) == len(rows)


def test_recipes_are_combined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = block("recipes/README.md", "recipes/lora.yaml").replace(" --config recipes/strategy/ddp.yaml", "")
    follow(text, {}, {"fit": f"{SHORT['fit']} --data.max_rows 1500 --run.test_after_fit false"}, monkeypatch)
    assert (tmp_path / "runs/dpo_lora/checkpoints/last.ckpt").is_file()


def test_from_nothing_but_sentences(cosyvoice: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = "tts_align/models/cosyvoice/README.md"
    whisper = convert(save_whisper(tmp_path / "stored"), tmp_path / "WHISPER")
    # A random Whisper prefers one reading whatever it hears: right in one sentence, wrong in the other.
    readings = (("からい", "つらい"), ("つらい", "からい"))
    spans = [{"start": 0, "end": 2, "right": [right], "wrong": [wrong]} for right, wrong in readings]
    rows = [
        {"id": f"s{number}", "text": f"辛い{number}", "language": "ja", "spans": [one]}
        for number, one in enumerate(spans)
    ]
    save_lines(tmp_path / "sentences.jsonl", rows)
    rules = "--rule.keep all --rule.max_cer 100 --rule.neither undesirable"
    more = {**SHORT, "fit": f"{SHORT['fit']} {TINY}", "label": rules, "sample": f"{SHORT['sample']} --samples 6"}
    lenient = "readings.max_cer 100 --model.judge.init_args.readings.min_margin 0"
    more["judge"] = f"--model.judge.init_args.max_tokens 2 --model.judge.init_args.{lenient}"
    follow(block(path, "--model.judge WhisperJudge"), {**cosyvoice, "WHISPER": str(whisper)}, more, monkeypatch)
    assert (tmp_path / "BETTER/llm.pt").is_file()


def test_recordings_are_prepared(cosyvoice: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    follow(block("tts_align/models/cosyvoice/README.md", "tts-align prepare"), cosyvoice, {}, monkeypatch)
    assert len(read_manifest(tmp_path / "manifest.parquet").rows) == 1


def test_what_each_objective_can_use_is_printed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: kind for name, kind in Objective.registry.items() if kind.__module__.startswith("tts_align.")}
    monkeypatch.setattr(Objective, "registry", own)
    rows = read_manifest("demo:audio/preference.parquet").rows
    usable = Selector(rows, seed=0).usable(KTO().rows_wanted.readers)
    assert block("tts_align/data/README.md", "one-sided sentences") == f"{usable}\n"


@pytest.mark.parametrize("path", [*READMES, "benchmarks/README.md"])
def test_every_path_it_names_is_there(path: str) -> None:
    text = (ROOT / path).read_text("utf-8")
    for name in set(re.findall(r"\b(?:recipes|benchmarks)/[\w/]+\.\w+", text)):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md", "tts_align/models/cosyvoice/README.md"])
def test_the_tables_are_those_of_the_saved_results(path: str) -> None:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks/readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.written(Path(path)) == (ROOT / path).read_text("utf-8"), "run: python benchmarks/readme_tables.py"


@pytest.mark.parametrize("path", READMES)
def test_every_block_is_looked_at(path: str) -> None:
    """What stands in a fence is read as a format, run by a test above, or printed by one."""
    run_here = ("tts-align", "import ", "tts_align/\n", "pip install")
    for language, text in BLOCKS[path]:
        printed = text.startswith(("speech (", " "))
        assert language == "json" or printed or any(word in text for word in run_here), text


def test_every_command_of_the_first_page_is_run() -> None:
    """By a test above that takes its block."""
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text("utf-8"))) if isinstance(node, ast.Call)]
    named = [call.args for call in calls if getattr(call.func, "id", "") == "block"]
    taken = [[one.value for one in words] for words in named if all(isinstance(one, ast.Constant) for one in words)]
    for _, text in BLOCKS["README.md"][2:]:  # the first two are those of the first test
        if "tts-align " in text:
            assert any(path == "README.md" and all(word in text for word in words) for path, *words in taken), text
