# SPDX-License-Identifier: Apache-2.0
"""Speech tokens -> mel by flow matching: the base of all token-to-mel models, and what their networks share.

The path from noise to mel and the solver are in :mod:`tts_align.models.flow.ode`.

Axes: ``b`` utterances, ``s`` tokens, ``f`` frames, ``m`` mel channels, ``e`` channels of token vectors, ``c`` channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tts_align.batch import Record
from tts_align.models.base.flow import FlowHead
from tts_align.models.base.flow_records import FlowDraws, FlowLoss, FlowPrompt, MelFrames
from tts_align.models.flow.ode import Field, cosine_grid, euler, fixed_noise, path, path_velocity


def chunk_mask(mask: Bool[Tensor, "b f"], chunk: int | None = None) -> Bool[Tensor, "b f f"]:
    """Which positions (last axis) each position sees: the real ones, up to the end of its own chunk.

    In a row without a real position each sees itself: attention over nothing would be no number.

    Args:
        mask: which positions are real.
        chunk: positions of a chunk; without it all real positions are seen.
    """
    length = mask.shape[1]
    visible = mask[:, None].expand(-1, length, -1)
    position = torch.arange(length, device=mask.device)
    if chunk is not None:
        visible = visible & (position < (position[:, None] // chunk + 1) * chunk)
    return visible | (~visible.any(-1, keepdim=True) & (position == position[:, None]))


def first_frames(
    mel: Float[Tensor, "b f m"], mask: Bool[Tensor, "b f"], count: Int[Tensor, " b"]
) -> Float[Tensor, "b f m"]:
    """The first ``count`` frames of each utterance, as far as they are real; 0 elsewhere."""
    first = torch.arange(mel.shape[1], device=mel.device) < count[:, None]
    return torch.where((first & mask)[..., None], mel, 0.0)


def pack_left(
    vectors: Float[Tensor, "b s e"], mask: Bool[Tensor, "b s"]
) -> tuple[Float[Tensor, "b q e"], Bool[Tensor, "b q"]]:
    """Move the real positions of each row to its beginning, in their order, and cut off what nobody needs."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1])), mask.gather(1, order)


def time_sinusoids(time: Float[Tensor, " b"], channels: int) -> Float[Tensor, "b c"]:
    """Sines, then cosines, of 1000 t at channels / 2 frequencies from 1 down to 1 / 10000, in float32 at least."""
    # At angles up to 1000 the last bit of a float32 frequency shows (6e-5), and processors disagree on it: in float64.
    step = -math.log(10000) / (channels // 2 - 1)
    frequency = torch.exp(torch.arange(channels // 2, device=time.device, dtype=torch.float64) * step)
    angle = 1000 * time.double()[:, None] * frequency  # :: (b, 1) * (c / 2) -> (b, c / 2)
    return torch.cat((angle.sin(), angle.cos()), -1).to(torch.promote_types(time.dtype, torch.float32))


class Lookahead(nn.Module):
    """Two convolutions, the first of which reads ahead, added to what they read.

    Args:
        channels: outside.
        hidden: channels inside.
        tokens: how many tokens ahead the first one reads.
    """

    def __init__(self, channels: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.conv1 = nn.Conv1d(channels, hidden, tokens + 1)
        self.conv2 = nn.Conv1d(hidden, channels, 3)

    def forward(self, vectors: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Behind the last token there is zero."""
        # :: (b, s, c) -> (b, c, s), and back at the end
        ahead = functional.leaky_relu(self.conv1(functional.pad(vectors.transpose(1, 2), (0, self.tokens))))
        return self.conv2(functional.pad(ahead, (2, 0))).transpose(1, 2) + vectors


@dataclass(frozen=True)
class Given(Record):
    """What the velocity is conditioned on.

    Args:
        mean: what the tokens say of each frame.
        speaker: projected speaker vector.
        known: mel of the frames that are given, 0 elsewhere.
    """

    mean: Float[Tensor, "b f m"]
    speaker: Float[Tensor, "b m"]
    known: Float[Tensor, "b f m"]

    def kept(self, keep: Bool[Tensor, " b"]) -> Given:
        """Zero for the rows that are not kept."""
        frames = keep[:, None, None]
        return Given(self.mean * frames, self.speaker * keep[:, None], self.known * frames)

    def with_nothing(self) -> Given:
        """Twice as many rows: these, then as many that are told nothing."""
        return Given(*(torch.cat((x, torch.zeros_like(x))) for x in (self.mean, self.speaker, self.known)))


class TokenFlow(FlowHead):
    """Speech tokens and a speaker -> mel: what all flow-matching models of tokens have in common.

    A final class adds :meth:`condition` and :meth:`velocity`. Tokens are padded on the right. What an utterance becomes
    depends on itself alone, whatever is beside it in a batch.

    Args:
        codebook_size: size of the codebook.
        mel_channels: mel channels.
        embedding_channels: channels of the token vectors.
        speaker_channels: channels of the speaker vectors.
        frames_per_token: mel frames that a token lasts.
        lookahead: tokens beyond each token on which its frames depend.
    """

    looks_up = True

    def __init__(
        self,
        codebook_size: int,
        mel_channels: int,
        embedding_channels: int,
        speaker_channels: int,
        frames_per_token: int = 2,
        lookahead: int = 3,
    ) -> None:
        super().__init__()
        sizes = codebook_size, mel_channels, embedding_channels, speaker_channels, frames_per_token
        if min(sizes) < 1 or lookahead < 0:
            raise ValueError("sizes of a flow model must be at least 1, its look-ahead at least 0")
        self.codebook_size, self.mel_channels, self.speaker_channels = codebook_size, mel_channels, speaker_channels
        self.frames_per_token, self.lookahead = frames_per_token, lookahead
        self.input_embedding = nn.Embedding(codebook_size, embedding_channels)
        self.spk_embed_affine_layer = nn.Linear(speaker_channels, mel_channels)

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all speech tokens."""
        return self.input_embedding

    @abstractmethod
    def condition(
        self,
        vectors: Float[Tensor, "b s e"],
        mask: Bool[Tensor, "b s"],
        streaming: bool = False,
        final: bool = True,
        voice: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b f m"]:
        """What the tokens say of each frame.

        Args:
            vectors: embedded tokens, 0 at padding.
            mask: which tokens are real.
            streaming: attention, if there is any, does not look beyond its own chunk.
            final: whether the utterance ends here. If not, the last ``lookahead`` tokens of each utterance are only
                looked at, and f is (s - lookahead) * frames_per_token.
            voice: projected speaker vectors, for models that ask them here, too.
        """

    def error_scale(self, time: Float[Tensor, " b"]) -> Float[Tensor, " b"] | None:
        """Factor of the velocity's error in the loss at each time; ``None`` for 1."""
        return None

    @abstractmethod
    def velocity(
        self,
        noisy: Float[Tensor, "b f m"],
        time: Float[Tensor, " b"],
        given: Given,
        mask: Bool[Tensor, "b f"],
        streaming: bool = False,
    ) -> Float[Tensor, "b f m"]:
        """Velocity of frames on the way from noise to mel; what it is at padding does not matter.

        Args:
            noisy: the frames.
            time: how far on the way, 0 noise to 1 mel.
            given: what is known of them.
            mask: which are real.
            streaming: attention does not look beyond a frame's own chunk.
        """

    def embed(self, tokens: Int[Tensor, "*s"] | Float[Tensor, "*s v"]) -> Float[Tensor, "*s e"]:
        """Vectors of tokens.

        Args:
            tokens: ids (negative ones count as 0), or mixtures of tokens, to which gradients flow. A one-hot mixture
                gives exactly the vector of its id.
        """
        if not tokens.is_floating_point():
            return self.input_embedding(tokens.clamp(min=0))
        if tokens.shape[-1] != self.codebook_size:
            raise ValueError(
                f"expected mixtures of the flow model's {self.codebook_size} speech tokens, got {tokens.shape[-1]}: "
                "model.flow and the tokenizer must share one codebook"
            )
        table = self.input_embedding.weight
        return tokens.to(table.dtype) @ table

    def project_speaker(self, speaker: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """Direction of the speaker vectors, in mel channels."""
        return self.spk_embed_affine_layer(functional.normalize(speaker, dim=1))

    def frame_mask(self, mask: Bool[Tensor, "b s"], final: bool = True) -> Bool[Tensor, "b f"]:
        """Which frames are real, given which tokens are; see :meth:`condition`."""
        return (mask if final else mask[:, self.lookahead :]).repeat_interleave(self.frames_per_token, 1)

    def paired(self, token_mask: Bool[Tensor, "b s"], mel_mask: Bool[Tensor, "b f"]) -> Bool[Tensor, "b q"]:
        """Which tokens have all of their frames: q columns, what is behind them in either is to be cut off.

        Tokens and mel of one recording may differ in length by a token, since they come from different frame rates.
        """
        step = self.frames_per_token
        columns = min(token_mask.shape[1], mel_mask.shape[1] // step)
        return token_mask[:, :columns] & mel_mask[:, step - 1 : columns * step : step]

    def loss(
        self,
        tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"],
        token_mask: Bool[Tensor, "b s"],
        mel: Float[Tensor, "b f m"],
        mel_mask: Bool[Tensor, "b f"],
        speaker: Float[Tensor, "b d"],
        draws: FlowDraws,
    ) -> FlowLoss:
        """Squared error of the velocity (see :meth:`error_scale`) at random times.

        Args:
            tokens: ids or mixtures; gradients reach the latter.
            token_mask: which are real.
            mel: the same utterances as mel; what has no counterpart among the tokens is left out, and conversely.
            mel_mask: which of its frames are real.
            speaker: vectors of the speakers.
            draws: everything random.
        """
        return self.loss_embedded(self.embed(tokens), token_mask, mel, mel_mask, speaker, draws)

    def loss_embedded(
        self,
        vectors: Float[Tensor, "b s e"],
        token_mask: Bool[Tensor, "b s"],
        mel: Float[Tensor, "b f m"],
        mel_mask: Bool[Tensor, "b f"],
        speaker: Float[Tensor, "b d"],
        draws: FlowDraws,
    ) -> FlowLoss:
        """As :meth:`loss`, of vectors made with :meth:`embed`: flat mixtures (tokens, tokens) need never be padded."""
        paired = self.paired(token_mask, mel_mask)
        mask = self.frame_mask(paired)
        length = mask.shape[1]
        if not 0 < length <= draws.noise.shape[1]:
            raise ValueError(
                f"expected at least one token of {self.frames_per_token} frames and noise for all {length} "
                f"frames, got mel of {mel.shape[1]} frames and noise of {draws.noise.shape[1]}"
            )
        target, noise, voice = mel[:, :length], draws.noise[:, :length], self.project_speaker(speaker)
        known = vectors[:, : paired.shape[1]] * paired[..., None]
        given = Given(
            mean=self.condition(known, paired, draws.streaming, True, voice),
            speaker=voice,
            known=first_frames(target, mask, draws.prompt),
        ).kept(draws.keep)
        noisy = path(noise, target, draws.time)
        velocity = self.velocity(noisy, draws.time, given, mask, draws.streaming)
        error = torch.where(mask[..., None], velocity - path_velocity(noise, target), 0.0)
        if (scale := self.error_scale(draws.time)) is not None:
            error = error * scale[:, None, None]
        error = error.to(torch.promote_types(error.dtype, torch.float32))
        return FlowLoss(error.square().sum(), mask.sum().to(error) * self.mel_channels)

    @torch.no_grad()
    def sample(
        self,
        tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"],
        token_mask: Bool[Tensor, "b s"],
        speaker: Float[Tensor, "b d"],
        prompt: FlowPrompt | None = None,
        steps: int = 10,
        guidance: float = 0.7,
        streaming: bool = False,
        final: bool = True,
        noise: Float[Tensor, "b f m"] | None = None,
    ) -> MelFrames:
        """Mel of utterances; the model should be in evaluation mode.

        Args:
            tokens: ids or mixtures.
            token_mask: which are real.
            speaker: vectors of the speakers.
            prompt: recordings to continue; their frames are not returned.
            steps: of the solver, from noise to mel.
            guidance: g in ``(1 + g) v - g v_0``, where v_0 is the velocity without conditions.
            streaming: attention does not look beyond its own chunk.
            final: whether the utterances end here. If not, the last ``lookahead`` tokens give no frames.
            noise: to start from, prompts first; may be too long. By default :func:`fixed_noise` for every utterance.
        """
        vectors, before = self.embed(tokens) * token_mask[..., None], token_mask[:, :0]
        if prompt is not None:
            before = self.paired(prompt.token_mask, prompt.mel_mask)
            vectors = torch.cat((self.embed(prompt.tokens[:, : before.shape[1]]) * before[..., None], vectors), 1)
        vectors, mask = pack_left(vectors, torch.cat((before, token_mask), 1))
        ahead = 0 if final else self.lookahead
        if mask.shape[1] <= ahead:
            raise ValueError(f"expected more than {ahead} tokens to make mel of, got {mask.shape[1]}")
        voice = self.project_speaker(speaker)
        mean, mask = self.condition(vectors, mask, streaming, final, voice), self.frame_mask(mask, final)
        known, shown = torch.zeros_like(mean), self.frame_mask(before)
        if prompt is not None:
            mel = first_frames(prompt.mel[:, : shown.shape[1]], shown, shown.sum(1))
            known = functional.pad(mel, (0, 0, 0, mean.shape[1] - mel.shape[1])).to(mean)
        if noise is None:
            noise = fixed_noise(mean.shape[1], self.mel_channels).to(mean).expand_as(mean)
        field = self.guided(Given(mean, voice, known), mask, guidance, streaming)
        mel = euler(field, noise[:, : mean.shape[1]], cosine_grid(steps, mean.device))
        return _cut(mel, mask, shown.sum(1), max(tokens.shape[1] - ahead, 0) * self.frames_per_token)

    def guided(self, given: Given, mask: Bool[Tensor, "b f"], guidance: float, streaming: bool) -> Field:
        """Velocity with classifier-free guidance, whose parts are computed in one batch of 2 b; one part without."""
        if not guidance:
            return lambda state, time: self.velocity(state, time, given, mask, streaming)
        both, twice = given.with_nothing(), torch.cat((mask, mask))

        def field(state: Float[Tensor, "b f m"], time: Float[Tensor, " b"]) -> Float[Tensor, "b f m"]:
            velocity = self.velocity(torch.cat((state, state)), torch.cat((time, time)), both, twice, streaming)
            told, untold = velocity.chunk(2)
            return (1 + guidance) * told - guidance * untold

        return field


def _cut(mel: Float[Tensor, "b f m"], mask: Bool[Tensor, "b f"], start: Int[Tensor, " b"], width: int) -> MelFrames:
    """Frames of each utterance from its ``start`` on."""
    index = start[:, None] + torch.arange(width, device=mel.device)
    inside, index = index < mel.shape[1], index.clamp(max=mel.shape[1] - 1)
    mask = mask.gather(1, index) & inside
    return MelFrames(mel.gather(1, index[..., None].expand(-1, -1, mel.shape[-1])) * mask[..., None], mask)
