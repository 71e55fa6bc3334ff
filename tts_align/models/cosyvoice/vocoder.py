# SPDX-License-Identifier: Apache-2.0
"""From speech tokens to sound: the flow and the HiFT vocoder of a CosyVoice directory, in a voice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.flow_records import FlowPrompt
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.cosyvoice.directory import ModelDirectory, load_state
from tts_align.models.cosyvoice.flow.model import load_flow
from tts_align.models.cosyvoice.hift.model import HiFT, load_hift
from tts_align.models.cosyvoice.voice_rows import STORED, read_voice_rows
from tts_align.models.cosyvoice.voices import Voice, Voices, open_voices
from tts_align.models.flow.token_flow import TokenFlow

SILENT = frozenset({1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323})
"""Speech tokens of version 3's tokenizer that stand for silence and breath."""
LONGEST_SILENCE = 5
SAMPLE_RATE = 24_000


class CosyVoiceVocoder(Vocoder):
    """The flow and vocoder of a CosyVoice2 or Fun-CosyVoice3 directory.

    What is drawn for an utterance depends on its tokens and voice only, so its sound is the same in any batch, up to
    the last bits of float32 sums. The weights are read when something is first spoken.

    Args:
        directory: model directory as downloaded; that of the policy by default.
        voices: JSONL file of voices to speak in; that of the policy by default.
        steps: steps of the flow's solver.
        guidance: strength of the classifier-free guidance.
        batch_size: utterances that the flow makes together; does not change them.
    """

    def __init__(
        self,
        directory: str | None = None,
        voices: str | None = None,
        steps: int = 10,
        guidance: float = 0.7,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        if min(steps, batch_size) < 1 or guidance < 0:
            raise ValueError(
                "model.vocoder: steps and batch_size must be at least 1 and guidance not negative, got "
                f"{steps}, {batch_size} and {guidance}"
            )
        self.sample_rate, self.steps, self.guidance, self.batch_size = SAMPLE_RATE, steps, guidance, batch_size
        self.source: ModelDirectory | None = None
        self.voices_path = voices
        self.register_buffer("device_of", torch.zeros(0), persistent=False)  # its weights are read later
        # Outside the module's own tree, so that nothing is read, saved or moved before somebody listens.
        self._nets: list[tuple[TokenFlow, HiFT]] = []
        if directory is not None:
            self._open(directory)

    def _open(self, directory: str) -> None:
        source = self.source = ModelDirectory.find(directory)
        self.sample_rate = source.frames.sample_rate

    def bind(self, policy: CodecLM) -> None:
        """Take over directory and voices from the policy, where the recipe gives none."""
        if self.source is None:
            own = getattr(policy, "source", None)
            if not isinstance(own, ModelDirectory):
                raise ValueError("model.vocoder.directory is missing: the policy is not a CosyVoice directory")
            self._open(str(own.path))
        if self.voices_path is None:
            self.voices_path = getattr(policy, "voices_path", None)

    @property
    def directory(self) -> ModelDirectory:
        """Where its weights are."""
        if self.source is None:
            raise ValueError("model.vocoder.directory is missing: name a CosyVoice directory")
        return self.source

    @property
    def voices(self) -> Voices:
        """The voices it can speak in."""
        return open_voices(str(self.directory.path), self.voices_path)

    def use_voices(self, path: Path) -> None:
        """Speak in the voices of a file of recordings, beside those of the directory."""
        self.voices_path = str(path)

    def nets(self) -> tuple[TokenFlow, HiFT]:
        """Flow and vocoder, on this module's device."""
        device = self.own_device
        if not self._nets:
            source = self.directory
            flow = load_flow(source.family, load_state(source.file("flow.pt")), source.config)
            hift = load_hift(source.family, load_state(source.file("hift.pt")), source.config)
            hift.fold()
            self._nets.append((flow.eval().requires_grad_(False), hift.eval().requires_grad_(False)))
        flow, hift = self._nets[0]
        return flow.to(device), hift.to(device)

    def digest(self) -> str:
        """Digest of its files and settings; a file counts by its size and time, as hashing gigabytes takes long."""
        source = self.directory
        names = ("flow.pt", "hift.pt", f"{source.family}.yaml", STORED, "campplus.onnx")
        files = [source.path / name for name in names] + sorted(source.path.glob("speech_tokenizer_*.onnx"))
        if self.voices_path is not None:
            rows = read_voice_rows(Path(self.voices_path))
            files += [Path(self.voices_path), *(row.audio for row in rows)]
        stats = [(path.name, path.stat()) for path in files if path.is_file()]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        settings = repr((facts, self.steps, self.guidance))
        return hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices of the directory and of the recipe's file, if there are any."""
        return tuple(self.voices) or None

    def check_speakers(self, speakers: Iterable[str]) -> None:
        """Raise ``ValueError`` for a voice that is not there, or whose recording cannot be used."""
        for name in speakers:
            self.voices[name]

    def speak(self, speech: Sequence[Int[Tensor, " _"]], speakers: Sequence[str]) -> list[Float[Tensor, " _"]]:
        """Waveforms of token sequences; none gives an empty one.

        Args:
            speech: speech tokens of each utterance.
            speakers: name of the voice of each.

        Raises:
            ValueError: a voice that is not there.
        """
        voices = {name: self.voices[name] for name in dict.fromkeys(speakers)}
        waveforms = [torch.zeros(0)] * len(speech)
        thin = self.directory.family == "cosyvoice3"
        speech_tokens = [thin_silence(row.long()) if thin else row.long() for row in speech]
        order = sorted(
            (row for row in range(len(speech_tokens)) if len(speech_tokens[row])),
            key=lambda row: len(speech_tokens[row]),
        )
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            mels = self._mels([speech_tokens[row] for row in rows], [voices[speakers[row]] for row in rows])
            for row, mel in zip(rows, mels, strict=True):
                waveforms[row] = self._wave(mel, speech_tokens[row], speakers[row])
        return waveforms

    def _mels(self, speech_tokens: Sequence[Tensor], voices: Sequence[Voice]) -> list[Tensor]:
        """Log-mel (m, f) of each utterance, without its prompt."""
        flow, _ = self.nets()
        tokens, token_mask = _padded(speech_tokens)
        empty = torch.zeros(0, flow.mel_channels)
        prompts = _padded([torch.tensor(voice.speech, dtype=torch.long) for voice in voices])
        mels = _padded([empty if voice.mel is None else voice.mel.to(self.own_device) for voice in voices])
        vectors = torch.stack([voice.vector for voice in voices]).to(self.own_device)
        prompt = FlowPrompt(*prompts, *mels) if prompts[0].shape[1] else None
        made = flow.sample(tokens, token_mask, vectors, prompt, steps=self.steps, guidance=self.guidance)
        return [mel[real].T for mel, real in zip(made.mel, made.mask, strict=True)]

    def _wave(self, mel: Float[Tensor, "m f"], speech_tokens: Tensor, speaker: str) -> Float[Tensor, " _"]:
        """One at a time: version 2's filter looks ahead, so padding would be heard at the end."""
        _, hift = self.nets()
        name = f"{speaker}\0{speech_tokens.tolist()}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big")
        generator = torch.Generator().manual_seed(seed)
        return hift(mel[None], generator=generator)[0].float()


def thin_silence(
    speech_tokens: Int[Tensor, " _"], silent: frozenset[int] = SILENT, longest: int = LONGEST_SILENCE
) -> Int[Tensor, " _"]:
    """Speech tokens without what lies beyond the first ``longest`` of a run of silent ones.

    >>> thin_silence(torch.tensor([7, 1, 2, 1, 7]), longest=2).tolist()
    [7, 1, 2, 7]
    """
    kept: list[int] = []
    run = 0
    for code in speech_tokens.tolist():
        run = run + 1 if code in silent else 0
        if run <= longest:
            kept.append(code)
    return torch.tensor(kept, dtype=torch.long)


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Bool[Tensor, "b s"]]:
    """Rows padded on the right, and what is real of them."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
