"""Names of earlier versions in saved recipes: the error holds today's."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from tts_align.cli.entry import run
from tts_align.cli.moved import MOVED, gone, new_key, new_path, outdated

CLASSES = {
    "callbacks.guards": ("HackingGuard", "CollapseGuard"),
    "callbacks.tokens": ("TokenStatistics", "KeepParts"),
    "contrast": ("Contrast",),
    "evaluation": ("TestSettings",),
    "judges.ctc": ("CTCJudge",),
    "judges.symbolic": ("SymbolicJudge",),
    "models.base": ("Sampling",),
    "models.cosyvoice.flow": ("UNetFlow",),
    "models.dit": ("DiTFlow",),
    "models.flow": ("TokenFlow",),
    "models.flow_vocoder": ("FlowVocoder",),
    "models.fsq": ("MelFSQ", "FSQSizes"),
    "models.mel": ("MelVocoder", "MelTokenizer"),
    "models.qwen2": ("Qwen2CodecLM", "Sizes", "LoRA"),
    "models.reward": ("RewardModel",),
    "models.reward_sizes": ("RewardSizes",),
    "models.s3": ("S3Tokenizer",),
    "reward_fit": ("RewardFit",),
    "stage_fit": ("StageFit",),
}
"""What a recipe of version 0.1 could name, by module."""
PATHS = [f"tts_align.{module}.{name}" for module, names in CLASSES.items() for name in names]


def test_no_module_is_left_out():
    assert CLASSES.keys() == MOVED.keys()


@pytest.mark.parametrize("old", PATHS)
def test_every_class_is_where_the_message_says(old: str):
    new = new_path(old)
    assert new is not None
    module, _, name = new.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert f"{found.__module__}.{found.__qualname__}" == new  # its home, not a module that imports it
    assert new_path(new) is None


@pytest.mark.parametrize("old", PATHS)
def test_an_old_path_in_a_recipe_gives_the_new_one(old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "config.yaml"
    recipe.write_text(yaml.safe_dump({"objective": "sft", "model": {"policy": {"class_path": old}}}))
    with pytest.raises(SystemExit) as raised:
        run(["fit", "--config", str(recipe)])
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert f"{recipe} was written by an earlier version" in message
    assert f"model.policy.class_path: {old} is now {new_path(old)}" in message


def test_everything_that_is_old_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = {
        "model": {
            "reward": {"class_path": "tts_align.models.reward.RewardModel", "init_args": {"sizes": {"codes": 1080}}}
        },
        "trainer": {"callbacks": [{"class_path": "tts_align.callbacks.guards.HackingGuard"}]},
    }
    assert list(outdated(recipe)) == [
        "model.reward.class_path: tts_align.models.reward.RewardModel is now tts_align.models.reward.model.RewardModel",
        "model.reward.init_args.sizes.codes is now model.reward.init_args.sizes.codebook_size",
        "trainer.callbacks[0].class_path: tts_align.callbacks.guards.HackingGuard is now "
        "tts_align.training.callbacks.guards.HackingGuard",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.judge tts_align.judges.ctc.CTCJudge", r"--model\.judge: .* is now tts_align\.evaluation\.judges"),
        ("--model.judge=tts_align.judges.ctc.CTCJudge", r"--model\.judge: .* is now tts_align\.evaluation\.judges"),
        ("--model.reward.init_args.sizes.codes 5", r"codes is now --model\.reward\.init_args\.sizes\.codebook_size"),
    ],
)
def test_old_names_as_flags(flags: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(["fit", "--objective", "sft", *flags.split()])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["tts_align.objectives.dpo.DPO", "mine.models.qwen2.Qwen2CodecLM", "tts_align", "x"])
def test_other_names_pass(name: str):
    assert new_path(name) is None
    assert new_key(name) is None


def test_a_key_that_is_gone_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "config.yaml"
    policy = {"class_path": "Qwen2CodecLM", "init_args": {"directory": "demo:audio/base", "packed": True}}
    recipe.write_text(yaml.safe_dump({"objective": "sft", "model": {"policy": policy}}))
    for args in (["--config", str(recipe)], ["--config", "sft", "--model.policy.init_args.packed", "true"]):
        with pytest.raises(SystemExit) as raised:
            run(["fit", *args])
        assert raised.value.code == 2
        message = capsys.readouterr().err
        assert "model.policy.init_args.packed is no longer there, leave it out: rows are scored without" in message
    assert gone("model.policy.init_args.lora") is None
