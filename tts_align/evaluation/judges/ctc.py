# SPDX-License-Identifier: Apache-2.0
"""A small kana recogniser trained with CTC: greedy transcripts, and forced choice between readings by exact likelihood.

It listens to the finished waveform. It knows only the kind of speech it was trained on: for the embedded corpus that is
eSpeak-like Japanese, real or copy-synthesised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torchaudio
from jaxtyping import Float, Int
from kaldialign import align
from torch import Tensor, nn
from torch.nn import functional

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.metrics.functional import error_rate
from tts_align.models.base.device import OwnsItsDevice
from tts_align.models.codec.fsq import MaskedBlock
from tts_align.models.codec.log_mel import LogMel, batches_by_length, log_mel_batch
from tts_align.utils.model_directory import find_model, half_parameters, load_parameters, read_sizes, write_model

_GAP = "·"


@dataclass(frozen=True)
class RecogniserSizes:
    """Sizes of a recogniser; what `config.json` in its directory holds.

    Args:
        alphabet: The kana it writes, each once.
        sample_rate: Samples per second.
        window_samples: Analysis window of the log-mel.
        hop_samples: Samples per log-mel frame.
        mel_channels: Mel channels.
        hidden_channels: Width.
        blocks: Number of convolution blocks.
        kernel_size: Positions (pairs of frames) that one block sees.
    """

    alphabet: str
    sample_rate: int = 16000
    window_samples: int = 512
    hop_samples: int = 160
    mel_channels: int = 48
    hidden_channels: int = 96
    blocks: int = 4
    kernel_size: int = 7


@dataclass(frozen=True)
class Hearing:
    """What the recogniser heard in one utterance.

    Attributes:
        transcript: Greedy kana transcript.
        likelihoods: Log-likelihood of the whole transcript with each candidate reading.
        said: The likelier reading, or None when the transcript does not spell it (see `said_reading`).
        share: Where the likelier reading begins and ends, as shares of the utterance's length; None without a reading.
    """

    transcript: str
    likelihoods: dict[str, float]
    said: str | None
    share: tuple[float, float] | None


class KanaRecogniser(OwnsItsDevice):
    """Log-mel -> convolution blocks -> blank or kana, at half the frame rate.

    Args:
        sizes: Alphabet and sizes. Class 0 is the blank.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("listen",)

    def __init__(self, sizes: RecogniserSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.features = LogMel(sizes.sample_rate, sizes.window_samples, sizes.hop_samples, sizes.mel_channels)
        self.stem = nn.Linear(2 * sizes.mel_channels, sizes.hidden_channels)
        self.blocks = nn.ModuleList(MaskedBlock(sizes.hidden_channels, sizes.kernel_size) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.hidden_channels)
        self.head = nn.Linear(sizes.hidden_channels, 1 + len(sizes.alphabet))

    def forward(
        self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b q v"], Int[Tensor, " b"]]:
        """Log-probabilities at each of q positions (two frames each), and the number of real positions of each row."""
        rows, length, channels = log_mel.shape
        # :: (b, q * 2, m) -> (b, q, 2 * m)
        pairs = functional.pad(log_mel, (0, 0, 0, length % 2)).reshape(rows, -1, 2 * channels)
        positions = frames // 2
        mask = torch.arange(pairs.shape[1], device=pairs.device) < positions[:, None]
        hidden = functional.gelu(self.stem(pairs))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(self.norm(hidden)).float().log_softmax(-1), positions

    def loss(
        self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"], texts: Sequence[str]
    ) -> Float[Tensor, ""]:
        """CTC loss per kana, for training."""
        log_probs, positions = self(log_mel, frames)
        return -self.likelihoods(log_probs, positions, texts).sum() / sum(map(len, texts))

    def likelihoods(
        self, log_probs: Float[Tensor, "b q v"], positions: Int[Tensor, " b"], texts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """Exact log p(text | sound), summed over all alignments; -10000 for a text too long for the sound."""
        indices = [index for text in texts for index in self.indices(text)]
        targets = torch.tensor(indices, dtype=torch.long, device=log_probs.device)
        lengths = torch.tensor([len(text) for text in texts], device=log_probs.device)
        # :: (b, q, v) -> (q, b, v) -> (b,)
        losses = functional.ctc_loss(log_probs.transpose(0, 1), targets, positions, lengths, reduction="none")
        return -losses.clamp_max(1e4)

    def indices(self, text: str) -> list[int]:
        """Class of each kana.

        Raises:
            ValueError: A character that the recogniser does not write.
        """
        if unknown := sorted(set(text) - set(self.sizes.alphabet)):
            raise ValueError(f"this recogniser writes no {unknown} (in {text!r}); give transcripts in its kana")
        return [1 + self.sizes.alphabet.index(kana) for kana in text]

    def listen(
        self, waveforms: Sequence[Float[Tensor, " _"]], candidates: Sequence[Mapping[str, str]], batch_size: int = 64
    ) -> list[Hearing]:
        """Transcribe, and choose between the candidate readings of each utterance.

        Args:
            waveforms: Sound at the recogniser's sample rate.
            candidates: For each utterance, reading -> transcript of the whole utterance with it; may be empty.
            batch_size: Utterances heard together; changes nothing but the last bits of sums.
        """
        hearings: dict[int, Hearing] = {}
        for rows in batches_by_length(waveforms, batch_size):
            batch = self._listen([waveforms[row] for row in rows], [candidates[row] for row in rows])
            hearings |= dict(zip(rows, batch, strict=True))
        return [hearings[row] for row in range(len(waveforms))]

    def transcribe(self, waveforms: Sequence[Float[Tensor, " _"]]) -> list[str]:
        """Greedy transcripts."""
        return [hearing.transcript for hearing in self.listen(waveforms, [{}] * len(waveforms))]

    def _listen(self, waveforms: list[Tensor], candidates: list[Mapping[str, str]]) -> list[Hearing]:
        # One position at least: a moment of silence more is heard as nothing.
        shortest = 2 * self.sizes.hop_samples
        padded = [functional.pad(clip, (0, max(0, shortest - len(clip)))) for clip in waveforms]
        log_probs, positions = self(*log_mel_batch(self.features, padded))
        rows = torch.tensor([row for row, readings in enumerate(candidates) for _ in readings], dtype=torch.long)
        texts = [text for readings in candidates for text in readings.values()]
        scores = iter(self.likelihoods(log_probs[rows], positions[rows], texts).tolist() if texts else [])
        hearings = []
        for row, readings in enumerate(candidates):
            own = log_probs[row, : positions[row]]
            transcript, likelihoods = self._greedy(own), {reading: next(scores) for reading in readings}
            share = self._share(own, readings, likelihoods)
            hearings.append(Hearing(transcript, likelihoods, said_reading(transcript, readings, likelihoods), share))
        return hearings

    def _greedy(self, log_probs: Float[Tensor, "q v"]) -> str:
        best = log_probs.argmax(-1).unique_consecutive().tolist()
        return "".join(self.sizes.alphabet[index - 1] for index in best if index)

    def _share(
        self, log_probs: Float[Tensor, "q v"], readings: Mapping[str, str], likelihoods: Mapping[str, float]
    ) -> tuple[float, float] | None:
        """Span of the likelier reading: from where its first kana is recognised to where the kana after it is."""
        choice = _likelier(likelihoods)
        text = readings.get(choice, "")
        place = text.find(choice) if choice else -1
        if place < 0 or len(log_probs) < 2 * len(text):
            return None
        path = torchaudio.functional.forced_align(log_probs[None], torch.tensor([self.indices(text)]))[0][0]
        spikes = _spikes(path.tolist())
        # CTC recognises a kana well inside it, and in the embedded corpus inside its first speech token.
        end = spikes[place + len(choice)] if place + len(choice) < len(text) else len(log_probs)
        return spikes[place] / len(log_probs), end / len(log_probs)

    def save(self, directory: Path) -> None:
        """Write `config.json` and `model.safetensors` (half precision); the directory appears whole or not at all."""
        write_model(directory, self.sizes, half_parameters(self))

    @classmethod
    def load(cls, directory: str | Path) -> KanaRecogniser:
        """The recogniser stored in `directory` (`demo:audio/judge` names an embedded one), for inference."""
        path = find_model(directory, "model.judge")
        recogniser = cls(read_sizes(path, RecogniserSizes))
        load_parameters(recogniser, path)
        return recogniser.eval().requires_grad_(False)


class CTCJudge(Judge):
    """Judges utterances with a kana recogniser.

    The reading is the candidate with the highest exact CTC log-likelihood. A forced choice always chooses, so it is
    checked against the free transcript: where the transcript does not spell the chosen reading in its place, the
    verdict is neither.

    Args:
        directory: directory of a recogniser; `demo:audio/judge` tests, `demo:audio/labeller` labels training data.
        batch_size: utterances judged together; does not change the result.
    """

    def __init__(self, directory: str = "demo:audio/judge", batch_size: int = 64) -> None:
        super().__init__()
        self.recogniser, self.batch_size = KanaRecogniser.load(directory), batch_size

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        """One verdict per utterance.

        Args:
            samples: utterances with waveforms.
            expected: Transcripts in kana, without spaces.
        """
        waveforms = [self._waveform(utterance) for utterance in samples]
        candidates = [{key: text for key, text in one.transcripts.items() if key} for one in expected]
        hearings = self.recogniser.listen(waveforms, candidates, self.batch_size)
        return [verdict(hearing, one) for hearing, one in zip(hearings, expected, strict=True)]

    def _waveform(self, utterance: SpeechSample) -> Tensor:
        if utterance.waveform is None:
            raise ValueError("the CTC judge listens: it needs waveforms, so the recipe must name a vocoder")
        rate = self.recogniser.sizes.sample_rate
        if utterance.sample_rate == rate:
            return utterance.waveform
        return torchaudio.functional.resample(utterance.waveform, utterance.sample_rate, rate)


def verdict(hearing: Hearing, expected: Expected) -> Verdict:
    """Compare what was heard with what should have been said."""
    errors = {reading: error_rate(text, hearing.transcript) for reading, text in expected.transcripts.items()}
    if not errors:
        raise ValueError(f"no transcript is given for {expected.text!r}, so it cannot be judged")
    right = {reading: rate for reading, rate in errors.items() if not hearing.likelihoods or reading in expected.right}
    margin = float("nan")
    if 0 < len(right) < len(hearing.likelihoods):
        wrong = max(score for reading, score in hearing.likelihoods.items() if reading not in right)
        margin = max(hearing.likelihoods[reading] for reading in right) - wrong
    if not hearing.likelihoods:
        reading = Reading.UNMARKED
    elif hearing.said is None:
        reading = Reading.NEITHER
    else:
        reading = Reading.RIGHT if hearing.said in expected.right else Reading.WRONG
    best = min((right or errors).values())
    return Verdict(hearing.transcript, reading, best, min(errors.values()), margin, hearing.share)


def said_reading(transcript: str, readings: Mapping[str, str], likelihoods: Mapping[str, float]) -> str | None:
    """The likelier reading if the transcript spells it in its place, else None.

    The transcript is aligned with the likelier candidate by fewest edits; each kana of the reading must stand
    there, with nothing in between.

    Args:
        transcript: What was heard.
        readings: Reading -> transcript of the whole sentence with it.
        likelihoods: Reading -> log-likelihood.

    Example:
        >>> readings = {"からい": "なべわからいよ", "つらい": "なべわつらいよ"}
        >>> said_reading("なべつらいよ", readings, {"からい": -9.0, "つらい": -2.0})
        'つらい'
        >>> said_reading("なべわくらいよ", readings, {"からい": -4.0, "つらい": -5.0}) is None
        True
    """
    choice = _likelier(likelihoods)
    start = readings[choice].find(choice) if choice else -1
    if start < 0:
        return None
    position = 0
    for expected, heard in align(list(readings[choice]), list(transcript), _GAP):
        # What is inserted before the first kana belongs to the word before.
        inside = start + (expected == _GAP) <= position < start + len(choice)
        if inside and expected != heard:
            return None
        position += expected != _GAP
    return choice


def _likelier(likelihoods: Mapping[str, float]) -> str:
    return max(likelihoods, key=likelihoods.__getitem__, default="")


def _spikes(path: Sequence[int]) -> list[int]:
    """Position at which each class of an alignment begins; the blank, 0, is none."""
    return [place for place, (before, now) in enumerate(zip([0, *path], path, strict=False)) if now and now != before]
