# SPDX-License-Identifier: Apache-2.0
"""Token-level KTO proves itself on the symbolic corpus, through the command a user would type."""

import json
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

from tts_align.cli.entry import run
from tts_align.training.cache import TokenCache
from tts_align.training.contrast import WEIGHTS, separation

pytestmark = pytest.mark.whole_runs

RECIPES = [str(ROOT / "recipes" / name) for name in ("tkto.yaml", "models/symbolic.yaml")]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenCache, dict]:
    place = tmp_path_factory.mktemp("symbolic") / "run"
    flags = ["--run.directory", str(place), "--run.threads", "1", "--model.test.sentences", "100"]
    flags += ["--model.lr_scheduler.init_args.total_iters", "69", "--objective.sft_weight", "10"]
    flags += ["--model.contrast.decay_steps", "null"]  # the pair follows the same schedule
    cli = run(["fit", "--config", RECIPES[0], "--config", RECIPES[1], *flags])
    weights = TokenCache.read(Path(json.loads((place / WEIGHTS).read_text())["weights"]), needed=())
    return place, weights, cli.datamodule.sources("train")


def test_it_reads_better_and_stays_clear(fitted: tuple[Path, TokenCache, dict]):
    summary = json.loads((fitted[0] / "test/summary.json").read_text())
    assert summary["base"]["accuracy"]["value"] <= 0.72
    assert summary["difference"]["accuracy"]["low"] > 0.1
    assert summary["difference"]["nearest_cer"]["value"] < 0.02
    assert summary["aligned"]["accuracy"]["n"] == 200


def test_the_pair_finds_the_deciding_token(fitted: tuple[Path, TokenCache, dict]):
    sides = separation(fitted[1], fitted[2])
    rest = sides["undesirable"].elsewhere
    assert -sides["undesirable"].target.mean() > 3 * rest.std()
    assert sides["desirable"].target.mean() > 0
    assert abs(np.median(rest)) < 0.2
