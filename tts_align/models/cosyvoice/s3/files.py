# SPDX-License-Identifier: Apache-2.0
"""Sizes, names and files of an S3 tokenizer's weights, as the PyPI package `s3tokenizer` lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tts_align.models.codec.fsq import TERNARY
from tts_align.models.cosyvoice.directory import load_state
from tts_align.utils.files import written_atomically

_DOWN = "quantizer._codebook.project_down."
_UP = "quantizer._codebook.project_up."
UP = frozenset({f"{_UP}weight", f"{_UP}bias"})
"""Names of the projection up, which published files lack."""
_FRONT = (("conv1.", "encoder.conv1."), ("conv2.", "encoder.conv2."), ("down.", _DOWN), ("up.", _UP))
_INSIDE = (
    (".attention_norm.", ".attn_ln."),
    (".attention.memory.", ".attn.fsmn_block."),
    (".attention.", ".attn."),
    (".norm.", ".mlp_ln."),
    (".widen.", ".mlp.0."),
    (".narrow.", ".mlp.2."),
)
_HEAD_CHANNELS = 64


@dataclass(frozen=True)
class S3Sizes:
    """Sizes of an S3 tokenizer; the defaults are those of version 2, version 3 has 12 layers.

    Args:
        mel_channels: Mel channels of the features.
        width: Channels of the encoder.
        heads: Attention heads.
        layers: Blocks of the encoder.
        kernel_size: Odd number of positions that the memory of a block sees.
        widening: Width inside the feed-forward layers, in widths.
        levels: Levels per dimension of the quantiser; their product is the codebook size.
        embedding_channels: Width of the tokens' embedding.
    """

    mel_channels: int = 128
    width: int = 1280
    heads: int = 20
    layers: int = 6
    kernel_size: int = 31
    widening: int = 4
    levels: tuple[int, ...] = TERNARY
    embedding_channels: int = 512

    def __post_init__(self) -> None:
        """Check what cannot be built.

        Raises:
            ValueError: heads do not share the channels evenly, or the memory has no middle.
        """
        if self.heads < 1 or self.width % (2 * self.heads):
            raise ValueError(f"expected heads of an even number of channels, got {self.heads} heads of {self.width}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {self.kernel_size}")

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        embedding_channels: int | None = None,
        heads: int | None = None,
        levels: Sequence[int] | None = None,
    ) -> S3Sizes:
        """Sizes of given weights.

        Args:
            state: Weights by their published names.
            embedding_channels: Width of the projection up if the weights have none.
            heads: Attention heads; by default one for every 64 channels.
            levels: Levels of the quantiser; by default three in each dimension.

        Raises:
            ValueError: The weights are those of another model, or contradict the arguments.
        """
        width, mel_channels, _ = _shape(state, "encoder.conv1.weight", 3)
        dimensions, _ = _shape(state, f"{_DOWN}weight", 2)
        hidden, _ = _shape(state, "encoder.blocks.0.mlp.0.weight", 2)
        if levels is not None and len(levels) != dimensions:
            raise ValueError(f"expected {dimensions} levels, as the weights project down, got {list(levels)}")
        if heads is None and width % _HEAD_CHANNELS:
            raise ValueError(
                f"{width} channels are not heads of {_HEAD_CHANNELS} as in the published models: give heads"
            )
        return cls(
            mel_channels=mel_channels,
            width=width,
            heads=heads or width // _HEAD_CHANNELS,
            layers=len({name.split(".")[2] for name in state if name.startswith("encoder.blocks.")}),
            kernel_size=_shape(state, "encoder.blocks.0.attn.fsmn_block.weight", 3)[-1],
            widening=hidden // width,
            levels=tuple(levels or (3,) * dimensions),
            embedding_channels=_embedding_channels(state, embedding_channels),
        )


def _shape(state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in state or state[name].dim() != axes:
        what = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        raise ValueError(f"these are not the weights of an S3 tokenizer of version 2 or 3: {name} is {what}")
    return tuple(state[name].shape)


def _embedding_channels(state: Mapping[str, Tensor], wanted: int | None) -> int:
    if not state.keys() & UP:
        return S3Sizes.embedding_channels if wanted is None else wanted
    stored = _shape(state, f"{_UP}weight", 2)[0]
    if wanted not in (None, stored):
        raise ValueError(
            f"the weights project up to {stored} channels, not to embedding_channels={wanted}: leave it out"
        )
    return stored


def published_name(name: str) -> str:
    """The name that the package `s3tokenizer` gives to one of our parameters.

    >>> published_name("blocks.3.attention.memory.weight")
    'encoder.blocks.3.attn.fsmn_block.weight'
    """
    for own, published in _FRONT:
        if name.startswith(own):
            return published + name.removeprefix(own)
    for own, published in _INSIDE:
        name = name.replace(own, published)
    return f"encoder.{name}"


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are missing, too many or of another shape; only the projection up may be left out.

    Args:
        state: Weights by their published names.
        shapes: What is expected, by the same names.

    Raises:
        ValueError: They differ in more than that.
    """
    given = {name: tuple(value.shape) for name, value in state.items()}
    expected = {name: shape for name, shape in shapes.items() if name not in UP or given.keys() & UP}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        raise ValueError(
            f"these are not the weights of an S3 tokenizer of version 2 or 3: {len(wrong)} of {len(expected)} differ, "
            f"{wrong[0]} first (expected {expected.get(wrong[0])}, got {given.get(wrong[0])})"
        )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Weights in a file, by their published names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not hold weights by name.
    """
    if Path(path).suffix == ".onnx":
        raise ValueError(
            f"expected weights in a .safetensors or .pt file, got {path}: read it with the package s3tokenizer and "
            "save the state_dict of what it returns"
        )
    return load_state(path)


def write_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file, atomically."""
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise ValueError(f"expected the path of a .safetensors file, got {path}")
    with written_atomically(path) as scratch:
        save_file({name: value.detach().contiguous() for name, value in state.items()}, scratch)
