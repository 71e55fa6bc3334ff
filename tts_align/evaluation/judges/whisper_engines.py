# SPDX-License-Identifier: Apache-2.0
"""Whisper through CTranslate2 (faster-whisper) and through transformers: many short sounds in one batch.

Both hear the same log-mel spectrograms, write greedily or with a beam, never sample, and score a text in the same way:
by the probabilities of its tokens when they are fed to the decoder one by one, each among the tokens of text alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tts_align.evaluation.judges.recogniser import SAMPLE_RATE, Recognition

WINDOW_SAMPLES = 30 * SAMPLE_RATE
HOP_SAMPLES = 160
CUBLAS = "libcublas.so.12"
"""What CTranslate2 4.8 loads by itself to work on a GPU."""
Precision = Literal["float32", "float16"]
MOST_TOKENS = 224
"""Of a transcript: half of the decoder's positions, as Whisper itself has it."""
_MOST_SCORED = 440
"""Tokens of a text that is scored; the decoder has 448 positions."""
_SPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")


class WhisperEngine(ABC):
    """A Whisper model that is loaded.

    Args:
        folder: of the model.
        tokenizer: of the ``tokenizers`` library.
        mel_channels: of the spectrograms it hears.
        multilingual: whether it is told the language.
        beam_size: hypotheses followed when transcribing.
        max_tokens: longest transcript of a window.
    """

    name: str
    """What it is called in messages."""

    def __init__(
        self, folder: Path, tokenizer: Any, mel_channels: int, multilingual: bool, beam_size: int, max_tokens: int
    ) -> None:
        from transformers import WhisperFeatureExtractor

        self.tokenizer, self.multilingual = tokenizer, multilingual
        self.beam_size, self.max_tokens = beam_size, max_tokens
        stored = (folder / "preprocessor_config.json").is_file()
        self.features = (
            WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
            if stored
            else WhisperFeatureExtractor(feature_size=mel_channels)
        )

    def words(self, language: str) -> Any:
        """Tokens of text and of a language."""
        from faster_whisper.tokenizer import Tokenizer

        return Tokenizer(self.tokenizer, self.multilingual, "transcribe", language if self.multilingual else None)

    def log_mel(self, sounds: Sequence[Float[Tensor, " _"]]) -> np.ndarray:
        """Log-mel spectrograms of sounds that are padded to 30 s, (b, c, 3000)."""
        padded = [functional.pad(sound, (0, WINDOW_SAMPLES - len(sound))).numpy() for sound in sounds]
        return self.features(padded, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features.astype(np.float32)

    def hear(
        self, sounds: Sequence[Float[Tensor, " _"]], language: str, texts: Sequence[Sequence[str]]
    ) -> list[Recognition]:
        """Transcribe sounds and score texts; see :class:`RecogniserJudge`."""
        words = self.words(language)
        encoded = self.encode(self.log_mel(sounds))
        transcripts = self.transcribe(encoded, words)
        frames = [max(2, -(-len(sound) // HOP_SAMPLES)) for sound in sounds]
        lead = "" if language in _SPACED else " "
        rows = [row for row, asked in enumerate(texts) for _ in asked]
        tokens = [words.encode(lead + text.strip()) for asked in texts for text in asked]
        fits = [place for place, one in enumerate(tokens) if 0 < len(one) <= _MOST_SCORED]
        scores = [-np.inf] * len(tokens)
        if fits:
            asked_rows = [rows[place] for place in fits]
            found = self.score(encoded, asked_rows, [tokens[place] for place in fits], words, frames)
            for place, score in zip(fits, found, strict=True):
                scores[place] = score
        ends = np.cumsum([0, *map(len, texts)])
        return [
            Recognition(transcript.strip(), tuple(scores[start:end]))
            for transcript, start, end in zip(transcripts, ends[:-1], ends[1:], strict=True)
        ]

    @abstractmethod
    def encode(self, log_mel: np.ndarray) -> Any:
        """What the decoder listens to."""

    @abstractmethod
    def transcribe(self, encoded: Any, words: Any) -> list[str]:
        """Transcript of each sound."""

    @abstractmethod
    def score(
        self, encoded: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]], words: Any, frames: Sequence[int]
    ) -> list[float]:
        """Log-likelihood of each text.

        Args:
            encoded: the sounds.
            rows: of which sound each text is a candidate.
            tokens: of each text.
            words: tokens of the language.
            frames: log-mel frames of each sound that are no padding.
        """


class CTranslate2Whisper(WhisperEngine):
    """Whisper by faster-whisper.

    Args:
        folder: of a converted model.
        device: where it runs.
        precision: type of its numbers.
        beam_size: hypotheses followed when transcribing.
        batch_size: texts that are scored together.
        max_tokens: longest transcript of a window.
    """

    name = "CTranslate2"

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, beam_size: int, batch_size: int, max_tokens: int
    ) -> None:
        from faster_whisper import WhisperModel

        loaded = WhisperModel(
            str(folder),
            device=device.type,
            device_index=device.index or 0,
            compute_type=precision,
            cpu_threads=torch.get_num_threads(),
            local_files_only=True,
        )
        self.model, self.batch_size = loaded.model, batch_size
        super().__init__(
            folder, loaded.hf_tokenizer, self.model.n_mels, self.model.is_multilingual, beam_size, max_tokens
        )

    def encode(self, log_mel: np.ndarray) -> Any:
        """Output of the encoder, (b, 1500, d), in memory that can be repeated for candidates."""
        from ctranslate2 import StorageView

        return self.model.encode(StorageView.from_array(log_mel), to_cpu=True)

    def transcribe(self, encoded: Any, words: Any) -> list[str]:
        """Transcript of each sound."""
        prompt = [*words.sot_sequence, words.no_timestamps]
        # CTranslate2 ends the text at half of what it is given, or where that is full.
        longest = max(2 * self.max_tokens, len(prompt) + self.max_tokens)
        found = self.model.generate(encoded, [prompt] * encoded.shape[0], beam_size=self.beam_size, max_length=longest)
        return [words.decode(one.sequences_ids[0]) for one in found]

    def score(
        self, encoded: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]], words: Any, frames: Sequence[int]
    ) -> list[float]:
        """Log-likelihood of each text, by a teacher-forced pass of the decoder."""
        from ctranslate2 import StorageView

        memory = np.array(encoded)
        scores = []
        for start in range(0, len(rows), self.batch_size):
            batch = list(rows[start : start + self.batch_size])
            found = self.model.align(
                StorageView.from_array(np.ascontiguousarray(memory[batch])),
                words.sot_sequence,
                [list(one) for one in tokens[start : start + self.batch_size]],
                [frames[row] for row in batch],
            )
            scores += [float(np.log(np.maximum(one.text_token_probs, 1e-45)).sum()) for one in found]
        return scores


class TransformersWhisper(WhisperEngine):
    """Whisper by transformers.

    Args:
        folder: of a model as transformers saves it.
        device: where it runs.
        precision: type of its numbers.
        beam_size: hypotheses followed when transcribing.
        batch_size: texts that are scored together.
        max_tokens: longest transcript of a window.
    """

    name = "transformers"

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, beam_size: int, batch_size: int, max_tokens: int
    ) -> None:
        from transformers import AutoTokenizer, WhisperForConditionalGeneration

        model: Any = WhisperForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, precision), use_safetensors=_has_safetensors(folder)
        )
        self.model, self.device, self.batch_size = model.to(device).eval(), device, batch_size
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        multilingual = getattr(model.generation_config, "is_multilingual", None)
        if multilingual is None:
            multilingual = bool(getattr(model.generation_config, "lang_to_id", None))
        super().__init__(folder, tokenizer, model.config.num_mel_bins, multilingual, beam_size, max_tokens)

    def encode(self, log_mel: np.ndarray) -> Any:
        """Output of the encoder, (b, 1500, d)."""
        features = torch.from_numpy(log_mel).to(self.device, self.model.dtype)
        return self.model.get_encoder()(features)

    def transcribe(self, encoded: Any, words: Any) -> list[str]:
        """Transcript of each sound."""
        from transformers import GenerationConfig, GenerationMixin

        prompt = torch.tensor([[*words.sot_sequence, words.no_timestamps]], device=self.device)
        stored = self.model.generation_config
        rules = GenerationConfig(
            max_new_tokens=self.max_tokens,
            num_beams=self.beam_size,
            do_sample=False,
            suppress_tokens=stored.suppress_tokens or None,
            begin_suppress_tokens=stored.begin_suppress_tokens or None,
            bos_token_id=stored.bos_token_id,
            eos_token_id=stored.eos_token_id,
            pad_token_id=stored.pad_token_id,
            decoder_start_token_id=stored.decoder_start_token_id,
        )
        # Whisper's own method samples again what seems unlikely to it, and cuts into windows: done without here.
        found: Any = GenerationMixin.generate(
            self.model,
            encoder_outputs=encoded,
            attention_mask=torch.ones(encoded[0].shape[:2], dtype=torch.long, device=self.device),
            decoder_input_ids=prompt.expand(len(encoded[0]), -1),
            generation_config=rules,
        )
        return [words.decode(one) for one in found.tolist()]

    def score(
        self, encoded: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]], words: Any, frames: Sequence[int]
    ) -> list[float]:
        """Log-likelihood of each text, by a teacher-forced pass of the decoder."""
        prompt = [*words.sot_sequence, words.no_timestamps]
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            batch = slice(start, start + self.batch_size)
            memory = encoded[0][list(rows[batch])]
            scores += self._score(memory, [[*prompt, *one] for one in tokens[batch]], len(prompt), words.eot)
        return scores

    def _score(self, memory: Tensor, sequences: list[list[int]], prompt: int, text_size: int) -> list[float]:
        longest = max(map(len, sequences))
        padded = torch.tensor([[*one, *[text_size] * (longest - len(one))] for one in sequences], device=self.device)
        counts = torch.tensor(list(map(len, sequences)), device=self.device)
        logits = self.model(encoder_outputs=(memory,), decoder_input_ids=padded[:, :-1]).logits
        # Each text token among the tokens of text :: (b, t, v) -> (b, t)
        logps = logits[:, prompt - 1 :, :text_size].float().log_softmax(-1)
        wanted: Int[Tensor, "b t"] = padded[:, prompt:].clamp_max(text_size - 1)
        picked = logps.gather(-1, wanted[..., None])[..., 0]
        mask = torch.arange(prompt, longest, device=self.device) < counts[:, None]
        return picked.masked_fill(~mask, 0.0).double().sum(-1).tolist()


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors*"))


def gpu_fault() -> str:
    """Why CTranslate2 cannot work on a GPU of this machine; empty if it can."""
    import ctranslate2

    try:
        if not ctranslate2.get_cuda_device_count():
            return "CTranslate2 finds no GPU"
    except RuntimeError as error:
        return f"CTranslate2 finds no GPU ({error})"
    for name in (CUBLAS, *_packaged_cublas()):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # once loaded it is found by its name
        except OSError:
            continue
        return ""
    return f"CTranslate2 needs {CUBLAS}, which is not found: pip install nvidia-cublas-cu12"


def _packaged_cublas() -> list[str]:
    """The library as NVIDIA's package for Python brings it."""
    found = importlib.util.find_spec("nvidia")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return [str(path) for place in places for path in Path(place).glob(f"cublas/lib/{CUBLAS}")]
