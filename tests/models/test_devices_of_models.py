# SPDX-License-Identifier: Apache-2.0
"""What listens, speaks or makes speech tokens owns its device and works in full precision, wherever and in whatever."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_device import DEVICE, simulated_device
from tiny import SIZES as POLICY_SIZES
from tiny_sound import FSQ, VOICES, parts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.judges.ctc import CTCJudge, KanaRecogniser, RecogniserSizes
from tts_align.models.base.generation import Prompt, Sampling
from tts_align.models.base.tokenizer import SpeechTokenizer
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.mel import CodecSizes, MelCodec, MelTokenizer
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.cosyvoice import features
from tts_align.models.cosyvoice.s3.files import S3Sizes
from tts_align.models.cosyvoice.s3.tokenizer import S3Tokenizer
from tts_align.models.flow.vocoder import FlowVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM

CODEC = CodecSizes(
    VOICES,
    sample_rate=4000,
    window_samples=128,
    hop_samples=32,
    mel_channels=6,
    frames_per_token=2,
    levels=(5, 4),
    embedding_channels=8,
    encoder_channels=12,
    encoder_blocks=1,
    decoder_channels=12,
    decoder_blocks=1,
)
RECOGNISER = RecogniserSizes("あいう", 4000, 128, 32, 6, 8, 1)
SPEECH = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([], dtype=torch.long)]
SPEAKERS = ["ann", "bob", "ann"]
WAVEFORMS = [torch.sin(torch.arange(length) / 5.0) / 2 for length in (700, 1100, 20)]
EXPECTED = Expected("辛い", {"あい": "あい", "いう": "いう"}, ("あい",))


class PlainVocoder(Vocoder):
    """As a user writes one: nothing here knows of a device or of a precision."""

    sample_rate = 4000

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)

    def speak(self, speech, speakers):
        gain = torch.tensor([1.0 + VOICES.index(name) for name in speakers])
        return [(self.table(row) * one).flatten().tanh() for row, one in zip(speech, gain, strict=True)]


class PlainJudge(Judge):
    """As a user writes one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def judge(self, samples, expected):
        scores = [self.net(one.waveform[:, None]).mean() + len(one.speech) for one in samples]
        errors = torch.stack(scores) * torch.arange(len(samples))
        return [Verdict("", Reading.UNMARKED, float(one), float(one)) for one in errors]


class PlainTokenizer(SpeechTokenizer):
    """As a user writes one."""

    codebook_size, sample_rate = 20, 4000

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(10, 20)

    def encode(self, waveforms):
        return [self.net(one.unfold(0, 10, 10) * torch.arange(10)).argmax(-1) for one in waveforms]


def flow_vocoder() -> FlowVocoder:
    models = parts(seed=2)
    vocoder = FlowVocoder(steps=3, iterations=2, batch_size=2)
    vocoder.attach(models["flow"], models["tokenizer"], VOICES)
    return vocoder


def judge_of(directory) -> CTCJudge:
    KanaRecogniser(RECOGNISER).save(directory / "judge")
    return CTCJudge(str(directory / "judge"))


def codec(directory) -> str:
    MelCodec(CODEC).save(directory / "codec")
    return str(directory / "codec")


def speak(model: Any) -> list[Tensor]:
    return model.speak(SPEECH, SPEAKERS)


def judge(model: Any) -> list[Tensor]:
    samples = [SpeechSample(row, wave, 4000, name) for row, wave, name in zip(SPEECH, WAVEFORMS, SPEAKERS, strict=True)]
    verdicts = model.judge(samples, [EXPECTED] * 3)
    return [torch.tensor([one.cer, one.margin], dtype=torch.float64).nan_to_num(-1.0) for one in verdicts]


def encode(model: Any) -> list[Tensor]:
    return model.encode(WAVEFORMS)


def take_features(model: Any) -> list[Tensor]:
    return [model.features(wave) for wave in WAVEFORMS]


def generate(model: Any) -> list[Tensor]:
    prompts = [Prompt((1, 2, 3), seed=4), Prompt((3, 1), seed=5)]
    return [one.speech for one in model.generate(prompts, Sampling())]


MODELS: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], list[Tensor]]]] = {
    "MelVocoder": (lambda folder: MelVocoder(codec(folder)), speak),
    "FlowVocoder": (lambda folder: flow_vocoder(), speak),
    "CTCJudge": (judge_of, judge),
    "MelTokenizer": (lambda folder: MelTokenizer(codec(folder)), encode),
    "MelFSQ.encode": (lambda folder: MelFSQ(sizes=FSQ), encode),
    "MelFSQ.features": (lambda folder: MelFSQ(sizes=FSQ), take_features),
    "S3Tokenizer.encode": (lambda folder: S3Tokenizer(S3Sizes(128, 16, 2, 1, 5, levels=(3, 3))), encode),
    "S3Tokenizer.features": (lambda folder: S3Tokenizer(S3Sizes(128, 16, 2, 1, 5, levels=(3, 3))), take_features),
    "Qwen2CodecLM": (lambda folder: Qwen2CodecLM(sizes=POLICY_SIZES), generate),
    "a user's vocoder": (lambda folder: PlainVocoder(), speak),
    "a user's judge": (lambda folder: PlainJudge(), judge),
    "a user's tokenizer": (lambda folder: PlainTokenizer(), encode),
}


def everything(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Change a model and, of a vocoder that hears others, those as well."""
    if isinstance(model, FlowVocoder):
        change(model.models[0])
        change(model.models[1])
    return change(model)


@pytest.fixture(autouse=True)
def own_tables():
    """What is built once per device is not handed from one pretended device to another."""
    features._window.cache_clear()
    features.mel_filters.cache_clear()


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    torch.manual_seed(0)
    make, use = MODELS[request.param]
    return make(tmp_path), use


def test_on_an_accelerator_it_gives_what_it_gives_on_the_cpu(case):
    model, use = case
    expected = use(model)
    with simulated_device():
        found = use(everything(model, lambda one: one.to(DEVICE)))
        assert all(one.device.type == "cpu" for one in found)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_what_it_is_given_may_lie_anywhere(case, monkeypatch):
    model, use = case
    expected = use(model)
    with simulated_device():
        for name in ("SPEECH", "WAVEFORMS"):
            monkeypatch.setitem(globals(), name, [one.to(DEVICE) for one in globals()[name]])
        for one, other in zip(use(model), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["autocast", "true", "default"])
def test_half_precision_around_it_changes_nothing(case, how):
    model, use = case
    if isinstance(model, (FlowVocoder, Qwen2CodecLM)) and how == "true":
        pytest.skip("what trains has a precision of its own")
    expected = use(copy.deepcopy(model))
    if isinstance(model, Qwen2CodecLM):
        return  # the policy follows the trainer
    if how == "true":
        model.to(torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if how == "default" else before)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = use(model)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True))


def test_fake_tensors_get_as_far_as_there_are_numbers(case):
    """Without data on ``cuda:0``: nothing but what needs the numbers themselves stops it, above all no other device."""
    model, use = case
    if not any(True for _ in model.parameters()) and not isinstance(model, FlowVocoder):
        pytest.skip("nothing to move")
    needs_numbers = DataDependentOutputException, DynamicOutputShapeException
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(*needs_numbers):
        use(everything(model, lambda one: one.to("cuda:0")))
