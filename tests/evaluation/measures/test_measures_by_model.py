# SPDX-License-Identifier: Apache-2.0
"""Similarity and quality on tiny models in the published layouts, built here."""

import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import save_directory
from torch import nn
from torch.nn import functional as F
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram
from torchmetrics.functional.audio import nisqa as nisqa_peer
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector, WavLMModel

from tts_align.evaluation.measures.base import MeasuredSample, Sound
from tts_align.evaluation.measures.ecapa import split_weights
from tts_align.evaluation.measures.nisqa import NISQA
from tts_align.evaluation.measures.quality import DNSMOS, DistillMOS, windows
from tts_align.evaluation.measures.similarity import CampplusSimilarity, SeedSimilarity, WavLMSimilarity

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_buckets": 8,
    "max_bucket_distance": 800,
}  # fmt: skip
CHANNELS, GROUPS, POOLED, OUT = 16, 8, 12, 6


def wave(seed, seconds=0.3):
    return 0.1 * torch.randn(int(seconds * 16_000), generator=torch.Generator().manual_seed(seed))


def sample(sound, prompt=None):
    return MeasuredSample(
        sound, 16_000, "a", torch.tensor([1]), True, None if prompt is None else Sound(prompt, 16_000)
    )


# --- the Seed scale ----------------------------------------------------------------------------------------------


def published_backbone(model):
    """transformers' weights by the names of the published checkpoint."""
    pairs = (
        (r"masked_spec_embed", "mask_emb"),
        (r"(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
        (r"(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", r"\1.2.1."),
        (r"feature_projection\.projection\.", "post_extract_proj."),
        (r"feature_projection\.layer_norm\.", "layer_norm."),
        (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0", "pos_conv.0.weight_g"),
        (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
        (r"pos_conv_embed\.conv\.bias", "pos_conv.0.bias"),
        (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
        (r"attention\.gru_rel_pos_const", "self_attn.grep_a"),
        (r"attention\.gru_rel_pos_linear", "self_attn.grep_linear"),
        (r"attention\.rel_attn_embed", "self_attn.relative_attention_bias"),
        (r"attention\.(\w+_proj)", r"self_attn.\1"),
        (r"feed_forward\.intermediate_dense", "fc1"),
        (r"feed_forward\.output_dense", "fc2"),
    )
    found = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        found[f"feature_extract.model.{name}"] = value
    return found


def published_head():
    """Random weights by the names and with the shapes of the published head."""
    torch.manual_seed(1)

    def conv(name, inputs, outputs, kernel=1):
        return {f"{name}.weight": torch.randn(outputs, inputs, kernel) / 4, f"{name}.bias": torch.randn(outputs) / 4}

    def norm(name, size):
        numbers = {"weight": 1 + torch.rand(size), "bias": torch.randn(size), "running_mean": torch.randn(size)}
        return {f"{name}.{key}": value for key, value in numbers.items()} | {
            f"{name}.running_var": 1 + torch.rand(size),
            f"{name}.num_batches_tracked": torch.tensor(3),
        }

    def linear(name, inputs, outputs):
        return {f"{name}.weight": torch.randn(outputs, inputs) / 4, f"{name}.bias": torch.randn(outputs)}

    found = {"feature_weight": torch.randn(3), "loss_calculator.projection.weight": torch.randn(5, OUT)}
    found |= conv("layer1.conv", 16, CHANNELS, 5) | norm("layer1.bn", CHANNELS)
    for layer in ("layer2", "layer3", "layer4"):
        for side in ("1", "2"):
            found |= conv(f"{layer}.Conv1dReluBn{side}.conv", CHANNELS, CHANNELS)
            found |= norm(f"{layer}.Conv1dReluBn{side}.bn", CHANNELS)
        for step in range(GROUPS - 1):
            found |= conv(f"{layer}.Res2Conv1dReluBn.convs.{step}", 2, 2, 3)
            found |= norm(f"{layer}.Res2Conv1dReluBn.bns.{step}", 2)
        found |= linear(f"{layer}.SE_Connect.linear1", CHANNELS, 4) | linear(f"{layer}.SE_Connect.linear2", 4, CHANNELS)
    found |= (
        conv("conv", 3 * CHANNELS, POOLED) | conv("pooling.linear1", POOLED, 5) | conv("pooling.linear2", 5, POOLED)
    )
    return found | norm("bn", 2 * POOLED) | linear("linear", 2 * POOLED, OUT)


def slow_vector(w, states):
    """The published formulas on the published names, step by step, of one utterance."""

    def conv(name, x, dilation=1):
        kernel = w[f"{name}.weight"]
        return F.conv1d(x, kernel, w[f"{name}.bias"], padding=dilation * (kernel.shape[-1] // 2), dilation=dilation)

    def norm(name, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, variance, scale, shift = (
            w[f"{name}.{key}"].view(shape) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    weights = torch.exp(w["feature_weight"]) / torch.exp(w["feature_weight"]).sum()
    x = sum(weight * state for weight, state in zip(weights, states, strict=True)).transpose(1, 2) + 1e-6
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
    x = norm("layer1.bn", conv("layer1.conv", x).relu())
    outs = []
    for layer, dilation in (("layer2", 2), ("layer3", 3), ("layer4", 4)):
        y = norm(f"{layer}.Conv1dReluBn1.bn", conv(f"{layer}.Conv1dReluBn1.conv", x).relu())
        parts, before = [], 0
        for step in range(GROUPS - 1):
            piece = y[:, 2 * step : 2 * step + 2] + before
            name = f"{layer}.Res2Conv1dReluBn"
            before = norm(f"{name}.bns.{step}", conv(f"{name}.convs.{step}", piece, dilation).relu())
            parts.append(before)
        y = torch.cat([*parts, y[:, 2 * (GROUPS - 1) :]], 1)
        y = norm(f"{layer}.Conv1dReluBn2.bn", conv(f"{layer}.Conv1dReluBn2.conv", y).relu())
        gate = y.mean(2)
        for key, act in (("linear1", torch.relu), ("linear2", torch.sigmoid)):
            gate = act(gate @ w[f"{layer}.SE_Connect.{key}.weight"].T + w[f"{layer}.SE_Connect.{key}.bias"])
        x = x + y * gate.unsqueeze(2)
        outs.append(x)
    x = conv("conv", torch.cat(outs, 1)).relu()
    alpha = torch.softmax(conv("pooling.linear2", torch.tanh(conv("pooling.linear1", x))), 2)
    mean = (alpha * x).sum(2)
    spread = torch.sqrt(((alpha * x * x).sum(2) - mean * mean).clamp(min=1e-9))
    return (norm("bn", torch.cat([mean, spread], 1)) @ w["linear.weight"].T + w["linear.bias"])[0]


@pytest.fixture(scope="module")
def seed_model(tmp_path_factory):
    torch.manual_seed(0)
    backbone = WavLMModel(WavLMConfig(**TINY)).eval()
    weights = published_backbone(backbone) | published_head()
    path = tmp_path_factory.mktemp("seed") / "wavlm_large_finetune.pth"
    torch.save({"model": weights, "epoch": 3}, path)
    return path, backbone, weights


@pytest.mark.parametrize("normalise", [True, False])
def test_the_seed_scale_is_the_published_formula(seed_model, normalise):
    path, backbone, weights = seed_model
    measure, sound = SeedSimilarity(str(path), normalise), wave(0)
    heard = (sound - sound.mean()) / torch.sqrt(sound.var(correction=0) + 1e-5) if normalise else sound
    with torch.no_grad():
        states = backbone(heard[None], output_hidden_states=True).hidden_states
        expected = slow_vector(weights, states)
        assert torch.allclose(measure.embed(sound), expected, atol=1e-4)


def test_similarity_of_a_voice_with_itself_is_one_and_goes_by_utterance(seed_model):
    measure = SeedSimilarity(str(seed_model[0]))
    one, two = wave(0), wave(1, 0.4)
    found = measure.measure([sample(one, one), sample(one, two), sample(one), sample(wave(2, 0.01), one)])
    assert found[0]["similarity_seed"] == pytest.approx(1)
    assert -1 <= found[1]["similarity_seed"] < 0.99999
    assert found[2:] == [{}, {}]
    assert measure.measure([sample(one, two)])[0] == pytest.approx(found[1])
    identity = measure.identity()
    assert identity["model"] == "wavlm_large_finetune.pth"
    assert len(identity["digest"]) == 16


def test_a_checkpoint_of_something_else_is_named(tmp_path, seed_model):
    with pytest.raises(FileNotFoundError, match=r"fetch wavlm_large_finetune\.pth .* name its place as model"):
        SeedSimilarity(str(tmp_path / "gone.pth"))
    torch.save({"model": {"what.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: expected the weights of .* 'what\.weight' is no weight"):
        SeedSimilarity(str(tmp_path / "other.pth"))
    torch.save({"model": {name: one for name, one in seed_model[2].items() if name != "bn.bias"}}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"norm\.bias"):
        SeedSimilarity(str(tmp_path / "cut.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="weights under 'model'"):
        SeedSimilarity(str(tmp_path / "list.pth"))
    assert not any(name.startswith("loss_calculator") for part in split_weights(seed_model[2]) for name in part)


# --- the others --------------------------------------------------------------------------------------------------


def test_wavlm_x_vectors_are_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 5}
    model = WavLMForXVector(WavLMConfig(**TINY, **sizes, classifier_proj_size=6)).eval()
    model.save_pretrained(tmp_path / "sv")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(tmp_path / "sv")
    measure, one, two = WavLMSimilarity(str(tmp_path / "sv")), wave(0), wave(1)
    found = measure.measure([sample(one, two), sample(one, one)])
    with torch.no_grad():
        vectors = [
            model((sound - sound.mean())[None] / torch.sqrt(sound.var(correction=0) + 1e-7)).embeddings[0]
            for sound in (one, two)
        ]
    expected = float(vectors[0] @ vectors[1] / vectors[0].norm() / vectors[1].norm())
    assert found[0]["similarity_wavlm"] == pytest.approx(expected, abs=1e-5)
    assert found[1]["similarity_wavlm"] == pytest.approx(1)
    assert measure.identity()["model"] == "sv"
    with pytest.raises(FileNotFoundError, match="microsoft/wavlm-base-plus-sv"):
        WavLMSimilarity(str(tmp_path / "gone"))


def test_campplus_compares_with_what_conditions_the_model(tmp_path):
    folder = save_directory(tmp_path / "model")
    measure, one = CampplusSimilarity(str(folder)), wave(0, 0.5)
    found = measure.measure([sample(one, one), sample(one, wave(1, 0.5))])
    assert found[0]["similarity_campplus"] == pytest.approx(1)
    assert -1 <= found[1]["similarity_campplus"] <= 1
    assert measure.identity()["digest"]


def save_dnsmos(path):
    """Stand-in with the published signature: three numbers of 144,160 samples: mean, largest and mean square."""
    nodes = [
        helper.make_node("ReduceMean", ["input_1"], ["a"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["input_1"], ["b"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["input_1", "input_1"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["c"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["a", "b", "c"], ["Identity:0"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("input_1", TensorProto.FLOAT, ["batch", 144_160])]
    outputs = [helper.make_tensor_value_info("Identity:0", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "dnsmos", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("seconds", [3.0, 9.5, 12.3])
def test_dnsmos_is_the_published_script(tmp_path, seconds):
    """Windows, repetition and polynomials as the published script has them, in plain NumPy."""
    sound = wave(5, seconds)
    found = DNSMOS(str(save_dnsmos(tmp_path / "sig_bak_ovr.onnx"))).measure([sample(sound)])[0]
    audio, length = sound.numpy(), int(9.01 * 16_000)
    while len(audio) < length:
        audio = np.append(audio, audio)
    numbers = []
    for place in range(int(np.floor(len(audio) / 16_000) - 9.01) + 1):
        window = audio[place * 16_000 : int((place + 9.01) * 16_000)]
        if len(window) >= length:
            numbers.append([window.mean(), window.max(), (window**2).mean()])
    polynomials = {
        "dnsmos_signal": np.poly1d([-0.08397278, 1.22083953, 0.0052439]),
        "dnsmos_background": np.poly1d([-0.13166888, 1.60915514, -0.39604546]),
        "dnsmos_overall": np.poly1d([-0.06766283, 1.11546468, 0.04602535]),
    }
    expected = {
        name: np.mean([scale(one[place]) for one in numbers]) for place, (name, scale) in enumerate(polynomials.items())
    }
    assert found == pytest.approx(expected, abs=1e-4)


def test_dnsmos_of_nothing_and_without_its_file(tmp_path):
    measure = DNSMOS(str(save_dnsmos(tmp_path / "sig_bak_ovr.onnx")))
    assert measure.measure([sample(torch.zeros(0))]) == [{}]
    assert measure.identity()["model"] == "sig_bak_ovr.onnx"
    assert len(windows(torch.zeros(16_000 * 12))) == 3
    with pytest.raises(FileNotFoundError, match=r"fetch sig_bak_ovr\.onnx from .*DNS-Challenge"):
        DNSMOS(str(tmp_path / "gone.onnx"))
    assert math.isfinite(measure.measure([sample(wave(0))])[0]["dnsmos_overall"])


NISQA_SETTINGS = {
    "ms_n_fft": 4096, "ms_hop_length": 0.01, "ms_win_length": 0.02, "ms_n_mels": 48, "ms_fmax": 20_000,
    "ms_seg_length": 15, "ms_seg_hop_length": 4, "ms_max_segments": 1300, "cnn_pool_1": [24, 7], "cnn_pool_2": [12, 5],
    "cnn_pool_3": [6, 3], "cnn_kernel_size": [3, 3], "cnn_dropout": 0.2, "cnn_c_out_1": 2, "cnn_c_out_2": 3,
    "cnn_c_out_3": 4, "td_sa_d_model": 8, "td_sa_nhead": 1, "td_sa_h": 8, "td_sa_num_layers": 2, "td_sa_dropout": 0.1,
    "pool_att_h": 8, "pool_att_dropout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def nisqa(tmp_path_factory):
    torch.manual_seed(0)
    model = nisqa_peer._NISQADIM(NISQA_SETTINGS).eval()
    path = tmp_path_factory.mktemp("nisqa") / "nisqa.tar"
    torch.save({"args": NISQA_SETTINGS, "model_state_dict": model.state_dict()}, path)
    return NISQA(str(path)), model


def test_nisqa_is_torchmetrics_on_torchaudios_log_mel(nisqa):
    measure, model = nisqa
    sound = 0.1 * torch.randn(48_000, generator=torch.Generator().manual_seed(3))
    mel = MelSpectrogram(
        48_000, 4096, 960, 480, f_max=20_000, n_mels=48, power=1, pad_mode="reflect", norm="slaney", mel_scale="slaney"
    )
    levels = AmplitudeToDB("magnitude", 80)(mel(sound))
    levels = torch.maximum(levels, torch.tensor(20 * math.log10(1e-4)))
    segments, count = nisqa_peer._segment_specs(levels[None], NISQA_SETTINGS)
    with torch.no_grad():
        expected = model(segments, count.expand(1))[0].tolist()
    found = measure.measure([MeasuredSample(sound, 48_000, "a", torch.tensor([1]), True)])[0]
    names = ("overall", "noisiness", "discontinuity", "coloration", "loudness")
    assert found == pytest.approx(dict(zip([f"nisqa_{name}" for name in names], expected, strict=True)), abs=2e-3)
    assert measure.identity()["model"] == "nisqa.tar"


def test_nisqa_of_what_it_cannot_hear(nisqa, tmp_path):
    assert nisqa[0].measure([sample(wave(0, 0.02)), sample(wave(0, 0.1)), sample(wave(0, 53.0))]) == [{}, {}, {}]
    with pytest.raises(FileNotFoundError, match=r"fetch weights/nisqa\.tar"):
        NISQA(str(tmp_path / "gone.tar"))
    torch.save({"weights": 1}, tmp_path / "other.tar")
    with pytest.raises(ValueError, match="settings under 'args'"):
        NISQA(str(tmp_path / "other.tar"))
    for settings in (5, {}):
        torch.save({"args": settings, "model_state_dict": {}}, tmp_path / "other.tar")
        with pytest.raises(ValueError, match=r"other\.tar: expected the settings and weights of NISQA"):
            NISQA(str(tmp_path / "other.tar"))
    (tmp_path / "other.tar").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"other\.tar: "):
        NISQA(str(tmp_path / "other.tar"))


class Loudest(nn.Module):
    """Stand-in for the package's model: the largest sample times a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x.amax(-1) * self.scale


def test_distillmos_by_its_package_and_with_other_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distillmos", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tts-align\[quality\]'"):
        DistillMOS()
    monkeypatch.setitem(sys.modules, "distillmos", SimpleNamespace(ConvTransformerSQAModel=Loudest))
    sounds = [sample(0.5 * torch.ones(16_000)), sample(torch.ones(100))]
    assert DistillMOS().measure(sounds) == [{"distillmos": 1.0}, {}]
    torch.save({"scale": torch.tensor(6.0)}, tmp_path / "weights.pth")
    assert DistillMOS(str(tmp_path / "weights.pth")).measure(sounds)[0] == {"distillmos": 3.0}
    for other in ({"scales": torch.tensor(6.0)}, 5):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth: expected the weights of Distill-MOS"):
            DistillMOS(str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match="Distill-MOS is not at"):
        DistillMOS(str(tmp_path / "gone.pth"))
