# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch
from parity import FOLDER, parity
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tts_align.models.codec.fsq import SHRINK
from tts_align.models.cosyvoice.features import whisper_mel
from tts_align.models.cosyvoice.s3.files import S3Sizes, published_name
from tts_align.models.cosyvoice.s3.tokenizer import S3Tokenizer, rotate, rotation_of

DUMP = "s3tokenizer_tiny"
SMALL = S3Sizes(mel_channels=6, width=24, heads=3, layers=2, kernel_size=5, levels=(3, 3, 3), embedding_channels=7)
OTHER = S3Sizes(mel_channels=5, width=16, heads=1, layers=3, kernel_size=9, levels=(5, 4), embedding_channels=3)


def made(sizes: S3Sizes = SMALL, seed: int = 0) -> S3Tokenizer:
    torch.manual_seed(seed)
    model = S3Tokenizer(sizes).eval()
    with torch.no_grad():
        model.down.weight.mul_(4)  # so that speech tokens differ
    return model


def sounds(*frames: int, channels: int = 6, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, count, channels, generator=generator) for count in frames]


def published_state() -> dict[str, torch.Tensor]:
    parity(DUMP)  # skips where there is none
    return load_file(FOLDER / DUMP / "state_dict.safetensors")


def test_published_weights_give_the_published_numbers():
    io = parity(DUMP).io
    model = S3Tokenizer.load(published_state()).eval()
    log_mel, frames = io["mel"].transpose(1, 2), io["mel_len"]
    with torch.no_grad():
        hidden, mask = model.hidden(log_mel, frames)
        out = model(log_mel, frames)
    assert mask.sum(-1).tolist() == io["codes_len"].tolist() == io["hidden_len"].tolist()
    assert torch.equal(out.mask, mask)
    torch.testing.assert_close(hidden[mask], io["hidden"][mask], atol=2e-6, rtol=0)
    torch.testing.assert_close(out.latent[mask], io["pre_tanh"][mask], atol=1e-5, rtol=0)
    assert torch.equal(out.tokens[mask], io["codes"][mask].long())
    alone = model(log_mel[1:, :43], frames[1:])
    assert alone.tokens[0].tolist() == io["codes"][1, :11].tolist(), "alone and without padding"


def test_sizes_follow_from_the_weights():
    state = published_state()
    config = json.loads((FOLDER / DUMP / "config.json").read_text())
    sizes = S3Tokenizer.load(state, embedding_channels=33).sizes
    assert sizes == S3Sizes(
        config["n_mels"],
        config["n_audio_state"],
        config["n_audio_head"],
        config["n_audio_layer"],
        embedding_channels=33,
    )
    assert math.prod(sizes.levels) == config["n_codebook_size"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_files_load_and_leave_only_the_projection_up_to_learn(tmp_path, suffix):
    state, path = published_state(), tmp_path / f"tokenizer{suffix}"
    (torch.save if suffix == ".pt" else lambda s, p: save_file(s, p))(state, path)
    model = S3Tokenizer.load(path)
    assert model.fresh == ("up.weight", "up.bias")
    assert model.up.weight.shape == (512, 8)
    own = model.state_dict()
    assert {published_name(name) for name in own} - state.keys() == {published_name(name) for name in model.fresh}
    for name, value in own.items():
        if name not in model.fresh:
            assert torch.equal(value, state[published_name(name)]), name


@pytest.mark.parametrize(("layers", "millions"), [(6, 124), (12, 242)])
def test_official_sizes_have_the_official_number_of_parameters(layers, millions):
    with torch.device("meta"):
        model = S3Tokenizer(S3Sizes(layers=layers))
    count = sum(value.numel() for name, value in model.named_parameters() if not name.startswith("up."))
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    assert model.codebook_size == 6561


def slowly(model: S3Tokenizer, log_mel: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Pre-quantised numbers and speech tokens of one utterance (f, m), position by position, channel by channel."""
    p, sizes = {name: value.double() for name, value in model.state_dict().items()}, model.sizes
    x, half = log_mel.double(), sizes.width // sizes.heads // 2

    def linear(name, y):
        return y @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()))

    def normed(name, y):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(y):
        return y * (1 + torch.erf(y / 2**0.5)) / 2

    for name in ("conv1", "conv2"):
        padded = functional.pad(x, (0, 0, 1, 2))
        windows = [padded[2 * i : 2 * i + 3] for i in range(math.ceil(len(x) / 2))]
        x = gelu(torch.stack([(p[f"{name}.weight"] * w.T).sum((1, 2)) + p[f"{name}.bias"] for w in windows]))
    for i in range(sizes.layers):
        at = f"blocks.{i}.attention"
        y = normed(f"{at}_norm", x)
        q, k, v = (linear(f"{at}.{name}", y) for name in ("query", "key", "value"))
        heads = []
        for h in range(sizes.heads):
            cut = slice(2 * half * h, 2 * half * (h + 1))

            def turned(z, position):
                pairs = torch.complex(z[:half], z[half:])
                angle = torch.tensor([position * 10000 ** (-c / half) for c in range(half)], dtype=torch.float64)
                pairs = pairs * torch.polar(torch.ones_like(angle), angle)
                return torch.cat([pairs.real, pairs.imag]) * (2 * half) ** -0.25

            qs = torch.stack([turned(row[cut], n) for n, row in enumerate(q)])
            ks = torch.stack([turned(row[cut], n) for n, row in enumerate(k)])
            heads.append((qs @ ks.T).softmax(-1) @ v[:, cut])
        reach = sizes.kernel_size // 2
        memory = v.clone()
        for n in range(len(v)):
            for offset in range(-reach, reach + 1):
                if 0 <= n + offset < len(v):
                    memory[n] += v[n + offset] * p[f"{at}.memory.weight"][:, 0, offset + reach]
        x = x + linear(f"{at}.out", torch.cat(heads, -1)) + memory
        x = x + linear(f"blocks.{i}.narrow", gelu(linear(f"blocks.{i}.widen", normed(f"blocks.{i}.norm", x))))
    latent = linear("down", x)
    speech_tokens, stride = torch.zeros(len(x), dtype=torch.long), 1
    for j, level in enumerate(sizes.levels):
        middle = 0.0 if level % 2 else 0.5
        digit = (0.9990000128746033 * latent[:, j].tanh() * (level - 1) / 2 - middle).round() + (level - 1) / 2 + middle
        speech_tokens, stride = speech_tokens + digit.long() * stride, stride * level
    return latent, speech_tokens.tolist()


@pytest.mark.parametrize(("sizes", "frames", "seed"), [(SMALL, 21, 0), (SMALL, 4, 5), (OTHER, 18, 2), (OTHER, 1, 3)])
def test_other_sizes_are_the_formulas_typed_slowly(sizes, frames, seed):
    model = made(sizes, seed)
    (log_mel,) = sounds(frames, channels=sizes.mel_channels, seed=seed)
    with torch.no_grad():
        out = model(log_mel, torch.tensor([frames]))
    latent, speech_tokens = slowly(model, log_mel[0])
    torch.testing.assert_close(out.latent[0].double(), latent, atol=2e-5, rtol=1e-5)
    assert out.tokens[0].tolist() == speech_tokens
    assert out.mask.all()
    assert out.embedding.shape == (1, math.ceil(math.ceil(frames / 2) / 2), sizes.embedding_channels)


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan])
@pytest.mark.parametrize("frames", range(1, 10))
def test_padding_and_neighbours_never_reach_a_token(frames, padding):
    model = made()
    long, short = sounds(26, frames)
    batch = torch.cat([long, functional.pad(short, (0, 0, 0, 26 - frames), value=padding)])
    with torch.no_grad():
        alone, together = model(short, torch.tensor([frames])), model(batch, torch.tensor([26, frames]))
    assert together.mask[1].sum() == math.ceil(frames / 4)
    assert together.tokens[1][together.mask[1]].tolist() == alone.tokens[0].tolist()
    torch.testing.assert_close(together.latent[1][together.mask[1]], alone.latent[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(together.embedding[1][together.mask[1]], alone.embedding[0])


def test_positions_turn_and_only_their_distance_counts():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    rotation = rotation_of(12, 8, torch.device("cpu"))
    queries = rotate(query.expand(1, 12, 1, 8), rotation)[0, :, 0]
    keys = rotate(key.expand(1, 12, 1, 8), rotation)[0, :, 0]
    scores = queries @ keys.T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert torch.equal(queries[0], query)
    assert not torch.allclose(queries[1], query)


def test_gradient_reaches_everything_but_padding():
    model = made().train()
    log_mel = torch.cat(sounds(23, 23)).requires_grad_()
    out = model(log_mel, torch.tensor([23, 10]))
    out.embedding[out.mask].square().sum().backward()
    assert log_mel.grad[1, 10:].abs().max() == 0
    assert (log_mel.grad[0].abs().sum(-1) > 0).all()
    assert (log_mel.grad[1, :10].abs().sum(-1) > 0).all()
    for name, value in model.named_parameters():
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name


def test_gradient_is_that_of_the_model_with_tanh_for_rounding():
    """In double precision: with a loss that is linear in the embedding, leaving the rounding out changes nothing."""
    model = made(OTHER, seed=4).double()
    (log_mel,) = sounds(14, channels=OTHER.mel_channels)
    log_mel, frames = log_mel.double(), torch.tensor([14])
    slope = torch.randn(1, 4, OTHER.embedding_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def surrogate(weight):
        state = {**dict(model.named_parameters()), "conv1.weight": weight}
        latent = torch.func.functional_call(model, state, (log_mel, frames)).latent
        return (model.up(SHRINK * latent.tanh()) * slope).sum()

    weight = model.conv1.weight
    (found,) = torch.autograd.grad((model(log_mel, frames).embedding * slope).sum(), weight)
    (expected,) = torch.autograd.grad(surrogate(weight), weight)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert torch.autograd.gradcheck(surrogate, weight.detach().clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("seed", range(3))
def test_training_finds_the_tokens_that_are_wanted(seed):
    """The error of the embedding tells every digit which way to go, through the rounding and all of the encoder."""
    torch.manual_seed(seed)
    model = S3Tokenizer(SMALL)
    model.up.requires_grad_(False)
    (log_mel,), frames = sounds(16), torch.tensor([16])
    wanted = torch.tensor([[5, 20, 13, 0]])
    out = model(log_mel, frames)
    assert not torch.equal(out.tokens, wanted)
    optimiser = torch.optim.Adam((value for value in model.parameters() if value.requires_grad), lr=1e-3)
    for _ in range(100):
        loss = functional.mse_loss(out.embedding, model.embed(wanted))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        out = model(log_mel, frames)
        if torch.equal(out.tokens, wanted):
            return
    pytest.fail(f"after 100 steps the tokens are {out.tokens.tolist()}")


def test_an_utterance_without_frames_harms_nobody():
    model = made().train()
    log_mel, frames = torch.cat(sounds(8, 8)), torch.tensor([8, 0])
    out = model(log_mel, frames)
    assert out.mask.sum(-1).tolist() == [2, 0]
    out.embedding[out.mask].sum().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


def test_hard_and_soft_tokens_are_embedded_alike():
    model = made()
    tokens = torch.arange(27).reshape(1, 27)
    assert torch.equal(model.embed(functional.one_hot(tokens, 27).float()), model.embed(tokens))
    out = model(sounds(17)[0], torch.tensor([17]))
    assert torch.equal(model.embed(out.tokens), out.embedding)


def test_autocast_keeps_it_finite_and_trainable():
    model = made().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(sounds(20)[0], torch.tensor([20]))
        loss = out.embedding.square().sum()
    loss.backward()
    assert model.conv1.weight.grad.isfinite().all()
    assert 0 <= int(out.tokens.min()) <= int(out.tokens.max()) < 27


def test_a_saved_tokenizer_is_the_same_again(tmp_path):
    for number, sizes in enumerate((SMALL, OTHER)):
        model, path = made(sizes), tmp_path / f"{number}.safetensors"
        model.save(path)
        again = S3Tokenizer.load(path, heads=sizes.heads, levels=sizes.levels)
        assert again.sizes == sizes
        assert again.fresh == ()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"3 channels, not to embedding_channels=4"):
        S3Tokenizer.load(path, embedding_channels=4, heads=1)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        model.save(tmp_path / "tokenizer.pt")


def test_waveforms_are_encoded_as_if_alone():
    model = made(S3Sizes(mel_channels=128, width=16, heads=2, layers=1, kernel_size=5, levels=(3, 3)))
    model.batch_size = 2
    generator = torch.Generator().manual_seed(3)
    waveforms = [torch.randn(count, generator=generator) * 0.1 for count in (9737, 100, 3200, 16000, 0)]
    speech_tokens = model.encode(waveforms)
    assert [len(row) for row in speech_tokens] == [15, 0, 5, 25, 0]
    for waveform, row in zip(waveforms, speech_tokens, strict=True):
        assert model.encode([waveform])[0].tolist() == row.tolist()
    mel = whisper_mel(waveforms[0]).T[None]
    assert model(mel, torch.tensor([60])).tokens[0].tolist() == speech_tokens[0].tolist()
    assert model.encode([]) == []
    with pytest.raises(ValueError, match=r"at most 30 s, got 31\.0 s"):
        model.encode([torch.zeros(31 * 16000)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.conv1.weight": None}, "encoder.conv1.weight is missing"),
        ({"encoder.blocks.1.mlp_ln.bias": None}, "encoder.blocks.1.mlp_ln.bias first"),
        ({"encoder.positional_embedding": torch.zeros(4, 4)}, "encoder.positional_embedding first"),
        ({"encoder.conv2.bias": torch.zeros(3)}, r"expected \(24,\), got \(3,\)"),
        ({"quantizer._codebook.project_up.bias": None}, "project_up.bias first"),
    ],
)
def test_other_weights_are_refused_by_name(change, message):
    state = {published_name(name): value for name, value in made().state_dict().items()} | change
    with pytest.raises(ValueError, match=message):
        S3Tokenizer.load({name: value for name, value in state.items() if value is not None}, heads=3)


def test_wrong_arguments_are_refused(tmp_path):
    state = {published_name(name): value for name, value in made().state_dict().items()}
    with pytest.raises(ValueError, match=r"24 channels are not heads of 64.*give heads"):
        S3Tokenizer.load(state)
    with pytest.raises(ValueError, match="expected 3 levels"):
        S3Tokenizer.load(state, heads=3, levels=(3, 3))
    with pytest.raises(ValueError, match="s3tokenizer and save the state_dict"):
        S3Tokenizer.load(tmp_path / "speech_tokenizer_v3.onnx")
    with pytest.raises(FileNotFoundError):
        S3Tokenizer.load(tmp_path / "tokenizer.pt")
    with pytest.raises(ValueError, match="6 channels, got 5"):
        made()(torch.zeros(1, 8, 5), torch.tensor([8]))
    with pytest.raises(ValueError, match="5 heads of 24"):
        S3Sizes(width=24, heads=5)
    with pytest.raises(ValueError, match="odd kernel_size, got 4"):
        S3Sizes(kernel_size=4)
