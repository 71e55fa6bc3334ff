"""Recipes of the package, from any folder, by name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import RECIPES

from tts_align.cli import entry, shelf
from tts_align.cli.entry import run
from tts_align.cli.recipe import load_recipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as raised:
        run(list(words))
    assert not raised.value.code
    return capsys.readouterr()


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as raised:
        run(list(words))
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_every_recipe_of_the_checkout_is_known():
    files = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert set(shelf.names()) == files


def test_overlays_are_what_chooses_no_objective():
    without = {name for name, path in shelf.names().items() if "objective" not in yaml.safe_load(path.read_text())}
    only_knobs = {"diffro/manner", "e2e/cascaded", "e2e/stage2"}
    assert set(shelf.overlays()) == without | only_knobs
    for name in only_knobs:
        assert set(load_recipe(shelf.names()[name].read_text())["objective"]) == {"init_args"}


@pytest.mark.parametrize("name", ["dpo", "dpo.yaml", "recipes/dpo.yaml", "recipes/dpo"])
def test_a_packaged_recipe_is_found_by_name_and_said(name: str, capsys: pytest.CaptureFixture[str]):
    out, err = printed(capsys, "fit", "--config", name, "--print_config")
    assert yaml.safe_load(out)["objective"]["class_path"].endswith("DPO")
    assert err == f"recipe: {name} is the packaged {RECIPES / 'dpo.yaml'}\n"


@pytest.mark.parametrize("named", ["-c dpo -c precision/bf16", "--config=dpo --config=recipes/precision/bf16.yaml"])
def test_overlays_likewise(named: str, capsys: pytest.CaptureFixture[str]):
    out, err = printed(capsys, "fit", *named.split(), "--print_config")
    assert yaml.safe_load(out)["trainer"]["precision"] == "bf16-mixed"
    assert err.count("is the packaged") == 2


def test_a_file_of_ones_own_comes_first(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "recipes").mkdir()
    (here / "recipes/dpo.yaml").write_text("objective: kto\n")
    (here / "sft").mkdir()  # a folder is no recipe
    out, err = printed(
        capsys, "fit", "--config", "recipes/dpo.yaml", "--model.policy", "Qwen2CodecLM", "--print_config"
    )
    assert yaml.safe_load(out)["objective"]["class_path"].endswith("KTO")
    assert err == ""
    out, err = printed(capsys, "fit", "--config", "sft", "--print_config")
    assert yaml.safe_load(out)["objective"]["class_path"].endswith("SFT")


def test_a_wrong_name_lists_what_there_is(capsys: pytest.CaptureFixture[str]):
    message = failed(capsys, "fit", "--config", "stratgy/ddp")
    assert "no recipe 'stratgy/ddp': there is no such file; did you mean 'strategy/ddp'?" in message
    recipes, overlays = re.findall(r"^packaged \w+: (.*)$", message, re.MULTILINE)
    assert sorted((recipes + ", " + overlays).split(", ")) == sorted(shelf.names())


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("s.txt", "s.txt is no recipe: expected names and values in YAML, such as objective: tkto, got plain text"),
        ("list.yaml", "list.yaml is no recipe: expected names and values in YAML, .*, got a list"),
        (
            "rows.jsonl",
            "rows.jsonl holds rows, not a recipe: pass it as --data.manifest, after a recipe such as",
        ),
        ("empty", "no recipe 'empty': it is a folder without a recipe"),
        ("runs/small", "no recipe 'runs/small': it is a folder, write --config runs/small/config.yaml"),
    ],
)
def test_what_is_no_recipe_is_named(here: Path, named: str, message: str, capsys: pytest.CaptureFixture[str]):
    (here / "s.txt").write_text("A secret sentence.\n")
    (here / "list.yaml").write_text("[1, 2]\n")
    (here / "rows.jsonl").write_text('{"id": "a", "text": "x"}\n')
    (here / "empty").mkdir()
    (here / "runs/small").mkdir(parents=True)
    (here / "runs/small/config.yaml").touch()
    said = failed(capsys, "fit", "--config", named)
    assert re.search(message, said)
    assert "secret" not in said


def test_an_overlay_before_its_recipe_says_what_to_write(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "over.yaml").write_text("trainer: {precision: bf16-mixed}\n")
    (here / "mine.yaml").write_text("objective: {name: sft}\n")
    (here / "knobs.yaml").write_text("objective: {init_args: {}}\n")
    message = failed(capsys, "fit", "--config", "over.yaml", "--config", "mine.yaml", "--config", "knobs.yaml")
    assert "over.yaml chooses no objective, so it is an overlay, and stands before its recipe" in message
    assert message.endswith("write --config mine.yaml --config over.yaml --config knobs.yaml\n")
    policy = ["--model.policy", "Qwen2CodecLM"]
    printed(capsys, "fit", "--config", "mine.yaml", "--config", "over.yaml", *policy, "--print_config")


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tts-align", *words])
    entry.main()


def test_recipes_lists_them_with_a_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    main(monkeypatch, "recipes")
    shown = capsys.readouterr().out
    lines = dict(re.findall(r"^  (\S+) +(\S.*)$", shown, re.MULTILINE))
    assert lines.keys() == shelf.names().keys()
    assert all(len(line.split()) >= 3 for line in lines.values())
    assert max(map(len, shown.splitlines())) <= 150


def test_recipes_copies_them(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    main(monkeypatch, "recipes", "--copy", "mine")
    assert f"{len(shelf.names())} recipes copied to mine" in capsys.readouterr().out
    for name, path in shelf.names().items():
        assert (here / "mine" / f"{name}.yaml").read_bytes() == path.read_bytes()
    (here / "mine/tkto.yaml").write_text("changed")
    with pytest.raises(SystemExit):
        main(monkeypatch, "recipes", "--copy", "mine")
    assert "are there already" in capsys.readouterr().err
    assert (here / "mine/tkto.yaml").read_text() == "changed"


def test_whoever_reads_the_list_may_stop_reading():
    """`tts-align recipes | head -1` printed a traceback."""
    command = [sys.executable, "-c", "from tts_align.cli.entry import main; main()", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
