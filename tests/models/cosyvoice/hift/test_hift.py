# SPDX-License-Identifier: Apache-2.0
"""The vocoders against the published code on tiny weights, against slowly typed formulas, and at other sizes."""

import dataclasses
import json
import math

import pytest
import torch
from parity import FOLDER, as_exact_as, parity
from safetensors.torch import load_file

from tts_align.models.cosyvoice.hift.config import HiFTSizes
from tts_align.models.cosyvoice.hift.layers import ResidualBlock
from tts_align.models.cosyvoice.hift.model import HiFT, load_hift
from tts_align.models.cosyvoice.hift.source import Source

BOTH = pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
DUMP = {"cosyvoice2": "hift_v2", "cosyvoice3": "hift_v3"}
NOISE = {"cosyvoice2": "sine.gauss", "cosyvoice3": "sine.noise"}
SMALL = {
    "mel_channels": 10,
    "base_channels": 8,
    "harmonics": 3,
    "sample_rate": 8000,
    "upsample_rates": (4, 2),
    "upsample_kernels": (8, 4),
    "fft_samples": 8,
    "hop_samples": 2,
    "resblock_kernels": (3, 5),
    "resblock_dilations": ((1, 2), (1, 3)),
    "source_kernels": (5, 3),
    "source_dilations": ((1, 2), (1, 2)),
    "post_kernel": 5,
    "f0_channels": 6,
    "f0_layers": 3,
    "f0_kernel": 5,
}
# Other rates, kernels, channels, counts and look-aheads than the dumps'.
OTHERS = [
    SMALL,
    SMALL | {"pre_kernel": 3, "look_ahead": 2, "f0_look_ahead": 1, "f0_kernel": 3, "f0_channels": 9, "f0_layers": 2},
    SMALL | {
        "upsample_rates": (3,),
        "upsample_kernels": (5,),
        "source_kernels": (3,),
        "source_dilations": ((1, 2, 4),),
        "harmonics": 0,
        "fft_samples": 20,
        "hop_samples": 5,
        "base_channels": 6,
        "post_kernel": 3,
    },
]  # fmt: skip


def weights(family):
    parity(DUMP[family])  # skips without the dumps
    return load_file(FOLDER / DUMP[family] / "state_dict.safetensors")


def yaml(family):
    return {"hift": json.loads((FOLDER / DUMP[family] / "config.json").read_text())}


def published(family):
    return load_hift(family, weights(family), yaml(family)), parity(DUMP[family]).io


def small(family, seed=0, **changes):
    torch.manual_seed(seed)
    hift = HiFT(HiFTSizes(family, **SMALL | changes))
    # A voice that crosses the threshold, instead of a fresh predictor's fraction of a hertz.
    torch.nn.init.normal_(hift.f0_predictor.classifier.weight, std=300)
    return hift.eval()


def mels(frames, channels=10, rows=1, seed=0):
    return torch.randn(rows, channels, frames, generator=torch.Generator().manual_seed(seed)) * 2


def near(found, expected, share):
    """Equal to within a share of the largest expected value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# --- the published code --------------------------------------------------------------------------------------------


def exact_f0(family, folded, mel):
    """Fundamental frequency in double precision."""
    hift, _ = published(family)
    if folded:
        hift.fold()
    return hift.double().f0(mel.double())


@BOTH
@pytest.mark.parametrize("folded", [False, True])
def test_each_step_is_the_published_one(family, folded):
    """From stored f0 the source differs by the phase alone, which the published code sums in single precision."""
    hift, io = published(family)
    if folded:
        hift.fold()
    mel, noise, source = io["in.mel"], io[NOISE[family]], io["source"][:, 0]
    as_exact_as(hift.f0(mel), io["f0"], exact_f0(family, folded, mel))
    near(hift.m_source.spread(io["f0"]), io["f0_up"][..., 0], 1e-7)
    assert torch.equal(hift.m_source.voiced(io["f0"]), io["uv"][..., 0] > 0)
    near(hift.source(io["f0"], noise), source, 1e-3)
    near(hift.source(hift.f0(mel), noise), source, 1e-3)
    near(hift.spectrum(source), io["source_stft"], 1e-6)
    near(hift.decode(mel, source), io["wav_from_source"], 1e-5)
    near(hift.decode(mel, torch.zeros_like(source)), io["wav_zero_source"], 1e-5)
    near(hift(mel, noise), io["wav"], 1e-3)


def test_a_cached_source_is_the_published_one():
    hift, io = published("cosyvoice2")
    cache, source = io["cached.cache_source"][:, 0], io["cached.source"][:, 0]
    near(hift.source(io["f0"], io["sine.gauss"], cache=cache), source, 1e-3)
    near(hift.decode(io["in.mel"], source), io["cached.wav"], 1e-5)
    near(hift(io["in.mel"], io["sine.gauss"], cache=cache), io["cached.wav"], 1e-3)


def test_speaking_before_the_end_is_the_published_one():
    """16 frames in, 13 with an f0, 8 spoken."""
    hift, io = published("cosyvoice3")
    mel, source = io["in.mel"], io["wav_not_final_source"][:, 0]
    noise = io["sine.noise"][:, : source.shape[1]]
    near(hift.f0(mel, finalize=False), io["f0_not_final"], 1e-6)
    near(hift.source(io["f0_not_final"], noise), source, 1e-3)
    near(hift.decode(mel, source, finalize=False), io["wav_not_final"], 1e-5)
    near(hift(mel, noise, finalize=False), io["wav_not_final"], 1e-3)


@BOTH
def test_names_and_shapes_at_full_size(family):
    parity(DUMP[family])
    expected = json.loads((FOLDER / "fullsize_keys.json").read_text())[DUMP[family]]
    with torch.device("meta"):
        state = HiFT(HiFTSizes(family)).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == expected
    assert HiFTSizes.of(state) == HiFTSizes(family)


# --- loading -------------------------------------------------------------------------------------------------------


def in_the_yaml_s_words(sizes):
    return {
        "hift": {
            "in_channels": sizes.mel_channels,
            "base_channels": sizes.base_channels,
            "nb_harmonics": sizes.harmonics,
            "sampling_rate": sizes.sample_rate,
            "upsample_rates": list(sizes.upsample_rates),
            "upsample_kernel_sizes": list(sizes.upsample_kernels),
            "istft_params": {"n_fft": sizes.fft_samples, "hop_len": sizes.hop_samples},
            "resblock_kernel_sizes": list(sizes.resblock_kernels),
            "resblock_dilation_sizes": [list(row) for row in sizes.resblock_dilations],
            "source_resblock_kernel_sizes": list(sizes.source_kernels),
            "source_resblock_dilation_sizes": [list(row) for row in sizes.source_dilations],
            "f0_predictor": {"num_class": 1, "in_channels": 10, "cond_channels": sizes.f0_channels},
        }
    }


@BOTH
@pytest.mark.parametrize("changes", OTHERS)
def test_a_saved_vocoder_of_any_size_loads(family, changes):
    made = small(family, **changes)
    before = torch.get_rng_state()
    again = load_hift(family, made.state_dict(), in_the_yaml_s_words(made.sizes))
    assert torch.equal(torch.get_rng_state(), before)
    expected = made.sizes
    # What the other family alone has leaves no trace in the weights.
    unused = ("pre_kernel",) if family == "cosyvoice3" else ("look_ahead", "f0_look_ahead")
    expected = dataclasses.replace(expected, **{name: getattr(again.sizes, name) for name in unused})
    assert again.sizes == expected
    assert not again.training
    assert torch.equal(again(mels(5)), made(mels(5)))


@BOTH
def test_a_file_of_adversarial_training_loads(family):
    """Prefix, discriminators and counters go; gain and direction may have their old names."""
    made = small(family)
    state = {"discriminator.mpd.0.weight": torch.zeros(3), "epoch": 3, "step": 700}
    for name, value in made.state_dict().items():
        old = name.replace("parametrizations.weight.original0", "weight_g")
        state["generator." + old.replace("parametrizations.weight.original1", "weight_v")] = value
    assert sum(name.endswith("weight_g") for name in state) > 10
    again = load_hift(family, state, in_the_yaml_s_words(made.sizes))
    assert torch.equal(again(mels(5)), made(mels(5)))


@BOTH
def test_what_does_not_fit_is_named(family):
    made = small(family)
    state, config = made.state_dict(), in_the_yaml_s_words(made.sizes)
    other = {"cosyvoice2": "cosyvoice3", "cosyvoice3": "cosyvoice2"}[family]
    with pytest.raises(ValueError, match=f"expected a vocoder of {other}.*shapes of {family}"):
        load_hift(other, state, config)
    less = {name: value for name, value in state.items() if name != "conv_post.bias"}
    with pytest.raises(ValueError, match=r"missing conv_post\.bias"):
        load_hift(family, less, config)
    with pytest.raises(ValueError, match=r"unknown flow\.weight"):
        load_hift(family, {**state, "flow.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"conv_pre\.bias of shape \(1,\) instead of \(8,\)"):
        load_hift(family, {**state, "conv_pre.bias": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"lack 'conv_pre\..*expected a HiFT"):
        load_hift(family, {"llm.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"base_channels: 512 in the yaml, 8 in the weights"):
        load_hift(family, state, {"hift": config["hift"] | {"base_channels": 512}})
    with pytest.raises(ValueError, match=r"hift\.sampling_rate of the model's yaml.*'fast'"):
        load_hift(family, state, {"hift": config["hift"] | {"sampling_rate": "fast"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upsample_kernels": (8,)}, r"one entry of upsample_kernels for each of the 2 upsample_rates, got \(8,\)"),
        ({"upsample_kernels": (8, 5)}, r"exceed its upsample_rate by an even number, got kernels \(8, 5\)"),
        ({"resblock_dilations": ((1,),)}, "resblock_dilations for each of the 2 resblock_kernels"),
        ({"base_channels": 10}, "divisible by 4, two per stage, got 10"),
        ({"fft_samples": 9}, "fft_samples must be even, got 9"),
    ],
)
def test_sizes_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        HiFTSizes("cosyvoice2", **SMALL | changes)


# --- at other sizes, and what must hold everywhere ------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("changes", OTHERS)
@pytest.mark.parametrize(("frames", "rows"), [(1, 1), (11, 2)])
def test_other_sizes_speak(family, changes, frames, rows):
    hift = small(family, seed=frames, **changes)
    wav = hift(mels(frames, rows=rows, seed=frames))
    sizes = hift.sizes
    assert wav.shape == (rows, frames * math.prod(sizes.upsample_rates) * sizes.hop_samples)
    assert torch.isfinite(wav).all()
    assert wav.abs().max() <= sizes.audio_limit
    assert wav.std() > 0
    assert hift(mels(0, rows=rows)).shape == (rows, 0)


def test_a_louder_filter_is_clamped():
    hift = small("cosyvoice2")
    hift.conv_post.bias.fill_(20.0)
    assert hift(mels(6)).abs().max() == torch.tensor(hift.sizes.audio_limit)


@BOTH
def test_a_row_sounds_the_same_in_every_batch(family):
    hift, mel = small(family), mels(7, rows=3)
    torch.testing.assert_close(hift(mel)[1:2], hift(mel[1:2]), atol=1e-5, rtol=1e-4)


@BOTH
def test_noise_comes_from_where_it_is_said_to(family):
    """The same generator seed gives the same waveform, another one another; the global generator is left alone."""
    hift, mel = small(family), mels(7, rows=2)
    before = torch.get_rng_state()

    def speak(seed):
        return hift(mel, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(hift(mel), hift(mel))
    assert torch.equal(speak(1), speak(1))
    assert not torch.equal(speak(1), speak(2))
    assert torch.equal(torch.get_rng_state(), before)
    noise = hift.m_source.noise(2, 7 * hift.sizes.frame_samples, torch.Generator().manual_seed(1))
    assert torch.equal(hift(mel, noise), speak(1))
    assert not torch.equal(noise[0], noise[1])
    with pytest.raises(ValueError, match="either noise or a generator"):
        hift(mel, noise, torch.Generator())


def test_the_kind_of_noise_is_the_family_s():
    """Gaussian, but for the uniform noise that Fun-CosyVoice3 speaks with."""
    gauss = small("cosyvoice2").m_source.noise(1, 20000)
    uniform = small("cosyvoice3").m_source.noise(1, 20000)
    trained = small("cosyvoice3").train().m_source.noise(1, 20000)
    for noise, mean, std in ((gauss, 0.0, 1.0), (uniform, 0.5, 12**-0.5), (trained, 0.0, 1.0)):
        assert abs(float(noise.mean()) - mean) < 0.02
        assert abs(float(noise.std()) - std) < 0.02
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_uniform_noise_has_no_end():
    """More than the 300 s of the published table; a shorter call gets the beginning of a longer one's."""
    source = Source(0, 24000, 480, 0.1, 0.003, 10.0, staircase=True, uniform_noise=True).eval()
    long = source.noise(1, 301 * 24000)
    assert long.shape == (1, 301 * 24000, 1)
    for samples in (1, 15, 16, 4801):
        assert torch.equal(source.noise(1, samples), long[:, :samples])


@pytest.mark.parametrize("staircase", [False, True])
def test_the_source_slowly(staircase):
    """Typed again with plain numbers, at a size where the sum of the phases is short."""
    torch.manual_seed(3)
    source = Source(2, 1000, 10, 0.3, 0.02, 40.0, staircase=staircase, uniform_noise=staircase)
    f0, noise = torch.tensor([[90.0, 30.0, 120.5, 41.0]]), torch.randn(1, 40, 3)
    weight, bias = source.l_linear.weight[0].tolist(), source.l_linear.bias.item()
    expected = []
    for n in range(40):
        frame = n // 10
        voiced = f0[0, frame] > 40
        mixed = bias
        for h in range(3):
            sums, total = [], 0.0
            for frequency in f0[0].tolist():
                total += (frequency * (h + 1) / 1000) % 1
                sums.append(2 * math.pi * 10 * total)
            place = min(max((n + 0.5) / 10 - 0.5, 0.0), 3.0)
            low = int(place)
            line = sums[low] + (place - low) * (sums[min(low + 1, 3)] - sums[low])
            sine = 0.3 * math.sin(sums[frame] if staircase else line) if voiced else 0.0
            mixed += weight[h] * (sine + (0.02 if voiced else 0.3 / 3) * noise[0, n, h].item())
        expected.append(math.tanh(mixed))
    torch.testing.assert_close(source(f0, noise), torch.tensor([expected]), atol=1e-5, rtol=0)


def test_a_long_recording_ends_as_precisely_as_it_begins():
    """A tone that fits the frames: after ten minutes its phase has not drifted."""
    source = Source(1, 24000, 480, 0.1, 0.003, 10.0, staircase=True, uniform_noise=True)
    source.frame_samples = 1  # a frame per sample keeps the test small; the sum is as long
    turns = source.phase(torch.full((1, 30000), 24000 / 7)) / (2 * math.pi)
    expected = (torch.arange(1, 30001, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0]) / 7) % 1
    error = (turns[0].double() - expected).abs()
    assert torch.minimum(error, 1 - error).max() < 1e-3


@pytest.mark.parametrize("changes", OTHERS)
def test_the_causal_vocoder_does_not_hear_what_comes(changes):
    """A changed late frame leaves everything before its look-ahead as it was, and changes what is behind it."""
    hift, mel = small("cosyvoice3", **changes), mels(24)
    late = mel.clone()
    late[..., 18] += 3.0
    first, second = hift(mel), hift(late)
    sizes = hift.sizes
    start = (18 - max(sizes.look_ahead, sizes.f0_look_ahead) - 1) * sizes.frame_samples
    torch.testing.assert_close(first[:, :start], second[:, :start], atol=1e-6, rtol=0)
    assert not torch.allclose(first[:, start:], second[:, start:], atol=1e-3)


@pytest.mark.parametrize("changes", OTHERS)
def test_pieces_of_a_stream_are_the_whole(changes):
    """What is spoken before the end stays true when more frames come."""
    hift, mel = small("cosyvoice3", **changes), mels(20)
    sizes, whole = hift.sizes, hift(mel)
    ahead = sizes.f0_look_ahead + sizes.look_ahead + 1
    for frames in (ahead + 1, 12, 20):
        piece = hift(mel[..., :frames], finalize=False)
        assert piece.shape[1] == (frames - ahead) * sizes.frame_samples
        torch.testing.assert_close(piece, whole[:, : piece.shape[1]], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"looks {ahead} frames ahead: give more than {ahead} frames"):
        hift(mel[..., :ahead], finalize=False)


def test_what_a_family_cannot_do_is_refused():
    with pytest.raises(ValueError, match="only a vocoder of cosyvoice3"):
        small("cosyvoice2")(mels(20), finalize=False)
    with pytest.raises(ValueError, match="cache of the excitation is for cosyvoice2"):
        small("cosyvoice3")(mels(20), cache=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="expected an excitation of 80 samples, 16 for each of 5 frames, got 70"):
        small("cosyvoice2").decode(mels(5), torch.zeros(1, 70))


def test_a_cache_replaces_the_beginning_only():
    hift, f0 = small("cosyvoice2"), torch.full((1, 6), 90.0)
    cache = torch.full((1, 32), 0.5)
    found, without = hift.source(f0, cache=cache), hift.source(f0)
    assert torch.equal(found[:, :32], cache)
    assert torch.equal(found[:, 32:], without[:, 32:])


# --- weights, precision, training -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("trained", [True, False])
def test_folded_weights_speak_the_same(family, trained):
    hift = small(family).requires_grad_(trained)
    mel, noise = mels(9), torch.randn(1, 9 * 16, 4, generator=torch.Generator().manual_seed(1))
    gain, direction = hift.conv_pre.parametrizations.weight.original0, hift.conv_pre.parametrizations.weight.original1
    weight = gain * direction / direction.flatten(1).norm(dim=1)[:, None, None]
    before = hift(mel, noise)
    assert hift.fold() is hift
    near(hift(mel, noise), before, 1e-4)
    torch.testing.assert_close(hift.conv_pre.weight.data, weight)
    assert not [name for name in hift.state_dict() if "parametrizations" in name]
    assert len(list(hift.parameters())) == len(hift.state_dict())
    assert {parameter.requires_grad for parameter in hift.parameters()} == {trained}


def test_predicting_in_double_leaves_the_module_as_it_was():
    """The published code leaves its predictor in double precision, which breaks training afterwards."""
    hift, mel = small("cosyvoice3"), mels(9)
    expected = hift.f0_predictor.double()(mel.double()).float()
    hift.float()
    assert torch.equal(hift.f0(mel), expected)
    assert {parameter.dtype for parameter in hift.parameters()} == {torch.float32}
    hift.train()
    with torch.enable_grad():
        frequency = hift.f0(mel)
        frequency.sum().backward()
    assert frequency.dtype == torch.float32
    assert hift.f0_predictor.classifier.weight.grad.abs().sum() > 0


@BOTH
def test_gradients_reach_the_mel_and_the_filter(family):
    hift = small(family).train()
    mel = mels(6).requires_grad_()
    with torch.enable_grad():
        hift(mel, generator=torch.Generator().manual_seed(0)).square().sum().backward()
    assert mel.grad.abs().sum() > 0
    without = {name for name, parameter in hift.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in hift.named_parameters() if name.startswith("f0_predictor.")}


@BOTH
def test_mixed_precision_around_it_changes_nothing(family):
    hift, mel = small(family), mels(6)
    expected = hift(mel)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hift(mel), expected)


def test_a_residual_block_slowly():
    torch.manual_seed(0)
    block = ResidualBlock(2, 3, (1, 2), causal=True)
    for part in block.modules():
        if hasattr(part, "alpha"):
            part.alpha.uniform_(0.5, 2.0)
    x = torch.randn(1, 2, 7)
    expected = x
    for i, dilation in enumerate((1, 2)):
        hidden = expected
        steps = ((block.activations1, block.convs1, dilation), (block.activations2, block.convs2, 1))
        for snakes, convolutions, gap in steps:
            alpha = snakes[i].alpha[:, None]
            hidden = hidden + torch.sin(alpha * hidden) ** 2 / (alpha + 1e-9)
            weight, bias = convolutions[i].weight, convolutions[i].bias
            out = torch.zeros_like(hidden)
            for t in range(7):
                out[0, :, t] = bias
                for tap in range(3):
                    past = t - (2 - tap) * gap
                    if past >= 0:
                        out[0, :, t] += weight[:, :, tap] @ hidden[0, :, past]
            hidden = out
        expected = expected + hidden
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)


def test_a_folded_predictor_is_as_precise_as_before():
    """Gain times direction, rounded to float32, lost a factor of five."""
    hift = small("cosyvoice3", seed=3)
    mel = mels(40)
    expected = hift.f0(mel)
    assert torch.equal(hift.fold().f0(mel), expected)
    assert hift.f0_predictor.classifier.weight.dtype == torch.float64
    assert hift(mel).dtype == torch.float32
