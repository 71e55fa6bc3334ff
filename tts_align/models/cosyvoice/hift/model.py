# SPDX-License-Identifier: Apache-2.0
"""HiFT, the vocoders of CosyVoice2 and Fun-CosyVoice3: log-mel -> waveform.

A network predicts the fundamental frequency, from which an excitation of harmonics and noise is made; a second network,
given the log-mel, filters it and writes the short-time spectrum of the waveform (HiFTNet, arXiv 2309.09493). The
CosyVoice2 one sees the whole utterance, the Fun-CosyVoice3 one a few frames ahead only. Names and shapes of the
parameters are those of the published ``hift.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tts_align.models.base.layout import Family
from tts_align.models.cosyvoice.hift.config import HiFTSizes, plain_names
from tts_align.models.cosyvoice.hift.f0 import F0Predictor
from tts_align.models.cosyvoice.hift.layers import PaddedConv1d, RepeatConv1d, ResidualBlock, fold_norms, normed
from tts_align.models.cosyvoice.hift.source import Source

# Largest magnitude of a bin of the spectrum that the filter may write.
_LOUDEST = 100.0


class HiFT(nn.Module):
    """A HiFT vocoder; ``hift(mel)`` speaks, and the three steps may be taken one by one.

    The global random generator is never used: noise is given, drawn from a given generator, or drawn from a seed of
    its own, so that the same log-mel always sounds the same.

    Args:
        sizes: sizes.
    """

    window: Tensor

    def __init__(self, sizes: HiFTSizes) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.f0_predictor = F0Predictor(
            s.mel_channels, s.f0_channels, s.f0_layers, s.f0_kernel, s.f0_look_ahead, s.causal
        )
        self.m_source = Source(
            s.harmonics,
            s.sample_rate,
            s.frame_samples,
            s.sine_amplitude,
            s.noise_std,
            s.voiced_threshold,
            staircase=s.causal,
            uniform_noise=s.causal,
        )
        if s.causal:
            first = PaddedConv1d(s.mel_channels, s.base_channels, s.look_ahead + 1, right=s.look_ahead)
        else:
            first = PaddedConv1d.same(s.mel_channels, s.base_channels, s.pre_kernel)
        self.conv_pre = normed(first)
        self._add_stages()
        self.conv_post = normed(PaddedConv1d.same(self._width(-1), s.fft_samples + 2, s.post_kernel, causal=s.causal))
        self.register_buffer("window", torch.hann_window(s.fft_samples), persistent=False)

    def _width(self, stage: int) -> int:
        """Channels behind a stage."""
        return self.sizes.base_channels // 2 ** (range(len(self.sizes.upsample_rates))[stage] + 1)

    def _add_stages(self) -> None:
        s = self.sizes
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        left = s.frame_spectra  # by which the excitation's spectrum is finer than the signal of this stage
        for stage, (rate, kernel) in enumerate(zip(s.upsample_rates, s.upsample_kernels, strict=True)):
            width, left = self._width(stage), left // rate
            if s.causal:
                up: nn.Module = RepeatConv1d(2 * width, width, kernel, rate)
            else:
                up = nn.ConvTranspose1d(2 * width, width, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(normed(up))
            self.source_downs.append(_down(s.fft_samples + 2, width, left, s.causal))
            self.source_resblocks.append(
                ResidualBlock(width, s.source_kernels[stage], s.source_dilations[stage], s.causal)
            )
            for block, dilations in zip(s.resblock_kernels, s.resblock_dilations, strict=True):
                self.resblocks.append(ResidualBlock(width, block, dilations, s.causal))

    def fold(self) -> HiFT:
        """Compute every weight from its gain and direction once, for inference; ``state_dict`` changes its names.

        Those of a predictor that computes in double precision are merged, and kept, in it.
        """
        if self.sizes.causal:
            self.f0_predictor.double()
        fold_norms(self)
        return self

    def forward(
        self,
        mel: Float[Tensor, "b m f"],
        noise: Float[Tensor, "#b time h"] | None = None,
        generator: torch.Generator | None = None,
        cache: Float[Tensor, "b cached"] | None = None,
        finalize: bool = True,
    ) -> Float[Tensor, "b out_time"]:
        """Speak, always in the precision of the weights.

        Args:
            mel: log-mel of rows of one length.
            noise: noise of the excitation, as :meth:`source` takes it.
            generator: where noise is drawn from if none is given.
            cache: excitation of the first samples, see :meth:`source`.
            finalize: whether ``mel`` is complete. If not (``cosyvoice3`` only), as many frames fewer are spoken as
                the vocoder looks ahead.

        Returns:
            Samples within ``±audio_limit``; ``frame_samples`` for each frame.
        """
        if finalize and mel.shape[-1] == 0:
            return mel.new_zeros(len(mel), 0)
        with torch.autocast(mel.device.type, enabled=False):
            mel = mel.to(self.m_source.l_linear.weight.dtype)
            return self.decode(mel, self.source(self.f0(mel, finalize), noise, generator, cache), finalize)

    def f0(self, mel: Float[Tensor, "b m in_f"], finalize: bool = True) -> Float[Tensor, "b f"]:
        """Fundamental frequency in hertz; without ``finalize`` the last ``f0_look_ahead`` frames get none."""
        self._check(mel.shape[-1], finalize)
        return self.f0_predictor.predict(mel, finalize)

    def source(
        self,
        f0: Float[Tensor, "b f"],
        noise: Float[Tensor, "#b time h"] | None = None,
        generator: torch.Generator | None = None,
        cache: Float[Tensor, "b cached"] | None = None,
    ) -> Float[Tensor, "b time"]:
        """Excitation of every sample.

        Args:
            f0: fundamental frequency.
            noise: for every sample and harmonic, standard normal (``cosyvoice2``) or uniform in [0, 1)
                (``cosyvoice3``); one row serves all rows of the batch.
            generator: where noise is drawn from if none is given; ``None``: a seed of the vocoder's own.
            cache: excitation of an earlier call that replaces the first samples, so that the frames spoken twice at
                the seam of two pieces sound the same (``cosyvoice2``; the other family's calls agree by themselves).
        """
        if noise is not None and generator is not None:
            raise ValueError("give either noise or a generator to draw it from, not both")
        if cache is not None and self.sizes.causal:
            raise ValueError("a cache of the excitation is for cosyvoice2 only; give cosyvoice3 all frames so far")
        if noise is None:
            samples = f0.shape[1] * self.sizes.frame_samples
            noise = self.m_source.noise(f0.shape[0], samples, generator).to(f0)
        source = self.m_source(f0, noise)
        return source if cache is None else torch.cat([cache, source[:, cache.shape[1] :]], dim=1)

    def spectrum(self, source: Float[Tensor, "b time"]) -> Float[Tensor, "b q n"]:
        """Short Fourier transform of the excitation: real parts, then imaginary parts."""
        bins = torch.stft(
            source, self.sizes.fft_samples, self.sizes.hop_samples, window=self.window, return_complex=True
        )
        return torch.cat([bins.real, bins.imag], dim=1)

    def decode(
        self, mel: Float[Tensor, "b m f"], source: Float[Tensor, "b time"], finalize: bool = True
    ) -> Float[Tensor, "b out_time"]:
        """Filter an excitation.

        Args:
            mel: log-mel.
            source: excitation of every frame, without ``finalize`` of all but the last ``f0_look_ahead``.
            finalize: whether ``mel`` is complete.
        """
        s = self.sizes
        self._check(mel.shape[-1], finalize)
        frames = mel.shape[-1] - (0 if finalize else s.f0_look_ahead)
        if source.shape[1] != frames * s.frame_samples:
            raise ValueError(
                f"expected an excitation of {frames * s.frame_samples} samples, {s.frame_samples} for each of "
                f"{frames} frames, got {source.shape[1]}"
            )
        spectrum = self.spectrum(source)
        if not finalize:
            spectrum = spectrum[..., : (frames - s.look_ahead) * s.frame_spectra + 1]
        wav = self._waveform(self._filter(self.conv_pre(mel[..., :frames], finalize), spectrum))
        # The end of what is not final would change with the next frame.
        return wav if finalize else wav[:, : -s.frame_samples]

    def _filter(self, hidden: Float[Tensor, "b c f"], spectrum: Float[Tensor, "b q n"]) -> Float[Tensor, "b q n"]:
        blocks = len(self.sizes.resblock_kernels)
        last = len(self.ups) - 1
        for stage, up in enumerate(self.ups):
            hidden = up(F.leaky_relu(hidden, self.sizes.leaky_slope))
            if stage == last:  # windows are centred, so there is one more than the stages make
                hidden = F.pad(hidden, (1, 0), mode="reflect")
            hidden = hidden + self.source_resblocks[stage](self.source_downs[stage](spectrum))
            parallel = self.resblocks[stage * blocks : (stage + 1) * blocks]
            hidden = torch.stack([block(hidden) for block in parallel]).mean(0)
        return self.conv_post(F.leaky_relu(hidden))

    def _waveform(self, hidden: Float[Tensor, "b q n"]) -> Float[Tensor, "b time"]:
        s = self.sizes
        magnitude, phase = hidden.chunk(2, dim=1)
        bins = torch.polar(magnitude.exp().clamp(max=_LOUDEST), phase.sin())
        wav = torch.istft(bins, s.fft_samples, s.hop_samples, window=self.window)
        return wav.clamp(-s.audio_limit, s.audio_limit)

    def _check(self, frames: int, finalize: bool) -> None:
        if finalize:
            return
        if not self.sizes.causal:
            raise ValueError("only a vocoder of cosyvoice3 can speak before the end: set finalize to True")
        ahead = self.sizes.f0_look_ahead + self.sizes.look_ahead + 1
        if frames <= ahead:
            raise ValueError(f"without finalize the vocoder looks {ahead} frames ahead: give more than {frames} frames")


def _down(bins: int, width: int, rate: int, causal: bool) -> PaddedConv1d:
    """Bring the excitation's spectrum down to the rate of a stage."""
    if rate == 1:
        return PaddedConv1d(bins, width, 1)
    if causal:
        return PaddedConv1d(bins, width, 2 * rate, rate, left=rate - 1)
    return PaddedConv1d(bins, width, 2 * rate, rate, left=rate // 2, right=rate // 2)


def load_hift(family: Family, state: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> HiFT:
    """Build the vocoder of a published file, in evaluation mode.

    Args:
        family: of which family it is to be.
        state: what ``hift.pt`` or a file of its training holds; every tensor must have its place.
        config: the model's yaml as a plain mapping, see :meth:`HiFTSizes.of`.
    """
    state = plain_names(state)
    sizes = HiFTSizes.of(state, config)
    if sizes.family != family:
        raise ValueError(f"expected a vocoder of {family}, but these weights have the shapes of {sizes.family}")
    with torch.random.fork_rng(devices=[]):  # initial values are drawn and then replaced
        hift = HiFT(sizes)
    expected = {name: tuple(value.shape) for name, value in hift.state_dict().items()}
    wrong = [f"missing {name}" for name in expected.keys() - state.keys()]
    wrong += [f"unknown {name}" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name} of shape {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        raise ValueError(f"the weights do not make a HiFT of {family}: {'; '.join(sorted(wrong))}")
    hift.load_state_dict(state)
    return hift.eval()
