# SPDX-License-Identifier: Apache-2.0
"""A diffusion transformer (arXiv 2212.09748) over mel frames, and the token-to-mel model around it: CosyVoice 3's.

Its modules carry the published names, so that published weights load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tts_align.models.flow.dit_layers import DiTBlock, InputEmbedding, Modulation, Rotary, TimeEmbedding, modulate
from tts_align.models.flow.prior import MelPrior, PriorSizes
from tts_align.models.flow.token_flow import Given, Lookahead, TokenFlow, chunk_mask
from tts_align.utils.files import read_config
from tts_align.utils.model_directory import CONFIG, check_values, find_model, read_weights_of, write_model
from tts_align.utils.readers import reading

_ESTIMATOR = "decoder.estimator"
_NEAR_END = 1e-3
"""Nearer to the end of the way than this, velocities are no longer what is left of it divided by the time left."""


@dataclass(frozen=True)
class DiTFlowSizes:
    """Sizes of a token-to-mel model with a diffusion transformer; the defaults are the published ones.

    Args:
        codebook_size: size of the codebook.
        mel_channels: mel channels; token vectors have as many.
        speaker_channels: channels of the speaker vectors.
        frames_per_token: mel frames that a token lasts.
        lookahead: tokens beyond each token on which its frames depend.
        lookahead_channels: channels inside the layer that looks ahead.
        dim: width of the transformer.
        depth: number of blocks.
        heads: attention heads.
        head_dim: channels of each head, even.
        ff_mult: width inside the feed-forward layers, as a multiple of ``dim``.
        time_channels: sinusoids of the time, even.
        position_kernel: frames that each of the two convolutions before the blocks reads.
        position_groups: their groups.
        chunk_frames: frames of a chunk, which streaming attention does not look beyond.
        dropout: share of dropout behind attention and inside feed-forward layers, in training only.
        patch_frames: frames of one position of the transformer; must divide frames_per_token and chunk_frames.
        upsampling: way in which a token becomes frames: repeat, or learned (each frame knows which of its token's it
            is; starts as repeat). Not with a prior, which has its own.
        predicts: output of the transformer: velocity (the published model), or the mel at the end of the way, from
            which the velocity follows and whose squared error is then the loss.
        prior: sizes of a deterministic decoder whose mel the transformer is told and corrects, from 0 at first; it
            takes the place of the layer that looks ahead, and its blocks say how far ahead tokens depend.
    """

    codebook_size: int = 6561
    mel_channels: int = 80
    speaker_channels: int = 192
    frames_per_token: int = 2
    lookahead: int = 3
    lookahead_channels: int = 1024
    dim: int = 1024
    depth: int = 22
    heads: int = 16
    head_dim: int = 64
    ff_mult: int = 2
    time_channels: int = 256
    position_kernel: int = 31
    position_groups: int = 16
    chunk_frames: int = 50
    dropout: float = 0.1
    patch_frames: int = 1
    upsampling: Literal["repeat", "learned"] = "repeat"
    predicts: Literal["velocity", "mel"] = "velocity"
    prior: PriorSizes | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that do not go together."""
        patch = self.patch_frames
        if patch < 1 or self.frames_per_token % patch or (patch > 1 and self.chunk_frames % patch):
            raise ValueError(
                f"patch_frames must divide frames_per_token and chunk_frames, got {patch}, {self.frames_per_token} and "
                f"{self.chunk_frames}"
            )
        if self.prior is not None and (self.predicts, self.upsampling) != ("mel", "repeat"):
            raise ValueError(
                "a prior is refined as mel and upsamples by itself: set predicts: mel and leave upsampling out"
            )
        if self.dim % self.position_groups:
            raise ValueError(f"dim must be a multiple of position_groups, got {self.dim} and {self.position_groups}")
        if self.head_dim % 2 or self.time_channels % 2 or self.time_channels < 4:
            raise ValueError(
                f"head_dim must be even, time_channels even and at least 4, got {self.head_dim}, {self.time_channels}"
            )
        if self.chunk_frames < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "expected at least 1 for chunk_frames and a dropout in [0, 1), "
                f"got {self.chunk_frames} and {self.dropout}"
            )

    @classmethod
    def read(cls, directory: Path) -> DiTFlowSizes:
        """Sizes that the ``config.json`` of a directory holds."""
        values = read_config(directory / CONFIG)
        prior = values.pop("prior", None)
        with reading(directory / CONFIG, "sizes of a DiTFlow", "is it the directory of another kind of model?"):
            check_values(directory, values, cls)
            return cls(**values, prior=None if prior is None else PriorSizes(**prior))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], chunk_frames: int = 50, frames_per_token: int = 2) -> DiTFlowSizes:
        """Sizes of published weights.

        Args:
            state: the weights by name.
            chunk_frames: what the weights do not tell; 50 in the published model.
            frames_per_token: what the weights do not tell either; 2 in the published model.

        Raises:
            ValueError: they belong to another kind of model.
        """

        def shape(name: str) -> torch.Size:
            if name not in state:
                raise ValueError(f"these are not the weights of a DiT flow: no {name}")
            return state[name].shape

        first = f"{_ESTIMATOR}.transformer_blocks.0"
        codebook_size, mel_channels = shape("input_embedding.weight")
        lookahead_channels, _, lookahead_kernel = shape("pre_lookahead_layer.conv1.weight")
        dim, time_channels = shape(f"{_ESTIMATOR}.time_embed.time_mlp.0.weight")
        _, per_group, position_kernel = shape(f"{_ESTIMATOR}.input_embed.conv_pos_embed.conv1.0.weight")
        head_dim = 2 * shape(f"{_ESTIMATOR}.rotary_embed.inv_freq")[0]
        return cls(
            codebook_size=codebook_size,
            mel_channels=mel_channels,
            speaker_channels=shape("spk_embed_affine_layer.weight")[1],
            frames_per_token=frames_per_token,
            lookahead=lookahead_kernel - 1,
            lookahead_channels=lookahead_channels,
            dim=dim,
            depth=len({key.split(".")[3] for key in state if key.startswith(f"{_ESTIMATOR}.transformer_blocks.")}),
            heads=shape(f"{first}.attn.to_q.weight")[0] // head_dim,
            head_dim=head_dim,
            ff_mult=shape(f"{first}.ff.ff.0.0.weight")[0] // dim,
            time_channels=time_channels,
            position_kernel=position_kernel,
            position_groups=dim // per_group,
            chunk_frames=chunk_frames,
        )


class DiT(nn.Module):
    """Velocity of noisy mel frames, given what they should become.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: DiTFlowSizes) -> None:
        super().__init__()
        self.chunk, self.patch = sizes.chunk_frames // sizes.patch_frames, sizes.patch_frames
        self.time_embed = TimeEmbedding(sizes.time_channels, sizes.dim)
        self.input_embed = InputEmbedding(
            (3 * self.patch + 1) * sizes.mel_channels, sizes.dim, sizes.position_kernel, sizes.position_groups
        )
        self.rotary_embed = Rotary(sizes.head_dim)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(sizes.dim, sizes.heads, sizes.head_dim, sizes.ff_mult * sizes.dim, sizes.dropout)
            for _ in range(sizes.depth)
        )
        self.norm_out = Modulation(sizes.dim, 2)
        self.proj_out = nn.Linear(sizes.dim, self.patch * sizes.mel_channels)
        if sizes.prior is not None:  # at first the prior's mel is left as it is
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        noisy: Float[Tensor, "b f m"],
        mean: Float[Tensor, "b f m"],
        speaker: Float[Tensor, "b m"],
        known: Float[Tensor, "b f m"],
        time: Float[Tensor, " b"],
        mask: Bool[Tensor, "b f"],
        streaming: bool = False,
    ) -> Float[Tensor, "b f m"]:
        """Velocity, or what the sizes say it predicts; it means nothing at padding.

        Args:
            noisy: frames on the way from noise to mel.
            mean: what the speech tokens say of each frame.
            speaker: projected speaker vector.
            known: mel of the frames that are given, 0 elsewhere.
            time: how far on the way, 0 noise to 1 mel.
            mask: which frames are real.
            streaming: attention does not look beyond a frame's own chunk.
        """
        # :: (b, positions * patch, m) -> (b, positions, patch * m)
        noisy, known, mean = (frames.unflatten(1, (-1, self.patch)).flatten(2) for frames in (noisy, known, mean))
        mask = mask[:, :: self.patch]
        visible = chunk_mask(mask, self.chunk if streaming else None)
        embedded = self.time_embed(time)
        angle = self.rotary_embed(noisy.shape[1])
        voice = speaker[:, None].expand(-1, noisy.shape[1], -1)
        vectors = self.input_embed(torch.cat((noisy, known, mean, voice), -1))
        for block in self.transformer_blocks:
            vectors = block(vectors, embedded, angle, visible, mask)
        scale, shift = self.norm_out(embedded)
        made = self.proj_out(modulate(vectors, scale, shift))
        return made.unflatten(-1, (self.patch, -1)).flatten(1, 2)  # :: (b, positions, patch * m) -> (b, f, m)


class DiTFlow(TokenFlow):
    """Speech tokens -> mel by a diffusion transformer: CosyVoice 3's, and variants of it for small models.

    Args:
        sizes: sizes of a new model; the published ones by default.
        directory: directory of a trained model, with ``config.json`` and ``model.safetensors``, in the place of sizes;
            ``demo:audio/flow`` names the embedded one.
    """

    def __init__(self, sizes: DiTFlowSizes | None = None, directory: str | None = None) -> None:
        if sizes is not None and directory is not None:
            raise ValueError("model.flow: `sizes` have no effect beside `directory`, which has its own; leave one out")
        path = None if directory is None else find_model(directory, "model.flow")
        if path is not None:
            sizes = DiTFlowSizes.read(path)
        sizes = DiTFlowSizes() if sizes is None else sizes
        prior = sizes.prior
        super().__init__(
            codebook_size=sizes.codebook_size,
            mel_channels=sizes.mel_channels,
            embedding_channels=sizes.mel_channels if prior is None else prior.embedding_channels,
            speaker_channels=sizes.speaker_channels,
            frames_per_token=sizes.frames_per_token,
            lookahead=sizes.lookahead if prior is None else prior.lookahead,
        )
        self.sizes, self.directory = sizes, path
        self.prior: MelPrior | None = None
        self.upsample: nn.Linear | None = None
        if prior is None:
            self.pre_lookahead_layer = Lookahead(sizes.mel_channels, sizes.lookahead_channels, sizes.lookahead)
        else:
            self.prior = MelPrior(prior, sizes.mel_channels, sizes.frames_per_token)
        if sizes.upsampling == "learned":
            self.upsample = nn.Linear(sizes.mel_channels, sizes.frames_per_token * sizes.mel_channels)
            with torch.no_grad():
                self.upsample.weight.copy_(torch.eye(sizes.mel_channels).repeat(sizes.frames_per_token, 1))
                self.upsample.bias.zero_()
        self.decoder = nn.ModuleDict({"estimator": DiT(sizes)})
        if path is not None:
            self.load_state_dict(read_weights_of(path))

    def condition(
        self,
        vectors: Float[Tensor, "b s e"],
        mask: Bool[Tensor, "b s"],
        streaming: bool = False,
        final: bool = True,
        voice: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b f m"]:
        """Tokens that have seen a little of the future, each as its frames; there is no attention."""
        if self.prior is not None:
            if voice is None:
                raise ValueError("a prior is told the voice: give the projected speaker vectors, too")
            made = self.prior(vectors, mask, voice)
            return made if final else made[:, : max(made.shape[1] - self.lookahead * self.frames_per_token, 0)]
        hidden = self.pre_lookahead_layer(vectors)
        if not final:
            hidden = hidden[:, : hidden.shape[1] - self.lookahead]
        if self.upsample is None:
            return hidden.repeat_interleave(self.frames_per_token, 1)
        # :: (b, s, frames_per_token * m) -> (b, s * frames_per_token, m)
        return self.upsample(hidden).reshape(len(hidden), -1, self.mel_channels)

    def velocity(
        self,
        noisy: Float[Tensor, "b f m"],
        time: Float[Tensor, " b"],
        given: Given,
        mask: Bool[Tensor, "b f"],
        streaming: bool = False,
    ) -> Float[Tensor, "b f m"]:
        """See :class:`DiT`."""
        made = self.decoder["estimator"](noisy, given.mean, given.speaker, given.known, time, mask, streaming)
        if self.sizes.predicts == "velocity":
            return made
        mel = made if self.prior is None else given.mean + made
        return (mel - noisy) / _left(time)[:, None, None]

    def error_scale(self, time: Float[Tensor, " b"]) -> Float[Tensor, " b"] | None:
        """What makes the error of a velocity that of the mel, where that is what is predicted."""
        return None if self.sizes.predicts == "velocity" else _left(time)

    def save(self, directory: Path, half: bool = False) -> None:
        """Write sizes and weights; the directory appears whole or not at all.

        Args:
            directory: what is written.
            half: weights in half precision.
        """
        weights = {key: value.half() if half else value for key, value in self.state_dict().items()}
        write_model(directory, self.sizes, weights)


def _left(time: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Time left until the mel is reached, never quite none."""
    return (1 - time).clamp(min=_NEAR_END)
