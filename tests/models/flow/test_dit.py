# SPDX-License-Identifier: Apache-2.0
"""The published flow of CosyVoice 3, number by number, and what must hold at any size."""

import json
import math
from dataclasses import replace

import pytest
import torch
from parity import FOLDER, parity
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.base.flow_records import FlowDraws, FlowPrompt
from tts_align.models.flow.dit import DiT, DiTFlow, DiTFlowSizes
from tts_align.models.flow.dit_layers import Attention, ConvolvedPositions, DiTBlock, Rotary, modulate, rotate
from tts_align.models.flow.ode import cosine_grid, euler, fixed_noise
from tts_align.models.flow.prior import PriorSizes
from tts_align.models.flow.token_flow import Given, chunk_mask

SMALL = DiTFlowSizes(
    codebook_size=11,
    mel_channels=6,
    speaker_channels=5,
    lookahead=2,
    lookahead_channels=7,
    dim=16,
    depth=2,
    heads=3,
    head_dim=4,
    ff_mult=3,
    time_channels=8,
    position_kernel=3,
    position_groups=4,
    chunk_frames=4,
)
OTHERS = [
    SMALL,
    replace(
        SMALL, codebook_size=5, lookahead=4, dim=24, depth=1, heads=1, head_dim=24, position_groups=8, position_kernel=1
    ),
    replace(SMALL, mel_channels=9, speaker_channels=2, frames_per_token=3, depth=3, ff_mult=1, chunk_frames=6),
    replace(SMALL, frames_per_token=4, patch_frames=2, chunk_frames=4, upsampling="learned", predicts="mel"),
    replace(SMALL, patch_frames=2, predicts="mel", prior=PriorSizes(7, 10, blocks=2, kernel=3)),
]


def make(sizes: DiTFlowSizes = SMALL, seed: int = 0, dtype: torch.dtype = torch.float64) -> DiTFlow:
    """Weights larger than new ones, and none of them zero, so that everything has an influence."""
    torch.manual_seed(seed)
    flow = DiTFlow(sizes).to(dtype).eval()
    for value in flow.parameters():
        nn.init.normal_(value, std=0.3)
    return flow


def length_mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given_of(sizes: DiTFlowSizes, rows: int, frames: int, seed: int = 0) -> Given:
    mel = sizes.mel_channels
    return Given(
        draw(rows, frames, mel, seed=seed), draw(rows, mel, seed=seed + 1), draw(rows, frames, mel, seed=seed + 2)
    )


# The published numbers


@pytest.fixture(scope="module")
def dump() -> tuple[DiTFlow, dict[str, Tensor]]:
    io = parity("flow_v3").io
    state = load_file(FOLDER / "flow_v3" / "state_dict.safetensors")
    chunk = json.loads((FOLDER / "flow_v3" / "config.json").read_text())["estimator"]["static_chunk_size"]
    flow = DiTFlow(DiTFlowSizes.of(state, chunk))
    flow.load_state_dict(state)
    return flow.eval(), io


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert one.shape == other.shape
    assert (one.detach() - other).abs().max() <= tolerance * other.abs().max()


def prompt_of(io: dict[str, Tensor]) -> FlowPrompt:
    tokens, mel = io["infer.prompt_token"], io["infer.prompt_feat"]
    return FlowPrompt(
        tokens, torch.ones(tokens.shape, dtype=torch.bool), mel, torch.ones(mel.shape[:2], dtype=torch.bool)
    )


def test_published_conditions(dump):
    flow, io = dump
    mask = length_mask(io["train.speech_token_len"].tolist())
    vectors = flow.embed(io["train.speech_token"]) * mask[..., None]
    close(vectors, io["enc.token_emb"])
    close(flow.pre_lookahead_layer(vectors), io["enc.look"])
    close(flow.condition(vectors, mask), io["enc.look"].repeat_interleave(2, 1))
    early = flow.condition(vectors[:1], mask[:1], final=False)
    close(early, io["enc.look_context"].repeat_interleave(2, 1))
    close(flow.project_speaker(io["infer.embedding"]), io["infer.spks"])


@pytest.mark.parametrize("streaming", [False, True])
def test_published_velocities(dump, streaming):
    """Of padding too."""
    flow, io = dump
    noisy, mean, known = (io[f"est.{name}"].transpose(1, 2) for name in ("x", "mu", "cond"))
    found = flow.velocity(
        noisy, io["est.t"], Given(mean, io["est.spks"], known), io["est.mask"][:, 0] > 0, streaming=streaming
    )
    close(found.transpose(1, 2), io[f"est.out_stream{int(streaming)}"])


@pytest.mark.parametrize("name", ["trainA", "trainB"])
def test_published_training(dump, name):
    flow, io = dump
    own = {key.removeprefix(f"{name}."): value for key, value in io.items() if key.startswith(f"{name}.")}
    draws = FlowDraws(
        time=own["t"].flatten(),
        noise=own["z"].transpose(1, 2),
        prompt=(own["cond"].abs().sum(1) > 0).sum(1),
        keep=own["cfg_uniform"] > 0.2,
        streaming=bool(own["streaming"]),
    )
    lengths = io["train.speech_token_len"].tolist(), io["train.speech_feat_len"].tolist()
    flow.zero_grad()
    loss = flow.loss(
        io["train.speech_token"],
        length_mask(lengths[0]),
        io["train.speech_feat"],
        length_mask(lengths[1]),
        io["train.embedding"],
        draws,
    )
    close(loss.value, own["loss"])
    loss.value.backward()
    close(flow.input_embedding.weight.grad, own["grad.input_embedding"])
    close(torch.stack([value.grad.norm() for value in flow.parameters()]).norm(), own["grad_norm"])
    flow.zero_grad()
    mask = own["mask"][:, 0] > 0
    given = Given(own["est_mu"].transpose(1, 2), own["est_spks"], own["est_cond"].transpose(1, 2))
    predicted = flow.velocity(own["y"].transpose(1, 2), own["est_t"], given, mask, draws.streaming)
    close(predicted[mask], own["pred"].transpose(1, 2)[mask])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_published_samples(dump, streaming, final):
    flow, io = dump
    mask = torch.ones(io["infer.token"].shape, dtype=torch.bool)
    found = flow.sample(io["infer.token"], mask, io["infer.embedding"], prompt_of(io), streaming=streaming, final=final)
    assert found.mask.all()
    close(found.mel.transpose(1, 2), io[f"infer.mel_stream{int(streaming)}_final{int(final)}"])


def test_published_steps(dump):
    flow, io = dump
    tokens = torch.cat((io["infer.prompt_token"], io["infer.token"]), 1)
    known = functional.pad(io["infer.prompt_feat"], (0, 0, 0, 2 * io["infer.token"].shape[1]))
    mask = torch.ones(known.shape[:2], dtype=torch.bool)
    mean = flow.condition(flow.embed(tokens), torch.ones(tokens.shape, dtype=torch.bool))
    given = Given(mean, flow.project_speaker(io["infer.embedding"]), known)
    states, times = [], []

    def field(state: Tensor, time: Tensor) -> Tensor:
        states.append(state)
        times.append(time)
        return flow.guided(given, mask, 0.7, False)(state, time)

    with torch.no_grad():
        euler(field, fixed_noise(known.shape[1], 80)[None], cosine_grid(10))
        both = flow.velocity(
            states[0].repeat(2, 1, 1), times[0].repeat(2), given.with_nothing(), mask.repeat(2, 1)
        ).transpose(1, 2)
    close(torch.cat(states).transpose(1, 2), io["infer.trace_x"])
    close(torch.cat(times), io["infer.trace_t"])
    close(both, io["infer.trace_v0_cond_uncond"])


def test_published_samples_in_a_batch(dump):
    """What the published code cannot do: others beside it change nothing."""
    flow, io = dump
    rows = [17, 5, 9]
    tokens = io["infer.token"].expand(3, -1)
    prompt = prompt_of(io)
    prompts = FlowPrompt(
        prompt.tokens.expand(3, -1),
        length_mask([6, 0, 3]),
        prompt.mel.expand(3, -1, -1),
        length_mask([12, 0, 6]),
    )
    found = flow.sample(tokens, length_mask(rows), io["infer.embedding"].expand(3, -1), prompts)
    close(found.mel[:1].transpose(1, 2), io["infer.mel_stream0_final1"])
    assert torch.equal(found.mask, length_mask([34, 10, 18]))
    assert not found.mel[~found.mask].any()


def test_published_positions():
    io = parity("misc").io
    rotary = Rotary(16)
    close(rotary.inv_freq, io["rope.inv_freq"])
    angle = rotary(7)
    close(angle.repeat_interleave(2, -1)[None], io["rope.freqs"])
    flat = io["rope.q_flat_before_heads"]
    heads = flat.unflatten(-1, (3, 16)).transpose(1, 2)
    turned = torch.cat((rotate(heads[:, :1], angle), heads[:, 1:]), 1).transpose(1, 2).flatten(2)
    close(turned, io["rope.q_rotated"])


def test_the_full_size_has_the_published_keys_and_shapes():
    path = FOLDER / "fullsize_keys.json"
    if not path.is_file():
        pytest.skip(f"the list of published keys is not here ({path})")
    with torch.device("meta"):
        flow = DiTFlow()
    expected = {key: tuple(shape) for key, shape in json.loads(path.read_text())["flow_v3"].items()}
    assert {key: tuple(value.shape) for key, value in flow.state_dict().items()} == expected
    assert sum(value.numel() for value in flow.parameters()) == 332_257_088
    assert DiTFlowSizes.of(flow.state_dict()) == DiTFlowSizes()


# Sizes


@pytest.mark.parametrize("sizes", OTHERS[:3])
def test_sizes_are_read_from_weights(sizes):
    flow = make(sizes)
    read = DiTFlowSizes.of(flow.state_dict(), sizes.chunk_frames, sizes.frames_per_token)
    assert read == sizes
    again = DiTFlow(read).double().eval()
    again.load_state_dict(flow.state_dict())
    tokens, mask, speaker = torch.tensor([[1, 2, 3]]), length_mask([3]), draw(1, sizes.speaker_channels)
    assert torch.equal(again.sample(tokens, mask, speaker).mel, flow.sample(tokens, mask, speaker).mel)


@pytest.mark.parametrize("lacking", ["input_embedding.weight", "decoder.estimator.rotary_embed.inv_freq"])
def test_other_weights_are_refused(lacking):
    state = make().state_dict()
    del state[lacking]
    with pytest.raises(ValueError, match=f"not the weights of a DiT flow: no {lacking}"):
        DiTFlowSizes.of(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 18}, "position_groups"),
        ({"head_dim": 3}, "even"),
        ({"time_channels": 2}, "time_channels"),
        ({"chunk_frames": 0}, "chunk_frames"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


# The layers, by hand


def test_positions_turn_pairs_of_neighbours():
    vectors = draw(1, 5, 6)
    turned = rotate(vectors, Rotary(6)(5))
    for place in range(5):
        for pair in range(3):
            angle = place * 10000 ** (-2 * pair / 6)
            x, y = vectors[0, place, 2 * pair : 2 * pair + 2].tolist()
            expected = [x * math.cos(angle) - y * math.sin(angle), y * math.cos(angle) + x * math.sin(angle)]
            assert turned[0, place, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_attention_by_hand():
    torch.manual_seed(0)
    attention, angle = Attention(10, 3, 4, 0.0).double(), Rotary(4)(5)
    vectors, mask = draw(1, 5, 10), length_mask([4, 5])[:1]
    visible = chunk_mask(mask, 2)
    found = attention(vectors, angle, visible, mask)
    query, key, value = (layer(vectors)[0] for layer in (attention.to_q, attention.to_k, attention.to_v))
    first = slice(0, 4)
    query, key = (torch.cat((rotate(x[:, first], angle), x[:, 4:]), -1) for x in (query, key))
    for i in range(5):
        heads = []
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            scores = [(query[i, part] @ key[j, part]).item() / 2 for j in range(5)]
            shares = [math.exp(scores[j]) * visible[0, i, j].item() for j in range(5)]
            heads.append(sum(share * value[j, part] for j, share in enumerate(shares)) / sum(shares))
        expected = attention.to_out[0](torch.cat(heads)) * (i < 4)
        torch.testing.assert_close(found[0, i], expected)


def test_a_block_by_hand():
    torch.manual_seed(1)
    block = DiTBlock(6, 2, 4, 5, 0.0).double()
    for value in block.parameters():
        nn.init.normal_(value)
    vectors, time, mask = draw(2, 3, 6), draw(2, 6, seed=1), length_mask([3, 2])
    rest = Rotary(4)(3), chunk_mask(mask), mask

    def normal(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    said = block.attn_norm.linear(time * torch.sigmoid(time))
    shift, scale, gate, shift_ff, scale_ff, gate_ff = (said[:, None, 6 * k : 6 * k + 6] for k in range(6))
    hidden = vectors + gate * block.attn(normal(vectors) * (1 + scale) + shift, *rest)
    wide = block.ff.ff[0][0](normal(hidden) * (1 + scale_ff) + shift_ff)
    wide = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    expected = hidden + gate_ff * block.ff.ff[2](wide)
    torch.testing.assert_close(block(vectors, time, *rest), expected)
    torch.testing.assert_close(modulate(vectors, scale, shift), normal(vectors) * (1 + scale) + shift)


@pytest.mark.parametrize(("kernel", "groups"), [(3, 2), (4, 1), (1, 4)])
def test_convolved_positions_by_hand(kernel, groups):
    torch.manual_seed(kernel)
    layer, vectors = ConvolvedPositions(4, kernel, groups).double(), draw(1, 5, 4)
    hidden, size = vectors[0], 4 // groups
    for conv in (layer.conv1[0], layer.conv2[0]):
        rows = []
        for i in range(5):
            row = conv.bias.clone()
            for channel in range(4):
                group = slice(channel // size * size, channel // size * size + size)
                for k in range(kernel):
                    if (j := i - kernel + 1 + k) >= 0:
                        row[channel] += conv.weight[channel, :, k] @ hidden[j, group]
            rows.append(row * torch.tanh(torch.log1p(torch.exp(row))))
        hidden = torch.stack(rows)
    torch.testing.assert_close(layer(vectors)[0], hidden)


# What must hold at any size


@pytest.mark.parametrize("sizes", OTHERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_padding_and_neighbours_change_no_velocity(sizes, streaming):
    longer, shorter = 9 // sizes.patch_frames * sizes.patch_frames, 5 // sizes.patch_frames * sizes.patch_frames
    flow, given = make(sizes), given_of(sizes, 2, longer)
    noisy, time = draw(2, longer, sizes.mel_channels, seed=9), torch.tensor([0.2, 0.7]).double()
    mask = length_mask([longer, shorter])
    both = flow.velocity(noisy, time, given, mask, streaming)
    own = Given(given.mean[1:, :shorter], given.speaker[1:], given.known[1:, :shorter])
    alone = flow.velocity(noisy[1:, :shorter], time[1:], own, mask[1:, :shorter], streaming)
    torch.testing.assert_close(both[1:, :shorter], alone)


@pytest.mark.parametrize("sizes", OTHERS)
def test_streaming_frames_do_not_depend_on_later_chunks(sizes):
    flow, given = make(sizes), given_of(sizes, 1, 14)
    noisy, time, mask = draw(1, 14, sizes.mel_channels), torch.tensor([0.4]).double(), length_mask([14])
    start = 2 * sizes.chunk_frames
    changed = noisy.clone()
    changed[:, start:] += 1

    def run(frames: Tensor, streaming: bool) -> Tensor:
        return flow.velocity(frames, time, given, mask, streaming)

    torch.testing.assert_close(run(noisy, True)[:, :start], run(changed, True)[:, :start], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(noisy, True)[:, start:], run(changed, True)[:, start:])
    assert not torch.allclose(run(noisy, False)[:, :start], run(changed, False)[:, :start])
    # Inside a chunk the last frame is seen by the first.
    changed = noisy.clone()
    changed[:, start - 1] += 1
    assert not torch.allclose(
        run(noisy, True)[:, start - sizes.chunk_frames], run(changed, True)[:, start - sizes.chunk_frames]
    )


@pytest.mark.parametrize("sizes", OTHERS)
def test_streaming_samples_grow(sizes):
    """Frames of whole chunks that were made before the end stay as they are when more tokens come."""
    flow, step = make(sizes), sizes.frames_per_token
    chunk = sizes.chunk_frames // step
    tokens = torch.randint(0, sizes.codebook_size, (1, 4 * chunk + flow.lookahead))
    mask, speaker = torch.ones(tokens.shape, dtype=torch.bool), draw(1, sizes.speaker_channels)
    short = 2 * chunk + flow.lookahead
    some = flow.sample(tokens[:, :short], mask[:, :short], speaker, streaming=True, final=False).mel
    more = flow.sample(tokens, mask, speaker, streaming=True, final=False).mel
    assert some.shape[1] == 2 * chunk * step
    torch.testing.assert_close(more[:, : some.shape[1]], some)


@pytest.mark.parametrize("sizes", OTHERS)
@pytest.mark.parametrize("final", [False, True])
def test_samples_do_not_depend_on_neighbours(sizes, final):
    flow, step, mel = make(sizes), sizes.frames_per_token, sizes.mel_channels
    lengths, before = [7, 9, 6], [4, 0, 2]
    tokens, prompt_tokens = torch.randint(0, sizes.codebook_size, (3, 9)), torch.randint(0, sizes.codebook_size, (3, 4))
    speaker, prompt_mel = draw(3, sizes.speaker_channels), draw(3, 4 * step, mel, seed=1)
    prompt = FlowPrompt(prompt_tokens, length_mask(before), prompt_mel, length_mask([step * n for n in before]))
    together = flow.sample(tokens, length_mask(lengths), speaker, prompt, steps=3, final=final)
    for i, (own, earlier) in enumerate(zip(lengths, before, strict=True)):
        one = slice(i, i + 1)
        ones = torch.ones(1, earlier, dtype=torch.bool), torch.ones(1, step * earlier, dtype=torch.bool)
        alone_prompt = FlowPrompt(prompt_tokens[one, :earlier], ones[0], prompt_mel[one, : step * earlier], ones[1])
        mask = torch.ones(1, own, dtype=torch.bool)
        alone = flow.sample(tokens[one, :own], mask, speaker[one], alone_prompt, steps=3, final=final)
        assert alone.mask.all()
        assert together.mask[i].sum() == alone.mel.shape[1]
        torch.testing.assert_close(together.mel[i, together.mask[i]], alone.mel[0])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("sizes", OTHERS)
def test_gradients_of_soft_tokens_are_finite_differences(sizes, streaming):
    flow, step = make(sizes), sizes.frames_per_token
    token_mask, mel_mask = length_mask([3, 2]), length_mask([3 * step, 2 * step])
    mel, speaker = draw(2, 3 * step, sizes.mel_channels), draw(2, sizes.speaker_channels)
    draws = FlowDraws(
        time=torch.tensor([0.3, 0.8]).double(),
        noise=draw(2, 3 * step, sizes.mel_channels, seed=7),
        prompt=torch.tensor([1, 0]),
        keep=torch.tensor([True, True]),
        streaming=streaming,
    )
    soft = draw(2, 3, sizes.codebook_size, seed=3).softmax(-1).requires_grad_()

    def total(tokens: Tensor, vector: Tensor) -> Tensor:
        return flow.loss(tokens, token_mask, mel, mel_mask, vector, draws).total

    assert torch.autograd.gradcheck(total, (soft, speaker.requires_grad_()), fast_mode=True)
    total(soft, speaker).backward()
    assert soft.grad[token_mask].abs().sum(-1).min() > 0
    assert not soft.grad[~token_mask].any()


def test_hard_mixtures_and_ids_have_the_same_loss_and_every_weight_is_used():
    flow = make(dtype=torch.float32)
    ids, mask = torch.randint(0, 11, (2, 4)), length_mask([4, 3])
    mel, speaker = draw(2, 8, 6).float(), draw(2, 5).float()
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    draws = FlowDraws.draw([8, 6], 6, generators, streaming=False)
    rest = mask, mel, length_mask([8, 6]), speaker, draws
    losses = [flow.loss(tokens, *rest).total for tokens in (ids, functional.one_hot(ids, 11).float())]
    assert torch.equal(*losses)
    losses[0].backward()
    assert all(value.grad.any() for value in flow.parameters())


def test_a_new_model_starts_with_its_blocks_gated_off():
    torch.manual_seed(0)
    deep = DiT(SMALL).eval()
    shallow = DiT(replace(SMALL, depth=0)).eval()
    shallow.load_state_dict({key: value for key, value in deep.state_dict().items() if "blocks" not in key})
    frames = [draw(1, 5, 6, seed=seed).float() for seed in range(3)]
    rest = torch.tensor([0.5]), length_mask([5])
    outputs = [net(frames[0], frames[1], frames[2][:, 0], frames[2], *rest) for net in (deep, shallow)]
    assert torch.equal(*outputs)
    assert outputs[0].any()


def test_dropout_is_for_training_only():
    flow = make(replace(SMALL, dropout=0.5))
    noisy, time, given, mask = draw(1, 5, 6), torch.tensor([0.5]).double(), given_of(SMALL, 1, 5), length_mask([5])
    assert torch.equal(flow.velocity(noisy, time, given, mask), flow.velocity(noisy, time, given, mask))
    flow.train()
    assert not torch.equal(flow.velocity(noisy, time, given, mask), flow.velocity(noisy, time, given, mask))


def test_half_precision_trains():
    flow = make(dtype=torch.float32)
    mel, mask = draw(1, 8, 6).float(), length_mask([4])
    draws = FlowDraws.draw([8], 6, [torch.Generator().manual_seed(0)], streaming=True)
    rest = mel, length_mask([8]), draw(1, 5).float(), draws
    soft = draw(1, 4, 11).float().softmax(-1).requires_grad_()
    exact = flow.loss(soft, mask, *rest).value
    with torch.autocast("cpu", torch.bfloat16):
        rough = flow.loss(soft, mask, *rest)
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.value, exact, rtol=0.1, atol=0.0)
    rough.total.backward()
    assert soft.grad.isfinite().all()
