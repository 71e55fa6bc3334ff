# SPDX-License-Identifier: Apache-2.0
"""Typed, self-checking records that travel from the data to the objectives.

Axis letters, the same in the whole package:

====== =====================================================================
letter meaning
====== =====================================================================
``r``  scored rows (an utterance under a text; a pair is two rows)
``p``  pairs
``n``  text tokens of a row, padded
``s``  speech tokens of a row, padded; the end-of-speech token is not one
``c``  real speech tokens of all rows, flat, without padding
``t``  targets of a row, padded: speech tokens, fill tokens, end-of-speech
``m``  real targets of all rows, flat, without padding
``l``  inputs of all rows, flat, without padding
``v``  speech vocabulary, speech tokens and special tokens
====== =====================================================================

Masks are Booleans and ``True`` counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Not `typing.Self`: the checker of shapes decorates methods one by one and does not know their class.
RecordT = TypeVar("RecordT", bound="Record")


class Record:
    """A frozen dataclass of tensors that moves as one."""

    def to(self: RecordT, device: torch.device | str, non_blocking: bool = False) -> RecordT:
        """Return a copy with every tensor on ``device``; everything else is kept as it is."""
        moved = {
            field.name: _to(getattr(self, field.name), device, non_blocking)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def pin_memory(self: RecordT) -> RecordT:
        """Return a copy in page-locked memory, so that the copy to a GPU does not wait."""
        pinned = {
            field.name: _pin(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return dataclasses.replace(self, **pinned)  # type: ignore[type-var]


def _to(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, (Tensor, Record)):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, tuple) and value and isinstance(value[0], Record):
        return tuple(item.to(device, non_blocking) for item in value)
    return value


def _pin(value: Any) -> Any:
    if isinstance(value, (Tensor, Record)):
        return value.pin_memory()
    if isinstance(value, tuple) and value and isinstance(value[0], Record):
        return tuple(item.pin_memory() for item in value)
    return value


@dataclass(frozen=True)
class Rows(Record):
    """Rows as the backbone reads them: inputs one row behind the other, and where each target is predicted.

    Unistream or bistream is decided once, when the rows are collated, so that policy, reference and contrast see the
    same layout. Nothing is padded but the target matrix, and only real targets are listed, so the speech head runs on
    nothing else.

    Args:
        token: ids, each in the embedding table that ``table`` names.
        table: 0 text, 1 speech, 2 special; see :mod:`tts_align.models.base.layout`.
        position: rotary position of each input inside its row.
        row: number of the row that each input belongs to, counted from 0.
        offset: where each row begins among the inputs, and the end of the last.
        lengths: inputs of each row, on the host.
        hidden_index: for each real target the index of the input that predicts it.
        target_index: for each real target its flat index (row * t + target) in the padded target matrix.
        target: speech-vocabulary id of each real target, in the order of ``target_index``.
        mask: which entries of the target matrix are real.
        end: which of them are end-of-speech.
        keys: digest of each row's content and layout: what caches are indexed by.
        vectors: added to the vectors of the inputs, for gradients that reach what made the speech tokens.
    """

    token: Int[Tensor, " l"]
    table: Int[Tensor, " l"]
    position: Int[Tensor, " l"]
    row: Int[Tensor, " l"]
    offset: Int[Tensor, " r_plus_1"]
    lengths: tuple[int, ...]
    hidden_index: Int[Tensor, " m"]
    target_index: Int[Tensor, " m"]
    target: Int[Tensor, " m"]
    mask: Bool[Tensor, "r t"]
    end: Bool[Tensor, "r t"]
    keys: tuple[str, ...]
    vectors: Float[Tensor, "l h"] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without waiting for a device."""
        if len(self.keys) != self.mask.shape[0]:
            raise ValueError(f"expected one key for each of the {self.mask.shape[0]} rows, got {len(self.keys)}")

    @property
    def count(self) -> int:
        """Number of rows r."""
        return self.mask.shape[0]

    def scatter(self, values: Float[Tensor, " m"]) -> Float[Tensor, "r t"]:
        """Put one number per real target into the padded target matrix; padding gets 0."""
        flat = values.new_zeros(self.mask.numel())
        return flat.index_put((self.target_index,), values).view(self.mask.shape)  # :: (r * t) -> (r, t)


@dataclass(frozen=True)
class Utterances(Record):
    """What rows say and how, for models that read speech tokens without the policy.

    Args:
        speech: speech tokens; 0 at padding.
        mask: which of them are real.
        code_target: for each real code, in the order of the rows, which of the flat targets it is.
        code_place: for each real code its flat index (row * s + code).
        targets: how many targets each row has.
        rows: the rows before they were arranged (:class:`tts_align.models.base.layout.TokenRow`).
        seeds: one for each row, another one in every epoch: what is drawn for a row depends on nothing else.
        transcripts: what is said in each, as a recogniser writes it; ``None`` where nobody knows.
        target_texts: what its text ought to sound like, written likewise.
        speakers: names of the voices.
        attributes: known properties of each, such as ``{"emotion": "happy", "mos": 4.2}``.
        labels: what a reward model makes of transcripts and attributes, if the objective has encoded it on the CPU.
        target_labels: the same of target texts and what is wanted.
        voices: what a flow is told of the speakers, likewise.
    """

    speech: Int[Tensor, "r s"]
    mask: Bool[Tensor, "r s"]
    code_target: Int[Tensor, " c"]
    code_place: Int[Tensor, " c"]
    targets: tuple[int, ...]
    rows: tuple[Any, ...]
    seeds: tuple[int, ...]
    transcripts: tuple[str | None, ...]
    target_texts: tuple[str, ...]
    speakers: tuple[str, ...]
    attributes: tuple[Mapping[str, str | float], ...]
    labels: Any = None
    target_labels: Any = None
    voices: Float[Tensor, "r e"] | None = None

    def __post_init__(self) -> None:
        """Check that there is one of everything for each row."""
        lists = (self.targets, self.rows, self.seeds, self.transcripts, self.target_texts, self.speakers)
        counts = {len(self.speech), len(self.attributes), *map(len, lists)}
        if len(counts) > 1:
            raise ValueError(f"expected everything once for each of {len(self.speech)} rows, got {sorted(counts)}")

    def placed(self, vectors: Float[Tensor, "c h"]) -> Float[Tensor, "r s h"]:
        """Vectors of the real speech tokens at their places, zero at padding."""
        padded = vectors.new_zeros(self.speech.numel(), vectors.shape[-1])
        return padded.index_copy(0, self.code_place, vectors).view(*self.speech.shape, -1)  # :: (r * s, h) -> (r, s, h)


@dataclass(frozen=True)
class Recordings(Record):
    """How rows sound, for objectives that make the speech tokens themselves.

    Args:
        features: features that the speech tokenizer reads, padded.
        frames: real frames of them.
        mel: frames that a flow model is to make, padded; their rate is that model's own.
        mel_mask: which of them are real.
        speaker: vectors of the voices; without columns when the rows bring none.
        speech_tokens: how many speech tokens the tokenizer makes of each row.
        tokenised: what it has made of them, once it has been asked.
    """

    features: Float[Tensor, "r f c"]
    frames: Int[Tensor, " r"]
    mel: Float[Tensor, "r g k"]
    mel_mask: Bool[Tensor, "r g"]
    speaker: Float[Tensor, "r d"]
    token_counts: tuple[int, ...]
    tokenised: Any = None


@dataclass(frozen=True)
class Totals:
    """What the rows of one optimiser step count up to, over all micro-batches and ranks.

    Known from the plan of the epoch before any of them is scored. Dividing by them, instead of by what a micro-batch
    happens to hold, makes the gradient independent of how the rows are cut.

    Args:
        rows: scored rows; a pair counts two.
        tokens: real targets of all rows.
        desirable_rows: rows labelled desirable, or chosen.
        desirable_tokens: real targets of those rows.
        labels: how many rows have each attribute, and ``text``: a known transcript; for objectives that read them.
        speech_tokens: speech tokens of all rows, likewise.
        letters: of the known transcripts, likewise.
    """

    rows: int
    tokens: int
    desirable_rows: int
    desirable_tokens: int
    labels: Mapping[str, int] = field(default_factory=dict, hash=False)
    speech_tokens: int = 0
    letters: int = 0


@dataclass(frozen=True)
class Batch(Record):
    """One micro-batch of an optimiser step.

    Args:
        rows: what is scored. For pairs the chosen rows come first, then the rejected ones in the same order.
        desirable: label of each row; chosen rows are desirable.
        totals: counts of the whole optimiser step.
        mismatched: rows whose text belongs to another sentence than their speech, for KTO's reference point: all of
            this rank's for the whole step on its first micro-batch (one entry per micro-batch), none on the others.
        first: whether this is the first micro-batch of its optimiser step.
        utterances: the same rows as speech tokens and words, for objectives with models that read them.
        recordings: the same rows as sound, for objectives that train the speech tokenizer, or a model of sound.
    """

    rows: Rows
    desirable: Bool[Tensor, " r"]
    totals: Totals
    mismatched: tuple[Rows, ...] = ()
    first: bool = True
    utterances: Utterances | None = None
    recordings: Recordings | None = None

    def __post_init__(self) -> None:
        """Check that rows and labels belong together."""
        if self.desirable.shape[0] != self.rows.count:
            raise ValueError(
                f"expected one label for each of the {self.rows.count} rows, got {self.desirable.shape[0]}"
            )


@dataclass(frozen=True)
class Scored(Record):
    """What a model says about rows.

    Args:
        logp: log-probability of each target given what precedes it; 0 where ``mask`` is ``False``.
        mask: which targets are real.
        logits: unnormalised scores at the real targets, when the objective wants distributions.
        normaliser: logarithm of the sum of their exponentials, without gradient, so that nobody sums them again.
    """

    logp: Float[Tensor, "r t"]
    mask: Bool[Tensor, "r t"]
    logits: Float[Tensor, "m v"] | None = None
    normaliser: Float[Tensor, " m"] | None = None

    def sums(self) -> Float[Tensor, " r"]:
        """Log-probability of each whole row: the sum over its real targets."""
        return self.logp.sum(-1)


@dataclass(frozen=True)
class Mean(Record):
    """A mean kept as its parts, so that means over micro-batches and ranks are never means of means.

    Args:
        total: sum of the values, detached.
        count: how many values, or the sum of their weights.
    """

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> Mean:
        """Mean of ``values``, where ``mask`` (same shape) is ``True`` or everywhere.

        >>> Mean.of(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False])).value.item()
        1.5
        """
        values = values.detach().float()
        if mask is None:
            return cls(values.sum(), values.new_full((), values.numel()))  # a copy from the host would wait for the GPU
        return cls(torch.where(mask, values, 0.0).sum(), mask.sum().to(values))

    @property
    def value(self) -> Float[Tensor, ""]:
        """Total over count; 0 when nothing was counted."""
        return self.total / self.count.clamp(min=torch.finfo(self.count.dtype).tiny)


class Reads(StrEnum):
    """Which rows an objective can use."""

    SPEECH = "speech"
    """Good speech: rows labelled desirable or chosen, and rows without a label."""
    PAIR = "pair"
    """Chosen and rejected speech of one sentence."""
    ANY = "any"
    """Every utterance, whatever its label; a pair is two of them."""
    LABELLED = "labelled"
    """Rows labelled desirable or undesirable; a pair is two of them."""


@dataclass(frozen=True)
class RowsWanted:
    """What an objective wants of the data; :attr:`tts_align.objectives.base.Objective.rows_wanted` says it.

    Args:
        reads: kind of rows that it can use.
        mismatched: it compares with speech of another sentence.
        utterances: it reads the rows as speech tokens and words, too.
        sound: it makes the speech tokens itself, of recordings.
        readers: names of the objectives that use each kind of rows, for what is printed.
    """

    reads: Reads = Reads.SPEECH
    mismatched: bool = False
    utterances: bool = False
    sound: bool = False
    readers: Mapping[Reads, tuple[str, ...]] = field(default_factory=dict, compare=False)


def across_ranks(mean: Mean) -> Mean:
    """The same mean over the values of all ranks; a rank without values takes part with a count of 0."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    both = torch.stack([mean.total.float(), mean.count.float()])
    dist.all_reduce(both)
    return Mean(both[0], both[1])
