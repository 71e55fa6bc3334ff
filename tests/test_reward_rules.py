# SPDX-License-Identifier: Apache-2.0
"""The rules that peers broke, for the objectives with a reward model, through the real module, data and trainer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_module import Look, first_batch, fitted
from tiny import LORA, REWARD_SIZES, build, gap, make_reward, make_rows, save_rows, weights
from tiny_directory import FAMILIES, make_directory

from tts_align.data.datamodule import AlignData
from tts_align.data.records import Row
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.reward.config import Attribute, RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import MTR, DiffRO, Objective, Part
from tts_align.training.module import AlignModule

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:The '.*' does not have many workers",
        "ignore:The number of training batches .* is smaller than the logging interval",
    ),
]
MOOD = Attribute("mood", "classes", ("happy", "sad"))
FREE: dict[str, Any] = {"rollout": "free", "resample": False}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Sixteen rows; some have a mood, and of some nobody knows what is heard."""
    found: list[Row] = []
    for number, row in enumerate(make_rows()):
        attributes: dict[str, str | float] = {"mood": MOOD.classes[number % 2]} if number % 3 else {}
        found.append(replace(row, attributes=attributes))
    return save_rows(tmp_path, found)


def built(objective: Objective, policy: Path, rows: str, folder: Path, **options: Any) -> tuple[AlignModule, Any]:
    dropout = options.pop("dropout", 0.0)
    reward = make_reward(attributes=(MOOD,), dropout=dropout)
    return build(objective, policy, rows, folder / "cache", parts={"reward": reward}, **options)


@pytest.mark.parametrize("way", ["whole", "lora"])
@pytest.mark.parametrize("knobs", [{}, FREE], ids=["teacher-forced", "free"])
def test_rule_2_step_0(way: str, knobs: dict[str, Any], tmp_path: Path, tiny_policy: Path, rows: str):
    """The divergence of a policy from itself is exactly 0, in whatever way it is scored."""
    options: dict[str, Any] = {"lora": LORA if way == "lora" else None}
    module, data = built(DiffRO(**knobs), tiny_policy, rows, tmp_path, **options)
    look = Look()
    logged = fitted(tmp_path, module, data, look, max_steps=1)
    assert look.outcome is not None
    assert look.outcome.metrics["kl"].total.item() == 0
    assert logged[0][1]["train/loss"] == pytest.approx(-logged[0][1]["train/reward"], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "objective",
    [
        lambda: DiffRO(0.3, ("asr", "mood"), sft_weight=0.5),
        lambda: DiffRO(0.3, reduction="sum", estimator="soft"),
        lambda: DiffRO(0.3, **FREE),
        MTR,
        lambda: MTR(label_smoothing=0.1, adversarial=0.5),
    ],
    ids=["straight-through", "soft sum", "free", "mtr", "mtr regularised"],
)
def test_rule_5_the_cut_into_micro_batches(objective: Any, steps: int, tmp_path: Path, tiny_policy: Path, rows: str):
    found = []
    for accumulate in (1, 2, 4):
        module, data = built(objective(), tiny_policy, rows, tmp_path)
        before = weights(module)
        options = {"accumulate_grad_batches": accumulate, "max_steps": steps, "max_epochs": -1}
        logged = fitted(tmp_path, module, data, **options)
        found.append((weights(module), [metrics for _, metrics in logged]))
    (one, logs), *others = found
    assert gap(before, one) > 3e-4
    for other, other_logs in others:
        assert gap(one, other) < 2e-6 * steps
        for ours, theirs in zip(logs, other_logs, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_rule_5_lora(tmp_path: Path, tiny_policy: Path, rows: str):
    found = []
    for accumulate in (1, 4):
        module, data = built(DiffRO(), tiny_policy, rows, tmp_path, lora=LORA)
        before = weights(module)
        fitted(tmp_path, module, data, accumulate_grad_batches=accumulate, max_steps=2, max_epochs=-1)
        found.append(weights(module))
    assert gap(before, found[0]) > 1e-4
    assert gap(found[0], found[1]) < 1e-6


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_rule_6_what_the_step_reads(lora: Any, tmp_path: Path, tiny_policy: Path, rows: str):
    """The reward of the first step is the model's own score of what was drawn: layout and places are right."""
    module, data = built(DiffRO(resample=False), tiny_policy, rows, tmp_path, lora=lora)
    batch = first_batch(module, data)
    reward: Any = module.parts[Part.REWARD]
    said = batch.utterances
    assert said is not None
    module.eval()
    with torch.no_grad():
        found = module.objective(module.score(batch))
        labels = reward.encode_labels(said.target_texts, said.attributes)
        expected = reward.score(said.speech, said.mask, labels, ("asr",)).reward()
    # Hearing the prefix itself is hearing the stored speech tokens.
    assert found.metrics["reward"].value.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_bistream_rows_are_heard_in_order(tmp_path: Path, tiny_policy: Path):
    """Fill tokens among the targets are not speech tokens."""
    long = save_rows(tmp_path, make_rows(longest=40, per_side=(2, 0)), "long.jsonl")
    module, data = built(DiffRO(resample=False), tiny_policy, long, tmp_path, bistream=(2, 3), bistream_share=0.5)
    batch = first_batch(module, data)
    said = batch.utterances
    assert said is not None
    assert (batch.rows.mask.sum(-1) > said.mask.sum(-1) + 1).any()  # some have fill tokens
    reward: Any = module.parts[Part.REWARD]
    with torch.no_grad():
        found = module.objective(module.score(batch))
        labels = reward.encode_labels(said.target_texts, said.attributes)
        expected = reward.score(said.speech, said.mask, labels, ("asr",)).reward()
    assert found.metrics["reward"].value.item() == pytest.approx(expected.mean().item(), rel=1e-5)


class Modes(Callback):
    """Notes which parts are in training mode in every step."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, bool]] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.add((pl_module.policy.backbone.training, pl_module.parts[Part.REWARD].training))


@pytest.mark.parametrize(("objective", "modes"), [(DiffRO, (True, False)), (MTR, (False, True))])
def test_rule_9_who_has_dropout(objective: Any, modes: Any, tmp_path: Path, tiny_dropout: Path, rows: str):
    module, data = built(objective(), tiny_dropout, rows, tmp_path, dropout=0.3, validation=rows)
    look = Modes()
    before = {name: value.clone() for name, value in module.named_parameters()}
    fitted(tmp_path, module, data, look, max_epochs=2)
    assert look.seen == {modes}
    moved = {name.split(".")[0] for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"policy" if objective is DiffRO else "parts"}


def test_noise_is_new_in_every_epoch(tmp_path: Path, tiny_policy: Path, rows: str):
    module, data = built(DiffRO(0.0), tiny_policy, rows, tmp_path, lr=0.0)
    logged = fitted(tmp_path, module, data, max_epochs=2, log_every_n_steps=2)
    rewards = [metrics["train/reward"] for _, metrics in logged]
    assert len(rewards) == 2
    assert rewards[0] != rewards[1]
    assert all(math.isfinite(reward) for reward in rewards)


def test_free_roll_outs_are_the_policys_own(tmp_path: Path, tiny_policy: Path, rows: str):
    """What is scored was drawn by the policy's whole distribution, by the row's seed; a row without end is kept."""
    module, data = built(DiffRO(**FREE), tiny_policy, rows, tmp_path)
    batch = first_batch(module, data)
    found = module.objective.prepare(batch, module.policy, module.parts)
    assert batch.utterances is not None
    assert found.utterances is not None
    assert found.totals == batch.totals
    old, new = batch.utterances.rows, found.utterances.rows
    assert any(a.speech != b.speech for a, b in zip(old, new, strict=True))
    assert [row.text for row in old] == [row.text for row in new]
    for row, speech_tokens, mask in zip(new, found.utterances.speech, found.utterances.mask, strict=True):
        assert speech_tokens[mask].tolist() == list(row.speech)
    again = module.objective.prepare(batch, module.policy, module.parts)
    assert again.rows.keys == found.rows.keys
    with torch.no_grad():  # end-of-speech becomes impossible
        module.policy.llm_decoder.bias[module.policy.layout.end] = -1e4
    assert module.objective.prepare(batch, module.policy, module.parts).rows.keys == batch.rows.keys


def test_validation_and_reference_caches_are_not_mixed_up(tmp_path: Path, tiny_policy: Path, rows: str):
    """DiffRO wants whole distributions, so no cache of log-probabilities is made or read."""
    module, data = built(DiffRO(), tiny_policy, rows, tmp_path, validation=rows)
    logged = fitted(tmp_path, module, data)
    assert module.scoring.reference_cache is None
    assert any("val/kl" in metrics for _, metrics in logged)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("knobs", [{"sft_weight": 0.3, "resample": False}, FREE], ids=["teacher-forced", "free"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_cosyvoice_directory_can_be_the_policy(family: str, knobs: dict[str, Any], lora: Any, tmp_path: Path):
    """Its speech vocabulary has special ids behind the speech tokens, of which the reward model knows nothing."""
    policy = CosyVoiceLM(str(make_directory(tmp_path / family, family)), lora=lora)
    speech_tokens = policy.layout.codebook_size
    assert policy.layout.vocabulary > speech_tokens
    random = torch.Generator().manual_seed(0)
    found = [
        Row(
            str(i),
            "hello"[: 2 + i % 4],
            speech=tuple(torch.randint(speech_tokens, (4 + i,), generator=random).tolist()),
        )
        for i in range(8)
    ]
    manifest = save_rows(tmp_path, found, "spoken.jsonl")
    objective = DiffRO(**knobs)
    torch.manual_seed(0)
    sizes = RewardSizes(speech_tokens, "helo", **REWARD_SIZES)
    module = AlignModule(
        objective, policy, reward=RewardModel(sizes=sizes), optimizer=lambda values: torch.optim.SGD(values, lr=1.0)
    )
    data = AlignData(manifest, rows_per_step=8)
    before, look = weights(module), Look()
    fitted(tmp_path, module, data, look, max_epochs=2)
    assert look.outcome is not None
    assert look.outcome.metrics["kl"].total.item() == 0
    assert look.outcome.metrics["gradient_norm"].value.item() > 0
    assert gap(before, weights(module)) > 0
    assert all(value.isfinite().all() for value in module.parameters())
