# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn.functional import layer_norm
from unet_dump import TOLERANCE, UNET, dump, length_mask, off, weights

from tts_align.models.cosyvoice.flow.unet import Attention, CausalBlock, CausalUNet, ResNet
from tts_align.models.flow.token_flow import time_sinusoids

SIZES = [
    {
        "mel": 3,
        "channels": 8,
        "time_channels": 10,
        "blocks": 1,
        "mid_blocks": 1,
        "heads": 2,
        "head_channels": 3,
        "hidden": 12,
        "chunk": 4,
    },
    {
        "mel": 5,
        "channels": 6,
        "time_channels": 4,
        "blocks": 2,
        "mid_blocks": 3,
        "heads": 3,
        "head_channels": 4,
        "hidden": 7,
        "chunk": 6,
    },
]


def make(sizes: dict[str, int], seed: int = 0) -> CausalUNet:
    torch.manual_seed(seed)
    return CausalUNet(**sizes).double().eval()


def inputs(sizes: dict[str, int], lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Whatever is fed to the model; padding is not zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, frames, mel = len(lengths), max(lengths), sizes["mel"]
    return {
        "noisy": draw(rows, frames, mel),
        "mean": draw(rows, frames, mel),
        "speaker": draw(rows, mel),
        "known": draw(rows, frames, mel),
        "time": torch.rand(rows, generator=generator, dtype=torch.float64),
        "mask": length_mask(torch.tensor(lengths)),
    }


@pytest.mark.parametrize("channels", [4, 12])
def test_time_is_the_formula(channels):
    half = channels // 2
    angles = [1000 * 0.37 * 10000 ** (-k / (half - 1)) for k in range(half)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert time_sinusoids(torch.tensor([0.37]), channels)[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("streaming", [False, True])
def test_velocity_equals_the_published_one(streaming):
    io = dump()
    model = CausalUNet(**UNET).eval()
    model.load_state_dict(weights("decoder.estimator."))
    noisy, mean, known = (io[f"est.{name}"].transpose(1, 2) for name in ("x", "mu", "cond"))
    mask = io["est.mask"][:, 0].bool()
    velocity = model(noisy, mean, io["est.spks"], known, io["est.t"], mask, streaming)
    assert off(velocity.transpose(1, 2), io[f"est.out_stream{int(streaming)}"]) < TOLERANCE


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 2)])
def test_attention_is_the_formula(heads, size):
    torch.manual_seed(heads)
    attention = Attention(5, heads, size, dropout=0.0, bias=False).double()
    vectors, mask = torch.randn(1, 4, 5, dtype=torch.float64), torch.rand(1, 4, 4) > 0.4
    mask = mask | torch.eye(4, dtype=torch.bool)
    mixed = torch.zeros(4, heads * size, dtype=torch.float64)
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        q, k, v = (vectors[0] @ layer.weight[own].T for layer in (attention.to_q, attention.to_k, attention.to_v))
        for i in range(4):
            seen = [j for j in range(4) if mask[0, i, j]]
            share = torch.stack([q[i] @ k[j] / math.sqrt(size) for j in seen]).softmax(0)
            mixed[i, own] = sum(a * v[j] for a, j in zip(share, seen, strict=True))
    torch.testing.assert_close(attention(vectors, None, mask)[0], attention.to_out[0](mixed))


def test_residual_block_is_the_formula():
    torch.manual_seed(0)
    block = ResNet(3, 4, 5).double()
    vectors, time = torch.randn(1, 6, 3, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    mask = length_mask(torch.tensor([5]), 6)[..., None]

    def mish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tanh(torch.log(1 + x.exp()))

    def causal(part: CausalBlock, x: torch.Tensor) -> torch.Tensor:
        conv, norm = part.block[0], part.block[2]
        rows = []
        for frame in range(6):
            past = [x[0, i] * mask[0, i] if i >= 0 else torch.zeros_like(x[0, 0]) for i in range(frame - 2, frame + 1)]
            sums = sum(conv.weight[:, :, tap] @ past[tap] for tap in range(3)) + conv.bias
            rows.append(mish(layer_norm(sums, (4,), norm.weight, norm.bias, 1e-5)))
        return torch.stack(rows)[None] * mask

    hidden = causal(block.block1, vectors) + block.mlp[1](mish(time))[:, None]
    around = (vectors * mask) @ block.res_conv.weight[:, :, 0].T + block.res_conv.bias
    torch.testing.assert_close(block(vectors, mask, time), causal(block.block2, hidden) + around)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_utterance_does_not_depend_on_its_neighbours(sizes, streaming):
    model, lengths = make(sizes), [11, 5, 8]
    given = inputs(sizes, lengths)
    together = model(**given, streaming=streaming)
    for item, length in enumerate(lengths):
        own = {key: value[item : item + 1] for key, value in given.items()}
        own = {key: value[:, :length] if value.ndim > 1 and key != "speaker" else value for key, value in own.items()}
        torch.testing.assert_close(together[item, :length], model(**own, streaming=streaming)[0])
        assert not together[item, length:].any(), "padding is 0"


@pytest.mark.parametrize("sizes", SIZES)
def test_streaming_velocity_depends_on_no_later_chunk(sizes):
    model, chunk = make(sizes, seed=2), sizes["chunk"]
    frames = 3 * chunk
    given = inputs(sizes, [frames])
    whole = model(**given, streaming=True)
    for end in (chunk, 2 * chunk):
        changed = {key: given[key].clone() for key in ("noisy", "mean", "known")}
        for value in changed.values():
            value[:, end:] += 1
        torch.testing.assert_close(model(**{**given, **changed}, streaming=True)[:, :end], whole[:, :end])
        assert not torch.allclose(model(**{**given, **changed})[:, :end], model(**given)[:, :end]), "not streaming"


def test_every_input_matters():
    sizes = SIZES[0]
    model, given = make(sizes), inputs(SIZES[0], [6])
    for key in ("noisy", "mean", "speaker", "known", "time"):
        given[key].requires_grad_()
    model(**given).square().sum().backward()
    for key in ("noisy", "mean", "speaker", "known"):
        assert (given[key].grad != 0).all(), key
    assert not torch.allclose(model(**given), model(**{**given, "time": given["time"] + 0.1}))
    assert all(parameter.grad is not None for parameter in model.parameters())
