# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tts_align.models.base.flow_records import FlowDraws, FlowLoss, FlowRates


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_draws_belong_to_their_utterance():
    together = FlowDraws.draw([5, 9, 7], 3, generators(1, 2, 3), streaming=True)
    for row, (frames, seed) in enumerate([(5, 1), (9, 2), (7, 3)]):
        alone = FlowDraws.draw([frames], 3, generators(seed), streaming=True)
        assert torch.equal(alone.noise[0], together.noise[row, :frames])
        assert not together.noise[row, frames:].any()
        assert all(torch.equal(getattr(alone, x)[0], getattr(together, x)[row]) for x in ("time", "prompt", "keep"))


def test_one_generator_may_serve_all_and_the_global_one_is_left_alone():
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(4)
    draws = FlowDraws.draw([6, 6], 2, [generator, generator])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draws.noise[0], draws.noise[1])


@pytest.mark.parametrize("rates", [FlowRates(), FlowRates(prompt=0.9, prompt_share=0.5, drop=0.6, streaming=0.1)])
def test_shares(rates):
    """Within five standard errors of what was asked for."""
    count, frames, generator = 4000, 41, torch.Generator().manual_seed(0)
    draws = FlowDraws.draw([frames] * count, 1, [generator] * count, rates)
    most = int(rates.prompt_share * frames)
    assert draws.prompt.max() == most

    def near(found: torch.Tensor, share: float) -> bool:
        return abs(found.double().mean().item() - share) < 5 * (share * (1 - share) / count) ** 0.5

    # Every length from none to most is as likely as the others.
    for length in range(1, most + 1):
        assert near(draws.prompt == length, rates.prompt / (most + 1))
    assert near(~draws.keep, rates.drop)
    assert near(draws.time < 0.25, 0.25)
    assert abs(draws.noise.std().item() - 1) < 0.02
    coins = [FlowDraws.draw([1], 1, [generator], rates).streaming for _ in range(1000)]
    assert abs(sum(coins) / 1000 - rates.streaming) < 5 * (rates.streaming * (1 - rates.streaming) / 1000) ** 0.5


def test_nothing_is_dropped_or_given_when_the_rates_say_so():
    generator = torch.Generator().manual_seed(0)
    draws = FlowDraws.draw([30] * 50, 1, [generator] * 50, FlowRates(prompt=0.0, drop=0.0, streaming=0.0))
    assert draws.keep.all()
    assert not draws.prompt.any()
    assert not draws.streaming
    draws = FlowDraws.draw([30] * 50, 1, [generator] * 50, FlowRates(drop=1.0, streaming=1.0))
    assert not draws.keep.any()
    assert draws.streaming


@pytest.mark.parametrize("name", ["prompt", "prompt_share", "drop", "streaming"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_shares_lie_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=name):
        FlowRates(**{name: value})


def test_every_utterance_needs_a_generator():
    with pytest.raises(ValueError, match="one generator for each of 2 utterances, got 1"):
        FlowDraws.draw([3, 3], 1, generators(0))


def test_an_empty_loss_is_zero():
    zero = torch.zeros(())
    assert FlowLoss(zero, zero).value == 0
    assert FlowLoss(torch.tensor(6.0), torch.tensor(4.0)).value == 1.5
