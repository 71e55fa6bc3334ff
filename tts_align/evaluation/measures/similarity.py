# SPDX-License-Identifier: Apache-2.0
"""Similarity of the voice to a recording of it: the cosine between vectors of two speaker encoders.

Similarities of different encoders are different scales, so each has a name of its own. The generated part alone is
compared, in full, with the recording that was asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.measures.base import MeasuredSample, UtteranceMeasure
from tts_align.evaluation.measures.ecapa import build_backbone, build_head, split_weights
from tts_align.utils.readers import load_tensors

SAMPLE_RATE = 16_000
SHORTEST_SECONDS = 0.1
"""A shorter recording has no voice that could be compared."""


def found(path: str | Path, what: str, fetch: str) -> Path:
    """A file or folder of weights.

    Args:
        path: where it should be.
        what: it is.
        fetch: where it comes from, in words.

    Raises:
        FileNotFoundError: it is not there; the message says what to fetch and where to put it.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{what} is not at {path}: fetch {fetch}, and name its place as model")
    return Path(path)


class SpeakerSimilarity(UtteranceMeasure):
    """Cosine between the vectors of an utterance and of a recording of the voice."""

    higher_is_better: ClassVar[bool | None] = True
    needs_prompt: ClassVar[bool] = True

    @abstractmethod
    def embed(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, " d"]:
        """Vector of one voice.

        Args:
            waveform: at 16 kHz, at least 0.1 s.
        """

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """The similarity of each utterance with a recording of its voice; what is shorter than 0.1 s has none."""
        prompts: dict[int, Tensor | None] = {}
        for one in samples:
            if one.prompt is not None and id(one.prompt) not in prompts:
                prompts[id(one.prompt)] = self._vector(one.prompt.at(SAMPLE_RATE))
        numbers: list[dict[str, float]] = []
        for one in samples:
            voice = None if one.prompt is None else prompts[id(one.prompt)]
            spoken = None if voice is None else self._vector(one.sound.at(SAMPLE_RATE))
            if voice is None or spoken is None:
                numbers.append({})
            else:
                numbers.append({self.name: float(F.cosine_similarity(voice, spoken, dim=0))})
        return numbers

    def _vector(self, waveform: Tensor) -> Tensor | None:
        if len(waveform) < SHORTEST_SECONDS * SAMPLE_RATE:
            return None
        return self.embed(waveform.to(self.own_device))


class WavLMSimilarity(SpeakerSimilarity):
    """Speaker verification by WavLM with x-vectors (arXiv 2110.13900); two recordings of one voice have about 0.9.

    Args:
        model: folder of transformers' WavLMForXVector, such as that of microsoft/wavlm-base-plus-sv.
    """

    name = "similarity_wavlm"

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

        folder = found(
            model, "the speaker encoder", "the folder microsoft/wavlm-base-plus-sv from the Hugging Face hub"
        )
        self.extractor = Wav2Vec2FeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        self.network = WavLMForXVector.from_pretrained(str(folder), local_files_only=True).eval()

    def embed(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, " d"]:
        """Vector of one voice."""
        values = self.extractor(waveform.cpu().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        return self.network(values.to(waveform.device)).embeddings[0]


class SeedSimilarity(SpeakerSimilarity):
    """The scale of Seed-TTS-Eval: WavLM-large with an ECAPA head; two recordings of one voice have about 0.7.

    Args:
        model: the file wavlm_large_finetune.pth.
        normalise: whether to bring each recording to mean 0 and variance 1 first, as WavLM-large was trained.
    """

    name = "similarity_seed"

    def __init__(self, model: str, normalise: bool = True) -> None:
        super().__init__()
        path = found(
            model,
            "the speaker encoder of Seed-TTS-Eval",
            "wavlm_large_finetune.pth as the README of github.com/BytedanceSpeech/seed-tts-eval says",
        )
        weights = load_tensors(path)
        if not isinstance(weights, dict) or not isinstance(weights.get("model"), dict):
            raise ValueError(f"{path}: expected a checkpoint with weights under 'model', as published")
        try:
            head, backbone = split_weights(weights["model"])
            self.head, self.backbone = build_head(head).eval(), build_backbone(backbone).eval()
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: expected the weights of WavLM-large with an ECAPA head: {error}") from None
        self.normalise = normalise

    def embed(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, " d"]:
        """Vector of one voice."""
        heard = F.layer_norm(waveform, waveform.shape) if self.normalise else waveform
        states = self.backbone(heard[None], output_hidden_states=True).hidden_states
        return self.head(torch.stack(states))[0]


class CampplusSimilarity(SpeakerSimilarity):
    """CAM++ (arXiv 2303.00332). Biased: its vectors condition the model that is measured, so no headline should be it.

    Args:
        model: CosyVoice directory with campplus.onnx.
    """

    name = "similarity_campplus"

    def __init__(self, model: str) -> None:
        super().__init__()
        from tts_align.models.cosyvoice.frontend import SpeakerEncoder

        folder = found(model, "the CosyVoice directory", "one of FunAudioLLM's model directories")
        self.encoder = SpeakerEncoder(str(folder))

    def model_files(self) -> Iterable[Path]:
        """The encoder's graph with its weights."""
        return (self.encoder.model.path,)

    def embed(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, " d"]:
        """Vector of one voice."""
        return self.encoder.encode([waveform.cpu()])[0]
