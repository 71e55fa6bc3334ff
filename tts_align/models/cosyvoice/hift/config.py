# SPDX-License-Identifier: Apache-2.0
"""Sizes of the HiFT vocoders, and how they are read from a published file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tts_align.models.base.layout import Family
from tts_align.models.cosyvoice.plain_yaml import section_of

_GAIN, _DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
# What files of adversarial training hold beside the vocoder.
_TRAINING = ("epoch", "step")


@dataclass(frozen=True)
class HiFTSizes:
    """Sizes of a HiFT vocoder; the defaults are those of the published models.

    Args:
        family: ``cosyvoice2`` sees past and future alike, ``cosyvoice3`` only a few frames ahead.
        mel_channels: mel channels.
        base_channels: width before the first upsampling; each halves it.
        harmonics: overtones of the excitation beside the fundamental.
        sample_rate: samples per second.
        sine_amplitude: of the excitation's sines.
        noise_std: factor of the excitation's noise in voiced stretches.
        voiced_threshold: hertz above which a frame is voiced.
        upsample_rates: factors of the upsampling stages.
        upsample_kernels: taps of the upsampling stages.
        fft_samples: window and length of the short Fourier transform at either end of the filter.
        hop_samples: samples between two of its windows.
        resblock_kernels: taps of the parallel residual blocks of each stage.
        resblock_dilations: dilations in each of them.
        source_kernels: taps of the residual block on the excitation, per stage.
        source_dilations: dilations in each of them.
        leaky_slope: of the activation before each upsampling.
        audio_limit: largest absolute value of a sample.
        pre_kernel: taps of the first convolution (``cosyvoice2``).
        post_kernel: taps of the last convolution.
        look_ahead: future frames that the first convolution sees (``cosyvoice3``).
        f0_channels: width of the predictor of the fundamental.
        f0_layers: its convolutions.
        f0_kernel: their taps.
        f0_look_ahead: future frames that the first of them sees (``cosyvoice3``).
    """

    family: Family = "cosyvoice2"
    mel_channels: int = 80
    base_channels: int = 512
    harmonics: int = 8
    sample_rate: int = 24000
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernels: tuple[int, ...] = (16, 11, 7)
    fft_samples: int = 16
    hop_samples: int = 4
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    source_kernels: tuple[int, ...] = (7, 7, 11)
    source_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    leaky_slope: float = 0.1
    audio_limit: float = 0.99
    pre_kernel: int = 7
    post_kernel: int = 7
    look_ahead: int = 4
    f0_channels: int = 512
    f0_layers: int = 5
    f0_kernel: int = 3
    f0_look_ahead: int = 3

    def __post_init__(self) -> None:
        """Check that the stages fit together."""
        stages = len(self.upsample_rates)
        for name in ("upsample_kernels", "source_kernels", "source_dilations"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"expected one entry of {name} for each of the {stages} upsample_rates, got {getattr(self, name)}"
                )
        if len(self.resblock_dilations) != len(self.resblock_kernels):
            raise ValueError(
                f"expected resblock_dilations for each of the {len(self.resblock_kernels)} resblock_kernels, "
                f"got {self.resblock_dilations}"
            )
        if self.base_channels % 2**stages:
            raise ValueError(f"base_channels must be divisible by {2**stages}, two per stage, got {self.base_channels}")
        if self.fft_samples % 2:
            raise ValueError(f"fft_samples must be even, got {self.fft_samples}")
        pairs = zip(self.upsample_rates, self.upsample_kernels, strict=True)
        if not self.causal and any(kernel < rate or (kernel - rate) % 2 for rate, kernel in pairs):
            raise ValueError(
                "each of upsample_kernels must exceed its upsample_rate by an even number, "
                f"got kernels {self.upsample_kernels} and rates {self.upsample_rates}"
            )

    @property
    def causal(self) -> bool:
        """Whether the vocoder can speak before it has heard everything."""
        return self.family == "cosyvoice3"

    @property
    def frame_spectra(self) -> int:
        """Windows of the short Fourier transform per mel frame."""
        return math.prod(self.upsample_rates)

    @property
    def frame_samples(self) -> int:
        """Samples per mel frame."""
        return self.frame_spectra * self.hop_samples

    @classmethod
    def of(cls, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> HiFTSizes:
        """Read the sizes of a published vocoder.

        Args:
            state: its tensors under their plain names (see :func:`plain_names`).
            config: the model's yaml as a plain mapping; of interest is what stands under ``hift``. Without it, what
                the weights do not tell is taken to be as published.
        """
        told, said = _told(state), _said(section_of(config, "hift", needs=_NOT_IN_WEIGHTS))
        wrong = [f"{name}: {said[name]} in the yaml, {told[name]} in the weights" for name in told.keys() & said.keys()
                 if said[name] != told[name]]  # fmt: skip
        if wrong:
            raise ValueError(f"the weights of the vocoder do not belong to its yaml: {'; '.join(sorted(wrong))}")
        known = {**said, **told}
        # Shapes tell the blocks but not their dilations.
        known.setdefault("resblock_dilations", ((1, 3, 5),) * len(known["resblock_kernels"]))
        known.setdefault("source_dilations", ((1, 3, 5),) * len(known["source_kernels"]))
        return cls(**known)


def _told(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of the weights say."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"the weights of the vocoder lack '{name}': expected a HiFT of CosyVoice2 or CosyVoice 3")
        return tuple(state[name].shape)

    def count(pattern: str) -> int:
        return next(i for i in range(len(state) + 1) if pattern.format(i) not in state)

    base, mel, pre = shape(f"conv_pre.{_DIRECTION}")
    # The gain of a transposed convolution has the inputs in front, that of a plain one the outputs.
    family: Family = "cosyvoice2" if shape(f"ups.0.{_GAIN}")[0] == base else "cosyvoice3"
    stages = count(f"ups.{{}}.{_DIRECTION}")
    blocks = count(f"resblocks.{{}}.convs1.0.{_DIRECTION}") // stages
    f0_channels, _, f0_first = shape(f"f0_predictor.condnet.0.{_DIRECTION}")
    outputs, _, post = shape(f"conv_post.{_DIRECTION}")
    ahead = {"look_ahead": pre - 1, "f0_look_ahead": f0_first - 1} if family == "cosyvoice3" else {"pre_kernel": pre}
    return {
        "family": family,
        "mel_channels": mel,
        "base_channels": base,
        "harmonics": shape("m_source.l_linear.weight")[1] - 1,
        "upsample_kernels": tuple(shape(f"ups.{i}.{_DIRECTION}")[2] for i in range(stages)),
        "fft_samples": outputs - 2,
        "resblock_kernels": tuple(shape(f"resblocks.{i}.convs1.0.{_DIRECTION}")[2] for i in range(blocks)),
        "source_kernels": tuple(shape(f"source_resblocks.{i}.convs1.0.{_DIRECTION}")[2] for i in range(stages)),
        "post_kernel": post,
        "f0_channels": f0_channels,
        "f0_layers": sum(f"f0_predictor.condnet.{2 * i}.bias" in state for i in range(len(state))),
        "f0_kernel": shape(f"f0_predictor.condnet.2.{_DIRECTION}")[2],
        **ahead,
    }


_NOT_IN_WEIGHTS = ("sampling_rate", "upsample_rates", "istft_params")
# Our names for the published constructor arguments, and what they hold.
_NAMES: dict[str, tuple[str, Any]] = {
    "in_channels": ("mel_channels", int),
    "base_channels": ("base_channels", int),
    "nb_harmonics": ("harmonics", int),
    "sampling_rate": ("sample_rate", int),
    "nsf_alpha": ("sine_amplitude", float),
    "nsf_sigma": ("noise_std", float),
    "nsf_voiced_threshold": ("voiced_threshold", float),
    "upsample_rates": ("upsample_rates", tuple),
    "upsample_kernel_sizes": ("upsample_kernels", tuple),
    "istft_params.n_fft": ("fft_samples", int),
    "istft_params.hop_len": ("hop_samples", int),
    "resblock_kernel_sizes": ("resblock_kernels", tuple),
    "resblock_dilation_sizes": ("resblock_dilations", lambda rows: tuple(map(tuple, rows))),
    "source_resblock_kernel_sizes": ("source_kernels", tuple),
    "source_resblock_dilation_sizes": ("source_dilations", lambda rows: tuple(map(tuple, rows))),
    "lrelu_slope": ("leaky_slope", float),
    "audio_limit": ("audio_limit", float),
    "conv_pre_look_right": ("look_ahead", int),
    "f0_predictor.cond_channels": ("f0_channels", int),
}


def _said(hift: Mapping[str, Any]) -> dict[str, Any]:
    """What the yaml says."""
    flat = dict(hift)
    for group in ("istft_params", "f0_predictor"):
        flat.update({f"{group}.{name}": value for name, value in (hift.get(group) or {}).items()})
    said = {}
    for name, (ours, kind) in _NAMES.items():
        if name not in flat:
            continue
        try:
            said[ours] = kind(flat[name])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"hift.{name} of the model's yaml must be a number or a list, got {flat[name]!r}"
            ) from error
    return said


def plain_names(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vocoder's tensors under the names of a published ``hift.pt``.

    Files of adversarial training put ``generator.`` in front and hold the discriminators and two counters as well;
    older ones write ``weight_g`` and ``weight_v`` for gain and direction.
    """
    plain = {}
    for name, value in state.items():
        if name in _TRAINING or name.startswith("discriminator."):
            continue
        name = name.removeprefix("generator.")
        for old, new in (("weight_g", _GAIN), ("weight_v", _DIRECTION)):
            if name.endswith(f".{old}"):
                name = name.removesuffix(old) + new
        plain[name] = value
    return plain
