# SPDX-License-Identifier: Apache-2.0
"""What stages of end-to-end training hand on to each other, and whose voice a row is in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tts_align.utils.readers import load_safetensors

PARTS = "parts"
"""Folder of a run's directory that holds the weights of each model, ready to work alone."""


def read_weights(folder: Path, name: str) -> dict[str, Tensor] | None:
    """All weights of one model; ``None`` if the folder does not hold it."""
    path = folder / f"{name}.safetensors"
    return load_safetensors(path) if path.is_file() else None


def write_weights(folder: Path, models: Mapping[str, nn.Module]) -> None:
    """Write all weights of each model into a file of its own, whole or not at all."""
    from safetensors.torch import save_file

    from tts_align.utils.files import written_atomically

    folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        with written_atomically(folder / f"{name}.safetensors") as scratch:
            save_file(state, scratch)


def loaded(folder: Path, models: Mapping[str, nn.Module]) -> set[str]:
    """Load the models that a folder holds; gives their names.

    Raises:
        ValueError: a model's sizes are not those of the file.
    """
    found = set()
    for name, model in models.items():
        weights = read_weights(folder, name)
        if weights is None:
            continue
        own = {key: value.shape for key, value in model.state_dict().items()}
        if own != {key: value.shape for key, value in weights.items()}:
            raise ValueError(f"{folder} holds a {name} of other sizes than model.{name}: give it the same ones")
        model.load_state_dict(weights)
        found.add(str(name))
    return found


def speaker_vectors_of(
    speakers: Sequence[str], voices: Sequence[str], vectors: Float[Tensor, "r d"], channels: int
) -> Float[Tensor, "r e"]:
    """Speaker vectors of rows: their own, or a one at the place of the speaker's name.

    Args:
        speakers: name of each row's speaker.
        voices: known names.
        vectors: the rows' own; without columns if they bring none.
        channels: numbers that the flow wants.
    """
    if vectors.shape[1]:
        if voices:
            raise ValueError("voices have no effect: the rows bring speaker_vector; leave voices out")
        if vectors.shape[1] != channels:
            raise ValueError(
                f"model.flow wants speaker vectors of {channels} numbers, the rows bring {vectors.shape[1]}"
            )
        return vectors
    if unknown := sorted(set(speakers) - set(voices)):
        raise ValueError(
            f"rows without speaker_vector must be in one of the objective's voices ({', '.join(voices) or 'none'}), "
            f"got {', '.join(map(repr, unknown))}"
        )
    if len(voices) != channels:
        raise ValueError(
            f"expected speaker_channels of model.flow to be the number of voices, {len(voices)}, got {channels}"
        )
    index = torch.tensor([voices.index(name) for name in speakers], device=vectors.device)
    return nn.functional.one_hot(index, len(voices)).to(vectors.dtype)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest of tensors, their names, shapes and types."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(weights.items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
