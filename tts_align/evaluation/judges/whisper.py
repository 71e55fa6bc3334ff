# SPDX-License-Identifier: Apache-2.0
"""Whisper as a judge, on CTranslate2 or transformers, from a folder of weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.judges.recogniser import LongAudio, ReadingRules, RecogniserJudge, Recognition
from tts_align.evaluation.judges.weights import MissingWeightsError, check_folder
from tts_align.evaluation.judges.whisper_engines import (
    MOST_TOKENS,
    CTranslate2Whisper,
    Precision,
    TransformersWhisper,
    WhisperEngine,
    gpu_fault,
)
from tts_align.evaluation.readings.spelling import Script

log = logging.getLogger(__name__)
Backend = Literal["auto", "ctranslate2", "transformers"]
_CTRANSLATE2 = (("model.bin",), ("config.json",), ("vocabulary.json", "vocabulary.txt"), ("tokenizer.json",))
_TRANSFORMERS = (
    ("*.safetensors", "pytorch_model*.bin"),
    ("config.json",),
    ("generation_config.json",),
    ("tokenizer.json", "vocab.json"),
)
_HUB = {"ctranslate2": "Systran/faster-whisper-large-v3", "transformers": "openai/whisper-large-v3"}
_WEIGHTS = ("model.bin", "*.safetensors", "pytorch_model*.bin", "*config.json", "vocab*", "tokenizer.json")


class WhisperJudge(RecogniserJudge):
    """Whisper: error rates from what it writes, readings from how likely it finds each of their spellings.

    Temperature 0, no fall-back to sampling, no filter of voice activity, no timestamps, and no text carried over from
    one utterance to the next: the same sound is always heard the same.

    Args:
        model: folder of weights: a model converted for CTranslate2 (model.bin), such as
            Systran/faster-whisper-large-v3, or one of transformers (model.safetensors), such as
            openai/whisper-large-v3.
        language: code of the language that is spoken, such as ja; empty for that of each sentence.
        backend: library to use. auto takes ctranslate2 for a folder with model.bin where that library can work on the
            trainer's device, else transformers if the folder has its weights too, else ctranslate2 on the CPU; a
            message says which.
        script: script that it writes: written (as people do), or kana for a Whisper that was trained to write nothing
            else, which needs no spelling of a reading and expects less.
        precision: type of the numbers: float32, or on a GPU float16, which is faster and less exact.
        beam_size: hypotheses followed when transcribing; 1 is greedy.
        max_tokens: longest transcript of a window in tokens, where a recogniser that repeats itself ends.
        batch_size: utterances heard together; does not change a verdict.
        readings: rules by which a reading counts as heard.
        long_audio: handling of a recording of more than 30 s: windows (it is cut at quiet moments, and no reading is
            told from another) or fail (an error names it).
    """

    expects: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        language: str = "",
        backend: Backend = "auto",
        script: Literal["written", "kana"] = "written",
        precision: Precision = "float32",
        beam_size: int = 1,
        max_tokens: int = MOST_TOKENS,
        batch_size: int = 16,
        readings: ReadingRules | None = None,
        long_audio: LongAudio = "windows",
    ) -> None:
        super().__init__(model, language, batch_size, readings, long_audio)
        if beam_size < 1 or not 0 < max_tokens <= MOST_TOKENS:
            given = f"{beam_size} and {max_tokens}"
            raise ValueError(f"beam_size must be at least 1 and max_tokens 1 to {MOST_TOKENS}, got {given}")
        self.backend, self.precision, self.beam_size, self.max_tokens = backend, precision, beam_size, max_tokens
        self._script = Script(script)
        self._formats = self._check()
        self._engine: tuple[torch.device, WhisperEngine] | None = None

    def _check(self) -> tuple[str, ...]:
        """Formats that the folder holds; raises if the wanted one is not among them."""
        option, wanted = "model.judge.init_args.model", {"ctranslate2": _CTRANSLATE2, "transformers": _TRANSFORMERS}
        names = list(wanted) if self.backend == "auto" else [self.backend]
        found, fault = [], None
        for name in names:
            try:
                check_folder(self.folder, wanted[name], [_HUB[one] for one in names], option)
                found.append(name)
            except MissingWeightsError as error:
                # The fault of what the folder seems to be.
                if fault is None or (name == "transformers" and any(self.folder.glob("*.safetensors"))):
                    fault = error
        if not found:
            assert fault is not None
            raise fault
        return tuple(found)

    def weight_files(self) -> Iterable[Path]:
        """Files of the weights and of the words."""
        return sorted({path for pattern in _WEIGHTS for path in self.folder.glob(pattern)})

    @property
    def script(self) -> Script:
        """What it writes."""
        return self._script

    @torch.no_grad()
    def hear(
        self, sounds: Sequence[Float[Tensor, " _"]], language: str, texts: Sequence[Sequence[str]]
    ) -> list[Recognition]:
        """Transcribe sounds, and score the texts asked for with each."""
        with torch.device("cpu"):  # the engine knows its own device
            return self.engine.hear([sound.cpu() for sound in sounds], language, texts)

    @property
    def engine(self) -> WhisperEngine:
        """The loaded model, on the device that the trainer has brought the judge to."""
        device = self.own_device
        if self._engine is None or self._engine[0] != device:
            kind, where, why = self._chosen(device)
            if where.type == "cpu" and self.precision != "float32":
                raise ValueError(
                    f"precision {self.precision} works on a GPU alone: set model.judge.init_args.precision: float32"
                )
            made = kind(self.folder, where, self.precision, self.beam_size, self.batch_size, self.max_tokens)
            log.info("%s hears with %s on %s%s", type(self).__name__, made.name, where.type, f": {why}" if why else "")
            self._engine = device, made
        return self._engine[1]

    def _chosen(self, device: torch.device) -> tuple[type[CTranslate2Whisper | TransformersWhisper], torch.device, str]:
        """Library, device and the reason if it is not what one would expect."""
        if "ctranslate2" not in self._formats:
            return TransformersWhisper, device, "" if self.backend != "auto" else "the folder has no model.bin"
        if device.type == "cpu":
            return CTranslate2Whisper, device, ""
        fault = gpu_fault() if device.type == "cuda" else f"CTranslate2 does not work on {device.type}"
        if not fault:
            return CTranslate2Whisper, device, ""
        if "transformers" in self._formats:
            return TransformersWhisper, device, fault
        log.warning("%s; the folder has no weights of transformers to use instead, so this is slow", fault)
        return CTranslate2Whisper, torch.device("cpu"), fault

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model, which no other process can take over."""
        return {**super().__getstate__(), "_engine": None}
