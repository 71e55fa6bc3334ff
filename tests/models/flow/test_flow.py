# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from parity import as_exact_as, parity
from torch import Tensor, nn

from tts_align.models.base.flow_records import FlowDraws, FlowPrompt, MelFrames
from tts_align.models.flow import token_flow as flow
from tts_align.models.flow.ode import cosine_grid, fixed_noise
from tts_align.models.flow.token_flow import TokenFlow

CODES, MEL, WIDTH, SPEAKER = 7, 3, 4, 5


class LinearFlow(TokenFlow):
    """Everything linear but the product of time and what is known: easily computed by hand."""

    def __init__(self, frames_per_token: int = 2, lookahead: int = 1) -> None:
        super().__init__(CODES, MEL, WIDTH, SPEAKER, frames_per_token, lookahead)
        self.mean = nn.Linear(WIDTH, MEL)
        self.ahead = nn.Linear(WIDTH, MEL, bias=False)
        self.last = {}

    def condition(self, vectors, mask, streaming=False, final=True, voice=None):
        self.last = {"streaming": streaming, "vectors": vectors}
        coming = torch.cat((vectors[:, self.lookahead :], torch.zeros_like(vectors[:, : self.lookahead])), 1)
        mean = self.mean(vectors) + self.ahead(coming)
        kept = mean if final else mean[:, : mean.shape[1] - self.lookahead]
        return kept.repeat_interleave(self.frames_per_token, 1)

    def velocity(self, noisy, time, given, mask, streaming=False):
        return (
            0.5 * noisy + given.mean + (2 + time[:, None, None]) * given.known + given.speaker[:, None].expand_as(noisy)
        )


def make(seed: int = 0, **sizes: int) -> LinearFlow:
    torch.manual_seed(seed)
    return LinearFlow(**sizes).double()


def length_mask(lengths: list[int], width: int | None = None) -> Tensor:
    return torch.arange(max(lengths) if width is None else width) < torch.tensor(lengths)[:, None]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws_of(rows: int, frames: int, seed: int = 0, **changes) -> FlowDraws:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "time": torch.rand(rows, generator=generator, dtype=torch.float64),
        "noise": draw(rows, frames, MEL, seed=seed + 1),
        "prompt": torch.randint(0, 3, (rows,), generator=generator),
        "keep": torch.arange(rows) % 3 != 1,
    }
    return FlowDraws(**(values | changes))


def by_hand(model: LinearFlow, tokens: list[int], speaker: Tensor) -> tuple[Tensor, Tensor]:
    """What the tokens of one utterance say of its frames, and its projected speaker."""
    means = []
    for i in range(len(tokens)):
        mean = model.mean(model.input_embedding.weight[tokens[i]])
        if i + model.lookahead < len(tokens):
            mean = mean + model.ahead(model.input_embedding.weight[tokens[i + model.lookahead]])
        means += [mean] * model.frames_per_token
    length = sum(float(x) ** 2 for x in speaker) ** 0.5
    layer = model.spk_embed_affine_layer
    return torch.stack(means), layer.weight @ (speaker / length) + layer.bias


# Masks and layers


def test_the_published_chunk_mask():
    io = parity("misc").io
    assert torch.equal(flow.chunk_mask(io["mask.pad"][:, 0] > 0, 4), io["mask.chunk4"] > 0)


@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 20])
def test_who_sees_whom(chunk):
    lengths, width = [7, 1, 10], 10
    found = flow.chunk_mask(length_mask(lengths), chunk)
    for row, length in enumerate(lengths):
        for i in range(width):
            for j in range(width):
                assert found[row, i, j] == (j < length and (chunk is None or j < (i // chunk + 1) * chunk))


def test_where_nothing_is_real_each_sees_itself():
    assert torch.equal(flow.chunk_mask(length_mask([0, 2], 3), 2)[0], torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize(("name", "channels"), [("time.dit_dim256", 256), ("time.unet_dim320", 320)])
def test_the_published_sinusoids(name, channels):
    half, time = channels // 2, np.array([0.0, 0.3, 1.0], np.float32).astype(np.float64)
    angles = 1000 * time[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    exact = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], -1))
    found = flow.time_sinusoids(torch.tensor([0.0, 0.3, 1.0]), channels)
    as_exact_as(found, parity("misc").io[name], exact, bound=1e-4)
    assert torch.equal(found, exact.float()), "rounded once"


@pytest.mark.parametrize("channels", [4, 6, 10])
def test_sinusoids_by_hand(channels):
    half = channels // 2
    angles = [1000 * 0.37 * 10000 ** (-k / (half - 1)) for k in range(half)]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
    time = torch.tensor([0.37], dtype=torch.float64)
    torch.testing.assert_close(flow.time_sinusoids(time, channels)[0], expected.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("hidden", "tokens"), [(6, 3), (2, 1), (5, 4)])
def test_the_lookahead_layer_by_hand(hidden, tokens):
    torch.manual_seed(tokens)
    layer = flow.Lookahead(WIDTH, hidden, tokens).double()
    vectors = draw(1, 6, WIDTH)
    zero = torch.zeros(max(WIDTH, hidden), dtype=torch.float64)

    def read(i: int) -> Tensor:
        total = layer.conv1.bias.clone()
        for k in range(tokens + 1):
            total += layer.conv1.weight[:, :, k] @ (vectors[0, i + k] if i + k < 6 else zero[:WIDTH])
        return torch.where(total > 0, total, 0.01 * total)

    for i in range(6):
        total = layer.conv2.bias + vectors[0, i]
        for k in range(3):
            total = total + layer.conv2.weight[:, :, k] @ (read(i - 2 + k) if i - 2 + k >= 0 else zero[:hidden])
        torch.testing.assert_close(layer(vectors)[0, i], total)


def test_packing_keeps_the_order():
    vectors = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    packed, real = flow.pack_left(vectors, mask)
    assert packed.shape == (2, 3, 1)
    assert packed[0, :, 0].tolist() == [0, 2, 3]
    assert packed[1, 0, 0] == 7
    assert real.tolist() == [[True] * 3, [True, False, False]]


def test_first_frames():
    mel = draw(3, 4, 2)
    found = flow.first_frames(mel, length_mask([4, 2, 4]), torch.tensor([3, 3, 0]))
    assert torch.equal(found[0, :3], mel[0, :3])
    assert torch.equal(found[1, :2], mel[1, :2])
    assert not found[0, 3:].any()
    assert not found[1, 2:].any()
    assert not found[2].any()


# Tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_mixtures_are_exactly_ids(dtype):
    model = make().to(dtype)
    ids = torch.tensor([[0, 3, 6], [5, 5, 1]])
    one_hot = nn.functional.one_hot(ids, CODES).to(dtype)
    assert torch.equal(model.embed(ids), model.embed(one_hot))
    # Also flat, as the tokens of a batch are without their padding.
    assert torch.equal(model.embed(one_hot.flatten(0, 1)), model.embed(ids).flatten(0, 1))


def test_negative_ids_count_as_zero():
    model = make()
    assert torch.equal(model.embed(torch.tensor([[-1, 2]])), model.embed(torch.tensor([[0, 2]])))


def test_mixtures_over_another_codebook_are_refused():
    with pytest.raises(ValueError, match="expected mixtures of the flow model's 7 speech tokens, got 9"):
        make().embed(torch.rand(1, 2, 9))


@pytest.mark.parametrize("change", [{"frames_per_token": 0}, {"lookahead": -1}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match="at least 1"):
        make(**change)


# The loss


@pytest.mark.parametrize(
    ("seed", "sizes"), [(0, {}), (1, {"frames_per_token": 3, "lookahead": 2}), (2, {"lookahead": 0})]
)
def test_the_loss_by_hand(seed, sizes):
    """Also that tokens and mel of different lengths are both cut to whole tokens."""
    model = make(seed, **sizes)
    step = model.frames_per_token
    token_lengths, mel_lengths = [4, 5, 3], [4 * step, 4 * step + 1, 4 * step]
    tokens = torch.randint(0, CODES, (3, 5))
    mel, speaker = draw(3, 5 * step - 1, MEL, seed=3), draw(3, SPEAKER, seed=4)
    draws = draws_of(3, 5 * step, seed)
    token_mask, mel_mask = length_mask(token_lengths), length_mask(mel_lengths, mel.shape[1])
    found = model.loss(tokens, token_mask, mel, mel_mask, speaker, draws)
    total, count = 0.0, 0
    for i in range(3):
        length = min(token_lengths[i], mel_lengths[i] // step) * step
        target, noise, time = mel[i, :length], draws.noise[i, :length], draws.time[i]
        known = torch.zeros_like(target)
        known[: draws.prompt[i]] = target[: draws.prompt[i]]
        mean, told_speaker = by_hand(model, tokens[i, : length // step].tolist(), speaker[i])
        noisy = (1 - (1 - 1e-6) * time) * noise + time * target
        told = mean + (2 + time) * known + told_speaker if draws.keep[i] else 0.0
        total += (0.5 * noisy + told - (target - (1 - 1e-6) * noise)).square().sum().item()
        count += length * MEL
    assert found.total.item() == pytest.approx(total, rel=1e-9)
    assert found.count == count
    assert found.value.item() == pytest.approx(total / count, rel=1e-9)


def test_padding_and_neighbours_do_not_matter():
    model = make()
    tokens, mel, speaker = torch.randint(0, CODES, (3, 5)), draw(3, 10, MEL), draw(3, SPEAKER)
    lengths, draws = [5, 2, 3], draws_of(3, 10)
    token_mask, mel_mask = length_mask(lengths), length_mask([10, 4, 6])
    together = model.loss(tokens, token_mask, mel, mel_mask, speaker, draws)
    spoilt_tokens = torch.where(token_mask, tokens, 6 - tokens)
    spoilt_mel = torch.where(mel_mask[..., None], mel, 99.0)
    assert torch.equal(
        model.loss(spoilt_tokens, token_mask, spoilt_mel, mel_mask, speaker, draws).total, together.total
    )
    parts = []
    for i, n in enumerate(lengths):
        one = slice(i, i + 1)
        own = FlowDraws(draws.time[one], draws.noise[one, : 2 * n], draws.prompt[one], draws.keep[one])
        real = length_mask([n]), length_mask([2 * n])
        parts.append(model.loss(tokens[one, :n], real[0], mel[one, : 2 * n], real[1], speaker[one], own))
    assert sum(part.total for part in parts).item() == pytest.approx(together.total.item(), rel=1e-12)
    assert sum(part.count for part in parts) == together.count


def test_a_row_without_any_frame_counts_nothing():
    model = make()
    tokens, mel, speaker, draws = torch.randint(0, CODES, (2, 3)), draw(2, 6, MEL), draw(2, SPEAKER), draws_of(2, 6)
    found = model.loss(tokens, length_mask([3, 3]), mel, length_mask([6, 1]), speaker, draws)
    assert found.count == 6 * MEL
    assert found.total.isfinite()


def test_what_is_dropped_has_no_influence():
    model = make()
    mel, mask = draw(1, 6, MEL), (length_mask([3]), length_mask([6]))
    draws = draws_of(1, 6, keep=torch.tensor([False]), prompt=torch.tensor([2]))
    speaker = draw(1, SPEAKER).requires_grad_()
    tokens = torch.rand(1, 3, CODES, dtype=torch.float64, requires_grad=True)
    model.loss(tokens, mask[0], mel, mask[1], speaker, draws).total.backward()
    assert not tokens.grad.any()
    assert not speaker.grad.any()
    other = model.loss(1 - tokens.detach(), mask[0], mel, mask[1], -speaker.detach(), draws)
    assert other.total == model.loss(tokens, mask[0], mel, mask[1], speaker, draws).total


def test_the_length_of_a_speaker_vector_does_not_matter():
    model = make()
    tokens, mel, speaker, draws = torch.randint(0, CODES, (2, 3)), draw(2, 6, MEL), draw(2, SPEAKER), draws_of(2, 6)
    masks = length_mask([3, 3]), length_mask([6, 6])
    first, second = (model.loss(tokens, masks[0], mel, masks[1], x, draws).total for x in (speaker, 7 * speaker))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_coin_reaches_the_model(streaming):
    model = make()
    tokens, mel, draws = torch.randint(0, CODES, (1, 3)), draw(1, 6, MEL), draws_of(1, 6, streaming=streaming)
    model.loss(tokens, length_mask([3]), mel, length_mask([6]), draw(1, SPEAKER), draws)
    assert model.last["streaming"] is streaming


def test_embedded_tokens_have_the_same_loss():
    model = make()
    tokens, mel, speaker, draws = torch.randint(0, CODES, (2, 3)), draw(2, 6, MEL), draw(2, SPEAKER), draws_of(2, 6)
    rest = length_mask([3, 2]), mel, length_mask([6, 6]), speaker, draws
    assert model.loss(tokens, *rest).total == model.loss_embedded(model.embed(tokens), *rest).total


@pytest.mark.parametrize(("frames", "noise"), [(1, 6), (6, 5)])
def test_too_few_frames_or_too_little_noise(frames, noise):
    tokens, masks = torch.randint(0, CODES, (1, 3)), (length_mask([3]), length_mask([frames]))
    with pytest.raises(ValueError, match=f"got mel of {frames} frames and noise of {noise}"):
        make().loss(tokens, masks[0], draw(1, frames, MEL), masks[1], draw(1, SPEAKER), draws_of(1, noise))


# Sampling


def sample_by_hand(
    model: LinearFlow, tokens: list[int], speaker: Tensor, prompt: list[int], prompt_mel: Tensor, noise: Tensor, **how
) -> Tensor:
    """One utterance, its two velocities one after the other."""
    steps, guidance, final = how.get("steps", 10), how.get("guidance", 0.7), how.get("final", True)
    frames = (len(prompt) + len(tokens) - (0 if final else model.lookahead)) * model.frames_per_token
    known = torch.zeros(frames, MEL, dtype=torch.float64)
    known[: len(prompt_mel)] = prompt_mel
    mean, told_speaker = by_hand(model, prompt + tokens, speaker)
    mean = mean[:frames]
    state = noise[:frames]
    grid = cosine_grid(steps).double().tolist()
    for i in range(steps):
        told = 0.5 * state + mean + (2 + grid[i]) * known + told_speaker
        state = state + (grid[i + 1] - grid[i]) * ((1 + guidance) * told - guidance * 0.5 * state)
    return state[len(prompt) * model.frames_per_token :]


@pytest.mark.parametrize(
    "how", [{}, {"steps": 3, "guidance": 0.0}, {"final": False}, {"final": False, "guidance": 2.0}]
)
@pytest.mark.parametrize("sizes", [{}, {"frames_per_token": 3, "lookahead": 2}])
def test_samples_by_hand(how, sizes):
    """Utterances and prompts of several lengths, one without a prompt, in one batch."""
    model = make(3, **sizes)
    step, speaker = model.frames_per_token, draw(3, SPEAKER)
    rows = [([1, 2, 3, 4], [5, 6]), ([6, 0, 2], [1, 2, 3]), ([3, 3, 1], [])]
    prompt_mel = draw(3, 3 * step, MEL, seed=8)
    tokens = torch.tensor([row + [0] * (4 - len(row)) for row, _ in rows])
    prompt_tokens = torch.tensor([row + [0] * (3 - len(row)) for _, row in rows])
    prompt_lengths = [len(row) for _, row in rows]
    prompt = FlowPrompt(
        prompt_tokens, length_mask(prompt_lengths), prompt_mel, length_mask([step * n for n in prompt_lengths])
    )
    mask = length_mask([len(row) for row, _ in rows])
    found = model.sample(tokens, mask, speaker, prompt, **how)
    noise = fixed_noise(7 * step, MEL).double()
    assert isinstance(found, MelFrames)
    for i, (row, before) in enumerate(rows):
        known = prompt_mel[i, : step * len(before)]
        expected = sample_by_hand(model, row, speaker[i], before, known, noise, **how)
        assert found.mask[i].sum() == len(expected)
        torch.testing.assert_close(found.mel[i, : len(expected)], expected)
        assert not found.mel[i, len(expected) :].any()


def test_no_prompt_is_an_empty_prompt():
    model, tokens, speaker = make(), torch.randint(0, CODES, (2, 3)), draw(2, SPEAKER)
    mask = length_mask([3, 2])
    nothing = FlowPrompt(tokens[:, :0], mask[:, :0], torch.zeros(2, 0, MEL), torch.zeros(2, 0, dtype=torch.bool))
    with_empty, without = model.sample(tokens, mask, speaker, nothing), model.sample(tokens, mask, speaker)
    assert torch.equal(with_empty.mel, without.mel)
    assert torch.equal(without.mask, length_mask([6, 4]))


def test_a_prompt_whose_parts_differ_in_length_is_cut():
    model, tokens, speaker = make(), torch.randint(0, CODES, (1, 3)), draw(1, SPEAKER)
    before, mel = torch.tensor([[4, 5, 6]]), draw(1, 7, MEL)
    exact = FlowPrompt(before[:, :2], length_mask([2]), mel[:, :4], length_mask([4]))
    expected = model.sample(tokens, length_mask([3]), speaker, exact).mel
    for prompt in (
        FlowPrompt(before, length_mask([3]), mel[:, :5], length_mask([5])),
        FlowPrompt(before, length_mask([2], 3), mel, length_mask([7])),
    ):
        assert torch.equal(model.sample(tokens, length_mask([3]), speaker, prompt).mel, expected)


def test_noise_can_be_given():
    model, tokens, speaker, noise = make(), torch.tensor([[1, 2]]), draw(1, SPEAKER), draw(1, 9, MEL, seed=5)
    found = model.sample(tokens, length_mask([2]), speaker, noise=noise).mel[0]
    expected = sample_by_hand(model, [1, 2], speaker[0], [], torch.zeros(0, MEL), noise[0])
    torch.testing.assert_close(found, expected)


def test_mixtures_can_be_sampled_from():
    model, ids, speaker = make(), torch.tensor([[1, 2, 3]]), draw(1, SPEAKER)
    soft = nn.functional.one_hot(ids, CODES).double()
    first, second = (model.sample(x, length_mask([3]), speaker).mel for x in (ids, soft))
    assert torch.equal(first, second)


def test_before_the_end_the_last_tokens_are_only_looked_at():
    model, speaker = make(lookahead=2), draw(2, SPEAKER)
    tokens, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), length_mask([4, 2])
    early = model.sample(tokens, mask, speaker, final=False)
    assert early.mask.sum(1).tolist() == [4, 0]
    # They are seen: the two frames that are made do depend on them.
    other = model.sample(torch.tensor([[1, 2, 0, 4], [5, 6, 0, 0]]), mask, speaker, final=False)
    assert not torch.equal(early.mel[0, :2], other.mel[0, :2])
    assert torch.equal(early.mel[0, 2:4], other.mel[0, 2:4])
    with pytest.raises(ValueError, match="expected more than 2 tokens"):
        model.sample(tokens[:, :2], mask[:, :2], speaker, final=False)
