"""What commands take from an earlier run: its checkpoint, its pair, its test."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import forked, ranks
from tiny import LETTERS, save_policy, save_recipe

from tts_align.cli.entry import run
from tts_align.utils.files import read_json_lines

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches .*"),
]

JUDGE = '''
from tts_align.evaluation.judges.base import Judge, Reading, Verdict


class Counter(Judge):
    """Calls even lengths right."""

    needs_audio = False

    def judge(self, samples, expected):
        return [
            Verdict("", Reading.RIGHT if len(one.speech) % 2 else Reading.WRONG, 0.0, 0.0)
            for one in samples
        ]
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with sentences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "prompts.txt").write_text("".join(f"{letter * 3}\n" for letter in LETTERS.strip()))
    return tmp_path


SAMPLE = ["--prompts", "prompts.txt", "--samples", "2"]


def said(out: str) -> list[list[int]]:
    return [row["speech"] for _, row in read_json_lines(Path(out))]


def test_sample_with_a_runs_recipe_speaks_with_what_it_trained(
    here: Path, tiny_policy: Path, tiny_rows: str, capsys: pytest.CaptureFixture[str]
):
    recipe = save_recipe(here, "sft", tiny_policy, tiny_rows, model__optimizer__init_args__lr=5.0)
    run(["fit", "--config", recipe])
    capsys.readouterr()
    run(["sample", "--config", recipe, *SAMPLE, "--out", "base.jsonl"])
    assert "policy:" not in capsys.readouterr().out
    run(["sample", "--config", "run/config.yaml", *SAMPLE, "--out", "own.jsonl"])
    assert re.search(r"policy: +\S*run/checkpoints/last\.ckpt\n", capsys.readouterr().out)
    given = ["--ckpt_path", "run/checkpoints/last.ckpt"]
    run(["sample", "--config", recipe, *SAMPLE, "--out", "given.jsonl", *given])
    assert re.search(r"policy: +run/checkpoints/last\.ckpt\n", capsys.readouterr().out)
    assert said("own.jsonl") == said("given.jsonl") != said("base.jsonl")


def test_another_policy_beside_a_runs_recipe_speaks_for_itself(
    here: Path, tiny_policy: Path, tiny_rows: str, capsys: pytest.CaptureFixture[str]
):
    """An exported directory under the run's own recipe must not get the run's weights, or adapters, once more."""
    recipe = save_recipe(here, "sft", tiny_policy, tiny_rows, model__optimizer__init_args__lr=5.0)
    run(["fit", "--config", recipe])
    (here / "other").mkdir()
    other = save_policy(here / "other" / "policy", seed=3)
    capsys.readouterr()
    flags = ["--model.policy.init_args.directory", str(other)]
    run(["sample", "--config", "run/config.yaml", *SAMPLE, "--out", "other.jsonl", *flags])
    assert "its checkpoint is not used" in capsys.readouterr().out
    run(["sample", "--config", recipe, *SAMPLE, "--out", "plain.jsonl", *flags])
    assert said("other.jsonl") == said("plain.jsonl")


def test_a_run_without_a_checkpoint_says_so(
    here: Path, tiny_policy: Path, tiny_rows: str, capsys: pytest.CaptureFixture[str]
):
    recipe = save_recipe(here, "sft", tiny_policy, tiny_rows)
    run(["fit", "--config", recipe, "--trainer.enable_checkpointing", "false"])
    capsys.readouterr()
    run(["sample", "--config", "run/config.yaml", *SAMPLE, "--out", "own.jsonl"])
    assert "has no checkpoint yet" in capsys.readouterr().out


def test_test_and_validate_say_which_checkpoint(
    here: Path, tiny_policy: Path, tiny_rows: str, capsys: pytest.CaptureFixture[str]
):
    recipe = save_recipe(here, "sft", tiny_policy, tiny_rows, data__validation=tiny_rows)
    run(["fit", "--config", recipe])
    capsys.readouterr()
    run(["validate", "--config", "run/config.yaml"])
    assert re.search(r"checkpoint: +\S*run/checkpoints/last\.ckpt\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_finished_tkto_run_validates(command: str, here: Path, tiny_policy: Path, tiny_rows: str):
    recipe = save_recipe(here, "tkto", tiny_policy, tiny_rows, data__validation=tiny_rows)
    fitted = run(["fit", "--config", recipe])
    expected = fitted.trainer.callback_metrics.get("val/loss")
    kept = {path: path.read_bytes() for path in Path("run").rglob("*.ckpt")}
    again = run([command, "--config", "run/config.yaml"])
    assert {path: path.read_bytes() for path in kept} == kept
    if command == "validate":
        torch.testing.assert_close(again.trainer.callback_metrics["val/loss"], expected)


def test_without_its_pair_it_says_what_to_run(
    here: Path, tiny_policy: Path, tiny_rows: str, capsys: pytest.CaptureFixture[str]
):
    recipe = save_recipe(here, "tkto", tiny_policy, tiny_rows, data__validation=tiny_rows)
    run(["fit", "--config", recipe])
    shutil.rmtree("run/contrast")
    with pytest.raises(SystemExit):
        run(["validate", "--config", "run/config.yaml"])
    assert "no contrastive pair at" in capsys.readouterr().err


@pytest.fixture
def tested(here: Path, tiny_policy: Path, tiny_rows: str) -> str:
    """Recipe of a run that was fitted and tested."""
    (here / "counter.py").write_text(JUDGE)
    test = {"prompts": "prompts.txt", "sentences": 4}
    changes = {"model__judge": {"class_path": "counter.Counter"}, "model__test": test, "run__test_after_fit": True}
    recipe = save_recipe(here, "sft", tiny_policy, tiny_rows, **changes)
    run(["fit", "--config", recipe])
    return recipe


def test_fit_on_a_finished_run_shows_the_stored_table(capsys: pytest.CaptureFixture[str], tested: str):
    first = capsys.readouterr().out
    table = re.search(r"^ +base.*?^95 % intervals *$", first, re.MULTILINE | re.DOTALL)[0]
    before = {path: path.stat().st_mtime_ns for path in Path("run/test").rglob("*")}
    run(["fit", "--config", tested])
    again = capsys.readouterr().out
    assert "is finished: 2 steps; nothing left to train" in again
    assert table in again
    assert {path: path.stat().st_mtime_ns for path in Path("run/test").rglob("*")} == before


@pytest.mark.parametrize(
    "flags",
    [["--model.test.init_args.samples", "2"], ["--model.sampling.temperature", "0.5"], ["--trainer.max_epochs", "2"]],
    ids=["other sentences", "other sampling", "more training"],
)
def test_what_would_be_another_result_is_tested_anew(flags: list[str], tested: str):
    before = Path("run/test/summary.json").stat().st_mtime_ns
    run(["fit", "--config", tested, *flags])
    assert Path("run/test/summary.json").stat().st_mtime_ns > before


def test_other_sentences_under_the_same_name_are_tested_anew(tested: str):
    before = Path("run/test/summary.json").stat().st_mtime_ns
    lines = Path("prompts.txt").read_text().splitlines()
    Path("prompts.txt").write_text("\n".join([*lines[1:], lines[0], ""]))
    run(["fit", "--config", tested])
    assert Path("run/test/summary.json").stat().st_mtime_ns > before


def test_two_processes_agree_on_whether_to_test(tested: str):
    """The second process starts when the first has already saved the new recipe."""
    Path("two.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from tts_align.cli.entry import run\n"
        "while os.environ['RANK'] == '1' and '0.625' not in Path('run/config.yaml').read_text():\n"
        "    time.sleep(0.01)\n"
        "run(sys.argv[1:])\n"
    )
    flags = ["--model.sampling.temperature", "0.625", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    assert "0.625" not in Path("run/config.yaml").read_text()
    before = Path("run/test/summary.json").stat().st_mtime_ns
    command = [sys.executable, "two.py", "fit", "--config", tested, *flags]
    ends = forked([command] * 2, [Path.cwd()] * 2, ranks(2))
    assert [one.returncode for one in ends] == [0, 0], ends
    done = ends[0]
    assert Path("run/test/summary.json").stat().st_mtime_ns > before
    assert done.stdout.count("test results:") == 1


@pytest.mark.parametrize("lost", ["summary.json", "report.html"])
def test_a_test_that_was_cut_short_is_made_up_for(lost: str, tested: str):
    Path("run/test", lost).unlink()
    run(["fit", "--config", tested])
    assert Path("run/test", lost).is_file()
    assert json.loads(Path("run/test/summary.json").read_text())["aligned"]["cer"]["n"] == 4
