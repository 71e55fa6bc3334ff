# SPDX-License-Identifier: Apache-2.0
"""Half precision around the models: what must not be rounded is not, and what cannot work is refused with a remedy."""

import contextlib

import pytest
import torch
from tiny import LORA, SIZES
from tiny_sound import FLOW, REWARD

from tts_align.models.flow.dit import DiTFlow
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward import layers
from tts_align.models.reward.model import RewardModel
from tts_align.utils.precision import check_precision, check_trained_weights

HALVES = [lambda model: model.to(torch.bfloat16), lambda model: model.half()]


@contextlib.contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("half", HALVES)
def test_the_policy_turns_by_the_same_angles(half):
    """In bfloat16 the frequencies turn position 300 by 0.28 rad too much or too little."""
    model = Qwen2CodecLM(sizes=SIZES)
    exact = 300 * model.backbone.rotary_emb.inv_freq.double()
    half(model)
    assert model.llm_decoder.weight.element_size() == 2
    angles = 300 * model.backbone.rotary_emb.inv_freq.double()
    assert (angles - exact).abs().max() < 1e-4


@pytest.mark.parametrize("half", HALVES)
def test_the_flow_turns_by_the_same_angles(half):
    model = DiTFlow(FLOW)
    exact = model.decoder.estimator.rotary_embed(301)
    assert torch.equal(half(model).decoder.estimator.rotary_embed(301), exact)


@pytest.mark.parametrize("half", HALVES)
def test_adapters_stay_float32(half):
    model = half(Qwen2CodecLM(sizes=SIZES, lora=LORA))
    types = {".lora_" in name: value.dtype for name, value in model.named_parameters()}
    assert types[True] == torch.float32
    assert types[False].itemsize == 2


def test_positions_of_the_reward_model_differ():
    """Computed in bfloat16 only 385 of 512 did."""
    like = torch.zeros(1, 1, 256)
    expected = layers.sinusoids(512, like)
    with default_type(torch.bfloat16):
        found = layers.sinusoids(512, like)
    assert torch.equal(found, expected)
    assert len(layers.sinusoids(512, like.bfloat16()).unique(dim=0)) == 512


def test_a_reward_model_takes_up_its_place_in_half_precision():
    model = RewardModel(sizes=REWARD).eval()
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    expected = model.encode(model.embed(tokens), mask)
    found = model.to(torch.bfloat16).encode(model.embed(tokens), mask)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def changed(dtype: torch.dtype, steps: int = 20) -> float:
    """Share of weights that AdamW at 1e-6 changes."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4000).mul(0.02).to(dtype))
    before, optimiser = weight.detach().clone(), torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
    for _ in range(steps):
        (weight * torch.randn(4000)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return float((weight != before).float().mean())


def test_small_steps_are_lost_in_half_precision():
    """Why it is refused."""
    assert changed(torch.float32) > 0.99
    assert changed(torch.bfloat16) < 0.05


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"])
def test_a_trainer_that_rounds_the_weights_is_refused(precision):
    with pytest.raises(ValueError, match=rf"trainer\.precision {precision} .*bf16-mixed"):
        check_precision(precision)


@pytest.mark.parametrize("precision", ["32-true", "32", 32, "64-true", "bf16-mixed", "16-mixed", "bf16", None])
def test_a_trainer_that_keeps_them_is_taken(precision):
    check_precision(precision)


def test_weights_that_train_in_half_precision_are_refused():
    model = Qwen2CodecLM(sizes=SIZES)
    check_trained_weights(model, "model.policy")
    with pytest.raises(ValueError, match=r"model\.policy trains .* in bfloat16.*dtype: float32.*lora"):
        check_trained_weights(model.to(torch.bfloat16), "model.policy")
    check_trained_weights(model.requires_grad_(False), "model.policy")
    check_trained_weights(Qwen2CodecLM(sizes=SIZES, lora=LORA).to(torch.bfloat16), "model.policy")
