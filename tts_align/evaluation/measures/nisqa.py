# SPDX-License-Identifier: Apache-2.0
"""NISQA v2.0 (arXiv 2104.09494): predicted quality in five dimensions, from the file with its published weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.measures.base import MeasuredSample, UtteranceMeasure
from tts_align.evaluation.measures.similarity import found
from tts_align.models.cosyvoice.features import mel_filters
from tts_align.utils.readers import load_tensors

SAMPLE_RATE = 48_000
"""NISQA hears the whole band."""
DIMENSIONS = ("overall", "noisiness", "discontinuity", "coloration", "loudness")
"""In the order in which the model gives them; more is better in each."""
_LEAST_MAGNITUDE, _RANGE_DECIBELS = 1e-4, 80.0


class NISQA(UtteranceMeasure):
    """Predicted opinion of speech without a reference, 1 to 5: overall, noisiness, discontinuity, coloration, loudness.

    The model is torchmetrics'. The weights are free for research only (CC BY-NC-SA).

    Args:
        model: the file nisqa.tar.
    """

    name = "nisqa"
    higher_is_better: ClassVar[bool | None] = True

    def __init__(self, model: str) -> None:
        super().__init__()
        from torchmetrics.functional.audio.nisqa import _NISQADIM

        path = found(model, "NISQA", "weights/nisqa.tar from github.com/gabrielmittag/NISQA")
        checkpoint = load_tensors(path)
        if not isinstance(checkpoint, dict) or not {"args", "model_state_dict"} <= checkpoint.keys():
            raise ValueError(f"{path}: expected NISQA's settings under 'args' and its weights under 'model_state_dict'")
        self.settings: Mapping[str, Any] = checkpoint["args"]
        try:
            self.network = _NISQADIM(checkpoint["args"]).eval()
            self.network.load_state_dict(checkpoint["model_state_dict"])
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"{path}: expected the settings and weights of NISQA ({said})") from None
        self.path = path

    def model_files(self) -> Iterable[Path]:
        """The file: its settings count as well as its weights."""
        return (self.path,)

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``nisqa_overall`` and so on; none of what is shorter or longer than the model can hear."""
        return [self._of(one.sound.at(SAMPLE_RATE)) for one in samples]

    def _of(self, waveform: Tensor) -> dict[str, float]:
        segments = self._segments(waveform)
        if segments is None:
            return {}
        count = torch.tensor([len(segments)])
        # Padded to its own length: the model counts nothing beyond the number of segments.
        values = self.network(segments[None].to(self.own_device), count.cpu())[0].tolist()
        return {f"{self.name}_{name}": value for name, value in zip(DIMENSIONS, values, strict=True)}

    def _segments(self, waveform: Tensor) -> Float[Tensor, "n m s"] | None:
        """Overlapping pieces of the log-mel; ``None`` where there is none, or more than the model takes."""
        length, hop = self.settings["ms_seg_length"], self.settings["ms_seg_hop_length"]
        if len(waveform) <= self.settings["ms_n_fft"] // 2:
            return None
        levels = log_mel(waveform, self.settings)
        # :: (m, f) -> (m, pieces, length) -> (pieces, m, length)
        pieces = levels.unfold(1, length, hop).transpose(0, 1) if levels.shape[1] >= length else None
        return None if pieces is None or len(pieces) > self.settings["ms_max_segments"] else pieces.contiguous()


def log_mel(waveform: Float[Tensor, " time"], settings: Mapping[str, Any]) -> Float[Tensor, "m f"]:
    """Mel magnitudes in decibels, no further than 80 below the loudest.

    Args:
        waveform: at 48 kHz.
        settings: of the model, by its own names.
    """
    hop, window = (math.floor(SAMPLE_RATE * settings[name]) for name in ("ms_hop_length", "ms_win_length"))
    fft = settings["ms_n_fft"]
    shape = torch.hann_window(window, device="cpu")
    padded = F.pad(shape, ((fft - window) // 2, fft - window - (fft - window) // 2))
    bins = torch.stft(waveform.cpu(), fft, hop, window=padded, center=True, pad_mode="reflect", return_complex=True)
    filters = mel_filters(SAMPLE_RATE, fft, settings["ms_n_mels"], 0.0, float(settings["ms_fmax"]), torch.device("cpu"))
    # :: (m, q) @ (q, f) -> (m, f)
    levels = 20 * (filters.T @ bins.abs()).clamp_min(_LEAST_MAGNITUDE).log10()
    return levels.maximum(levels.max() - _RANGE_DECIBELS)
