# SPDX-License-Identifier: Apache-2.0
"""The rules that peers broke, each on a tiny policy through the real module, data and trainer."""

from __future__ import annotations

import ast
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import (
    LORA,
    OBJECTIVES,
    Memory,
    build,
    gap,
    make_rows,
    make_trainer,
    save_log_ratios,
    save_policy,
    save_rows,
    weights,
)

import tts_align
from tts_align.batch import Batch, Mean, Reads, Rows, Scored
from tts_align.data.collate import MicroBatches, PlanSampler
from tts_align.data.datamodule import AlignData
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.speech import TestSettings
from tts_align.evaluation.stages.hearing import Hearing
from tts_align.evaluation.stages.spoken import SpokenStages
from tts_align.models.base.layout import collate
from tts_align.models.base.policy import CodecLM
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM
from tts_align.objectives import DPO, KTO, SFT, TKTO, Objective, Outcome, Part, Step
from tts_align.objectives.tkto import token_weights
from tts_align.training import testing
from tts_align.training.cache import TokenCache
from tts_align.training.contrast import Contrast
from tts_align.training.module import AlignModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def fitted(folder: Path, module: AlignModule, data: AlignData, *callbacks: Callback, **options: Any) -> list[Any]:
    """Fit, and give what was logged."""
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(module, datamodule=data)
    logger = trainer.logger
    assert isinstance(logger, Memory)
    return logger.logged


def first_batch(module: AlignModule, data: AlignData) -> Batch:
    """The first micro-batch of a training, with everything in place to score it without a trainer."""
    data.prepare(module.policy, module.rows_wanted)
    split = data._splits["train"]
    sampler = PlanSampler(split.plan, split.examples)
    if module.contrast is not None:
        module.scoring.contrast_cache = TokenCache.read(Path(str(module.contrast.weights)), data.rows())
    return MicroBatches(split.examples, split.layout)[next(iter(sampler))]


def loss_of(module: AlignModule, batch: Batch) -> float:
    with torch.no_grad():
        return module.objective(module.score(batch)).loss.item()


@contextmanager
def disturbed(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block a module's output is changed."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return change(output)
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- rule 1: the loss is made of speech, nothing else ---


@every_objective
def test_rule_1_only_targets_count(name: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path)
    with torch.no_grad():
        module.policy.llm_decoder.weight.add_(0.1)  # off the reference, so that every target matters
        module.policy.llm_decoder.bias.add_(torch.linspace(0, 1, len(module.policy.llm_decoder.bias)))
    batch = first_batch(module, data)
    before = loss_of(module, batch)
    rows = batch.rows
    predicting = torch.zeros(len(rows.token), dtype=torch.bool)
    predicting[rows.hidden_index] = True
    assert 0 < predicting.sum() < len(predicting)

    def loss_with(where: torch.Tensor, states: torch.nn.Module) -> float:
        def change(hidden: torch.Tensor) -> torch.Tensor:
            if len(hidden) != len(where):  # the mismatched rows
                return hidden
            return torch.where(where[:, None], hidden + 1.0, hidden)

        with disturbed(states, change):
            return loss_of(module, batch)

    # What the last layer asks at prompts does not matter, bit for bit: only its keys and values do.
    layer = module.policy.blocks[-1].self_attn
    assert loss_with(~predicting, layer.q_proj) == before
    assert loss_with(~predicting, layer.v_proj) != before
    count = len(rows.hidden_index)  # behind it there are states of targets and of nothing else
    for index in (0, count // 2, count - 1):
        assert loss_with(torch.arange(count) == index, module.policy.backbone) != before


@every_objective
def test_rule_1_no_padding_and_other_targets(name: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path)
    with torch.no_grad():
        module.policy.llm_decoder.bias.add_(torch.linspace(0, 1, len(module.policy.llm_decoder.bias)))
    batch = first_batch(module, data)
    before, rows = loss_of(module, batch), batch.rows
    assert len(rows.token) == sum(module.policy.layout.input_count(data.rows()[key]) for key in rows.keys)
    for index in range(0, len(rows.target), 5):
        target = rows.target.clone()
        target[index] = (target[index] + 1) % 20
        assert loss_of(module, replace(batch, rows=replace(rows, target=target))) != before


# --- rule 2: a policy that is its reference ---


def expected_first_loss(objective: Objective, module: AlignModule, batch: Batch) -> float:
    if isinstance(objective, TKTO):
        cache = module.scoring.contrast_cache
        assert cache is not None
        total = 0.0
        for key, label in zip(batch.rows.keys, batch.desirable.tolist(), strict=True):
            ratios = torch.from_numpy(cache.numbers[key])[None]
            total -= float(token_weights(ratios, torch.tensor([label])).sum()) / 2
        return total / batch.rows.count
    return {DPO: math.log(2), KTO: 0.5}[type(objective)]


class Look(Callback):
    """Keeps the first step as the objective sees it."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.outcome: Outcome | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = pl_module.objective.register_forward_hook(self.hook)

    def hook(self, _: Any, given: tuple[Step], outcome: Outcome) -> None:
        if self.step is None:
            self.step, self.outcome = given[0], outcome

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()


@pytest.mark.parametrize("name", ["dpo", "kto", "tkto"])
@pytest.mark.parametrize("way", ["whole", "lora"])
def test_rule_2_step_0(name: str, way: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """DPO ln 2, KTO 1/2, TKTO minus half of each weight; rewards 0, exactly so when the reference is asked at once."""
    options: dict[str, Any] = {"lora": LORA if way == "lora" else None}
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path, **options)
    batch = first_batch(module, data)
    with torch.no_grad():
        online = module.score(batch)
    assert online.reference is not None
    assert (online.log_ratio == 0).all()
    assert online.mismatched is None or online.mismatched.total == 0
    expected = expected_first_loss(module.objective, module, batch)
    assert module.objective(online).loss.item() == pytest.approx(expected, rel=1e-6)
    look = Look()
    logged = fitted(tmp_path, module, data, look, max_steps=1)
    assert look.step is not None
    assert look.step.batch.rows.keys == batch.rows.keys
    assert look.step.log_ratio.abs().max() < (1e-5 if name != "tkto" else 1e-12)
    assert logged[0][1]["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(logged[0][1]["train/desirable_reward"]) < 1e-5
    if name != "dpo":
        assert abs(logged[0][1]["train/kl"]) < 1e-5


def test_rule_2_with_equal_weights(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """−λ/2 for each token: eight rows, their tokens counted."""
    objective = TKTO(mu=0.0, desirable_weight=1.5, undesirable_weight=0.5)
    module, data = build(objective, tiny_policy, tiny_rows, tmp_path)
    batch = first_batch(module, data)
    good = int(batch.rows.mask[batch.desirable].sum())
    bad = int(batch.rows.mask.sum()) - good
    assert loss_of(module, batch) == pytest.approx(-(0.75 * good + 0.25 * bad) / 8, rel=1e-6)


# --- rule 4: one class alone ---


@pytest.mark.parametrize("name", ["kto", "tkto"])
@pytest.mark.parametrize("side", [True, False])
def test_rule_4_one_class(name: str, side: bool, tmp_path: Path, tiny_policy: Path):
    manifest = save_rows(tmp_path, make_rows(per_side=(2, 0) if side else (0, 2)))
    objective = OBJECTIVES[name](sft_weight=0.5)
    module, data = build(objective, tiny_policy, manifest, tmp_path, rows_per_step=4)
    before = weights(module)
    logged = fitted(tmp_path, module, data, accumulate_grad_batches=2)
    assert len(logged) == 4
    present, absent = ("desirable", "undesirable") if side else ("undesirable", "desirable")
    for _, metrics in logged:
        assert all(math.isfinite(value) for value in metrics.values())
        assert f"train/{present}_logp" in metrics
        assert f"train/{absent}_logp" not in metrics  # no mean of nothing
    assert gap(before, weights(module)) > 1e-4
    assert all(value.isfinite().all() for value in module.parameters())


# --- rule 5: however the rows are cut ---


@pytest.mark.parametrize("steps", [1, 4])
@every_objective
def test_rule_5_the_cut_into_micro_batches(name: str, steps: int, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    knobs = {} if name == "sft" else {"sft_weight": 0.3}
    found = []
    for accumulate in (1, 2, 4):
        objective = OBJECTIVES[name](**knobs)
        module, data = build(objective, tiny_policy, tiny_rows, tmp_path / "cache")
        before = weights(module)
        logged = fitted(tmp_path, module, data, accumulate_grad_batches=accumulate, max_steps=steps, max_epochs=-1)
        found.append((weights(module), [metrics for _, metrics in logged]))
    (one, logs), *others = found
    assert gap(before, one) > 0.01
    assert len(logs) == steps
    for other, other_logs in others:
        assert gap(one, other) < 1e-6 * steps
        for ours, theirs in zip(logs, other_logs, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_rule_5_micro_batches_by_tokens(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    found, lengths = [], []
    for cut in ({}, {"tokens_per_micro_batch": 30}, {"tokens_per_micro_batch": 10**6}):
        module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache", **cut)
        trainer = make_trainer(tmp_path, max_steps=2, max_epochs=-1)
        sizes: list[int] = []
        module.policy.register_forward_pre_hook(
            lambda _, given, to=sizes: to.append(len(given[0].token)) if torch.is_grad_enabled() else None
        )
        trainer.fit(module, datamodule=data)
        found.append((weights(module), trainer.accumulate_grad_batches))
        lengths.append(max(sizes))
    assert [count for _, count in found][::2] == [1, 1]
    assert found[1][1] > 1
    assert lengths[1] <= 30 < lengths[0]
    assert gap(found[0][0], found[1][0]) < 1e-6
    with pytest.raises(ValueError, match=r"tokens_per_micro_batch and trainer\.accumulate_grad_batches both"):
        make_trainer(tmp_path, accumulate_grad_batches=3).fit(
            *build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache", tokens_per_micro_batch=10**6)
        )


def test_rule_5_lora(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    found = []
    for accumulate in (1, 4):
        module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache", lora=LORA)
        before = weights(module)
        fitted(tmp_path, module, data, accumulate_grad_batches=accumulate, max_steps=2, max_epochs=-1)
        found.append(weights(module))
    assert gap(before, found[0]) > 1e-3
    assert gap(found[0], found[1]) < 1e-6


# --- rule 6: metrics are sums and counts; nothing waits for the device ---


class Record(Callback):
    """Keeps every outcome."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.objective.register_forward_hook(lambda *given: self.outcomes.append(given[-1]))


def pooled(outcomes: list[Outcome], name: str) -> float:
    means = [outcome.metrics[name] for outcome in outcomes]
    return sum(mean.total.item() for mean in means) / sum(mean.count.item() for mean in means)


@pytest.mark.parametrize("name", ["dpo", "kto", "tkto"])
def test_rule_6_one_mean_over_all(name: str, tmp_path: Path, tiny_policy: Path):
    """Three steps of two uneven micro-batches each: one mean over all their tokens, not of six means."""
    manifest = save_rows(tmp_path, make_rows(sentences=12, per_side=(2, 2), longest=14, seed=3))
    module, data = build(OBJECTIVES[name](), tiny_policy, manifest, tmp_path)
    record = Record()
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 3, "max_steps": 7, "max_epochs": -1}
    logged = fitted(tmp_path, module, data, record, **options)
    assert [step for step, _ in logged] == [3, 6, 7]
    groups = [record.outcomes[:6], record.outcomes[6:12], record.outcomes[12:]]
    for (_, metrics), outcomes in zip(logged, groups, strict=True):
        assert metrics.keys() == {"train/loss", *(f"train/{key}" for key in outcomes[0].metrics)}
        for key in outcomes[0].metrics:
            assert metrics[f"train/{key}"] == pytest.approx(pooled(outcomes, key), rel=1e-5, abs=1e-7), key
        whole = sum(outcome.loss.item() for outcome in outcomes) / (len(outcomes) / 2)
        assert metrics["train/loss"] == pytest.approx(whole, rel=1e-5)
    of_means = sum(one.metrics["desirable_logp"].value.item() for one in groups[0]) / 6
    assert abs(of_means - logged[0][1]["train/desirable_logp"]) > 1e-4  # the data could tell the difference


def test_rule_6_validation(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Steps of 5 and 6 rows weigh by their rows and tokens."""
    held_out = save_rows(tmp_path, make_rows(sentences=8, per_side=(1, 1), longest=14, seed=3))
    module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path, validation=held_out, rows_per_step=5)
    record = Record()
    logged = fitted(tmp_path, module, data, record)
    outcomes = record.outcomes[3:]
    assert len(outcomes) == 3
    found = next(metrics for _, metrics in logged if "val/loss" in metrics)
    for key in ("desirable_logp", "undesirable_reward"):
        assert found[f"val/{key}"] == pytest.approx(pooled(outcomes, key), rel=1e-5)


@every_objective
def test_rule_6_no_step_waits_for_the_device(name: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """On the meta device there are no numbers: whatever asks for one fails."""
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path)
    batch = first_batch(module, data)
    module.to("meta")
    if name in ("dpo", "kto"):  # the reference's numbers come from the cache
        module.scoring.reference_cache = save_log_ratios(data, module.policy, tmp_path)
    module.trainer = make_trainer(tmp_path)
    module.step(batch.to("meta"), "train").backward()
    assert module.means["train"].sums["loss"].total.device.type == "meta"


def test_rule_6_numbers_are_read_once_per_log(
    tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch
):
    module, data = build(TKTO(), tiny_policy, tiny_rows, tmp_path)
    inside, reads = [False], [0]

    def counted(method: str) -> None:
        original = getattr(torch.Tensor, method)

        def read(self: torch.Tensor, *args: Any) -> Any:
            reads[0] += inside[0]
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, method, read)

    def watched(hook: str) -> None:
        original = getattr(module, hook)

        def call(*args: Any, **kwargs: Any) -> Any:
            inside[0] = True
            try:
                return original(*args, **kwargs)
            finally:
                inside[0] = False

        monkeypatch.setattr(module, hook, call)

    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero"):
        counted(method)
    for hook in ("training_step", "on_train_batch_end"):
        watched(hook)
    logged = fitted(tmp_path, module, data, max_steps=6, max_epochs=-1, log_every_n_steps=3)
    assert len(logged) == 2
    assert reads[0] == 2


# --- rule 8: one implementation of each loss ---

PACKAGE = Path(tts_align.__file__).parent
LOSSES = {"dpo_loss", "ipo_loss", "kto_loss", "token_weights", "token_values", "chosen_logp", "full_kl"}


def test_rule_8_each_loss_is_written_once():
    """Sigmoids live in objectives/, log-probabilities of tokens in logprobs.py; everything else calls them."""
    defined: dict[str, list[str]] = {}
    uses: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in LOSSES:
                defined.setdefault(node.name, []).append(where)
            word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if word in ("sigmoid", "logsigmoid", "softplus", "cross_entropy", "nll_loss", "kl_div"):
                uses.setdefault(word, set()).add(where)
    assert defined.keys() == LOSSES
    assert {name: places for name, places in defined.items() if len(places) > 1} == {}
    alignment = {
        place
        for word in ("sigmoid", "logsigmoid", "softplus", "nll_loss", "kl_div")
        for place in uses.get(word, set())
        if not place.startswith(
            ("objectives/", "models/codec/mel", "evaluation/judges/", "evaluation/measures/", "cli/demo/")
        )
    }
    assert alignment == set()
    tree = ast.parse((PACKAGE / "training" / "module.py").read_text("utf-8"))
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not words & {"DPO", "KTO", "TKTO", *LOSSES}  # the step knows no objective by name


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_rule_8_cached_and_online_references_give_the_same_loss(
    name: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path)
    with torch.no_grad():
        module.policy.llm_decoder.weight.mul_(1.3)
    batch = first_batch(module, data)
    online = loss_of(module, batch)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    logger = trainer.logger
    assert isinstance(logger, Memory)
    assert module.scoring.reference_cache is not None
    assert logger.logged[0][1]["train/loss"] == pytest.approx(online, abs=1e-6)


# --- rule 9: no dropout where nothing is learned ---


class Forwards(Callback):
    """Notes, for every forward of the policy and the reference in training, its mode and what it said."""

    def __init__(self) -> None:
        self.policy: list[tuple[bool, bool, bool]] = []  # training, with gradient, adapter on
        self.reference: list[tuple[bool, bool]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        policy = pl_module.policy
        policy.register_forward_hook(
            lambda *_: self.policy.append((policy.backbone.training, torch.is_grad_enabled(), policy._adapter_on))
        )
        if "reference" in pl_module.parts:
            part = pl_module.parts["reference"]
            part.register_forward_hook(
                lambda *_: self.reference.append((any(m.training for m in part.modules()), torch.is_grad_enabled()))
            )


@pytest.mark.parametrize("name", ["dpo", "kto", "tkto"])
@pytest.mark.parametrize("lora", [None, LoRA(2, 4, dropout=0.3)], ids=["whole", "lora"])
def test_rule_9_dropout(name: str, lora: LoRA | None, tmp_path: Path, tiny_dropout: Path, tiny_rows: str):
    module, data = build(OBJECTIVES[name](), tiny_dropout, tiny_rows, tmp_path, lora=lora)
    seen, look = Forwards(), Look()
    fitted(tmp_path, module, data, seen, look, max_steps=2)
    learning = [training for training, gradient, _ in seen.policy if gradient]
    still = [training for training, gradient, _ in seen.policy if not gradient]
    assert learning == [True, True]  # the policy has its dropout
    assert not any(still)  # its mismatched rows, and its base as the reference, have none
    assert len(still) == (2 if name == "kto" or (name == "tkto" and lora) else 0)
    if name == "tkto":
        assert not any(worn for _, gradient, worn in seen.policy if not gradient)  # rule 12: the adapter is off
    assert seen.reference == ([(False, False)] * 2 if name == "tkto" and not lora else [])
    assert look.step is not None
    assert look.step.reference is not None
    base = Qwen2CodecLM(str(tiny_dropout)).eval()
    with torch.no_grad():
        said = base(look.step.batch.rows).logp
    torch.testing.assert_close(look.step.reference.logp, said, rtol=0, atol=1e-5)
    assert (look.step.policy.logp - said).abs().max() > 1e-3  # dropout is not 0, so the rule could be broken


def test_rule_9_is_asserted(tmp_path: Path, tiny_dropout: Path, tiny_rows: str):
    module, data = build(KTO(), tiny_dropout, tiny_rows, tmp_path)
    batch = first_batch(module, data)
    module.train()
    assert not any(part.training for part in module.parts["reference"].modules())
    module.score(batch)
    module.parts["reference"].train()
    with pytest.raises(AssertionError, match="must not use dropout"):
        module.score(batch)


# --- rule 10: the base of an evaluation is not the policy ---


class Deaf(Judge):
    """Judges nothing."""

    needs_audio = False

    def judge(self, samples: Any, expected: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("name", ["sft", "kto"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_rule_10_before_is_the_directory(
    name: str, lora: Any, tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "p", "text": "ab"}\n')
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path, lora=lora)
    fitted(tmp_path, module, data, max_steps=2)
    module.test_settings, module.judge = TestSettings(str(prompts)), Deaf()
    spoke: list[tuple[str, str]] = []
    speak = SpokenStages._speak

    def noted(self: SpokenStages, system: str, model: CodecLM, batch: Any) -> None:
        spoke.append((system, model.digest()))
        speak(self, system, model, batch)

    monkeypatch.setattr(SpokenStages, "_speak", noted)
    monkeypatch.setattr(Hearing, "listen", lambda *_: None)
    monkeypatch.setattr(testing.Testing, "finish", lambda *_: None)
    make_trainer(tmp_path).test(module, datamodule=data)
    assert [system for system, _ in spoke] == ["base", "aligned"]
    assert spoke[0][1] == Qwen2CodecLM(str(tiny_policy)).digest()
    assert spoke[1][1] == module.policy.digest() != spoke[0][1]


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_rule_10_validation_compares_with_the_start(lora: Any, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Trained, saved, loaded into a fresh module: rewards are those against the directory's weights, not 0."""
    module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "one", lora=lora, validation=tiny_rows)
    trainer = make_trainer(tmp_path, max_steps=3, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    fresh, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "two", lora=lora, validation=tiny_rows)
    later = make_trainer(tmp_path)
    later.validate(fresh, datamodule=data, ckpt_path=tmp_path / "some.ckpt", weights_only=True, verbose=False)
    logger = later.logger
    assert isinstance(logger, Memory)
    found = logger.logged[0][1]["val/desirable_reward"]
    base, policy = Qwen2CodecLM(str(tiny_policy)).eval(), module.policy.eval()
    total = count = 0.0
    for key, source in data.sources("validation").items():
        if source.desirable:
            rows = collate([data.rows()[key]], policy.layout)
            with torch.no_grad():
                total += float((policy(rows).logp - base(rows).logp).sum())
            count += rows.mask.sum().item()
    assert abs(found) > 1e-3
    assert found == pytest.approx(total / count, abs=1e-5)


# --- rule 11: resuming is not noticed ---


class SaveAndDie(Callback):
    """Saves after some steps, and breaks the run off a little later, in the middle of a step."""

    def __init__(self, path: Path, save_at: int, die_at: int) -> None:
        self.path, self.save_at, self.die_at = path, save_at, die_at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.save_at and not self.path.exists():
            trainer.save_checkpoint(self.path)

    def on_before_zero_grad(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.die_at:
            raise MemoryError("killed")


@every_objective
@pytest.mark.parametrize("lora", [None, LoRA(2, 4, dropout=0.3)], ids=["whole", "lora"])
def test_rule_11_killed_in_an_epoch(name: str, lora: Any, tmp_path: Path, tiny_dropout: Path, tiny_rows: str):
    """Ten steps, or four, a kill, and the other six: the same bits in weights and optimiser, dropout and all."""
    options = {"accumulate_grad_batches": 2, "max_steps": 10, "max_epochs": -1}
    data_options: dict[str, Any] = {"rows_per_step": 4, "lora": lora, "optimizer": torch.optim.AdamW, "lr": 0.01}

    def prepared() -> tuple[AlignModule, AlignData]:
        return build(OBJECTIVES[name](), tiny_dropout, tiny_rows, tmp_path / "cache", **data_options)

    whole, data = prepared()
    trainer = make_trainer(tmp_path, **options)
    torch.manual_seed(5)
    trainer.fit(whole, datamodule=data)
    saved = tmp_path / "mid.ckpt"
    killed, data = prepared()
    with pytest.raises(MemoryError):
        make_trainer(tmp_path, SaveAndDie(saved, 4 if name != "sft" else 1, 6 if name != "sft" else 2), **options).fit(
            killed, datamodule=data
        )
    resumed, data = prepared()
    again = make_trainer(tmp_path, **options)
    torch.manual_seed(77)  # whatever the process was doing before
    torch.rand(3)
    again.fit(resumed, datamodule=data, ckpt_path=saved, weights_only=True)
    assert gap(weights(whole), weights(resumed)) == 0
    assert gap(weights(whole), weights(killed)) > 0
    ours, theirs = (one.optimizers[0].state_dict()["state"] for one in (trainer, again))
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][key]))
    logs = [one.logger.logged for one in (trainer, again)]  # type: ignore[union-attr]
    steps = len(logs[1])
    assert [m["train/loss"] for _, m in logs[0][-steps:]] == [m["train/loss"] for _, m in logs[1]]


def test_double_precision_resumes_without_a_rounding(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Lightning puts a checkpoint's weights into the module before it makes that double."""
    options = {"precision": "64-true"}
    whole, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache", rows_per_step=4)
    make_trainer(tmp_path, **options).fit(whole, datamodule=data)
    part, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache", rows_per_step=4)
    with pytest.raises(MemoryError):
        make_trainer(tmp_path, SaveAndDie(tmp_path / "mid.ckpt", 2, 3), **options).fit(part, datamodule=data)
    resumed, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache", rows_per_step=4)
    make_trainer(tmp_path, **options).fit(resumed, datamodule=data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert next(iter(weights(resumed).values())).dtype == torch.float64
    assert gap(weights(whole), weights(resumed)) == 0


def test_another_reference_is_not_resumed_with(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """The directory of the base may have been written anew in the meantime; the policy comes from the checkpoint."""
    base = tmp_path / "base"
    shutil.copytree(tiny_policy, base)
    module, data = build(KTO(), base, tiny_rows, tmp_path / "cache", rows_per_step=4)
    with pytest.raises(MemoryError):
        make_trainer(tmp_path, SaveAndDie(tmp_path / "mid.ckpt", 2, 3)).fit(module, datamodule=data)
    same, data = build(KTO(), base, tiny_rows, tmp_path / "cache", rows_per_step=4)
    make_trainer(tmp_path).fit(same, datamodule=data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    module.policy.save(base)
    other, data = build(KTO(), base, tiny_rows, tmp_path / "cache", rows_per_step=4)
    with pytest.raises(ValueError, match=r"begun with another reference: .* put the weights of model\.reference back"):
        make_trainer(tmp_path).fit(other, datamodule=data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True)


def test_an_order_of_rows_that_is_not_the_plans_is_refused(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches would replace the plan .* set data\.max_rows"):
        make_trainer(tmp_path, overfit_batches=1).fit(module, datamodule=data)


# --- rule 12: adapters alone train, or the base is no reference ---


@pytest.mark.parametrize("name", ["dpo", "kto", "tkto"])
def test_rule_12_loose_weights(name: str, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path, lora=LORA)
    module.policy.speech_embedding.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"speech_embedding\.weight and 0 more train"):
        fitted(tmp_path, module, data, max_steps=1)


def test_rule_12_one_base_for_all(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, _ = build(TKTO(), tiny_policy, tiny_rows, tmp_path, lora=LORA)
    assert not module.parts
    assert sum(1 for name, _ in module.named_parameters() if "embed_tokens" in name) == 1


# --- rule 13: what has no effect is refused ---


def test_rule_13_parts_without_effect(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    contrast = Contrast(weights="some")
    with pytest.raises(ValueError, match=r"model\.contrast has no effect: KTO does not use it"):
        AlignModule(KTO(), Qwen2CodecLM(str(tiny_policy)), contrast=contrast)
    with pytest.raises(ValueError, match=r"model\.contrast has no effect: TKTO"):
        AlignModule(TKTO(mu=0.0), Qwen2CodecLM(str(tiny_policy)), contrast=contrast)
    with pytest.raises(ValueError, match=r"model\.reference has no effect: with adapters"):
        AlignModule(KTO(), Qwen2CodecLM(str(tiny_policy), lora=LORA), reference=Qwen2CodecLM(str(tiny_policy)))


def test_tkto_without_weights_says_who_makes_them(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(TKTO(), tiny_policy, tiny_rows, tmp_path)
    module.contrast = None
    with pytest.raises(ValueError, match=r"set model\.contrast\.weights, or be run by `tts-align fit`"):
        fitted(tmp_path, module, data, max_steps=1)


def test_missing_parts_are_all_named(tiny_policy: Path):
    class Needy(Objective):
        needs = frozenset({Part.REWARD, Part.FLOW})

        def forward(self, step: Step) -> Outcome:
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"Needy cannot run: the recipe must set model\.flow and model\.reward"):
        AlignModule(Needy(), Qwen2CodecLM(str(tiny_policy)))


# --- rule 14: one layout of a row for every model ---


class Layouts(Callback):
    """Keeps the rows that the policy and the reference are given in training."""

    def __init__(self) -> None:
        self.given: dict[str, list[Rows]] = {"policy": [], "reference": []}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        models = {"policy": pl_module.policy, "reference": pl_module.parts["reference"]}
        for name, model in models.items():
            model.register_forward_pre_hook(lambda _, given, name=name: self.given[name].append(given[0]))


def test_rule_14_bistream(tmp_path: Path, tiny_policy: Path):
    manifest = save_rows(tmp_path, make_rows(sentences=12, per_side=(2, 2), longest=16, seed=3))
    options: dict[str, Any] = {"bistream": (2, 3), "bistream_share": 0.5}
    module, data = build(TKTO(), tiny_policy, manifest, tmp_path, **options)
    seen, look = Layouts(), Look()
    fitted(tmp_path, module, data, seen, look, max_epochs=2)
    drawn = {key: row.bistream for key, row in data.rows("train").items()}
    assert 0 < sum(drawn.values()) < len(drawn)
    assert module.scoring.contrast_cache is not None
    epochs: list[list[str]] = [[], []]
    assert len(seen.given["policy"]) == len(seen.given["reference"]) == 12
    for number, (ours, theirs) in enumerate(zip(*seen.given.values(), strict=True)):
        assert ours is theirs
        epochs[number // 6] += ours.keys
        for key, count in zip(ours.keys, ours.mask.sum(-1).tolist(), strict=True):
            expected = module.policy.layout.target_count(data.rows()[key])
            assert len(module.scoring.contrast_cache.numbers[key]) == count == expected
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(drawn)
    assert look.step is not None
    assert look.step.log_ratio.abs().max() == 0


# --- checkpoints ---


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["kto", "tkto"])
def test_a_checkpoint_holds_what_trains(name: str, lora: Any, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path, lora=lora)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    state = torch.load(tmp_path / "some.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == weights(module).keys()
    assert all(key.startswith("policy.") for key in state)
    assert all((".lora_" in key) == (lora is not None) for key in state)


def test_another_models_checkpoint_is_refused(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(SFT(), tiny_policy, tiny_rows, tmp_path, lora=LORA)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    other, data = build(SFT(), tiny_policy, tiny_rows, tmp_path)
    with pytest.raises(ValueError, match=r"does not fit \d+ of \d+ trained weights, policy\..* another model\.policy"):
        make_trainer(tmp_path, max_steps=2).fit(
            other, datamodule=data, ckpt_path=tmp_path / "some.ckpt", weights_only=True
        )


# --- and further ---


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@every_objective
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_precisions(name: str, precision: Any, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """Lightning would rebuild the batches to convert them, which frozen records do not allow."""
    module, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path, validation=tiny_rows)
    logged = fitted(tmp_path, module, data, precision=precision, max_steps=2, max_epochs=-1)
    plain, data = build(OBJECTIVES[name](), tiny_policy, tiny_rows, tmp_path, validation=tiny_rows)
    expected = fitted(tmp_path, plain, data, max_steps=2, max_epochs=-1)
    assert logged[0][1]["train/loss"] == pytest.approx(expected[0][1]["train/loss"], rel=0.01)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_that_cannot_train_is_refused(precision: Any, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(SFT(), tiny_policy, tiny_rows, tmp_path)
    with pytest.raises(ValueError, match=f"trainer.precision {precision} keeps the weights .* bf16-mixed"):
        fitted(tmp_path, module, data, precision=precision, max_steps=1)


def test_coarse_weights_are_refused(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(SFT(), tiny_policy, tiny_rows, tmp_path)
    module.policy.bfloat16()
    with pytest.raises(ValueError, match=r"model.policy trains .* in bfloat16.*dtype: float32"):
        fitted(tmp_path, module, data, max_steps=1)


def test_the_reference_can_be_another_model(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    other = save_policy(tmp_path / "other", seed=1)
    policy, reference = Qwen2CodecLM(str(tiny_policy)), Qwen2CodecLM(str(other))
    module = AlignModule(KTO(), policy, reference, cache=str(tmp_path / "cache"))
    _, data = build(KTO(), tiny_policy, tiny_rows, tmp_path)
    found = module.score(first_batch(module, data))
    assert found.log_ratio.abs().max() > 0.1
    assert not any(value.requires_grad for value in reference.parameters())


def test_kto_compares_mismatched_speech_of_the_whole_step(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """z₀ is one number per optimiser step, the mean over all its mismatched rows, whatever the micro-batches."""
    found = []
    for accumulate in (1, 4):
        module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache")
        with torch.no_grad():
            module.policy.llm_decoder.weight.mul_(1.2)
        points: list[Mean] = []
        module.objective.register_forward_pre_hook(lambda _, given, points=points: points.append(given[0].mismatched))
        fitted(tmp_path, module, data, accumulate_grad_batches=accumulate, max_steps=2)
        assert len(points) == 2 * accumulate
        for step in range(2):
            assert len({point.value.item() for point in points[step * accumulate : (step + 1) * accumulate]}) == 1
        found.append([points[0], points[accumulate]])
    for one, other in zip(*found, strict=True):
        assert one.count.item() == other.count.item() == 8
        assert one.value.item() == pytest.approx(other.value.item(), abs=1e-5)
    module, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache")
    with torch.no_grad():
        module.policy.llm_decoder.weight.mul_(1.2)
    batch = first_batch(module, data)
    ratios = []
    for rows in batch.mismatched:
        with torch.no_grad():
            ratios += (module.policy.eval()(rows).sums() - module.parts["reference"](rows).sums()).tolist()
    assert found[0][0].value.item() == pytest.approx(sum(ratios) / 8, abs=1e-5)
    assert set(batch.rows.keys).isdisjoint(key for rows in batch.mismatched for key in rows.keys)


def test_predict_scores_rows(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    module, data = build(SFT(), tiny_policy, tiny_rows, tmp_path)
    batch = first_batch(module, data)
    with torch.no_grad():
        found = module.predict_step(batch, 0)
    assert isinstance(found, Scored)
    torch.testing.assert_close(found.logp, module.policy(batch.rows).logp.detach(), rtol=0, atol=0)


def test_an_objective_of_the_users_own(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    class Brief(Objective):
        """Rows' log-probabilities, up or down."""

        reads = Reads.LABELLED

        def forward(self, step: Step) -> Outcome:
            sign = step.batch.desirable.float() * 2 - 1
            return Outcome(-step.mean(sign * step.policy.sums()))

    module, data = build(Brief(), tiny_policy, tiny_rows, tmp_path, lr=0.001)
    logged = fitted(tmp_path, module, data, max_steps=6, max_epochs=-1)
    assert logged[-1][1]["train/loss"] < logged[0][1]["train/loss"]
