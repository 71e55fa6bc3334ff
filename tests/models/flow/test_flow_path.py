# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from parity import parity
from torch import Tensor

from tts_align.models.flow import ode as flow_path


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_path_is_the_formula():
    noise, mel = draw(3, 4, 2), draw(3, 4, 2, seed=1)
    time = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    found = flow_path.path(noise, mel, time)
    for i, t in enumerate(time.tolist()):
        torch.testing.assert_close(found[i], (1 - (1 - 1e-6) * t) * noise[i] + t * mel[i])
    assert torch.equal(found[0], noise[0])
    assert (found[2] - mel[2]).abs().max() < 1e-5


def test_the_velocity_is_the_derivative_of_the_path():
    noise, mel = draw(1, 4, 2), draw(1, 4, 2, seed=1)
    time = torch.tensor([0.4], dtype=torch.float64)
    slope = (flow_path.path(noise, mel, time + 1e-4) - flow_path.path(noise, mel, time - 1e-4)) / 2e-4
    torch.testing.assert_close(flow_path.path_velocity(noise, mel), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 10, 32])
def test_the_time_grid(steps):
    grid = flow_path.cosine_grid(steps)
    expected = [1 - math.cos(math.pi / 2 * i / steps) for i in range(steps + 1)]
    torch.testing.assert_close(grid, torch.tensor(expected), rtol=0, atol=2e-7)


def test_the_published_time_grid():
    torch.testing.assert_close(flow_path.cosine_grid(10), parity("flow_v3").io["infer.t_span"], rtol=0, atol=1e-7)


def test_a_grid_has_steps():
    with pytest.raises(ValueError, match="at least 1 step"):
        flow_path.cosine_grid(0)


def test_a_constant_velocity_is_followed_exactly():
    noise, mel = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    found = flow_path.euler(lambda _state, _time: flow_path.path_velocity(noise, mel), noise, flow_path.cosine_grid(7))
    torch.testing.assert_close(found, flow_path.path(noise, mel, torch.ones(2, dtype=torch.float64)))


def test_euler_by_hand():
    grid = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    seen = []

    def field(state: Tensor, time: Tensor) -> Tensor:
        seen.append(time.tolist())
        return state * time[:, None, None] + 1

    found, state = flow_path.euler(field, draw(2, 3, 1), grid), draw(2, 3, 1)
    for start, step in ((0.0, 0.2), (0.2, 0.5), (0.7, 0.3)):
        state = state + step * (state * start + 1)
    torch.testing.assert_close(found, state)
    assert seen == [[0.0] * 2, [0.2] * 2, [0.7] * 2]


def test_the_published_noise():
    expected = parity("flow_v3").io["infer.noise"][0]
    assert torch.equal(flow_path.fixed_noise(64, 80).T, expected)
    torch.testing.assert_close(
        expected[0, :4], torch.tensor([-1.12584, -1.15236, -0.25058, -0.43388]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("channels", [1, 2, 48])
def test_noise_of_any_length_begins_alike_and_leaves_the_generator_alone(channels):
    state = torch.get_rng_state()
    short, long = flow_path.fixed_noise(20, channels), flow_path.fixed_noise(2 * flow_path.NOISE_FRAMES + 1, channels)
    assert torch.equal(torch.get_rng_state(), state)
    assert long.shape == (2 * flow_path.NOISE_FRAMES + 1, channels)
    assert torch.equal(long[:20], short)
    # Later noise is not a repetition, and is noise.
    assert not torch.equal(long[flow_path.NOISE_FRAMES : flow_path.NOISE_FRAMES + 20], short)
    assert abs(long[flow_path.NOISE_FRAMES :].std().item() - 1) < 0.02
