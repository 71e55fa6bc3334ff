# SPDX-License-Identifier: Apache-2.0
"""Quality as predicted by models: opinion scores without a reference. They saturate on modern speech."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tts_align.evaluation.measures.base import MeasuredSample, UtteranceMeasure
from tts_align.evaluation.measures.similarity import SAMPLE_RATE, SHORTEST_SECONDS, found
from tts_align.utils.readers import load_tensors

DNSMOS_SECONDS = 9.01
_POLYNOMIALS = {
    "signal": (-0.08397278, 1.22083953, 0.0052439),
    "background": (-0.13166888, 1.60915514, -0.39604546),
    "overall": (-0.06766283, 1.11546468, 0.04602535),
}
"""From what the model gives to the scale of P.835, coefficients of the square first, as published with it."""


class DNSMOS(UtteranceMeasure):
    """DNSMOS P.835 (arXiv 2110.01763): predicted quality of the signal, of the background, and overall, 1 to 5.

    Windows of 9.01 s, a second apart; shorter utterances are repeated to that length, as the published script does.

    Args:
        model: the file sig_bak_ovr.onnx.
    """

    name = "dnsmos"
    higher_is_better: ClassVar[bool | None] = True

    def __init__(self, model: str) -> None:
        super().__init__()
        from tts_align.models.cosyvoice.frontend import OnnxModel

        fetch = "sig_bak_ovr.onnx from DNSMOS/DNSMOS of github.com/microsoft/DNS-Challenge"
        self.network = OnnxModel(found(model, "DNSMOS", fetch))

    def model_files(self) -> Iterable[Path]:
        """The graph with its weights."""
        return (self.network.path,)

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``dnsmos_signal``, ``dnsmos_background`` and ``dnsmos_overall`` of each utterance with any sample."""
        return [self._of(one.sound.at(SAMPLE_RATE)) for one in samples]

    def _of(self, waveform: Float[Tensor, " time"]) -> dict[str, float]:
        if not len(waveform):
            return {}
        kinds = list(_POLYNOMIALS)
        raw = [np.asarray(self.network(one[None].numpy()))[0] for one in windows(waveform)]
        # The scale is not straight: each window is brought to it, and then they are averaged.
        scaled = [
            [np.polyval(_POLYNOMIALS[kind], value) for kind, value in zip(kinds, one, strict=True)] for one in raw
        ]
        return {f"{self.name}_{kind}": float(value) for kind, value in zip(kinds, np.mean(scaled, axis=0), strict=True)}


def windows(waveform: Float[Tensor, " time"]) -> list[Float[Tensor, " window"]]:
    """Windows of 9.01 s that begin a second apart; what is shorter is repeated by doubling until it is long enough.

    Args:
        waveform: at 16 kHz.
    """
    length = int(DNSMOS_SECONDS * SAMPLE_RATE)
    while len(waveform) < length:
        waveform = torch.cat([waveform, waveform])
    count = int(np.floor(len(waveform) / SAMPLE_RATE) - DNSMOS_SECONDS) + 1
    starts = [place * SAMPLE_RATE for place in range(max(count, 1))]
    return [waveform[start : start + length] for start in starts if start + length <= len(waveform)]


class DistillMOS(UtteranceMeasure):
    """Distill-MOS (arXiv 2502.05356): predicted opinion of speech without a reference, 1 to 5.

    Needs the package distillmos, which brings its weights: pip install 'tts-align[quality]'.

    Args:
        model: file of other weights for it; its own by default.
    """

    name = "distillmos"
    higher_is_better: ClassVar[bool | None] = True

    def __init__(self, model: str | None = None) -> None:
        super().__init__()
        try:
            package = importlib.import_module("distillmos")
        except ImportError:
            message = "DistillMOS needs the package distillmos: pip install 'tts-align[quality]'"
            raise ModuleNotFoundError(message) from None
        self.network: nn.Module = package.ConvTransformerSQAModel()
        if model is not None:
            path = found(model, "Distill-MOS", "weights of github.com/microsoft/Distill-MOS")
            try:
                self.network.load_state_dict(load_tensors(path))
            except (TypeError, AttributeError, RuntimeError) as error:
                said = " ".join(str(error).split())[:300]
                raise ValueError(f"{path}: expected the weights of Distill-MOS ({said})") from None
        self.network.eval()

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``distillmos`` of each utterance of at least 0.1 s."""
        return [self._of(one.sound.at(SAMPLE_RATE)) for one in samples]

    def _of(self, waveform: Tensor) -> dict[str, float]:
        if len(waveform) < SHORTEST_SECONDS * SAMPLE_RATE:
            return {}
        return {self.name: float(self.network(waveform[None].to(self.own_device)).flatten()[0])}
