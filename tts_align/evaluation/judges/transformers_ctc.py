# SPDX-License-Identifier: Apache-2.0
"""Any CTC model of transformers as a judge: wav2vec 2.0, HuBERT, WavLM, MMS; of letters, kana, pinyin or phonemes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tts_align.evaluation.judges.alphabet import Alphabet, read_alphabet
from tts_align.evaluation.judges.recogniser import SAMPLE_RATE, LongAudio, ReadingRules, RecogniserJudge, Recognition
from tts_align.evaluation.judges.weights import check_folder
from tts_align.evaluation.readings.spelling import Script

log = logging.getLogger(__name__)
_WANTED = (("*.safetensors", "pytorch_model*.bin"), ("config.json",), ("vocab.json",))
_HUB = ("facebook/wav2vec2-lv-60-espeak-cv-ft", "facebook/mms-1b-all")
_SHORTEST = SAMPLE_RATE // 20
"""Samples that give every model a frame."""


class TransformersCTCJudge(RecogniserJudge):
    """A CTC model of transformers: error rates from its greedy transcript, readings by exact likelihood.

    The likelihood of a candidate is summed over all ways to lay it on the sound, and the model has hardly learnt how
    words are written: what is likelier was said.

    Args:
        model: folder of a model for CTC, such as facebook/wav2vec2-lv-60-espeak-cv-ft (phonemes) or
            facebook/mms-1b-all (letters of many languages).
        language: code of the language that is spoken, such as ja; empty for that of each sentence.
        target_language: adapter and letters of a model of many languages, such as jpn for MMS.
        script: script that the model writes: written (as people write the language), kana, pinyin or phonemes; auto
            goes by its vocabulary.
        batch_size: utterances heard together; does not change a verdict.
        readings: rules by which a reading counts as heard.
        long_audio: handling of a recording of more than 30 s: windows (it is cut at quiet moments, and no reading is
            told from another) or fail (an error names it).
    """

    def __init__(
        self,
        model: str,
        language: str = "",
        target_language: str = "",
        script: Literal["auto", "written", "kana", "pinyin", "phonemes"] = "auto",
        batch_size: int = 16,
        readings: ReadingRules | None = None,
        long_audio: LongAudio = "windows",
    ) -> None:
        super().__init__(model, language, batch_size, readings, long_audio)
        wanted = (*_WANTED, (f"adapter.{target_language}.safetensors",)) if target_language else _WANTED
        check_folder(self.folder, wanted, _HUB, "model.judge.init_args.model")
        self.target_language = target_language
        self.alphabet = self._alphabet(None if script == "auto" else Script(script))
        self._model: tuple[torch.device, nn.Module] | None = None

    def _alphabet(self, script: Script | None) -> Alphabet:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        return read_alphabet(self.folder, int(config.pad_token_id), self.target_language, script)

    def weight_files(self) -> Iterable[Path]:
        """Files of the weights and of the letters; of the adapters only the one in use."""
        kept = [path for pattern in ("*.safetensors", "*.bin", "*.json") for path in self.folder.glob(pattern)]
        own = f"adapter.{self.target_language}.safetensors"
        return [path for path in kept if not path.name.startswith("adapter.") or path.name == own]

    @property
    def script(self) -> Script:
        """What it writes."""
        return self.alphabet.script

    @cached_property
    def _prepares(self) -> Any:
        from transformers import Wav2Vec2FeatureExtractor

        if (self.folder / "preprocessor_config.json").is_file():
            return Wav2Vec2FeatureExtractor.from_pretrained(self.folder, local_files_only=True)
        return Wav2Vec2FeatureExtractor()

    @property
    def loaded(self) -> Any:
        """The model, on the device that the trainer has brought the judge to."""
        device = self.own_device
        if self._model is None or self._model[0] != device:
            from transformers import AutoModelForCTC

            told: dict[str, Any] = {}
            if self.target_language:
                told = {"target_lang": self.target_language, "ignore_mismatched_sizes": True}
            with torch.device("cpu"):
                made = AutoModelForCTC.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32, **told)
            self._model = device, made.to(device).eval()
        return self._model[1]

    @torch.no_grad()
    def hear(
        self, sounds: Sequence[Float[Tensor, " _"]], language: str, texts: Sequence[Sequence[str]]
    ) -> list[Recognition]:
        """Transcribe sounds, and score the texts asked for with each."""
        with torch.device("cpu"):  # only the model itself is elsewhere
            return self._hear(sounds, texts)

    def _hear(self, sounds: Sequence[Float[Tensor, " _"]], texts: Sequence[Sequence[str]]) -> list[Recognition]:
        # A model that normalises each layer over time would hear the padding.
        together = len(sounds) if getattr(self.loaded.config, "feat_extract_norm", "") == "layer" else 1
        heard: list[Recognition] = []
        for start in range(0, len(sounds), together):
            batch = slice(start, start + together)
            logps, counts = self.log_probs(sounds[batch])
            for row, asked in enumerate(texts[batch]):
                own = logps[row, : counts[row]]
                path = [number for number, _ in groupby(own.argmax(-1).tolist()) if number != self.alphabet.blank]
                heard.append(Recognition(self.alphabet.text(path), tuple(self.score(own, asked))))
        return heard

    def log_probs(self, sounds: Sequence[Float[Tensor, " _"]]) -> tuple[Float[Tensor, "b q v"], Int[Tensor, " b"]]:
        """Log-probabilities of the tokens in q frames, and the number of real frames of each sound; on the CPU."""
        padded = [functional.pad(sound, (0, max(0, _SHORTEST - len(sound)))).numpy() for sound in sounds]
        lengths = torch.tensor([len(sound) for sound in padded])
        given = self._prepares(padded, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        device = self.own_device
        options = {"attention_mask": mask.long().to(device)} if len(sounds) > 1 else {}
        logits = self.loaded(given.input_values.float().to(device), **options).logits
        counts = self.loaded._get_feat_extract_output_lengths(lengths)
        return logits.float().log_softmax(-1).cpu(), counts.clamp_max(logits.shape[1]).cpu()

    def score(self, logps: Float[Tensor, "q v"], texts: Sequence[str]) -> list[float]:
        """Exact log p(text | sound) of each text, summed over all alignments; minus infinity if it does not fit.

        A text with letters that the model does not write can only be compared with texts in which the same letters
        are missing.

        Args:
            logps: of one sound.
            texts: its candidates.
        """
        spelled = [self.alphabet.spell(text) for text in texts]
        everywhere = min((unknown for _, unknown in spelled), key=len, default=[])
        fits = [bool(tokens) and unknown == everywhere for tokens, unknown in spelled]
        chosen = [
            [self.alphabet.ids[one] for one in tokens] for (tokens, _), fit in zip(spelled, fits, strict=True) if fit
        ]
        if not chosen:
            return [-math.inf] * len(texts)
        lengths = torch.tensor(list(map(len, chosen)))
        targets = torch.tensor([number for one in chosen for number in one])
        repeated = logps[:, None].expand(-1, len(chosen), -1)  # :: (q, v) -> (q, n, v)
        frames = torch.full((len(chosen),), len(logps))
        losses = functional.ctc_loss(
            repeated, targets, frames, lengths, blank=self.alphabet.blank, reduction="none"
        ).tolist()
        found = iter(losses)
        return [-next(found) if fit else -math.inf for fit in fits]

    def reference(self, text: str) -> str:
        """A text as the model would write it."""
        if self.script in (Script.WRITTEN, Script.KANA):
            return text
        return self.alphabet.text([self.alphabet.ids[token] for token in self.alphabet.spell(text)[0]])

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model."""
        return {**super().__getstate__(), "_model": None}
