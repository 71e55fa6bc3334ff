# SPDX-License-Identifier: Apache-2.0
"""CosyVoice2's flow, and how the flow of either family is made from its published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tts_align.models.base.layout import Family
from tts_align.models.cosyvoice.flow.conformer import UpsamplingConformer
from tts_align.models.cosyvoice.flow.unet import CausalUNet
from tts_align.models.cosyvoice.plain_yaml import section_of
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.flow.token_flow import Given, TokenFlow

_UNET = "decoder.estimator."
_HEAD_CHANNELS, _CHUNK_TOKENS, _CHUNK_FRAMES, _FRAMES_PER_TOKEN = 64, 25, 50, 2


@dataclass(frozen=True)
class UNetFlowSizes:
    """Sizes of a flow; the defaults are those of CosyVoice2.

    Args:
        codebook_size: size of the codebook.
        mel_channels: channels of the mel.
        speaker_channels: numbers of a speaker vector.
        token_channels: channels of a token's vector.
        frames_per_token: mel frames that one token stands for.
        lookahead: speech tokens beyond a token that its frames depend on.
        width: width of the encoder.
        heads: its attention heads.
        feed_forward: width inside its feed-forward parts.
        blocks: blocks of the encoder at token rate.
        up_blocks: blocks of the encoder at frame rate.
        chunk_tokens: speech tokens of a chunk, which the streaming encoder does not look beyond.
        unet_width: width of the U-Net.
        unet_time_width: width of the time as the U-Net is told of it.
        unet_blocks: transformer blocks at each of its levels.
        unet_mid_levels: levels between its way down and its way up.
        unet_heads: its attention heads.
        unet_head_channels: channels of each attention head of the U-Net.
        unet_feed_forward: width inside its feed-forward parts.
        chunk_frames: frames of a chunk, which the streaming U-Net does not look beyond.
        dropout: share of dropout in the encoder, in training only.
        position_dropout: share of dropout of the encoder's scaled inputs and positions, in training only.
        attention_dropout: share of dropout of the encoder's attention weights, in training only.
        unet_dropout: share of dropout in the U-Net, in training only.
    """

    codebook_size: int = 6561
    mel_channels: int = 80
    speaker_channels: int = 192
    token_channels: int = 512
    frames_per_token: int = _FRAMES_PER_TOKEN
    lookahead: int = 3
    width: int = 512
    heads: int = 8
    feed_forward: int = 2048
    blocks: int = 6
    up_blocks: int = 4
    chunk_tokens: int = _CHUNK_TOKENS
    unet_width: int = 256
    unet_time_width: int = 1024
    unet_blocks: int = 4
    unet_mid_levels: int = 12
    unet_heads: int = 8
    unet_head_channels: int = _HEAD_CHANNELS
    unet_feed_forward: int = 1024
    chunk_frames: int = _CHUNK_FRAMES
    dropout: float = 0.1
    position_dropout: float = 0.1
    attention_dropout: float = 0.1
    unet_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        faults = []
        if self.width % self.heads or self.width % 2:
            faults.append(f"width must be even and a multiple of heads, got {self.width} and {self.heads}")
        for name in ("chunk_tokens", "chunk_frames"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("dropout", "position_dropout", "attention_dropout", "unet_dropout"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> UNetFlowSizes:
        """Sizes of published weights.

        Args:
            state: a flow's state dict, which tells most of them by its shapes.
            config: the model's yaml as plain data; of interest is what stands under ``flow`` about the U-Net's heads,
                the chunks and dropout. Without it they are taken to be as published.

        Raises:
            ValueError: these are not the weights of such a flow, or the yaml belongs to others.
        """
        try:
            return cls(**_told(state), **_said(state, config))
        except KeyError as error:
            raise ValueError(f"these are not the weights of a U-Net flow: no {error.args[0]}") from None


def _told(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the shapes of the weights say."""
    codebook_size, token_channels = state["input_embedding.weight"].shape
    mel_channels, speaker_channels = state["spk_embed_affine_layer.weight"].shape
    feed_forward, width = state["encoder.encoders.0.feed_forward.w_1.weight"].shape
    down = f"{_UNET}down_blocks.0.1."
    unet_feed_forward, unet_width = state[f"{down}0.ff.net.0.proj.weight"].shape
    return {
        "codebook_size": codebook_size,
        "mel_channels": mel_channels,
        "speaker_channels": speaker_channels,
        "token_channels": token_channels,
        "frames_per_token": state["encoder.up_layer.conv.weight"].shape[2] // 2,
        "lookahead": state["encoder.pre_lookahead_layer.conv1.weight"].shape[2] - 1,
        "width": width,
        "heads": state["encoder.encoders.0.self_attn.pos_bias_u"].shape[0],
        "feed_forward": feed_forward,
        "blocks": _count(state, "encoder.encoders."),
        "up_blocks": _count(state, "encoder.up_encoders."),
        "unet_width": unet_width,
        "unet_time_width": state[f"{_UNET}time_mlp.linear_1.weight"].shape[0],
        "unet_blocks": _count(state, down),
        "unet_mid_levels": _count(state, f"{_UNET}mid_blocks."),
        "unet_feed_forward": unet_feed_forward,
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered entries a list of modules has."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return 1 + max((int(number) for number in numbers), default=-1)


def _said(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What only the yaml can say."""
    encoder = section_of(config, "flow", "encoder", needs=["static_chunk_size"])
    unet = section_of(config, "flow", "decoder", "estimator", needs=["static_chunk_size"])
    inner = state[f"{_UNET}down_blocks.0.1.0.attn1.to_q.weight"].shape[0]
    heads, channels = unet.get("num_heads"), unet.get("attention_head_dim")
    if channels is None:
        channels = _HEAD_CHANNELS if heads is None else inner // heads
    heads = inner // channels if heads is None else heads
    if heads * channels != inner:
        raise ValueError(
            f"expected num_heads * attention_head_dim = {inner}, as wide as the U-Net's attention, "
            f"got {heads} * {channels} in flow.decoder.estimator of the yaml: does it belong to these weights?"
        )
    return {
        "unet_heads": heads,
        "unet_head_channels": channels,
        "chunk_tokens": encoder.get("static_chunk_size", _CHUNK_TOKENS),
        "chunk_frames": unet.get("static_chunk_size", _CHUNK_FRAMES),
        "dropout": encoder.get("dropout_rate", 0.1),
        "position_dropout": encoder.get("positional_dropout_rate", 0.1),
        "attention_dropout": encoder.get("attention_dropout_rate", 0.1),
        "unet_dropout": unet.get("dropout", 0.0),
    }


class UNetFlow(TokenFlow):
    """Flow matching with a conformer over tokens and a causal U-Net over frames: the flow of CosyVoice2, at any size.

    In the published code, frames of an utterance in a batch depend on how much padding follows it. Here they do not;
    see :mod:`tts_align.models.cosyvoice.flow.conformer`.

    Args:
        sizes: sizes of the encoder and the U-Net.
    """

    def __init__(self, sizes: UNetFlowSizes | None = None) -> None:
        sizes = sizes or UNetFlowSizes()
        super().__init__(
            codebook_size=sizes.codebook_size,
            mel_channels=sizes.mel_channels,
            embedding_channels=sizes.token_channels,
            speaker_channels=sizes.speaker_channels,
            frames_per_token=sizes.frames_per_token,
            lookahead=sizes.lookahead,
        )
        self.sizes = sizes
        self.encoder = UpsamplingConformer(
            channels=sizes.token_channels,
            width=sizes.width,
            heads=sizes.heads,
            hidden=sizes.feed_forward,
            blocks=sizes.blocks,
            up_blocks=sizes.up_blocks,
            lookahead=sizes.lookahead,
            chunk=sizes.chunk_tokens,
            stride=sizes.frames_per_token,
            dropout=sizes.dropout,
            position_dropout=sizes.position_dropout,
            attention_dropout=sizes.attention_dropout,
        )
        self.encoder_proj = nn.Linear(sizes.width, sizes.mel_channels)
        unet = CausalUNet(
            mel=sizes.mel_channels,
            channels=sizes.unet_width,
            time_channels=sizes.unet_time_width,
            blocks=sizes.unet_blocks,
            mid_blocks=sizes.unet_mid_levels,
            heads=sizes.unet_heads,
            head_channels=sizes.unet_head_channels,
            hidden=sizes.unet_feed_forward,
            chunk=sizes.chunk_frames,
            dropout=sizes.unet_dropout,
        )
        self.decoder = nn.ModuleDict({"estimator": unet})

    def condition(
        self,
        vectors: Float[Tensor, "b s e"],
        mask: Bool[Tensor, "b s"],
        streaming: bool = False,
        final: bool = True,
        voice: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b f m"]:
        """What the encoder makes of the tokens, in mel channels."""
        return self.encoder_proj(self.encoder(vectors, mask, streaming, final))

    def velocity(
        self,
        noisy: Float[Tensor, "b f m"],
        time: Float[Tensor, " b"],
        given: Given,
        mask: Bool[Tensor, "b f"],
        streaming: bool = False,
    ) -> Float[Tensor, "b f m"]:
        """See :class:`~tts_align.models.cosyvoice.flow.unet.CausalUNet`."""
        return self.decoder["estimator"](noisy, given.mean, given.speaker, given.known, time, mask, streaming)


def load_flow(family: Family, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> TokenFlow:
    """A flow with published weights, in float32 and in evaluation mode, as ``load_hift`` and ``load_lm`` give theirs.

    Args:
        family: ``cosyvoice2`` for the U-Net, ``cosyvoice3`` for the diffusion transformer.
        state: its state dict; copied.
        config: the model's yaml as plain data, for what shapes do not tell.

    Raises:
        ValueError: these are not exactly the weights of such a flow; the message names what is missing or too much.
    """
    with torch.device("meta"):
        flow = _empty_dit(state, config) if family == "cosyvoice3" else UNetFlow(UNetFlowSizes.of(state, config))
    own = flow.state_dict()
    faults = [f"missing: {_listed(own.keys() - state.keys())}"] if own.keys() - state.keys() else []
    faults += [f"unexpected: {_listed(state.keys() - own.keys())}"] if state.keys() - own.keys() else []
    odd = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    faults += [f"of other shapes: {_listed(odd)}"] if odd else []
    if faults:
        raise ValueError(f"these are not the weights of a {family} flow; {'; '.join(faults)}")
    # Copied, so that training does not write into what was read.
    flow.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in state.items()}, assign=True)
    return flow.eval()


def _empty_dit(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> DiTFlow:
    flow = section_of(config, "flow", needs=["token_mel_ratio"])
    estimator = section_of(config, "flow", "decoder", "estimator", needs=["static_chunk_size"])
    sizes = DiTFlowSizes.of(
        state,
        chunk_frames=estimator.get("static_chunk_size", _CHUNK_FRAMES),
        frames_per_token=flow.get("token_mel_ratio", _FRAMES_PER_TOKEN),
    )
    return DiTFlow(dataclasses.replace(sizes, dropout=estimator.get("dropout", sizes.dropout)))


def _listed(keys: set[str]) -> str:
    """The first few of them, and how many more there are."""
    first = sorted(keys)[:5]
    return ", ".join(first) + (f" and {len(keys) - len(first)} more" if len(keys) > len(first) else "")
