"""The command, from the words on the command line to the files in the run's directory."""

import gc
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from places import ROOT
from processes import in_two_processes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from tts_align.cli import entry as cli
from tts_align.cli.commands import COMMANDS
from tts_align.cli.entry import run
from tts_align.cli.errors import DEBUG, did_you_mean
from tts_align.cli.lightning import AlignCLI
from tts_align.cli.recipe import expand_flags, load_recipe
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes
from tts_align.objectives import Objective

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers.*",  # one process is what a test wants
    ),
]
CODES, LETTERS = 20, "abcdefgh "


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's directory and a manifest of labelled pairs, both tiny."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[-1]))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = Sizes(CODES, len(LETTERS), hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=16)
    torch.manual_seed(0)
    Qwen2CodecLM(sizes=sizes, tokenizer=str(folder / "tokenizer.json")).save(folder / "policy")
    random = np.random.default_rng(0)
    rows = [
        Row(
            id=f"{sentence}-{side}",
            text=LETTERS[sentence] * 3,
            speech=tuple(random.integers(0, CODES, random.integers(3, 9)).tolist()),
            desirable=side == 0,
        )
        for sentence in range(8)
        for side in range(2)
    ]
    write_manifest(rows, folder / "rows.jsonl")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the command line of pytest is not ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tts-align"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(DEBUG, raising=False)
    return tmp_path


Recipe = Callable[..., str]


@pytest.fixture
def recipe(here: Path, models: Path) -> Recipe:
    """Write a recipe of few steps, and give its path."""

    def write(name: str = "small", objective: Any = "sft", **trainer: Any) -> str:
        settings = {
            "objective": objective,
            "model": {
                "policy": {"class_path": "Qwen2CodecLM", "init_args": {"directory": str(models / "policy")}},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
            },
            "data": {"manifest": str(models / "rows.jsonl"), "rows_per_step": 4},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "enable_progress_bar": False,
                "log_every_n_steps": 1,
                **trainer,
            },
            "run": {"test_after_fit": False},
        }
        path = here / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path.name

    return write


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run, expect exit status 2, and give the message."""
    with pytest.raises(SystemExit) as raised:
        run(list(args))
    assert raised.value.code == 2
    notes, mark, message = capsys.readouterr().err.partition("tts-align: error: ")
    assert mark
    assert all(line.startswith("recipe: ") for line in notes.splitlines())
    assert "Traceback" not in message
    assert message.count("\n") <= 8
    return message


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run something that prints and ends well."""
    with pytest.raises(SystemExit) as raised:
        run(list(args))
    assert not raised.value.code
    return capsys.readouterr().out


def weights(cli: AlignCLI) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in cli.model.policy.state_dict().items()}


# --- short names ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("objective: dpo", {"class_path": "tts_align.objectives.dpo.DPO"}),
        (
            "objective: {name: dpo, beta: 0.2}",
            {"class_path": "tts_align.objectives.dpo.DPO", "init_args": {"beta": 0.2}},
        ),
        ("objective: {class_path: mine.Mine}", {"class_path": "mine.Mine"}),
        ("objective: {init_args: {beta: 0.4}}", {"init_args": {"beta": 0.4}}),
    ],
)
def test_objective_in_a_recipe(text: str, expected: dict[str, Any]) -> None:
    assert load_recipe(text)["objective"] == expected


def test_public_classes_in_a_recipe() -> None:
    recipe = load_recipe("model: {policy: Qwen2CodecLM, reference: {class_path: Qwen2CodecLM}}")
    full = "tts_align.models.policy.qwen2.Qwen2CodecLM"
    assert recipe == {"model": {"policy": full, "reference": {"class_path": full}}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--objective dpo", "--objective tts_align.objectives.dpo.DPO"),
        ("--objective=dpo --objective.beta 1", "--objective=tts_align.objectives.dpo.DPO --objective.beta 1"),
        ("--model.policy Qwen2CodecLM", "--model.policy tts_align.models.policy.qwen2.Qwen2CodecLM"),
        ("fit --config dpo --data.manifest dpo", "fit --config dpo --data.manifest dpo"),
        ("--objective mine.Mine --x", "--objective mine.Mine --x"),
    ],
)
def test_short_names_as_flags(given: str, expected: str) -> None:
    assert expand_flags(given.split()) == expected.split()


def test_no_suggestion_for_what_is_like_nothing() -> None:
    assert did_you_mean("xyz", ["sft", "dpo"]) == ""


# --- what is wrong is said in a line or two ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--objective tkot", r"unknown objective 'tkot': expected one of .*; did you mean 'tkto'\?"),
        ("--objective dpo --objective.betta 0.2", r"Option 'betta' is not accepted; did you mean 'beta'\?"),
        ("--objective dpo --objective.beta high", r"^objective\.beta: expected a number, got high$"),
        ("--run.threads many", r"^run\.threads: expected a whole number, got many$"),
        ("--run.overwrite maybe", r"^run\.overwrite: expected true or false, got maybe$"),
        ("--data.on_bad_row skip", r"^data\.on_bad_row: expected one of stop, drop, got skip$"),
        ("--trainer.precision fp16", r"^trainer\.precision: expected one of transformer-engine, .*, bf16, got fp16$"),
        ("--model.optimizer.lr fast", r"^model\.optimizer\.lr: expected a number, got fast$"),
        ("--model.policy.init_args.lora.rank big", r"^model\.policy\.lora\.rank: expected a whole number, got big$"),
        (
            "--objective nofile.Focal",
            r"^objective: no module named 'nofile' in the current folder, .*, or among the installed packages: start",
        ),
        ("--model.judge tts_align.Juge", r"^model\.judge: tts_align has no Juge; did you mean 'Judge'\?$"),
        ("--model.judge WhisperJuge", r"^model\.judge: expected one of .*got WhisperJuge; did you mean 'WhisperJudge'"),
        (
            "--model.judge WhisperJudge",
            r"^model\.judge: WhisperJudge needs model: pass --model\.judge\.init_args\.model$",
        ),
        ("--trainer.callbacks+=KeepBst", r"^trainer\.callbacks: .*, got KeepBst; did you mean 'KeepBest'\?$"),
        ("--model.policy Qwen3", r"^model\.policy: expected one of .*Qwen2CodecLM, or the import path .*, got Qwen3$"),
        ("--model.optimizer Adamm", r"^model\.optimizer: expected one of .*AdamW.*, got Adamm; did you mean 'Adam'\?$"),
        ("--objective dpo --objective.beta -1", r"beta must be above 0, got -1\.0"),
        ("--traner.max_steps 3", r"traner\.max_steps 3; did you mean 'trainer\.max_steps'\?"),
        ("--model.lr 1e-5", r"--model\.lr 1e-5; did you mean 'model\.optimizer\.lr'\?$"),
        ("--lr 1e-5", r"--lr 1e-5; did you mean 'model\.optimizer\.lr'\?$"),
        ("--beta=5", r"--beta=5; did you mean 'objective\.beta'\?$"),
        ("--run.name foo", r"--run\.name foo; did you mean 'run\.directory'\?$"),
        ("--max_steps 3", r"--max_steps 3; did you mean 'trainer\.max_steps'\?$"),
        ("--max_step 3", r"--max_step 3; did you mean 'trainer\.max_steps'\?$"),
        (
            "--resume true",
            r"--resume true; fit resumes by itself: give the same command again, or --run\.overwrite true",
        ),
        ("--recipe tkto", r"^there is no option --recipe: write --config tkto$"),
        ("--trainer.max_step 3", r"unrecognized arguments: --trainer\.max_step 3; did you mean"),
        ("--run.threads 0", r"run\.threads must be at least 1, got 0"),
        ("--model.policy.directory nowhere", r"expected a model directory with config\.json, got 'nowhere'"),
        ("--model.reference Qwen2CodecLM --model.reference.directory nowhere", r"expected a model directory"),
        ("--data.manifest nowhere.jsonl", r"nowhere\.jsonl"),
        ("--data.tokens_per_step 3", r"exactly one of data\.rows_per_step and data\.tokens_per_step"),
        ("--config nowhere.yaml", r"no recipe 'nowhere\.yaml': there is no such file"),
        ("--config tkot", r"did you mean 'tkto'\?\n.*packaged recipes: .*dpo, .*\n.*packaged overlays: .*strategy/ddp"),
        ("--model.policy.init_args.dirctory x", r"Option 'dirctory' is not accepted; did you mean 'directory'\?"),
        ("--model.policy Qwen2CodeLM", r"did you mean 'Qwen2CodecLM'\?"),
        ("--model.sampling.top 3", r"Option 'top' is not accepted; (did you mean 'top_[pk]'\?|Sampling takes )"),
        (
            "--trainer.strategy ddpp",
            r"trainer\.strategy: expected one of auto, ddp, .*, got ddpp; did you mean 'ddp'\?\n"
            r".*--config strategy/ddp or --config strategy/fsdp$",
        ),
        (
            "--trainer.devices two",
            r"trainer\.devices: expected a number above 0, a list such as \[0, 1\], or auto, got two$",
        ),
        ("--trainer.devices 0", r"trainer\.devices: expected a number above 0, .*, got 0$"),
        (
            "--trainer.accelerator gpuu",
            r"trainer\.accelerator: expected one of auto, gpu, cpu, .*, got gpuu; did you mean 'gpu'\?$",
        ),
        (
            "--trainer.accelerator tpu",
            r"trainer\.accelerator: .*finds here, got tpu: there is none; set auto, cpu or gpu$",
        ),
        ("--trainer.num_nodes 0", r"trainer\.num_nodes: expected a number of machines above 0, got 0$"),
        ("--trainer.barebones true", r"trainer\.barebones cannot be: .* set trainer\.logger false, "),
        ("--trainer.accumulate_grad_batches 0", r"trainer\.accumulate_grad_batches must be at least 1, got 0$"),
        ("--trainer.strategy fsdp", r"trainer: The strategy fsdp requires a GPU"),
    ],
)
def test_wrong_flags(flags: str, message: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, fails(capsys, "fit", "--config", recipe(), *flags.split()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what is loaded
def test_what_else_is_loaded_does_not_change_what_is_listed(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):  # as Lightning does while it trains
        wrapped = LightningOptimizer(kind([torch.nn.Parameter(torch.ones(1))], lr=0.1))
        assert type(wrapped).__name__ == f"Lightning{kind.__name__}"
    message = fails(capsys, "fit", "--config", recipe(), "--model.optimizer", "Adamm")
    assert "expected one of Adadelta, Adafactor, " in message
    assert ZeroRedundancyOptimizer.__name__ not in message
    assert "Lightning" not in message


@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_no_gpu(name: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails(capsys, "fit", "--config", recipe(), "--trainer.accelerator", name)
    assert message.startswith(f"trainer.accelerator: expected a device that PyTorch finds here, got {name}: PyTorch ")
    assert "set trainer.accelerator to cpu or auto, or " in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traner: {max_steps: 2}", r"does not accept option 'traner\.max_steps'; did you mean 'trainer\.max_steps'\?"),
        ("objective: {name: dpo, betta: 0.2}", r"Option 'betta' is not accepted; did you mean 'beta'\?"),
        ("objective: tkot", r"unknown objective 'tkot'"),
        ("objective: {name: dpo, beta: [1", r"wrong\.yaml: not YAML: while parsing"),
    ],
)
def test_wrong_recipes(text: str, message: str, here: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "wrong.yaml").write_text(text)
    assert re.search(message, fails(capsys, "fit", "--config", recipe(), "--config", "wrong.yaml"))


def test_no_objective(here: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "fit", "--data.manifest", str(models / "rows.jsonl"), "--model.policy", "Qwen2CodecLM")
    assert re.search(r"no objective chosen: pass --objective, one of .*dpo, .*sft", message)


def test_a_faulty_manifest_is_the_users_to_mend(here: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.jsonl").write_text('{"id": "a", "text": "a", "speech": [1, 99]}\n')
    assert re.search(r"bad\.jsonl:1: ", fails(capsys, "fit", "--config", recipe(), "--data.manifest", "bad.jsonl"))


def test_real_faults_keep_their_traceback(here: Path, recipe: Recipe) -> None:
    (here / "broken.py").write_text(
        "from tts_align import Objective\n"
        "class Broken(Objective):\n"
        "    def forward(self, step):\n"
        "        return int('no number')\n"
    )
    with pytest.raises(ValueError, match="invalid literal"):
        run(["fit", "--config", recipe(objective={"class_path": "broken.Broken"})])


def test_traceback_flag(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "false")  # what the flag sets is undone with it
    with pytest.raises(ValueError, match="beta must be above 0"):
        run(["fit", "--config", recipe(), "--objective", "dpo", "--objective.beta", "-1", "--traceback"])


# --- a recipe and what overrides it ---


def test_later_overrides_earlier(here: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "over.yaml").write_text("objective: {init_args: {beta: 0.4}}\n")
    args = ["fit", "--config", recipe(objective={"name": "dpo", "beta": 0.2}), "--config", "over.yaml"]
    shown = yaml.safe_load(printed(capsys, *args, "--trainer.max_steps", "9", "--print_config"))
    assert shown["objective"]["init_args"]["beta"] == 0.4
    assert shown["trainer"]["max_steps"] == 9


def test_another_objective_drops_the_knobs_of_the_first(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", recipe(objective={"name": "dpo", "label_smoothing": 0.1}), "--objective", "kto"]
    shown = yaml.safe_load(printed(capsys, *args, "--print_config=skip_default"))
    assert shown["objective"]["class_path"].endswith(".KTO")
    assert "label_smoothing" not in shown["objective"].get("init_args", {})


@pytest.mark.parametrize(
    ("overlay", "key", "expected"),
    [
        ("strategy/ddp.yaml", ("trainer", "strategy"), "ddp"),
        ("strategy/fsdp.yaml", ("trainer", "strategy", "class_path"), "tts_align.training.sharding.ShardedStrategy"),
        ("precision/bf16.yaml", ("trainer", "precision"), "bf16-mixed"),
        ("lora.yaml", ("model", "policy", "init_args", "lora", "rank"), 16),
    ],
)
def test_overlays(
    overlay: str, key: tuple[str, ...], expected: Any, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", recipe(), "--config", str(ROOT / "recipes" / overlay), "--print_config"]
    shown = yaml.safe_load(printed(capsys, *args))
    assert shown["objective"]["class_path"].endswith(".SFT")
    for part in key:
        shown = shown[part]
    assert shown == expected


def test_data_follows_the_objective(recipe: Recipe) -> None:
    cli = run(["fit", "--config", recipe(max_steps=1), "--objective", "dpo"])
    assert cli.datamodule.wants.reads == "pair"
    assert not cli.datamodule.wants.mismatched
    cli = run(["fit", "--config", recipe(max_steps=1), "--objective", "kto", "--run.directory", "runs/kto"])
    assert cli.datamodule.wants.reads == "labelled"
    assert cli.datamodule.wants.mismatched


def test_an_objective_in_the_users_own_file(here: Path, recipe: Recipe) -> None:
    (here / "focal.py").write_text(
        "from tts_align import Objective, Outcome, Reads\n\n\n"
        "class Focal(Objective):\n"
        '    """Mine.\n\n    Args:\n        gamma: focus.\n    """\n\n'
        "    reads = Reads.LABELLED\n\n"
        "    def __init__(self, gamma: float = 2.0) -> None:\n"
        "        super().__init__()\n"
        "        self.gamma = gamma\n\n"
        "    def forward(self, step):\n"
        "        return Outcome(-step.mean(step.policy.sums()))\n"
    )
    cli = run(["fit", "--config", recipe(objective={"class_path": "focal.Focal"}), "--objective.gamma", "3"])
    assert cli.model.objective.gamma == 3.0
    assert cli.trainer.global_step == 4


def test_lora_trains(recipe: Recipe) -> None:
    cli = run(["fit", "--config", recipe(), "--config", str(ROOT / "recipes/lora.yaml")])
    names = [name for name, value in cli.model.policy.named_parameters() if value.requires_grad]
    assert names
    assert all(".lora_" in name for name in names)


# --- the run's directory ---


def test_fit_fills_the_runs_directory_and_says_where(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(["fit", "--config", recipe("first"), "--config", recipe("second")])
    directory = Path("runs/first")
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoints", "config.yaml", "tensorboard"]
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["last.ckpt"]
    assert cli.trainer.default_root_dir == str(Path("runs/first"))
    said = capsys.readouterr().out
    for line in ("recipe: +runs/first/config.yaml", "checkpoint: +runs/first/checkpoints/last.ckpt", "logs: +runs/fir"):
        assert re.search(line, said)


def test_the_saved_recipe_runs(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(["fit", "--config", recipe(objective={"name": "dpo", "beta": 0.3}, max_steps=2)])
    again = run(["fit", "--config", "runs/small/config.yaml", "--run.directory", "runs/copy"])
    assert again.model.objective.beta == 0.3
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=0, atol=0)
    saved = yaml.safe_load(Path("runs/copy/config.yaml").read_text())
    assert saved["run"]["directory"] == "runs/copy"
    assert not {"config", "ckpt_path", "weights_only"} & saved.keys()


def test_fit_goes_on_where_it_was_and_equals_an_uncut_run(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(max_steps=6)
    whole = run(["fit", "--config", path, "--run.directory", "runs/whole"])
    run(["fit", "--config", path, "--trainer.max_steps", "3"])
    capsys.readouterr()
    cut = run(["fit", "--config", path])
    assert "continuing runs/small from step 3" in capsys.readouterr().out
    assert cut.trainer.global_step == 6
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("steps", ["1", "2", "3"])
def test_an_epoch_that_max_steps_cut_short_is_trained_to_its_end(
    steps: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(max_steps=-1, max_epochs=2)
    whole = run(["fit", "--config", path, "--run.directory", "runs/whole"])
    assert whole.trainer.global_step == 4
    run(["fit", "--config", path, "--trainer.max_steps", steps])
    capsys.readouterr()
    cut = run(["fit", "--config", path])
    assert f"continuing runs/small from step {steps}" in capsys.readouterr().out
    assert cut.trainer.global_step == 4
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("command", ["sample", "judge"])
def test_no_command_writes_over_what_its_recipe_names(
    command: str, recipe: Recipe, models: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(models / "rows.jsonl", here / "mine.jsonl")
    (here / "sentences.txt").write_text("a\n")
    read = {"sample": ["--prompts", "sentences.txt"], "judge": ["--candidates", "sentences.txt"]}[command]
    path = recipe()
    words = [command, "--config", path, "--data.manifest", "mine.jsonl", *read, "--overwrite", "true", "--out"]
    before = (here / "mine.jsonl").read_bytes()
    assert "--out mine.jsonl is what data.manifest names" in fails(capsys, *words, "./mine.jsonl")
    assert f"--out {path} is what config names" in fails(capsys, *words, path)
    assert (here / "mine.jsonl").read_bytes() == before


def test_a_given_checkpoint_begins_a_run_like_any_other(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(max_steps=4)
    whole = run(["fit", "--config", path, "--run.directory", "runs/whole"])
    run(["fit", "--config", path, "--run.directory", "runs/half", "--trainer.max_steps", "2"])
    half = "runs/half/checkpoints/last.ckpt"
    other = run(["fit", "--config", path, "--run.directory", "runs/other", "--ckpt_path", half])
    assert "continuing runs/other from step 2" in capsys.readouterr().out
    assert {"config.yaml", "checkpoints", "tensorboard"} == set(os.listdir("runs/other"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=0)
    same = run(["fit", "--config", path, "--run.directory", "runs/half", "--ckpt_path", half])
    assert same.trainer.global_step == 4
    for words, message in (
        (["--run.directory", "runs/whole", "--ckpt_path", half], "runs/whole has a checkpoint of its own"),
        (["--run.directory", "runs/half", "--ckpt_path", half, "--run.overwrite", "true"], "lies in runs/half"),
        (["--run.directory", "runs/half", "--ckpt_path", half, "--objective", "dpo"], "holds a run of another recipe"),
        (["--run.directory", "runs/new", "--ckpt_path", "no.ckpt"], "no checkpoint at no.ckpt: check --ckpt_path"),
    ):
        assert message in fails(capsys, "fit", "--config", path, *words)
    assert Path(half).is_file()
    assert not Path("runs/new/config.yaml").exists()


def test_a_finished_run_says_so_and_keeps_its_weights(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe()
    first = run(["fit", "--config", path])
    capsys.readouterr()
    again = run(["fit", "--config", path])
    assert "runs/small is finished: 4 steps" in capsys.readouterr().out
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=0, atol=0)


def test_another_recipes_run_is_not_touched(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe()
    run(["fit", "--config", path])
    before = Path("runs/small/config.yaml").read_bytes()
    message = fails(capsys, "fit", "--config", path, "--data.seed", "1")
    assert re.search(r"runs/small holds a run of another recipe:\n  data\.seed: None there, 1 now\n", message)
    assert "--run.directory" in message
    assert "--run.overwrite true" in message
    assert Path("runs/small/config.yaml").read_bytes() == before
    cli = run(["fit", "--config", path, "--data.seed", "1", "--run.overwrite", "true"])
    assert cli.trainer.global_step == 4
    saved = yaml.safe_load(Path("runs/small/config.yaml").read_text())
    assert saved["data"]["seed"] == 1
    assert saved["run"]["overwrite"] is False  # or a second start would throw the first away


def test_own_logger_and_no_checkpoints(recipe: Recipe) -> None:
    cli = run(["fit", "--config", recipe(logger=False, enable_checkpointing=False, max_steps=1)])
    assert cli.trainer.logger is None
    assert not Path("runs/small/checkpoints").exists()


def test_fast_dev_run_leaves_nothing(recipe: Recipe) -> None:
    run(["fit", "--config", recipe(), "--trainer.fast_dev_run", "true"])
    assert not Path("runs/small/config.yaml").exists()
    assert not Path("runs/small/checkpoints").exists()


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_missing_checkpoint_is_named(command: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(
        r"no checkpoint at runs/small/checkpoints/last\.ckpt: train first",
        fails(capsys, command, "--config", recipe()),
    )
    assert re.search(
        r"no checkpoint at mine\.ckpt: check --ckpt_path",
        fails(capsys, command, "--config", recipe(), "--ckpt_path", "mine.ckpt"),
    )


def test_validate_takes_the_runs_last_checkpoint(recipe: Recipe, models: Path) -> None:
    path = recipe()
    first = run(["fit", "--config", path])
    later = run(["validate", "--config", "runs/small/config.yaml", "--data.validation", str(models / "rows.jsonl")])
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(later)[name], value, rtol=0, atol=0)
    assert later.trainer.callback_metrics


def test_predict_hands_scores_of_the_held_out_rows_to_a_callback(here: Path, recipe: Recipe, models: Path) -> None:
    (here / "writer.py").write_text(
        "from lightning.pytorch import Callback\n\n\n"
        "class Writer(Callback):\n"
        "    def on_predict_batch_end(self, trainer, module, outputs, batch, number, loader=0):\n"
        "        with open('scores.txt', 'a') as file:\n"
        "            file.writelines(f'{value}\\n' for value in outputs.sums().tolist())\n"
    )
    path = recipe()
    run(["fit", "--config", path])
    flags = ["--data.validation", str(models / "rows.jsonl"), "--trainer.callbacks+", "writer.Writer"]
    run(["predict", "--config", path, *flags])
    assert len(Path("scores.txt").read_text().splitlines()) == 8


def test_a_checkpoint_gives_weights_and_never_options(recipe: Recipe) -> None:
    """Lightning sets a checkpoint's hyper-parameters over recipe and flags; here what is written is what is run."""
    run(["fit", "--config", recipe()])
    flags = ["--ckpt_path", "runs/small/checkpoints/last.ckpt", "--model.sampling.temperature", "0.5"]
    cli = run(["fit", "--config", recipe("other"), "--trainer.max_steps", "5", *flags])
    assert cli.model.sampling.temperature == 0.5
    assert cli.trainer.global_step == 5


# --- the program ---


def program(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command as a person gives it, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tts_align", *args]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False, **kwargs)


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tts-align", "--help"])
    assert cli.main() is None
    shown = capsys.readouterr().out
    for command, line in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(line)}$", shown, re.MULTILINE)
    assert {command.split()[0] for command in COMMANDS} == {
        *AlignCLI.subcommands(),
        "recipes",
        "prepare",
        "score",
        "compare",
        "listen",
        "label",
        "demo",
    }
    assert max(map(len, shown.splitlines())) <= 120


def test_help_of_an_objective(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--objective.beta" in printed(capsys, "fit", "--objective.help", "tkto")


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--version"], 0, r"^tts-align \d+\.\d+\.\d+\n$"),
        (["ftt"], 2, r"unknown command 'ftt': expected one of .*did you mean 'fit'\?"),
        (["--verison"], 2, r"unknown command '--verison': .*; did you mean '--version'\?"),
        (["help"], 0, r"^usage: tts-align COMMAND"),
        (["help", "listen", "make"], 0, r"^usage: tts-align listen make SYSTEM\.\.\."),
        (["fit", "tkto"], 2, r"error: fit takes no word before its options, got tkto: write --config tkto\n"),
        (["fit", "recipes/kto.yaml"], 2, r"write --config recipes/kto\.yaml\n"),
        (["sample", "lines.txt"], 2, r"got lines\.txt: write --config and the name of a recipe, such as --config tkto"),
        (["recipes", "tkto"], 2, r"got tkto: tts-align fit --config tkto trains with it, tts-align recipes --copy DIR"),
        (["fit"], 2, r"no objective chosen: pass --objective, one of .*, or name a recipe, such as --config tkto"),
        (
            ["fit", "--config", "lora"],
            2,
            r"lora.yaml is an overlay, which follows a recipe: write --config tkto ",
        ),
        (["fit", "--objective", "tkto"], 2, r"options are required: --model.policy; a recipe holds them: .*tkto"),
        (["sample", "--config", "tkto"], 2, r"the following options are required: --prompts, --out\n"),
        (["compare"], 2, r"are required: --first\n  usage: tts-align compare FIRST \[SECOND\]"),
        (["prepare", "--manifst", "x"], 2, r"--manifst x; did you mean 'source'\?"),
        (["prepare", "voices.jsonl"], 2, r"unrecognized arguments: voices\.jsonl: write --source voices\.jsonl"),
        (["label", "--config", "s.txt"], 2, r"error: --config: expected a YAML file of options, names and values"),
        (["demo"], 2, r"expected `tts-align demo build`"),
        (["demo", "build", "--help"], 0, r"--seed"),
        (["label", "--help"], 0, r"(?s)--judged.*--rule\.max_cer"),
        (["label", "--judged", "nowhere.jsonl", "--out", "x.jsonl"], 2, r"nowhere\.jsonl"),
        (["label", "--judged", "x", "--out", "y", "--rule.max_cer", "-1"], 2, r"max_cer must not be negative"),
        (
            ["label", "--judged", "x", "--out", "y", "--rule.keep", "some"],
            2,
            r"rule.keep: expected one of best, all, got",
        ),
        (["listen", "score", "--answers", "x"], 2, r"error: answers: expected a list, such as \[x\], got x\n"),
        (
            ["score", "a", "--prompts", "x", "--judge", "Whisper"],
            2,
            r"judge: .*got Whisper; did you mean 'Whis",
        ),
        (["label", "--judgde", "x"], 2, r"did you mean 'judged'\?"),
    ],
)
def test_words(
    args: list[str], status: int, message: str, here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (here / "s.txt").write_text("hello\n")
    monkeypatch.setattr(sys, "argv", ["tts-align", *args])
    try:
        cli.main()
        ended = 0
    except SystemExit as end:
        ended = end.code or 0
    assert ended == status
    shown = capsys.readouterr()
    assert re.search(message, shown.out + shown.err)
    assert "Traceback" not in shown.err


def test_a_registered_name_works_once_its_module_is_named(
    here: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own_sft.py").write_text(
        "from tts_align import Objective, Outcome, Reads\n\n\n"
        "class Mine(Objective, name='mine'):\n"
        '    """Mine."""\n\n'
        "    reads = Reads.LABELLED\n\n"
        "    def forward(self, step):\n"
        "        return Outcome(-step.mean(step.policy.sums()))\n"
    )
    monkeypatch.setattr(Objective, "registry", dict(Objective.registry))
    path = recipe(objective="sft", max_steps=1)
    assert "unknown objective 'mine'" in fails(capsys, "fit", "--config", path, "--objective", "mine")
    flags = ["--objective", "mine", "--run.modules", "[own_sft]"]
    cli = run(["fit", "--config", path, *flags, "--run.directory", "runs/flags"])
    assert type(cli.model.objective).__name__ == "Mine"
    (here / "own.yaml").write_text("objective: mine\nrun: {modules: own_sft, directory: runs/own}\n")
    monkeypatch.delitem(sys.modules, "own_sft")
    Objective.registry.pop("mine")
    cli = run(["fit", "--config", path, "--config", "own.yaml"])
    assert type(cli.model.objective).__name__ == "Mine"
    saved = yaml.safe_load(Path("runs/own/config.yaml").read_text())
    assert saved["objective"]["class_path"] == "own_sft.Mine"
    assert saved["run"]["modules"] == "own_sft"
    message = fails(capsys, "fit", "--config", path, "--run.modules=[nowhere]")
    assert f"run.modules: no module named 'nowhere' in {here}" in message


@pytest.mark.parametrize("command", ["fit", "sample"])
@pytest.mark.parametrize("version", ["2", "3"])
def test_what_an_overlay_leaves_open_is_named(
    command: str, version: str, here: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prompts", "x", "--out", "y"] if command == "sample" else []
    named = [command, "--config", "dpo", "--config", f"models/cosyvoice{version}", *given]
    message = fails(capsys, *named)
    assert "model.policy.init_args.directory is not given: pass --model.policy.init_args.directory" in message
    message = fails(capsys, *named, "--model.policy.init_args.directory", "mine")
    if command == "fit":
        assert "data.manifest is not given: pass --data.manifest with a file of rows" in message
    else:
        assert "no directory mine: expected that of a CosyVoice2" in message  # which needs no rows


def test_a_hub_identifier_says_how_to_download(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "FunAudioLLM/CosyVoice2-0.5B"
    message = fails(
        capsys, "fit", "--config", "dpo", "--config", "models/cosyvoice2", "--data.manifest", "rows.jsonl",
        "--model.policy.init_args.directory", name,
    )  # fmt: skip
    assert f"there is no directory {name}" in message
    assert f"hf download {name} --local-dir CosyVoice2-0.5B" in message
    assert f"modelscope download --model {name} --local_dir CosyVoice2-0.5B" in message
    monkeypatch.setattr(
        sys, "argv", ["tts-align", *["prepare", "--source", "x", "--out", "y.jsonl", "--directory"], name]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert f"hf download {name}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_logger_goes_by_its_short_name_and_says_what_to_install(
    name: str, package: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    message = fails(capsys, "fit", "--config", recipe(), "--trainer.logger", name)
    assert re.search(rf"Requirement '{package}>=[\d.]+' not met.*pip install", message)


def test_audio_is_yes_or_no(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "sample", "--config", recipe(), "--prompts", "p", "--out", "o.jsonl", "--audio", "wav")
    assert "--audio true writes recordings beside --out" in message


@pytest.mark.parametrize("voices", ["anna", "[anna]"])
def test_one_voice_needs_no_brackets(
    voices: str, here: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "p.txt").write_text("ab\n")
    given = ["--prompts", "p.txt", "--out", "o.jsonl", "--speakers", voices]
    assert "voice 'anna' has no effect" in fails(capsys, "sample", "--config", recipe(), *given)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_sentences_as_plain_lines(name: str, here: Path, recipe: Recipe) -> None:
    (here / "p.txt").write_text("\ufeffab\n\n  cab \n", "utf-8")
    (here / "p.jsonl").write_text('{"id": "line-1", "text": "ab"}\n{"id": "line-3", "text": "cab"}\n')
    run(["sample", "--config", recipe(), "--prompts", name, "--out", f"{name}.out", "--samples", "2"])
    rows = [yaml.safe_load(line) for line in Path(f"{name}.out").read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [
        ("line-1-0", "ab"), ("line-1-1", "ab"), ("line-3-0", "cab"), ("line-3-1", "cab"),
    ]  # fmt: skip


def test_sample_is_resumable_and_needs_no_checkpoint(here: Path, recipe: Recipe) -> None:
    (here / "prompts.jsonl").write_text('{"id": "p0", "text": "ab"}\n{"id": "p1", "text": "cab"}\n')
    args = ["sample", "--config", recipe(), "--prompts", "prompts.jsonl", "--out", "said.jsonl", "--samples", "3"]
    run(args)
    said = Path("said.jsonl").read_bytes()
    assert len(said.splitlines()) == 6
    run(args)
    assert Path("said.jsonl").read_bytes() == said


def test_the_program_in_two_processes(here: Path, recipe: Recipe) -> None:
    """Two CPU processes fit TKTO, the contrastive pair included, and learn what one process learns."""
    path = recipe(objective="tkto", max_steps=3)
    ddp = str(ROOT / "recipes" / "strategy" / "ddp.yaml")
    said = in_two_processes(here, "fit", "--config", path, "--config", ddp, "--run.directory", "runs/two")
    assert said.count("recipe:") == 1
    run(["fit", "--config", path, "--run.directory", "runs/one"])
    one, two = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_the_program_refuses_in_a_line(here: Path) -> None:
    done = program("fit", "--config", "nowhere.yaml", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1].startswith("tts-align: error: ")


def test_tkto_fits_its_pair_first_and_goes_on_anywhere(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(objective="tkto", max_steps=2)
    run(["fit", "--config", path])
    said = capsys.readouterr().out
    assert said.index("π⁺") < said.index("π⁻") < said.index("separation of the pair") < said.index("checkpoint:")
    for side in ("desirable", "undesirable"):
        assert Path("runs/small/contrast", side, "checkpoints/last.ckpt").is_file()
    kept = {path: path.read_bytes() for path in Path("runs/small/contrast").rglob("*.ckpt")}
    Path("runs/small/checkpoints/last.ckpt").unlink()
    run(["fit", "--config", path])
    assert {path: path.read_bytes() for path in kept} == kept
    assert Path("runs/small/checkpoints/last.ckpt").is_file()


def test_at_its_end_python_does_not_look_through_all_objects(monkeypatch: pytest.MonkeyPatch):
    """That takes more than a second with PyTorch and Lightning loaded; only then, not while the command works."""
    at_exit: list[Any] = []
    monkeypatch.setattr("tts_align.cli.entry.atexit.register", at_exit.append)
    cli.main(["--version"])
    assert at_exit == [gc.freeze]
