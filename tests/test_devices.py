# SPDX-License-Identifier: Apache-2.0
"""Whole recipes on an accelerator that is not there: policy, judge, vocoder, reward model, flow and tokenizer on it."""

import json
from pathlib import Path

import pytest
import torch
from places import RECIPES, with_short_hearings
from simulated_device import ON_SIMULATED_DEVICE, OnDevice, simulated_device

from tts_align.cli.entry import run

SHORT = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
ROWS = {"sft": 40, "dpo": 400, "e2e": 30}
"""Enough to have what the objective needs: pairs, and undesirable rows (64)."""
TESTED = [
    "--model.test.sentences",
    "2",
    "--model.test.audio",
    "1",
    "--model.test.forgetting",
    "false",
    "--run.threads",
    "1",
]
OF_ITS_OWN = {
    "diffro": ["--model.reward_fit.epochs", "1"],
    "e2e": [
        *("--model.stage_fit.epochs", "1", "--model.stage_fit.second_epochs", "1"),
        *("--model.vocoder.init_args.steps", "1"),
    ],
}


pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:'pin_memory' argument is set as true:UserWarning",  # there is nothing to pin it for
        "ignore:.*does not have many workers.*",
        "ignore:The number of training batches .*",
    ),
]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "tkto", "diffro", "e2e"])
def test_a_recipe_runs_on_an_accelerator(name: str, tmp_path: Path):
    place = tmp_path / name
    rows = ["--data.max_rows", str(ROWS.get(name, 64))]
    options = [*SHORT, *rows, *TESTED, *OF_ITS_OWN.get(name, []), *ON_SIMULATED_DEVICE, "--run.directory", str(place)]
    with simulated_device():
        recipe = with_short_hearings(name, tmp_path) if name in ("diffro", "e2e") else RECIPES / f"{name}.yaml"
        cli = run(["fit", "--config", str(recipe), *options])
    assert cli.trainer.global_step == 1
    summary = json.loads((place / "test/summary.json").read_text())
    assert summary["aligned"]["cer"]["n"] == 4
    assert summary["aligned"]["cer"]["value"] < 1
    stored = torch.load(place / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert stored
    assert not any(isinstance(value, OnDevice) for value in stored.values())


def test_a_reward_model_trains_and_is_tested_on_an_accelerator(tmp_path: Path):
    place = tmp_path / "mtr"
    few = ["--trainer.limit_test_batches", "1", "--data.max_rows", "64", "--run.threads", "1"]
    with simulated_device():
        run(
            [
                *("fit", "--config", str(RECIPES / "mtr.yaml"), *SHORT, *few, "--trainer.max_epochs", "1"),
                *(*ON_SIMULATED_DEVICE, "--run.directory", str(place)),
            ]
        )
    assert set(json.loads((place / "test/reward.json").read_text())) == {"cer", "speaker_accuracy"}
    assert (place / "model/model.safetensors").is_file()
