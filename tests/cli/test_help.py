"""What ``--help`` of each command shows: the project's options, all of them, at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from tts_align.cli import entry, help
from tts_align.cli.commands import COMMANDS, OF_A_RECIPE
from tts_align.cli.lightning import AlignCLI

NOT_LISTED = {
    "objective",
    "config",
    "print_config",
    "seed_everything",
    "ckpt_path",
    "help",
    "verbose",
    "return_predictions",
}
"""Options that stand in the general part, and Lightning's that nobody needs."""


class Parsers(AlignCLI):
    """Builds the parser of a command and stops."""

    def parse_arguments(self, parser, args):
        self.found = parser._subcommands_action.choices[self.command]
        raise StopIteration


def options_of_the_parser(command: str) -> set[str]:
    """Names of what the command really takes, without Lightning's trainer and what follows from something else."""
    cli = Parsers.__new__(Parsers)
    with pytest.raises(StopIteration):
        cli.__init__([command])
    links = {action.target[0] for action in cli.found._links_group._group_actions} if cli.found._links_group else set()
    names = {action.dest for action in cli.found._actions} - links - NOT_LISTED
    groups = {"run", "model", "data", "trainer"}
    return {name for name in names if not name.startswith("trainer.") and not name.endswith(".help")} - groups


@pytest.mark.parametrize("command", OF_A_RECIPE)
def test_every_option_of_a_recipe_is_in_the_help(command: str):
    shown = set(re.findall(r"^  --([\w.]+)", help.show(command), re.MULTILINE)) - NOT_LISTED - {"debug"}
    assert shown == options_of_the_parser(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_words_and_help_is_short(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = help.show(command)
    assert len(shown.splitlines()) <= 120
    assert max(map(len, shown.splitlines())) <= 120
    assert "``" not in shown
    for sources in ([*help.OWN.get(command, ())], [*help.OF_THE_RECIPE.values()]):
        for source in sources:
            for option in help.options(source):
                assert len(option.text.split()) >= 2, f"{option.name}: {option.text!r}"


@pytest.mark.parametrize("trainer", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_values_and_no_source(command: str, trainer: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = " ".join(help.show(command, trainer).split())
    assert "field(" not in shown
    assert "``" not in shown
    for default in re.findall(r"\(default: ([^)]*\)?)", shown):
        assert not re.match(r"\(|'|\"", default), default
        assert not re.match(r"[\w.]*\b[A-Z][A-Z_]+\)", default), default


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("label", "--rule.min_measures +lowest number of each named measure, such as {similarity: 0.7}$"),
        ("listen make", r"--plan.kinds .*\s(default: )?\[nmos\]\)$"),
        ("listen make", r"--plan.loudness_lufs .*default:\s+-23.0\)$"),
        ("listen score", r"--resamples .*\(default: 10000\)$"),
        ("compare", r"--resamples .*\(default: 10000\)$"),
        ("score", r"--max_failed_share .*default:\s+0.01\)$"),
        ("prepare", r"--speaker_vectors .*default:\s+true\)$"),
        ("demo build", r"--directory [^-]*; the package's own by default$"),
        ("demo build", r"--work .*default: demo/build\)$"),
        ("recipes", "--copy DIR +folder to copy"),
        ("fit", "--config, -c RECIPE +recipe to use"),
        ("label", "--config, -c FILE +YAML file"),
    ],
)
def test_a_default_as_it_is_typed(command: str, option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    one_line = re.sub(r"\n {30}", " ", help.show(command))
    assert re.search(rf"^  {option}", one_line, re.MULTILINE), one_line


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("score", "FOLDER --prompts FILE"),
        ("listen make", "SYSTEM... --out FILE"),
        ("listen score", "ANSWERS... --key FILE"),
        ("listen label", "ANSWERS... --key FILE --out FILE"),
        ("prepare", "--directory DIR --source FILE --out FILE"),
        ("label", "--judged FILE --out FILE"),
        ("compare", "FIRST [SECOND]"),
        ("sample", "--config RECIPE --prompts FILE --out FILE"),
    ],
)
def test_usage_names_what_must_be_given(command: str, usage: str):
    assert help.show(command).splitlines()[0] == f"usage: tts-align {command} {usage} [options]"


@pytest.mark.parametrize("width", [80, 120])
def test_help_of_fit_begins_with_what_is_ours(width: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = help.show("fit").splitlines()
    assert lines[0] == "usage: tts-align fit --config RECIPE [options]"
    assert len(lines) <= 120
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    assert shown.index("--objective") < shown.index("--run.directory") < shown.index("--model.policy")
    assert "--trainer." not in shown
    assert "tts-align fit --help.trainer" in shown


def test_lightnings_options_stand_behind_a_word_of_their_own(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        entry.run(["fit", "--help.trainer"])
    assert not raised.value.code
    shown = capsys.readouterr().out
    assert {"max_epochs", "devices", "precision", "callbacks"} <= set(re.findall(r"--trainer\.(\w+)", shown))
    assert re.search(r"--trainer\.gradient_clip_val [^-]*\(default:\s+1\.0\)", shown)  # ours, not Lightning's
    assert "--model.policy" not in shown


@pytest.mark.parametrize("words", [["fit", "--help"], ["--help"], ["--version"], ["recipes"], ["prepare", "-h"]])
def test_help_loads_nothing_heavy(words: list[str], tmp_path: Path):
    code = (
        "import sys; from tts_align.cli.entry import main; sys.argv = ['tts-align', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([one for one in ('torch', 'lightning', 'jsonargparse', 'numpy') if one in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_command_says_at_once_that_it_is_alive(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-m", "tts_align", "fit", "--config", "nowhere.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stderr.readline() == "tts-align fit: loading libraries\n"
        out, _ = process.communicate(timeout=60)
    assert out == ""  # standard output is for results


def test_only_one_process_of_many_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from tts_align.cli.errors import note

    monkeypatch.setenv("LOCAL_RANK", "1")
    note("alive")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["--traceback"], ["--traceback", "--help"]])
def test_traceback_alone(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv(entry.DEBUG, "false")
    monkeypatch.setattr(sys, "argv", ["tts-align", *words])
    entry.main()
    assert capsys.readouterr().out.startswith("usage: tts-align COMMAND")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "no objective chosen: pass --objective"),
        (["label"], "judged"),
        (["fit", "--objective", "dpo", "--objective.betta", "1"], "did you mean 'beta'"),
    ],
)
def test_traceback_of_a_wrong_command_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Where it came from, and then what is wrong in plain words."""
    monkeypatch.setenv(entry.DEBUG, "false")
    monkeypatch.setattr(sys, "argv", ["tts-align", *words, "--traceback"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as raised:
        entry.main()
    assert raised.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert message in shown.partition("tts-align: error: ")[2]
