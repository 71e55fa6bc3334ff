# SPDX-License-Identifier: Apache-2.0
"""Speech tokens -> waveform through the flow model that is being trained, and Griffin-Lim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
import torchaudio
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.device import evaluation_mode
from tts_align.models.base.flow import FlowHead
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.log_mel import LogMel, batches_by_length
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.codec.vocoder import sound_of
from tts_align.models.flow.token_flow import TokenFlow
from tts_align.utils.weights import weights_digest


class FlowVocoder(Vocoder):
    """Lets the recipe's own flow and tokenizer be heard: speech tokens -> mel by flow matching -> Griffin-Lim.

    The flow must make the mel that the tokenizer reads: a :class:`~tts_align.models.codec.mel_fsq.MelFSQ`.

    Args:
        steps: steps of the flow's solver.
        guidance: strength of the classifier-free guidance.
        iterations: rounds of Griffin-Lim.
        batch_size: utterances made together. It changes the mel by the last bits of float32 sums only; Griffin-Lim
            makes more of them, where next to nothing sounds.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("speak", "log_mel")

    def __init__(self, steps: int = 10, guidance: float = 0.7, iterations: int = 8, batch_size: int = 32) -> None:
        super().__init__()
        if min(steps, iterations, batch_size) < 1 or guidance < 0:
            raise ValueError("model.vocoder: steps, iterations and batch_size must be at least 1, guidance at least 0")
        self.steps, self.guidance, self.iterations, self.batch_size = steps, guidance, iterations, batch_size
        # Outside the module's own tree: they are trained and saved elsewhere.
        self._models: tuple[TokenFlow, LogMel] | None = None
        self.voices: tuple[str, ...] = ()

    def attach(self, flow: FlowHead, tokenizer: TokenizerHead, voices: Sequence[str]) -> None:
        """Speak with this flow."""
        if not isinstance(tokenizer, MelFSQ) or flow.mel_channels != tokenizer.sizes.mel_channels:
            raise ValueError(
                "FlowVocoder needs a model.tokenizer of class MelFSQ and a model.flow of as many mel channels: choose "
                "another model.vocoder"
            )
        features = tokenizer.log_mel
        self._models, self.voices = (cast("TokenFlow", flow), features), tuple(voices)
        self.sample_rate = features.sample_rate
        self.griffin_lim = torchaudio.transforms.GriffinLim(
            n_fft=features.window_samples,
            n_iter=self.iterations,
            hop_length=features.hop_samples,
            power=1.0,
            rand_init=False,  # from zero phase the waveform is a function of the mel
        )

    @property
    def own_device(self) -> torch.device:
        """That of the flow."""
        return next(self.models[0].parameters()).device

    @property
    def models(self) -> tuple[TokenFlow, LogMel]:
        """Flow and features."""
        if self._models is None:
            raise ValueError(
                "FlowVocoder speaks with model.flow and model.tokenizer: use it with an objective that has"
            )
        return self._models

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices of the objective, once they are known."""
        return tuple(self.voices) or None

    def check_speakers(self, speakers: Iterable[str]) -> None:
        """Raise ``ValueError`` for a speaker that is not one of the objective's voices."""
        if unknown := sorted(set(speakers) - set(self.voices)):
            raise ValueError(f"unknown speakers {unknown}: the objective's voices are {list(self.voices)}")

    def digest(self) -> str:
        """Digest of the flow as it is now."""
        return weights_digest(self.models[0].state_dict())

    def speak(self, speech: Sequence[Int[Tensor, " _"]], speakers: Sequence[str]) -> list[Float[Tensor, " _"]]:
        """Waveforms of token sequences; none gives an empty waveform.

        Raises:
            ValueError: a speaker that is not one of the objective's voices.
        """
        features, waveforms = self.models[1], [torch.zeros(0)] * len(speech)
        self.check_speakers(speakers)
        for rows in batches_by_length(speech, self.batch_size):
            spoken = [row for row in rows if len(speech[row])]
            if not spoken:
                continue
            log_mel, frames = self.log_mel([speech[row] for row in spoken], [speakers[row] for row in spoken])
            sounds = sound_of(features, self.griffin_lim.to(log_mel.device), log_mel, frames)
            for row, waveform in zip(spoken, sounds, strict=True):
                waveforms[row] = waveform
        return waveforms

    def log_mel(
        self, speech: Sequence[Int[Tensor, " _"]], speakers: Sequence[str]
    ) -> tuple[Float[Tensor, "b f m"], Int[Tensor, " b"]]:
        """What the flow makes of token sequences, and the number of real frames of each."""
        flow = self.models[0]
        counts = torch.tensor([len(row) for row in speech])
        padded = pad_sequence([row.long() for row in speech], batch_first=True)
        mask = torch.arange(padded.shape[1]) < counts[:, None]
        places = torch.tensor([self.voices.index(name) for name in speakers])
        speaker = torch.nn.functional.one_hot(places, len(self.voices)).to(next(flow.parameters()).dtype)
        with evaluation_mode(flow):
            made = flow.sample(padded, mask, speaker, steps=self.steps, guidance=self.guidance)
        return made.mel, made.mask.sum(1)
