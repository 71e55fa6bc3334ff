# SPDX-License-Identifier: Apache-2.0
"""Paraformer and SenseVoice through sherpa-onnx: the light way to the recogniser of the official Mandarin scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.judges.recogniser import SAMPLE_RATE, LongAudio, ReadingRules, RecogniserJudge, Recognition
from tts_align.evaluation.judges.weights import check_folder

Kind = Literal["paraformer", "sense_voice"]
_HUB = {
    "paraformer": "csukuangfj/sherpa-onnx-paraformer-zh-2023-09-14",
    "sense_voice": "csukuangfj/sherpa-onnx-sense-voice-zh-en-ja-ko-yue-2024-07-17",
}
_SENSE_VOICE = ("zh", "en", "ja", "ko", "yue")


class SherpaJudge(RecogniserJudge):
    """Paraformer or SenseVoice by sherpa-onnx (extra ``mandarin``): error rates alone.

    It writes hanzi, which are the same for every reading, and gives no likelihoods: of a sentence with a marked word it
    leaves the reading open (abstained), and its error rate counts.

    Args:
        model: folder with model.onnx or model.int8.onnx and tokens.txt.
        kind: kind of model: paraformer or sense_voice.
        language: code of the language that is spoken; empty for that of each sentence.
        readings: rules by which a reading counts as heard, of which only max_cer matters here: the error rate above
            which nothing was understood.
        long_audio: handling of a recording of more than 30 s: windows (it is cut at quiet moments) or fail (an error
            names it).
        provider: execution provider of ONNX Runtime inside sherpa-onnx: cpu, or cuda where that build of it is
            installed.
    """

    scores_readings: ClassVar[bool] = False

    def __init__(
        self,
        model: str,
        kind: Kind = "paraformer",
        language: str = "zh",
        readings: ReadingRules | None = None,
        long_audio: LongAudio = "windows",
        provider: str = "cpu",
    ) -> None:
        super().__init__(model, language, 1, readings, long_audio)
        wanted = (("model.onnx", "model.int8.onnx"), ("tokens.txt",))
        check_folder(self.folder, wanted, (_HUB[kind],), "model.judge.init_args.model")
        self.kind, self.provider = kind, provider
        self._recognisers: dict[str, Any] = {}

    def weight_files(self) -> Iterable[Path]:
        """The graph that is used, and its tokens."""
        graphs = (self.folder / "model.onnx", self.folder / "model.int8.onnx")
        return next(path for path in graphs if path.is_file()), self.folder / "tokens.txt"

    def recogniser(self, language: str) -> Any:
        """What transcribes a language.

        Raises:
            ValueError: sherpa-onnx is not installed, or SenseVoice does not know the language.
        """
        if self.kind == "sense_voice" and language not in _SENSE_VOICE:
            raise ValueError(f"SenseVoice hears {', '.join(_SENSE_VOICE)}, and not {language!r}")
        if language not in self._recognisers:
            self._recognisers[language] = self._load(language)
        return self._recognisers[language]

    def _load(self, language: str) -> Any:
        try:
            from sherpa_onnx import OfflineRecognizer
        except ImportError:
            raise ValueError("SherpaJudge needs sherpa-onnx: pip install 'tts-align[mandarin]'") from None
        graph, tokens = self.weight_files()
        common = {"tokens": str(tokens), "num_threads": torch.get_num_threads(), "provider": self.provider}
        if self.kind == "paraformer":
            return OfflineRecognizer.from_paraformer(
                paraformer=str(graph), sample_rate=SAMPLE_RATE, decoding_method="greedy_search", **common
            )
        return OfflineRecognizer.from_sense_voice(model=str(graph), language=language, use_itn=False, **common)

    def hear(
        self, sounds: Sequence[Float[Tensor, " _"]], language: str, texts: Sequence[Sequence[str]]
    ) -> list[Recognition]:
        """Transcribe sounds; no text is scored."""
        recogniser = self.recogniser(language)
        heard = []
        for sound in sounds:
            stream = recogniser.create_stream()
            stream.accept_waveform(SAMPLE_RATE, sound.numpy())
            recogniser.decode_stream(stream)  # alone: these models hear the padding of a batch
            heard.append(Recognition(stream.result.text.strip()))
        return heard

    def __getstate__(self) -> dict[str, Any]:
        """Without what is loaded."""
        return {**super().__getstate__(), "_recognisers": {}}
