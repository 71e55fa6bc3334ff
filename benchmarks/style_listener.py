# SPDX-License-Identifier: Apache-2.0
"""A held-out listener of manner and quality: hears sound, trained apart from every reward model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tts_align.cli.demo.training import Schedule, endless_batches, log_mels, optimise, padded_rows
from tts_align.data.demo.audio import Clip, speed_jitter
from tts_align.data.demo.manner import MANNERS, QUALITIES, Style
from tts_align.models.codec.fsq import MaskedBlock
from tts_align.models.codec.log_mel import LogMel

SCHEDULE = Schedule(250, batch_size=32, learning_rate=2e-3)
SCORES = tuple(sorted(QUALITIES))
NAMES = tuple(MANNERS)


class StyleListener(nn.Module):
    """Log-mel -> manner and quality: two convolution blocks, averaged over time.

    Args:
        width: of the vectors.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.features = LogMel(mel_channels=64)
        self.stem = nn.Conv1d(64, width, 5, padding=2, stride=2)
        self.blocks = nn.ModuleList(MaskedBlock(width, 5) for _ in range(2))
        self.manner, self.quality = nn.Linear(width, len(NAMES)), nn.Linear(width, len(SCORES))

    def forward(
        self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b manners"], Float[Tensor, "b qualities"]]:
        """Scores of each manner and of each quality, worst first."""
        clean = log_mel * (torch.arange(log_mel.shape[1]) < frames[:, None])[..., None]
        hidden = self.stem(clean.transpose(1, 2)).transpose(1, 2)  # :: (b, f, m) -> (b, f / 2, h)
        mask: Bool[Tensor, "b f2"] = torch.arange(hidden.shape[1]) < (-(-frames // 2))[:, None]
        for block in self.blocks:
            hidden = block(hidden, mask)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return self.manner(pooled), self.quality(pooled)

    @torch.no_grad()
    def hear(self, audio: Sequence[Float[Tensor, " _"]], batch_size: int = 64) -> list[Style]:
        """What manner and quality each sound has."""
        found: list[Style] = []
        for start in range(0, len(audio), batch_size):
            some = [Clip(sound, "", "") for sound in audio[start : start + batch_size]]
            manners, qualities = self(*padded_rows(log_mels(self.features, some)))
            pairs = zip(manners.argmax(-1).tolist(), qualities.argmax(-1).tolist(), strict=True)
            found += [Style(NAMES[manner], SCORES[quality]) for manner, quality in pairs]
        return found


def train_listener(clips: Sequence[Clip], styles: Sequence[Style], seed: int = 0) -> StyleListener:
    """Train on sound whose style is known, a little faster or slower, louder or softer."""
    torch.manual_seed(seed)
    listener = StyleListener()
    rows = log_mels(listener.features, speed_jitter(clips, f"listener {seed}", share=0.02))
    manners = torch.tensor([NAMES.index(style.manner) for style in styles])
    qualities = torch.tensor([SCORES.index(style.quality) for style in styles])
    batches = endless_batches([len(row) for row in rows], SCHEDULE.batch_size, random.Random(seed))

    def loss() -> Tensor:
        chosen = next(batches)
        manner, quality = listener(*padded_rows([rows[row] for row in chosen]))
        return functional.cross_entropy(manner, manners[chosen]) + functional.cross_entropy(quality, qualities[chosen])

    optimise(listener, loss, SCHEDULE, "listener")
    return listener.requires_grad_(False)


def kept_listener(path: Path, clips: Sequence[Clip], styles: Sequence[Style]) -> StyleListener:
    """The listener stored in a file, trained first if there is none."""
    if path.exists():
        listener = StyleListener()
        listener.load_state_dict(load_file(path))
        return listener.eval().requires_grad_(False)
    listener = train_listener(clips, styles)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in listener.state_dict().items()}, path)
    return listener
