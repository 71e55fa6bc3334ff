# SPDX-License-Identifier: Apache-2.0
"""What CosyVoice hears with: the speech tokenizer and the speaker encoder, as the ONNX files of the directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.tokenizer import SpeechTokenizer
from tts_align.models.cosyvoice.directory import ModelDirectory
from tts_align.models.cosyvoice.features import kaldi_fbank, whisper_mel

SAMPLE_RATE = 16000
MAX_SECONDS = 30.0
"""More than this the speech tokenizer was not made for."""
_WINDOW_SAMPLES = 400
_FRAMES_PER_TOKEN = 4


class OnnxModel:
    """An ONNX file, opened when it is first run; a copy of this opens it anew.

    Inputs and outputs go by their position, as their names differ between files.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: Any = None

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """The first output.

        Raises:
            ValueError: the file is no ONNX model, or takes another number of inputs.
        """
        if self._session is None:
            self._session = _open_session(self.path)
        slots = self._session.get_inputs()
        if len(slots) != len(inputs):
            raise ValueError(f"{self.path} takes {len(slots)} inputs, expected {len(inputs)}: is it another model?")
        feed = {slot.name: value for slot, value in zip(slots, inputs, strict=True)}
        return self._session.run([self._session.get_outputs()[0].name], feed)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_session": None}


def _open_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": torch.cuda.current_device()}))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the library has one kind for each of its parts, without a common base
        raise ValueError(f"cannot open {path} as an ONNX model, was it downloaded completely? {error}") from None


class CosyVoiceTokenizer(SpeechTokenizer):
    """The speech tokenizer of a CosyVoice2 or Fun-CosyVoice3 directory: 25 speech tokens a second.

    A token stands for four frames of 10 ms. ``speech_tokenizer_v*.batch.onnx`` gives a token for each *whole* four of
    them, the file without ``batch`` also one for the rest; the CosyVoice runtime uses the latter for its prompts.

    Args:
        directory: directory of the model.
        batch_size: utterances encoded together, if the directory has the file for that; 1 uses the file for single
            ones if it is there.
    """

    sample_rate = SAMPLE_RATE
    max_seconds = MAX_SECONDS

    def __init__(self, directory: str, batch_size: int = 8) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        source = ModelDirectory.find(directory)
        stem = f"speech_tokenizer_v{source.family[-1]}"
        names = [f"{stem}.batch.onnx", f"{stem}.onnx"]
        ordered = names if batch_size > 1 else names[::-1]
        name = next((name for name in ordered if (source.path / name).is_file()), names[1])
        self.model = OnnxModel(source.file(name))
        self.batched = name == names[0]
        self.batch_size = batch_size if self.batched else 1
        self.codebook_size = source.codebook_size

    def encode(self, waveforms: Sequence[Float[Tensor, " _"]]) -> list[Int[Tensor, " _"]]:
        """Speech tokens of each waveform; what is shorter than a window of 25 ms has none.

        Utterances of like length are encoded together. Padding is masked within the model, so neighbours change
        nothing but the last bits of its sums.

        Args:
            waveforms: at 16 kHz, in [-1, 1].

        Raises:
            ValueError: one lasts more than 30 s, or the model gave speech tokens that its yaml does not know.
        """
        for number, waveform in enumerate(waveforms, start=1):
            if len(waveform) > MAX_SECONDS * SAMPLE_RATE:
                raise ValueError(
                    f"waveform {number} of {len(waveforms)} lasts {len(waveform) / SAMPLE_RATE:.1f} s, "
                    f"but the speech tokenizer takes at most {MAX_SECONDS:g} s: cut it"
                )
        speech_tokens = [torch.zeros(0, dtype=torch.long)] * len(waveforms)
        heard = [row for row, waveform in enumerate(waveforms) if len(waveform) >= _WINDOW_SAMPLES]
        heard.sort(key=lambda row: len(waveforms[row]))
        for start in range(0, len(heard), self.batch_size):
            rows = heard[start : start + self.batch_size]
            for row, found in zip(rows, self._encode([waveforms[row] for row in rows]), strict=True):
                speech_tokens[row] = found
        return speech_tokens

    def _encode(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Speech tokens of a batch."""
        frames = [whisper_mel(waveform.float().cpu()).T for waveform in waveforms]
        lengths = np.array([len(some) for some in frames], np.int32)
        mel = pad_sequence(frames, batch_first=True).transpose(1, 2)  # :: -> (b, m, f)
        speech_tokens = torch.from_numpy(np.array(self.model(mel.contiguous().numpy(), lengths))).long()
        if speech_tokens.numel() and not 0 <= int(speech_tokens.min()) <= int(speech_tokens.max()) < self.codebook_size:
            lowest, highest = int(speech_tokens.min()), int(speech_tokens.max())
            raise ValueError(
                f"{self.model.path} gave tokens {lowest}..{highest}, expected 0..{self.codebook_size - 1}: "
                "do the yaml and the speech tokenizer belong together?"
            )
        if not self.batched:
            return [speech_tokens.flatten()]
        return [row[: length // _FRAMES_PER_TOKEN] for row, length in zip(speech_tokens, lengths.tolist(), strict=True)]


class SpeakerEncoder:
    """CAM++ (arXiv 2303.00332) as ``campplus.onnx`` in a CosyVoice directory: the vector of a voice.

    Args:
        directory: of the model.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, directory: str) -> None:
        self.model = OnnxModel(ModelDirectory.find(directory).file("campplus.onnx"))

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, "b d"]:
        """Vectors of waveforms at 16 kHz, not normalised; each is encoded by itself.

        Raises:
            ValueError: there is none, or one is shorter than a window of 25 ms.
        """
        if not waveforms:
            raise ValueError("expected at least one waveform")
        return torch.stack([self._encode(waveform) for waveform in waveforms])

    def _encode(self, waveform: Tensor) -> Tensor:
        features = kaldi_fbank(waveform.float().cpu())
        return torch.from_numpy(np.array(self.model(features[None].numpy()), np.float32)).flatten()
