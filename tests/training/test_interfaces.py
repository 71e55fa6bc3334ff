# SPDX-License-Identifier: Apache-2.0
"""A user's own reward model and policy: what they must have is asked for before the training, not at its test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_stage import NEW, SIZES, spoken_rows
from tiny import save_recipe, save_rows

from tts_align.cli.entry import run
from tts_align.models.base.reward import RewardHead
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.config import RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import DPO, SFT, Part, Parts
from tts_align.training.interfaces import check_test

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


class OwnReward(RewardHead):
    """Everything the interface asks for and nothing else, done by a model inside."""

    def __init__(self, sizes: RewardSizes | None = None, directory: str | None = None) -> None:
        super().__init__()
        self.inner = RewardModel(directory, sizes)
        self.codebook_size, self.tasks = self.inner.codebook_size, self.inner.tasks
        self.attribute_tasks, self.directory = self.inner.attribute_tasks, self.inner.directory

    def encode_labels(self, *given: Any) -> Any:
        return self.inner.encode_labels(*given)

    def embed(self, *given: Any) -> Any:
        return self.inner.embed(*given)

    def score_embedded(self, *given: Any) -> Any:
        return self.inner.score_embedded(*given)

    def losses(self, *given: Any) -> Any:
        return self.inner.losses(*given)

    def losses_embedded(self, *given: Any) -> Any:
        return self.inner.losses_embedded(*given)

    def rebuild(self) -> OwnReward:
        return OwnReward(directory=str(self.directory))

    def save(self, directory: Path) -> None:
        self.inner.save(directory)

    def digest(self) -> str:
        return self.inner.digest()


class Reads(OwnReward):
    def transcribe(self, *given: Any) -> Any:
        return self.inner.transcribe(*given)


class ReadsAndPredicts(Reads):
    def predict(self, *given: Any) -> Any:
        return self.inner.predict(*given)


def _fit(folder: Path, policy: Path, reward: Any) -> None:
    manifest = save_rows(folder, spoken_rows())
    held_out = save_rows(folder, spoken_rows(sentences=3, seed=9), "held_out.jsonl")
    knobs = {"data__validation": held_out, "run__test_after_fit": True, "trainer__max_steps": 1}
    recipe = save_recipe(folder, "mtr", policy, manifest, model__reward=reward, **knobs)
    run(["fit", "--config", recipe, "--run.directory", str(folder / "run")])


@pytest.mark.parametrize(("kind", "lacks"), [(OwnReward, "transcribe"), (Reads, "predict")])
def test_a_reward_model_that_cannot_be_tested_is_refused_before_the_training(
    kind: type[RewardHead], lacks: str, tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
):
    own = {"class_path": f"{__name__}.{kind.__name__}", "init_args": {"sizes": SIZES}}
    with pytest.raises(SystemExit):
        _fit(tmp_path, tiny_policy, own)
    assert f"{kind.__name__} cannot be tested: give it a method `{lacks}`" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_interface_is_all_that_a_reward_model_needs(tmp_path: Path, tiny_policy: Path):
    own = {"class_path": f"{__name__}.ReadsAndPredicts", "init_args": {"sizes": SIZES}}
    for name, reward in {"own": own, "ours": NEW}.items():
        (tmp_path / name).mkdir()
        _fit(tmp_path / name, tiny_policy, reward)
    found = [json.loads((tmp_path / name / "run/test/reward.json").read_text()) for name in ("own", "ours")]
    assert found[0] == found[1]


class Itself(Qwen2CodecLM):
    def rebuild(self) -> Itself:
        return self


def test_a_policy_that_cannot_be_built_again_is_refused_before_the_training(tiny_policy: Path):
    check_test(SFT(), Qwen2CodecLM(str(tiny_policy)), Parts())
    with pytest.raises(ValueError, match=r"Itself.rebuild must give another model.*got the policy itself"):
        check_test(SFT(), Itself(str(tiny_policy)), Parts())
    larger = Qwen2CodecLM(str(tiny_policy))
    larger.register_buffer("more", torch.zeros(1))
    with pytest.raises(ValueError, match=r"a model of the same weights, got other ones at 1 names, more first"):
        check_test(SFT(), larger, Parts())
    # A reference that is there already is what the test compares with.
    parts = Parts()
    parts[Part.REFERENCE] = Qwen2CodecLM(str(tiny_policy))
    check_test(DPO(), Itself(str(tiny_policy)), parts)


def test_the_command_refuses_it_too(tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab\n")
    recipe = save_recipe(
        tmp_path,
        "sft",
        tiny_policy,
        save_rows(tmp_path, spoken_rows()),
        model__policy={"class_path": f"{__name__}.Itself", "init_args": {"directory": str(tiny_policy)}},
        model__test={"prompts": str(prompts), "speakers": ["s0"]},
        model__judge={"class_path": "SymbolicJudge"},
        run__test_after_fit=True,
    )
    with pytest.raises(SystemExit):
        run(["fit", "--config", recipe])
    assert "rebuild must give another model" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))
