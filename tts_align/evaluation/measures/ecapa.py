# SPDX-License-Identifier: Apache-2.0
"""The speaker encoder of the Seed scale: an ECAPA-TDNN head (arXiv 2005.07143) over the layers of a WavLM.

All sizes are read from the published checkpoint, ``wavlm_large_finetune.pth``, which holds the WavLM as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_LEAST_VARIANCE = 1e-9
_STRIDES = (5, 2, 2, 2, 2, 2, 2)
_FARTHEST = 800
"""What no weight shows of WavLM: strides of its convolutions, and the farthest distance between two frames in samples
of its table of positions."""


class Convolved(nn.Module):
    """Convolution, ReLU, normalisation over the batch's statistics of training, in this order."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=dilation * (kernel // 2))
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Float[Tensor, "b c f"]) -> Float[Tensor, "b k f"]:
        """Features of each frame."""
        return self.bn(F.relu(self.conv(x)))


class Scales(nn.Module):
    """Res2Net: each group of channels is convolved together with the result of the group before it."""

    def __init__(self, channels: int, groups: int, dilation: int) -> None:
        super().__init__()
        width = channels // groups
        self.steps = nn.ModuleList(Convolved(width, width, 3, dilation) for _ in range(groups - 1))

    def forward(self, x: Float[Tensor, "b c f"]) -> Float[Tensor, "b c f"]:
        """Features of each frame; the last group passes unchanged."""
        *groups, last = x.chunk(len(self.steps) + 1, dim=1)
        found: list[Tensor] = []
        for group, step in zip(groups, self.steps, strict=True):
            found.append(step(group + found[-1] if found else group))
        return torch.cat([*found, last], dim=1)


class Block(nn.Module):
    """Res2Net between two convolutions of one frame, channels weighted by what the whole utterance is like."""

    def __init__(self, channels: int, groups: int, dilation: int, squeezed: int) -> None:
        super().__init__()
        self.first, self.last = Convolved(channels, channels), Convolved(channels, channels)
        self.scales = Scales(channels, groups, dilation)
        self.squeeze, self.excite = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x: Float[Tensor, "b c f"]) -> Float[Tensor, "b c f"]:
        """Features of each frame, added to what came in."""
        y = self.last(self.scales(self.first(x)))
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean(-1)))))  # :: (b, c, f) -> (b, c)
        return x + y * weights[..., None]


class EcapaHead(nn.Module):
    """Vector of a voice from the layers of a WavLM.

    Args:
        layers: hidden states that are mixed, the input of the first layer included.
        inputs: channels of each.
        channels: in the three blocks.
        pooled: channels that are pooled over time.
        attention: channels of the attention that pools.
        squeezed: channels of the summary that weighs channels.
        outputs: numbers in the vector.
        groups: of channels in a block.
    """

    def __init__(
        self,
        layers: int,
        inputs: int,
        channels: int,
        pooled: int,
        attention: int,
        squeezed: int,
        outputs: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers))
        self.enter = Convolved(inputs, channels, 5)
        self.blocks = nn.ModuleList(Block(channels, groups, dilation, squeezed) for dilation in (2, 3, 4))
        self.join = nn.Conv1d(3 * channels, pooled, 1)
        self.attend, self.score = nn.Conv1d(pooled, attention, 1), nn.Conv1d(attention, pooled, 1)
        self.norm, self.out = nn.BatchNorm1d(2 * pooled), nn.Linear(2 * pooled, outputs)

    def forward(self, states: Float[Tensor, "l b f c"]) -> Float[Tensor, "b d"]:
        """Vectors, not normalised."""
        # :: (l,), (l, b, f, c) -> (b, c, f)
        x = torch.einsum("l,lbfc->bcf", self.mix.softmax(0), states)
        x = self.enter(F.instance_norm(x + 1e-6))
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        x = F.relu(self.join(torch.cat(found, dim=1)))
        weights = self.score(torch.tanh(self.attend(x))).softmax(-1)
        mean = (weights * x).sum(-1)  # :: (b, p, f) -> (b, p)
        deviation = ((weights * x.square()).sum(-1) - mean.square()).clamp_min(_LEAST_VARIANCE).sqrt()
        return self.out(self.norm(torch.cat([mean, deviation], dim=-1)))


_HEAD = (
    (r"feature_weight", "mix"),
    (r"layer1\.(.*)", r"enter.\1"),
    (r"layer([234])\.Conv1dReluBn1\.(.*)", r"blocks.\1.first.\2"),
    (r"layer([234])\.Conv1dReluBn2\.(.*)", r"blocks.\1.last.\2"),
    (r"layer([234])\.Res2Conv1dReluBn\.convs\.(\d+)\.(.*)", r"blocks.\1.scales.steps.\2.conv.\3"),
    (r"layer([234])\.Res2Conv1dReluBn\.bns\.(\d+)\.(.*)", r"blocks.\1.scales.steps.\2.bn.\3"),
    (r"layer([234])\.SE_Connect\.linear1\.(.*)", r"blocks.\1.squeeze.\2"),
    (r"layer([234])\.SE_Connect\.linear2\.(.*)", r"blocks.\1.excite.\2"),
    (r"conv\.(.*)", r"join.\1"),
    (r"pooling\.linear1\.(.*)", r"attend.\1"),
    (r"pooling\.linear2\.(.*)", r"score.\1"),
    (r"bn\.(.*)", r"norm.\1"),
    (r"linear\.(.*)", r"out.\1"),
)
_BACKBONE = (
    (r"mask_emb", "masked_spec_embed"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.*)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(.*)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"post_extract_proj\.(.*)", r"feature_projection.projection.\1"),
    (r"layer_norm\.(.*)", r"feature_projection.layer_norm.\1"),
    (r"encoder\.pos_conv\.0\.bias", "encoder.pos_conv_embed.conv.bias"),
    (r"encoder\.pos_conv\.0\.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"encoder\.layer_norm\.(.*)", r"encoder.layer_norm.\1"),
    (r"(encoder\.layers\.\d+)\.self_attn\.relative_attention_bias\.(.*)", r"\1.attention.rel_attn_embed.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn\.grep_a", r"\1.attention.gru_rel_pos_const"),
    (r"(encoder\.layers\.\d+)\.self_attn\.grep_linear\.(.*)", r"\1.attention.gru_rel_pos_linear.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn\.([qkv]|out)_proj\.(.*)", r"\1.attention.\2_proj.\3"),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.(.*)", r"\1.layer_norm.\2"),
    (r"(encoder\.layers\.\d+)\.fc1\.(.*)", r"\1.feed_forward.intermediate_dense.\2"),
    (r"(encoder\.layers\.\d+)\.fc2\.(.*)", r"\1.feed_forward.output_dense.\2"),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.(.*)", r"\1.final_layer_norm.\2"),
)
_PREFIX, _CLASSIFIER = "feature_extract.model.", "loss_calculator."


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the published checkpoint by the names of our head and of transformers' WavLM.

    Args:
        weights: as published; the classifier that trained it is left out.

    Raises:
        ValueError: a name that neither has.
    """
    head, backbone = {}, {}
    for name, value in weights.items():
        if name.startswith(_CLASSIFIER):
            continue
        if name.startswith(_PREFIX):
            backbone[_renamed(name.removeprefix(_PREFIX), _BACKBONE)] = value
        else:
            own = _renamed(name, _HEAD)
            head[re.sub(r"blocks\.([234])", lambda found: f"blocks.{int(found[1]) - 2}", own)] = value
    return head, backbone


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    raise ValueError(f"{name!r} is no weight of a WavLM with an ECAPA head")


def build_head(weights: Mapping[str, Tensor]) -> EcapaHead:
    """The head with its weights, of the sizes that they have."""
    kernel = weights["enter.conv.weight"]
    head = EcapaHead(
        layers=len(weights["mix"]),
        inputs=kernel.shape[1],
        channels=kernel.shape[0],
        pooled=weights["join.weight"].shape[0],
        attention=weights["attend.weight"].shape[0],
        squeezed=weights["blocks.0.squeeze.weight"].shape[0],
        outputs=weights["out.weight"].shape[0],
        groups=1 + sum(bool(re.fullmatch(r"blocks\.0\.scales\.steps\.\d+\.conv\.weight", name)) for name in weights),
    )
    head.load_state_dict(dict(weights))
    return head


def build_backbone(weights: Mapping[str, Tensor]) -> nn.Module:
    """The WavLM with its weights, of the sizes that they have."""
    from transformers import WavLMConfig, WavLMModel

    kernels = [value for name, value in weights.items() if re.fullmatch(r"feature_extractor.*\.conv\.weight", name)]
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
    buckets, heads = weights["encoder.layers.0.attention.rel_attn_embed.weight"].shape
    hidden, per_group, positions = weights["encoder.pos_conv_embed.conv.parametrizations.weight.original1"].shape
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "intermediate_size": weights["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0],
        "conv_dim": tuple(kernel.shape[0] for kernel in kernels),
        "conv_kernel": tuple(kernel.shape[2] for kernel in kernels),
        "conv_stride": _STRIDES[: len(kernels)],
        "num_feat_extract_layers": len(kernels),
        "num_conv_pos_embeddings": positions,
        "num_conv_pos_embedding_groups": hidden // per_group,
        "num_buckets": buckets,
        "max_bucket_distance": _FARTHEST,
    }
    normed = "feature_extractor.conv_layers.1.layer_norm.weight" in weights
    kinds: dict[str, Any] = {"feat_extract_norm": "layer" if normed else "group", "do_stable_layer_norm": normed}
    model = WavLMModel(WavLMConfig(**sizes, **kinds))
    model.load_state_dict(dict(weights))
    return model
