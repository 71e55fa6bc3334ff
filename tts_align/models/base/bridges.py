# SPDX-License-Identifier: Apache-2.0
"""What lies between a tokenizer that trains and the models that read its vectors: linear maps, or wider ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tts_align.utils.messages import say

if TYPE_CHECKING:
    from tts_align.models.base.flow import FlowHead
    from tts_align.models.base.reward import RewardHead

CLOSE = 0.01
"""Relative error up to which the image of a codebook counts as the table that it stands for."""
MAX_DEGREE = 5
_RANK_TOLERANCE = 1e-4


class Coordinates(nn.Module):
    """Products of Legendre polynomials of a codebook's few independent coordinates: a projection wider than its rank.

    The coordinates are fixed, linear in the vectors, and lie in [-1, 1] for the codebook they were made of; gradients
    pass through all products to the vectors.

    Args:
        codebook: vectors of all speech tokens.
        degree: largest total degree of a product.
    """

    centre: Tensor
    axes: Tensor

    def __init__(self, codebook: Float[Tensor, "v c"], degree: int) -> None:
        super().__init__()
        wide = codebook.double()
        centre = wide.mean(0)
        _, sizes, axes = torch.linalg.svd(wide - centre, full_matrices=False)
        axes = axes[sizes > _RANK_TOLERANCE * sizes[0]]
        longest = ((wide - centre) @ axes.T).abs().amax(0)
        self.register_buffer("centre", centre.to(codebook.dtype))
        self.register_buffer("axes", (axes / longest[:, None]).to(codebook.dtype))
        self.products = tuple(
            powers for powers in itertools.product(range(degree + 1), repeat=len(axes)) if sum(powers) <= degree
        )
        self.degree = degree

    def forward(self, vectors: Float[Tensor, "*b c"]) -> Float[Tensor, "*b k"]:
        """The products, one behind the other."""
        place = (vectors - self.centre) @ self.axes.T
        legendre = [torch.ones_like(place), place]
        for n in range(1, self.degree):
            legendre.append(((2 * n + 1) * place * legendre[n] - n * legendre[n - 1]) / (n + 1))
        found = [
            math.prod((legendre[power][..., axis] for axis, power in enumerate(powers) if power), start=ones)
            for ones in [torch.ones_like(place[..., 0])]
            for powers in self.products
        ]
        return torch.stack(found, -1)


class Bridge(nn.Module):
    """From a tokenizer's vectors to those that another model reads.

    Args:
        channels: of the tokenizer's vectors.
        width: of the other model's.
        coordinates: a wider projection to start from; the vectors themselves by default.
    """

    def __init__(self, channels: int, width: int, coordinates: Coordinates | None = None) -> None:
        super().__init__()
        self.coordinates = coordinates
        inputs = channels if coordinates is None else len(coordinates.products)
        self.weight = nn.Parameter(torch.empty(width, inputs))
        nn.init.normal_(self.weight, std=channels**-0.5)  # about as long as the tokenizer's vectors are

    def forward(self, vectors: Float[Tensor, "*b c"]) -> Float[Tensor, "*b h"]:
        """What the other model reads."""
        return functional.linear(vectors if self.coordinates is None else self.coordinates(vectors), self.weight)


@dataclass(frozen=True)
class Fit:
    """A bridge that stands for a table.

    Args:
        bridge: its image of the codebook is the nearest to the table, in the mean square.
        error: length of what is missing, as a share of the length of the table.
        degree: of the bridge's polynomials; 1 for a linear map.
    """

    bridge: Bridge
    error: float
    degree: int

    def __str__(self) -> str:
        kind = "a linear image" if self.degree == 1 else f"an image of degree {self.degree}"
        return f"{kind} of the codebook, relative error {self.error:.1e}"


def fitted(codebook: Float[Tensor, "v c"], table: Float[Tensor, "v h"]) -> Fit:
    """The bridge whose image of a codebook is nearest to a table.

    It is linear where the table lies in the codebook's span; where the codebook's rank prevents that, its projection
    grows wider, degree by degree, until the image is close or further degrees would make more inputs than tokens.

    Args:
        codebook: vectors of all speech tokens.
        table: what another model has learnt of the same tokens.
    """
    channels, width = codebook.shape[1], table.shape[1]
    best = _solved(Bridge(channels, width), codebook, table, 1)
    for degree in range(2, MAX_DEGREE + 1):
        if best.error <= CLOSE:
            break
        coordinates = Coordinates(codebook, degree)
        if len(coordinates.products) >= len(codebook):
            break
        best = _solved(Bridge(channels, width, coordinates), codebook, table, degree)
    return best


@torch.no_grad()
def _solved(bridge: Bridge, codebook: Tensor, table: Tensor, degree: int) -> Fit:
    """The bridge with its least-squares weights."""
    inputs = codebook if bridge.coordinates is None else bridge.coordinates(codebook)
    # On the CPU in double precision: the vectors' own rank is far below their width.
    weight = torch.linalg.lstsq(
        inputs.double().cpu(), table.double().cpu(), rcond=_RANK_TOLERANCE, driver="gelsd"
    ).solution
    bridge.to(codebook.device, codebook.dtype).weight.copy_(weight.T)
    error = torch.linalg.vector_norm(bridge(codebook).double() - table.double())
    return Fit(bridge, float(error / torch.linalg.vector_norm(table.double()).clamp(min=1e-12)), degree)


def bridge_to(name: str, reader: RewardHead | FlowHead, codebook: Float[Tensor, "v c"]) -> Bridge:
    """Of a new model a random one; of a trained one the image of the codebook that is nearest to its table."""
    table = reader.table.weight
    if getattr(reader, "directory", None) is None:
        return Bridge(codebook.shape[1], table.shape[1])
    fit = fitted(codebook, table.detach()[: len(codebook)])
    say(f"{name} of {reader.directory} keeps what it learnt: its table as {fit}")
    return fit.bridge


def words(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
