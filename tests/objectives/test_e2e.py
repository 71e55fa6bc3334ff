# SPDX-License-Identifier: Apache-2.0
"""End-to-end training: who gets gradients, exact gradients, the cut, folding, hand-over between stages, resume."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from tiny import gap, make_rows, make_trainer, weights
from tiny_sound import (
    VOICES,
    Tones,
    build_e2e,
    double,
    gradients,
    micro_batches,
    parts,
    save_e2e_recipe,
    save_recordings,
    spoken_rows,
)
from torch.nn import functional

from tts_align.batch import Batch
from tts_align.cli.entry import run
from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.objectives import Step
from tts_align.objectives.e2e import E2E
from tts_align.training.module import AlignModule
from tts_align.training.settings import StageFit
from tts_align.training.stages import _stage_changes

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
)
POLICY = {"policy.backbone", "policy.llm_decoder", "policy.llm_embedding", "policy.speech_embedding"}
TOKENIZER = {"parts.tokenizer.tokenizer"}
REWARD = {f"parts.reward.{name}" for name in ("blocks", "norm", "decoder", "ctc_head", "pooled")}
FLOW = {f"parts.flow.{name}" for name in ("spk_embed_affine_layer", "pre_lookahead_layer", "decoder")}
TABLES = {"reward": "parts.reward.embedding", "flow": "parts.flow.input_embedding"}
EXPECTED: dict[tuple[int, tuple[str, ...]], set[str]] = {
    (1, ("reward",)): TOKENIZER | REWARD | {"objective.bridges.reward"},
    (1, ("flow",)): TOKENIZER | FLOW | {"objective.bridges.flow"},
    (1, ("policy",)): TOKENIZER | POLICY | {"objective.bridges.policy"},
    (1, ("reward", "flow")): TOKENIZER | REWARD | FLOW | {"objective.bridges.reward", "objective.bridges.flow"},
    (1, ("reward", "flow", "policy")): TOKENIZER
    | REWARD
    | FLOW
    | POLICY
    | {f"objective.bridges.{name}" for name in ("reward", "flow", "policy")},
    (2, ()): REWARD | FLOW | POLICY | set(TABLES.values()),
    (3, ()): FLOW | POLICY | {TABLES["flow"]},
}


REWARDED = ("asr_weight", "attribute_weight", "second_flow_weight")


def make(stage: int, losses: Sequence[str] = (), **knobs: Any) -> E2E:
    chosen = {"losses": tuple(losses)} if losses else {}
    return E2E(stage=stage, voices=VOICES, **chosen, **knobs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def speech_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Good rows of speech tokens in two voices."""
    folder = tmp_path_factory.mktemp("codebook_size")
    return str(write_manifest(spoken_rows(sentences=8), folder / "rows.jsonl"))


@pytest.fixture
def build(tiny_policy: Path, speech_tokens: str):
    def built(objective: E2E, **options: Any) -> tuple[AlignModule, AlignData]:
        return build_e2e(objective, tiny_policy, speech_tokens, vocoder=Tones(), **options)

    return built


def awake(module: AlignModule) -> None:
    """The bridge to the policy is zero at first: then nothing passes it."""
    if "policy" in module.objective.bridges:
        torch.nn.init.normal_(module.objective.bridges["policy"].weight, std=0.3)


def prefix(name: str) -> str:
    return ".".join(name.split(".")[: 3 if name.startswith(("parts.", "objective.")) else 2])


# --- which parts train ---


@pytest.mark.parametrize(("stage", "losses"), EXPECTED, ids=str)
def test_gradients_reach_exactly_the_parts_of_the_stage(stage: int, losses: tuple[str, ...], build: Any):
    module, data = build(make(stage, losses))
    awake(module)
    found = gradients(module, micro_batches(module, data))
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert {prefix(name) for name in trained} == EXPECTED[stage, losses]
    assert found.keys() == trained  # DDP waits for all of them
    reached = {prefix(name) for name, value in found.items() if np.abs(value).max() > 0}
    assert reached == EXPECTED[stage, losses]


def test_each_loss_reaches_the_tokenizer_and_the_reward_reaches_the_policy(build: Any):
    """Stage 1 by each loss alone; stage 3 by the reward alone, though the reward model itself stays as it is."""
    for name in ("reward", "flow", "policy"):
        zero = {f"{other}_weight": 0.0 for other in ("reward", "flow", "policy") if other != name}
        module, data = build(make(1, **zero))
        batches = micro_batches(module, data)
        before = gradients(module, batches)["parts.tokenizer.tokenizer.stem.weight"]
        assert (np.abs(before).max() > 0) == (name != "policy")  # its bridge is zero at first
        awake(module)
        assert np.abs(gradients(module, batches)["parts.tokenizer.tokenizer.stem.weight"]).max() > 0
    off = {"policy_weight": 0.0, "flow_weight": 0.0, "second_flow_weight": 0.0}
    for rewarded in ({"asr_weight": 0.0}, {"attribute_weight": 0.0}):
        module, data = build(make(3, **off, **rewarded))
        found = gradients(module, micro_batches(module, data))
        assert np.abs(found["policy.llm_decoder.weight"]).max() > 0
        assert all(np.abs(value).max() == 0 for name, value in found.items() if name.startswith("parts."))


def test_parts_that_do_not_train_stay_in_evaluation_mode(build: Any):
    module, _ = build(make(3))
    module.train()
    assert {name for name, part in module.parts.items() if part.training} == {"flow"}
    assert module.policy.training


# --- exact gradients ---


def wide(build: Any, objective: E2E, **options: Any) -> tuple[AlignModule, list[Batch]]:
    """In double precision, normalisation of the backbone included, which would go through float32."""
    module, data = build(objective, **options)
    batches = [double(batch) for batch in micro_batches(module, data)]
    for layer in module.policy.modules():
        if type(layer).__name__ == "Qwen2RMSNorm":
            layer.forward = functools.partial(
                lambda own, hidden: functional.rms_norm(hidden, own.weight.shape, own.weight, own.variance_epsilon),
                layer,
            )
    return module.double(), batches


def check_directions(module: AlignModule, batches: list[Batch], names: Sequence[str], step: float = 1e-6) -> None:
    """Autograd against central differences along one random direction of each parameter."""
    awake(module)
    found = gradients(module, batches)
    named = dict(module.named_parameters())
    random = torch.Generator().manual_seed(3)

    def loss() -> float:
        with torch.no_grad():
            return sum(module.objective(module.score(batch)).loss.item() for batch in batches)

    for name in names:
        value = named[name]
        way = torch.randn(value.shape, generator=random, dtype=value.dtype)
        kept = value.detach().clone()
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                value.copy_(kept + sign * step * way)
            sides.append(loss())
        with torch.no_grad():
            value.copy_(kept)
        slope = (sides[0] - sides[1]) / (2 * step)
        exact = float((torch.from_numpy(found[name]) * way).sum())
        assert abs(slope) > 1e-7, name
        assert exact == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_finite_differences_in_stage_1(build: Any):
    """Everything behind the rounding: the tokenizer's projection up, the bridges, and what reads them."""
    module, batches = wide(build, make(1))
    check_directions(
        module,
        batches,
        [
            "parts.tokenizer.tokenizer.up.weight",
            "parts.tokenizer.tokenizer.up.bias",
            "objective.bridges.reward.weight",
            "objective.bridges.flow.weight",
            "objective.bridges.policy.weight",
            "policy.backbone.layers.0.self_attn.q_proj.weight",
            "parts.reward.blocks.0.attention.query.weight",
            "parts.flow.pre_lookahead_layer.conv1.weight",
        ],
    )


@pytest.mark.parametrize("alone", ["asr", "speaker", "flow", "all"])
def test_finite_differences_through_soft_tokens(alone: str, build: Any):
    """Stage 3 with soft samples: the policy's weights, through the samples, into reward model and flow."""
    off = {"policy_weight": 0.0, "flow_weight": 0.0}
    only = {
        "asr": {"attribute_weight": 0.0, "second_flow_weight": 0.0, **off},
        "speaker": {"asr_weight": 0.0, "second_flow_weight": 0.0, "attribute_weight": 5.0, **off},
        "flow": {"asr_weight": 0.0, "attribute_weight": 0.0, **off},
        "all": {},
    }
    module, batches = wide(build, make(3, estimator="soft", temperature=0.7, **only[alone]))
    names = [
        "policy.llm_decoder.weight",
        "policy.backbone.layers.1.mlp.up_proj.weight",
        "policy.speech_embedding.weight",
    ]
    if alone in ("flow", "all"):
        names += ["parts.flow.input_embedding.weight", "parts.flow.decoder.estimator.proj_out.weight"]
    check_directions(module, batches, names)


def test_the_rounding_passes_gradients_as_the_bounded_numbers_would(build: Any):
    """The one gradient that finite differences cannot see: with the rounding left out they agree, at one point."""
    module, batches = wide(build, make(1))
    found = gradients(module, batches)["parts.tokenizer.tokenizer.down.weight"]
    # d loss / d values, known from the embedding's gradient, times the derivative of the bounded numbers.
    sound = batches[0].recordings
    assert sound is not None
    tokenizer = module.parts["tokenizer"].tokenizer
    kept: dict[str, torch.Tensor] = {}

    def look(_: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        kept["values"] = given[0]
        given[0].retain_grad()

    handles = [
        tokenizer.up.register_forward_hook(look),
        tokenizer.down.register_forward_hook(lambda _, given, made: kept.update(hidden=given[0], latent=made)),
    ]
    module.zero_grad(set_to_none=True)
    step = module.score(batches[0])
    module.objective(step).loss.backward()
    for handle in handles:
        handle.remove()
    pull = kept["values"].grad * (1 - torch.tanh(kept["latent"]) ** 2)  # digits are spread over all of tanh
    expected = torch.einsum("bsd,bsc->dc", pull, kept["hidden"])
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-9, atol=1e-12)


# --- the loss itself ---


def slow_loss(module: AlignModule, batch: Batch) -> dict[str, float]:
    """Stage 1 typed again, row by row and without padding; in double precision, with the folded models."""
    objective, policy = module.objective, module.policy
    said = batch.utterances
    assert said is not None
    reward, flow = module.parts["reward"], module.parts["flow"]
    sums = {"lm": 0.0, "asr": 0.0, "ctc": 0.0, "speaker": 0.0, "fm": 0.0}
    counts = dict.fromkeys(sums, 0)
    with torch.no_grad(), objective.merged(policy, module.parts):
        step = module.score(batch)
        assert step.batch.utterances is not None
        sums["lm"], counts["lm"] = -float(step.policy.logp.sum()), int(step.policy.mask.sum())
        draws = objective._draws(step)
        for i in range(len(said.target_texts)):
            speech_tokens = step.batch.utterances.speech[i][said.mask[i]][None]
            real = torch.ones_like(speech_tokens, dtype=torch.bool)
            labels = reward.encode_labels([said.transcripts[i]], [said.attributes[i]])
            for name, loss in reward.losses(speech_tokens, real, labels).items():
                sums[name] += float(loss.total)
                # Speech too short for a text under ctc has no loss, but its letters count: no cut must matter.
                counts[name] += len(said.transcripts[i] or "") if name == "ctc" else int(loss.count)
            sound = step.recordings
            frames = sound.mel_mask[i].sum()
            speaker = torch.eye(2, dtype=torch.float64)[VOICES.index(said.speakers[i])][None]
            row = replace(
                draws,
                time=draws.time[i : i + 1],
                noise=draws.noise[i : i + 1],
                prompt=draws.prompt[i : i + 1],
                keep=draws.keep[i : i + 1],
            )
            mel = sound.mel[i : i + 1, :frames]
            error = flow.loss(speech_tokens, real, mel, torch.ones(mel.shape[:2], dtype=torch.bool), speaker, row)
            sums["fm"] += float(error.total)
            counts["fm"] += int(error.count)
    return {name: total / counts[name] for name, total in sums.items()}


def test_the_loss_is_the_weighted_sum_and_folding_changes_nothing(build: Any):
    module, batches = wide(build, make(1, policy_weight=0.3, reward_weight=0.7, flow_weight=1.1))
    awake(module)
    (batch,) = batches
    expected = slow_loss(module, batch)
    outcome = module.objective(module.score(batch))
    recognition = expected["asr"] + expected["ctc"] + expected["speaker"]
    assert outcome.loss.item() == pytest.approx(
        0.3 * expected["lm"] + 0.7 * recognition + 1.1 * expected["fm"], rel=1e-7
    )
    means = {name: mean.value.item() for name, mean in outcome.metrics.items()}
    assert means["lm"] == pytest.approx(expected["lm"], rel=1e-5)
    assert means["rm_asr"] == pytest.approx(expected["asr"], rel=1e-5)
    assert means["fm"] == pytest.approx(expected["fm"], rel=1e-5)


def test_folding_ends_as_it_began(build: Any):
    module, _ = build(make(1))
    awake(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    named = module.parts
    with module.objective.merged(module.policy, named):
        codebook = module.parts["tokenizer"].codebook()
        image = codebook @ before["objective.bridges.flow.weight"].T
        torch.testing.assert_close(module.parts["flow"].table.weight, image)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_soft_token_is_a_mixture_of_the_codebook(build: Any):
    """y @ codebook through a bridge is y @ the folded table: stage 3 needs no bridge."""
    module, _ = build(make(1))
    y = torch.rand(1, 4, 20).softmax(-1)
    bridge, tokenizer = module.objective.bridges["flow"], module.parts["tokenizer"]
    soft = bridge(tokenizer.embed(y))
    with module.objective.merged(module.policy, module.parts):
        torch.testing.assert_close(module.parts["flow"].embed(y), soft)


# --- speech tokens in their places ---


@pytest.mark.parametrize("way", ["unistream", "bistream"])
def test_codes_stand_where_the_placeholders_stood(way: str, tiny_policy: Path, tmp_path: Path):
    """The same rows collated with the speech tokens that the tokenizer makes, by the code that every objective uses."""
    rows = spoken_rows(sentences=6, longest=14)
    manifest = str(write_manifest(rows, tmp_path / "rows.jsonl"))
    options: dict[str, Any] = {"bistream": (1, 2)}
    if way == "bistream":
        options["bistream_share"] = 1.0
    module, data = build_e2e(make(2), tiny_policy, manifest, vocoder=Tones(), **options)
    (batch,) = micro_batches(module, data)
    prepared = module.score(batch).batch
    said = prepared.utterances
    assert said is not None
    from tts_align.models.base.layout import collate

    split = data._splits["train"]
    order = {key: row for key, row in zip(split.keys, split.examples.rows, strict=True)}
    speech_tokens = {
        key: tuple(row[mask].tolist()) for key, row, mask in zip(batch.rows.keys, said.speech, said.mask, strict=True)
    }
    assert len(set(speech_tokens.values())) > 2
    again = collate(
        [replace(order[key], speech=speech_tokens[key]) for key in batch.rows.keys],
        module.policy.layout,
    )
    for name in ("token", "table", "target", "hidden_index", "mask", "end"):
        assert torch.equal(getattr(again, name), getattr(prepared.rows, name)), name


def test_vectors_stand_with_their_codes(build: Any):
    module, data = build(make(1))
    awake(module)
    (batch,) = micro_batches(module, data)
    rows = module.score(batch).batch.rows
    assert rows.vectors is not None
    codebook = module.objective.bridges["policy"](module.parts["tokenizer"].codebook())
    at = rows.vectors.abs().sum(-1) > 0
    torch.testing.assert_close(rows.vectors[at], codebook[rows.token[at]])
    assert (rows.table[at] == 1).all()
    assert int(at.sum()) == int(rows.mask.sum()) - rows.count


# --- rule 5 and 11 ---


@pytest.mark.parametrize(("stage", "losses"), [(1, ("reward",)), (1, ()), (2, ()), (3, ())], ids=str)
def test_the_gradient_does_not_depend_on_the_cut(stage: int, losses: tuple[str, ...], build: Any):
    found = []
    for cut in (1, 2, 4):
        module, data = build(make(stage, losses))
        awake(module)
        batches = [double(batch) for batch in micro_batches(module, data, cut)]
        assert len(batches) == cut
        found.append(gradients(module.double(), batches))
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-7, atol=1e-10, err_msg=name)


class SaveAndDie(Callback):
    """Saves after so many steps and stops the process of the training."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise MemoryError


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_training_continues_bit_for_bit(stage: int, build: Any, tmp_path: Path):
    options: dict[str, Any] = {"max_steps": 5, "max_epochs": -1, "enable_checkpointing": False}

    def made() -> tuple[AlignModule, AlignData]:
        return build(make(stage), rows_per_step=4, optimizer=torch.optim.AdamW, lr=0.01)

    whole, data = made()
    make_trainer(tmp_path / "a", **options).fit(whole, datamodule=data)
    saved = tmp_path / "mid.ckpt"
    killed, data = made()
    with pytest.raises(MemoryError):
        make_trainer(tmp_path / "b", SaveAndDie(saved, 3), **options).fit(killed, datamodule=data)
    resumed, data = made()
    make_trainer(tmp_path / "b", **options).fit(resumed, datamodule=data, ckpt_path=saved, weights_only=True)
    assert gap(weights(whole), weights(resumed)) == 0
    assert gap(weights(whole), weights(killed)) > 0


# --- from stage to stage ---


def test_a_stage_starts_from_what_the_one_before_left(build: Any, tmp_path: Path):
    first, data = build(make(1), lr=0.02)
    trainer = make_trainer(tmp_path / "one", max_steps=2, max_epochs=-1)
    trainer.fit(first, datamodule=data)
    second, data = build(make(2, start=str(tmp_path / "one")), seed=9)
    named = first.parts
    with first.objective.merged(first.policy, named):
        for name in ("policy.", "parts.tokenizer.", "parts.reward.", "parts.flow."):
            ours, theirs = first.state_dict(), second.state_dict()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith(name))
    assert not second.objective.bridges
    make_trainer(tmp_path / "two", max_steps=2, max_epochs=-1).fit(second, datamodule=data)
    third, data = build(make(3, start=str(tmp_path / "two")), seed=4)
    before = third.objective.initial_policy(third.policy)
    assert before is not None
    assert before.digest() == third.policy.digest() == second.policy.digest()
    make_trainer(tmp_path / "three", max_steps=1, max_epochs=-1).fit(third, datamodule=data)
    assert before.digest() != third.policy.digest()
    assert third.objective.initial_policy(third.policy).digest() == before.digest()


def test_stage_3_needs_all_models_trained(build: Any, tmp_path: Path):
    module, data = build(make(1, ("reward",)))
    make_trainer(tmp_path / "one", max_steps=1, max_epochs=-1).fit(module, datamodule=data)
    assert sorted(path.name for path in (tmp_path / "one/parts").glob("*.safetensors")) == [
        "policy.safetensors",
        "reward.safetensors",
        "tokenizer.safetensors",
    ]
    build(make(2, start=str(tmp_path / "one")))
    with pytest.raises(ValueError, match="stage 3 starts from"):
        build(make(3, start=str(tmp_path / "one")))
    with pytest.raises(ValueError, match="no trained tokenizer"):
        build(make(2, start=str(tmp_path)))


# --- what cannot work ---


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"stage": 2, "losses": ("reward",)}, "losses say what stage 1"),
        ({"stage": 1, "losses": ()}, "losses say what stage 1"),
        ({"stage": 1, "start": "runs/x"}, "start has no effect"),
        ({"temperature": 0.0}, "temperature"),
        ({"flow_weight": -1.0}, "flow_weight"),
        ({"stage": 1, "asr_weight": 1.0, "resample": False}, r"asr_weight, resample have no effect in stage 1"),
        ({"stage": 1, "losses": ("reward",), "flow_weight": 1.0}, r"flow_weight have no effect"),
        ({"stage": 2, "temperature": 0.5}, r"temperature have no effect in stage 2"),
        ({"stage": 3, "start": "runs/x", "reward_weight": 2.0}, r"reward_weight have no effect in stage 3"),
        ({"stage": 2, "unfreeze_after": {"tokenizer": 1}}, r"unfreeze_after of tokenizer has no effect"),
    ],
)
def test_knobs_that_cannot_work(knobs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        E2E(**knobs)


def test_voices_must_fit(build: Any):
    module, data = build(E2E(stage=2, voices=("ann", "zoe")))
    with pytest.raises(ValueError, match="got 'bob'"):
        module.score(micro_batches(module, data)[0]) and module.objective(module.score(micro_batches(module, data)[0]))


def test_codebooks_must_agree(tiny_policy: Path, speech_tokens: str):
    from tiny_sound import FSQ

    from tts_align.models.codec.mel_fsq import MelFSQ
    from tts_align.models.policy.qwen2 import Qwen2CodecLM

    models = parts() | {"tokenizer": MelFSQ(sizes=replace(FSQ, levels=(5, 5)))}
    with pytest.raises(ValueError, match=r"25 speech tokens of model.tokenizer"):
        AlignModule(make(2), Qwen2CodecLM(str(tiny_policy)), **models)


def test_recordings_serve_as_codes_do(tiny_policy: Path, tmp_path: Path):
    """Rows of recordings without speech tokens; the loss is finite and falls."""
    module, data = build_e2e(make(1), tiny_policy, save_recordings(tmp_path), lr=0.02)
    (batch,) = micro_batches(module, data)
    with torch.no_grad():
        before = module.objective(module.score(batch)).loss.item()
    make_trainer(tmp_path, max_steps=12, max_epochs=-1).fit(module, datamodule=data)
    with torch.no_grad():
        after = module.objective(module.score(batch)).loss.item()
    assert math.isfinite(after)
    assert after < before


def test_step_needs_sound(build: Any):
    module, data = build(make(2))
    step: Step = module.score(micro_batches(module, data)[0])
    with pytest.raises(ValueError, match="no sound"):
        _ = replace(step, batch=replace(step.batch, recordings=None)).recordings


def test_predicting_scores_what_the_tokenizer_hears(build: Any):
    module, data = build(make(2))
    batch = micro_batches(module, data)[0]
    module.eval()
    with torch.no_grad():
        found, wanted = module.predict_step(batch, 0), module.score(batch).policy
    assert gap({"": found.logp}, {"": wanted.logp}) == 0


def test_what_is_rewarded_is_checked_before_the_stages_are_fitted(build: Any):
    with pytest.raises(ValueError, match=r"attributes must be among .*, asr, ctc, speaker, got mood"):
        build(make(3, attributes=("speaker", "mood")))


def test_what_only_the_last_stage_uses_stays_there_and_groups_follow_what_trains():
    """The recipe of stage 3 sets knobs and groups of all stages; each stage gets its own."""
    knobs = Namespace(stage=3, start=None, policy_weight=0.5, reward_weight=0.7, asr_weight=2.0, resample=False)
    chosen = Namespace(class_path="tts_align.objectives.e2e.E2E", init_args=knobs)
    groups = {name: {"lr": 0.1} for name in ("tokenizer", "reward", "flow", "policy")}
    config = Namespace(objective=chosen, trainer=Namespace(callbacks=None), model=Namespace(optimizer_groups=groups))
    fit = StageFit(losses=("reward",), unfreeze_after={"tokenizer": 4}, second_decay_steps=7)
    first, second = (_stage_changes(config, fit, stage, Path("run")) for stage in (1, 2))
    for changes, stage in ((first, 1), (second, 2)):
        made = {name: value for name, value in vars(changes["objective"].init_args).items() if value is not None}
        E2E(**made)
        assert {"asr_weight", "resample"}.isdisjoint(made)
        assert made["stage"] == stage
    assert vars(first["objective"].init_args)["policy_weight"] is None
    assert vars(first["objective"].init_args)["unfreeze_after"] == {"tokenizer": 4}
    assert vars(second["objective"].init_args)["unfreeze_after"] == {}
    assert first["model.optimizer_groups"].keys() == {"tokenizer", "reward"}
    assert second["model.optimizer_groups"].keys() == {"reward", "flow", "policy"}
    assert first["model.lr_scheduler"] is None
    assert second["model.lr_scheduler"].init_args.total_iters == 7
    assert knobs.asr_weight == 2.0


def test_trained_models_keep_what_they_know_in_stage_1(
    build: Any, tiny_policy: Path, speech_tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Directories of a finished run, named by a first stage: its bridges make the same tables of its codebook."""
    module, data = build(make(1), lr=0.02)
    make_trainer(tmp_path / "one", max_steps=2, max_epochs=-1).fit(module, datamodule=data)
    saved = tmp_path / "one/parts"
    assert {path.name for path in saved.iterdir() if path.is_dir()} == {"policy", "reward", "flow", "tokenizer"}
    from tts_align.models.codec.mel_fsq import MelFSQ
    from tts_align.models.flow.dit import DiTFlow
    from tts_align.models.policy.qwen2 import Qwen2CodecLM
    from tts_align.models.reward.model import RewardModel

    models = {
        "tokenizer": MelFSQ(str(saved / "tokenizer")),
        "reward": RewardModel(str(saved / "reward")),
        "flow": DiTFlow(directory=str(saved / "flow")),
    }
    tables = {name: models[name].table.weight.detach().clone() for name in ("reward", "flow")}
    again = AlignModule(make(1), Qwen2CodecLM(str(saved / "policy")), **models)
    said = capsys.readouterr().out
    for name, table in tables.items():
        assert f"{name} of {saved / name} keeps what it learnt: its table as a linear image" in said
        image = again.objective.bridges[name](models["tokenizer"].codebook())
        torch.testing.assert_close(image, table, rtol=1e-3, atol=1e-3)
    batch = micro_batches(again, data)[0]
    with torch.no_grad():
        after = again.objective(again.score(batch))
        assert module.objective.bridges
        before = module.objective(module.score(batch))
    for name, mean in before.metrics.items():
        assert after.metrics[name].value.item() == pytest.approx(mean.value.item(), rel=1e-3), name


@pytest.mark.parametrize("task", ["asr", "ctc"])
def test_conditioned_noise_rewards_the_stored_tokens(task: str, build: Any):
    """With resample: false the reward model reads exactly what the rows say, and the policy still gets a gradient."""
    module, data = build(make(3, resample=False, text_task=task, second_flow_weight=0.0, policy_weight=0.0))
    (batch,) = micro_batches(module, data)
    step = module.score(batch)
    found = module.objective(step).metrics
    said, reward = step.utterances, module.parts["reward"]
    labels = reward.encode_labels(said.target_texts, said.attributes)
    with torch.no_grad():
        scores = reward.score(said.speech, said.mask, labels, (task, "speaker"))
    for rows in scores.tasks:
        expected = -(rows.total.sum() / rows.count.sum()).item()
        assert found[f"second_{rows.name}"].value.item() == pytest.approx(expected, rel=1e-4), rows.name
    gradient = gradients(module, [batch])["policy.llm_decoder.weight"]
    assert np.abs(gradient).max() > 0
    fresh, data = build(make(3, text_task=task, second_flow_weight=0.0, policy_weight=0.0))
    (batch,) = micro_batches(fresh, data)
    other = fresh.objective(fresh.score(batch)).metrics
    assert abs(other[f"second_{task}"].value.item() - found[f"second_{task}"].value.item()) > 1e-3


@pytest.mark.parametrize("stage", [2, 3])
def test_all_rows_are_heard_and_good_ones_are_learnt_to_say(stage: int, tiny_policy: Path, tmp_path: Path):
    """Utterances labelled undesirable reach reward model and flow; the language model's own loss does not know them."""
    every = [replace(row, speaker=VOICES[i % 2], notes={"transcript": "ab"}) for i, row in enumerate(make_rows())]
    manifest = str(write_manifest(every, tmp_path / "rows.jsonl"))
    alone = {"flow_weight": 0.0, **({"reward_weight": 0.0} if stage == 2 else dict.fromkeys(REWARDED, 0.0))}
    found, counts, means = {}, {}, {}
    for heard in (False, True):
        objective = make(stage, all_rows=heard, **alone)
        module, data = build_e2e(objective, tiny_policy, manifest, vocoder=Tones(), rows_per_step=len(every))
        module = module.double()
        batches = [double(batch) for batch in micro_batches(module, data)]
        found[heard] = gradients(module, batches)
        metrics = module.objective(module.score(batches[0])).metrics
        counts[heard] = int(metrics["rm_speaker" if stage == 2 else "second_speaker"].count)
        means[heard] = (metrics["lm"].value.item(), metrics["fm"].count.item())
    assert (counts[False], counts[True]) == (len(every) // 2, len(every))
    assert means[True][1] > means[False][1]
    assert means[True][0] == pytest.approx(means[False][0], rel=1e-6)
    for name, value in found[False].items():
        np.testing.assert_allclose(found[True][name], value, rtol=1e-6, atol=1e-10, err_msg=name)


def test_guards_wait_for_the_last_stage():
    """They listen with a judge, which earlier stages do not have."""
    watch = Namespace(class_path="tts_align.training.callbacks.guards.HackingGuard")
    other = Namespace(class_path="tts_align.training.callbacks.tokens.TokenStatistics")
    chosen = Namespace(class_path="tts_align.objectives.e2e.E2E", init_args=Namespace(stage=3))
    config = Namespace(objective=chosen, trainer=Namespace(callbacks=[watch, other]), model=Namespace())
    for stage in (1, 2):
        assert _stage_changes(config, StageFit(), stage, Path("run"))["trainer.callbacks"] == [other]


def test_nothing_is_fitted_for_a_test_without_a_checkpoint(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.argv", ["tts-align"])
    path = save_e2e_recipe(tmp_path, tiny_policy, save_recordings(tmp_path), trainer__max_epochs=1)
    for verb in ("test", "validate"):
        with pytest.raises(SystemExit):
            run([verb, "--config", path])
        assert "train first" in capsys.readouterr().err
    assert not (tmp_path / "run/stage1").exists()


def test_stages_are_fitted_once_and_continue(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """One call fits all stages; the next one finds them finished; a named start and stage_fit exclude each other."""
    monkeypatch.setattr("sys.argv", ["tts-align"])
    path = save_e2e_recipe(tmp_path, tiny_policy, save_recordings(tmp_path), trainer__max_epochs=1)
    first = run(["fit", "--config", path])
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("stage*/parts/*.safetensors")}
    assert len(made) == 8
    assert first.model.objective.start == str(tmp_path / "run/stage2")
    again = run(["fit", "--config", path])
    assert gap(weights(first.model), weights(again.model)) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in made.items())
    named = ["--objective.start", str(tmp_path / "run/stage2"), "--run.directory", str(tmp_path / "other")]
    with pytest.raises(SystemExit):
        run(["fit", "--config", path, *named])
    assert "model.stage_fit has no effect" in capsys.readouterr().err
    other = run(["fit", "--config", path, *named, "--model.stage_fit", "null"])
    assert gap(weights(first.model), weights(other.model)) == 0
