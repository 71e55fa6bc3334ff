# SPDX-License-Identifier: Apache-2.0
"""What README.md says is so."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT

from tts_align.cli.entry import run
from tts_align.objectives import Objective

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_it_opens_with_one_sentence_and_two_commands():
    assert README.startswith("# tts-align\n\n`tts-align` ")
    sentence = README.split("\n\n")[1]
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert [text.strip() for _, text in BLOCKS[:2]] == [
        "pip install -e . && tts-align fit --config recipes/tkto.yaml",
        "pip install -e '.[test]' && pytest",
    ]


def test_the_objective_of_15_lines_runs_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = next(text for language, text in BLOCKS if language == "python")
    body = [line for line in code.split("class FocalDPO", 1)[1].splitlines() if line.strip()]
    assert len(body) <= 15
    (tmp_path / "focal.py").write_text(code)
    command = next(text for _, text in BLOCKS if "focal.FocalDPO" in text).split()
    assert command[:2] == ["tts-align", "fit"]
    command[command.index("--config") + 1] = str(ROOT / "recipes/dpo.yaml")
    command[command.index("--run.directory") + 1] = str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(Objective, "registry", dict(Objective.registry))
    monkeypatch.setitem(sys.modules, "focal", None)  # put back as it was afterwards
    del sys.modules["focal"]
    short = ["--trainer.max_steps", "1", "--data.max_rows", "1500", "--run.threads", "1"]
    short += ["--run.test_after_fit", "false"]
    cli = run([*command[1:], *short])
    assert type(cli.model.objective).__name__ == "FocalDPO"
    assert cli.model.objective.gamma == 1
    assert cli.trainer.global_step == 1
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["objective"]["class_path"] == "focal.FocalDPO"


def test_every_file_of_the_tree_is_there():
    tree = next(text for _, text in BLOCKS if text.startswith("tts_align/\n"))
    for line in tree.splitlines():
        path = line.split("  ")[0] if not line.startswith("  ") else f"tts_align/{line.split()[0]}"
        assert (ROOT / path.strip()).exists(), line


def test_every_path_it_names_is_there():
    for path in set(re.findall(r"\b(?:recipes|benchmarks)/[\w/]+\.\w+", README)):
        assert (ROOT / path).is_file(), path


def test_the_tables_are_those_of_the_saved_results():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks/readme_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.written(README) == README, "run: python benchmarks/readme_tables.py"
