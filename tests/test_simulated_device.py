# SPDX-License-Identifier: Apache-2.0
"""The pretended accelerator computes what the CPU computes, and refuses what CUDA refuses."""

import copy
import io

import pytest
import torch
from simulated_device import DEVICE, OnDevice, simulated_device
from torch import nn
from torch.nn import functional
from transformers import Qwen2Config, Qwen2Model


@pytest.fixture(autouse=True)
def device():
    with simulated_device() as device:
        yield device


def test_devices_say_where_they_are():
    here, there = torch.ones(2, device="cuda"), torch.ones(2)
    assert here.device == DEVICE
    assert here.is_cuda
    assert there.device.type == "cpu"
    assert here.cpu().device.type == "cpu"
    assert there.to(here).device == there.to(here.device).device == there.cuda().device == DEVICE
    assert torch.zeros_like(here).device == here.new_zeros(3).device == here[0].device == DEVICE
    assert here.sum().item() == 2
    assert here.tolist() == here.cpu().numpy().tolist() == [1, 1]
    with torch.device(DEVICE):
        assert torch.arange(3).device == torch.tensor([1]).device == DEVICE
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.where(here > 0, here, there),
        lambda here, there: functional.linear(here, there[:, None] * torch.ones(3)),
        lambda here, there: functional.embedding(torch.tensor([1]), here[:, None]),
        lambda here, there: there[torch.zeros(1, dtype=torch.long, device=DEVICE)],
        lambda here, there: here.index_select(0, torch.tensor([0])),
        lambda here, there: here.add_(there),
        lambda here, there: torch.randn(2, device=DEVICE, generator=torch.Generator()),
        lambda here, there: torch.randn(2, generator=torch.Generator(device=DEVICE)),
        lambda here, there: functional.scaled_dot_product_attention(here[None, None], here[None, None], there[None]),
    ],
)
def test_two_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError, match=r"same device|generator"):
        mix(torch.ones(3, device=DEVICE), torch.ones(3))


def test_what_cuda_allows_is_allowed():
    here = torch.arange(4.0, device=DEVICE)
    assert (here + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert here[torch.tensor([1, 2])].tolist() == here[[1, 2]].tolist() == here[here > 0][:2].tolist() == [1, 2]
    here[1:3] = torch.tensor([7.0, 8.0])
    assert here.tolist() == [0, 7, 8, 3]
    assert torch.rand(2, device=DEVICE, generator=torch.Generator(device=DEVICE).manual_seed(0)).device == DEVICE


def test_models_without_numbers_stay_so():
    with torch.device("meta"):
        assert not isinstance(nn.Linear(2, 3).weight, OnDevice)
    assert not isinstance(torch.empty(2, device="meta"), OnDevice)


def test_views_share_their_numbers():
    here = torch.zeros(2, 3, device=DEVICE)
    here[:, 1].fill_(5)
    here.view(-1)[0] = 1
    assert here.tolist() == [[1, 5, 0], [0, 5, 0]]


def test_training_is_that_of_the_cpu():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ours = Qwen2Model(config)
    theirs = copy.deepcopy(ours).to(DEVICE)
    assert all(isinstance(value, OnDevice) and isinstance(value, nn.Parameter) for value in theirs.parameters())
    for model, device in ((ours, "cpu"), (theirs, DEVICE)):
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
            loss = model(tokens).last_hidden_state.square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimiser.step()
            optimiser.zero_grad()
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():  # attention and optimiser take other ways to the same numbers
        torch.testing.assert_close(state[name].cpu(), value, atol=1e-4, rtol=1e-4)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert all(torch.equal(again[name], value.cpu()) for name, value in state.items())
