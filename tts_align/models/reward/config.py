# SPDX-License-Identifier: Apache-2.0
"""Sizes, tasks and alphabet of a reward model, and the 5 bins of a mean opinion score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tts_align.models.base.reward_records import AttributeLabels
from tts_align.utils.files import read_config
from tts_align.utils.model_directory import check_values
from tts_align.utils.readers import reading

ASR, CTC = "asr", "ctc"
END, UNKNOWN, CHARACTERS = 0, 1, 2
"""Text ids: the end, which also starts a text and is the blank of CTC; an unknown character; the first known one."""
MOS_BINS = 5
Kind = Literal["classes", "events", "mos", "regression"]


def mos_bin(score: Float[Tensor, "*r"]) -> Int[Tensor, "*r"]:
    """Bin 0..4 of a mean opinion score of 1..5: the nearest whole score, halves upwards.

    >>> mos_bin(torch.tensor([1.0, 2.4, 2.5, 5.0])).tolist()
    [0, 1, 2, 4]
    """
    return (score + 0.5).floor().clamp(1, MOS_BINS).long() - 1


def mos_expectation(logits: Float[Tensor, "*r e"]) -> Float[Tensor, "*r"]:
    """Expected score, 1..5, under the distribution over the bins.

    >>> mos_expectation(torch.zeros(1, 5)).item()
    3.0
    """
    if logits.shape[-1] != MOS_BINS:
        raise ValueError(f"expected logits of {MOS_BINS} bins, got {logits.shape[-1]}")
    scores = torch.arange(1, MOS_BINS + 1, device=logits.device, dtype=logits.dtype)
    return (logits.softmax(-1) * scores).sum(-1)


@dataclass(frozen=True)
class Attribute:
    """A property of a whole utterance that the reward model predicts.

    Args:
        name: name of the attribute, of its column in the manifest, its scores and its losses.
        kind: kind of the attribute: ``classes`` (one of several: emotion, gender, speaker), ``events`` (each there or
            not: audio events), ``mos`` (a score of 1 to 5, in 5 bins) or ``regression`` (a number: age; it has no
            log-probability, so it is learnt but cannot be a reward).
        classes: names of the classes or events.
        centre: centre of a regression's values; what is predicted is (value - centre) / spread.
        spread: spread of a regression's values.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    centre: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot work, or would have no effect."""
        named = self.kind in ("classes", "events")
        faults = []
        if self.name in (ASR, CTC, ""):
            faults.append(f"an attribute must have a name other than {ASR!r} and {CTC!r}, got {self.name!r}")
        if named and (len(self.classes) < 1 + (self.kind == "classes") or len(set(self.classes)) < len(self.classes)):
            faults.append(f"attribute {self.name!r} needs different names for its {self.kind}, got {self.classes}")
        if not named and self.classes:
            faults.append(f"attribute {self.name!r} of kind {self.kind} has no classes, got {self.classes}")
        if not self.spread > 0:
            faults.append(f"spread of attribute {self.name!r} must be above 0, got {self.spread}")
        if self.kind != "regression" and (self.centre, self.spread) != (0.0, 1.0):
            faults.append(f"centre and spread of attribute {self.name!r} need the kind regression, got {self.kind}")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def outputs(self) -> int:
        """Numbers that are predicted, e."""
        return {"mos": MOS_BINS, "regression": 1}.get(self.kind, len(self.classes))

    def encode(self, values: Sequence[str | int | float | Sequence[str] | None]) -> AttributeLabels:
        """Labels of rows; ``None`` where a row has none.

        Args:
            values: name of the class; names of the events that are there, as a sequence or separated by commas; or
                the number.
        """
        mask = torch.tensor([value is not None for value in values], dtype=torch.bool)
        if self.kind == "events":
            there = [self._events(value) for value in values]
            target = torch.tensor([[name in row for name in self.classes] for row in there], dtype=torch.bool)
            target = target.view(len(there), len(self.classes))  # :: (r, e); (0) -> (0, e)
            return AttributeLabels(self.name, target, mask)
        if self.kind == "classes":
            indices = [0 if value is None else self._index(value) for value in values]
            return AttributeLabels(self.name, torch.tensor(indices, dtype=torch.long), mask)
        numbers = [self._fallback if value is None else self._number(value) for value in values]
        return AttributeLabels(self.name, torch.tensor(numbers, dtype=torch.float32), mask)

    def predict(self, logits: Float[Tensor, "r e"]) -> Tensor:
        """What the logits say: class (r,), whether each event is there (r, e), expected score (r,) or number (r,)."""
        if self.kind == "classes":
            return logits.argmax(-1)
        if self.kind == "events":
            return logits > 0
        return mos_expectation(logits) if self.kind == "mos" else logits[:, 0] * self.spread + self.centre

    @property
    def _fallback(self) -> float:
        """A harmless number where there is no label."""
        return 1.0 if self.kind == "mos" else self.centre

    def _index(self, value: object) -> int:
        if value not in self.classes:
            raise ValueError(f"{self.name} must be one of {', '.join(self.classes)}, got {value!r}")
        return self.classes.index(str(value))

    def _events(self, value: str | int | float | Sequence[str] | None) -> set[str]:
        if isinstance(value, (int, float)):
            raise ValueError(f"{self.name} must be names of events, separated by commas, got {value!r}")
        names = [] if value is None else value.split(",") if isinstance(value, str) else value
        found = {name.strip() for name in names} - {""}
        if unknown := sorted(found - set(self.classes)):
            raise ValueError(f"{self.name} must be some of {', '.join(self.classes)}, got {', '.join(unknown)}")
        return found

    def _number(self, value: object) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"{self.name} must be a number, got {value!r}") from None
        low, high = (1.0, float(MOS_BINS)) if self.kind == "mos" else (float("-inf"), float("inf"))
        if not (low <= number <= high and abs(number) < float("inf")):
            raise ValueError(f"{self.name} must be a number between {low:g} and {high:g}, got {value!r}")
        return number


@dataclass(frozen=True)
class Alphabet:
    """Texts as ids of characters.

    Args:
        characters: each once.
    """

    characters: str

    @property
    def size(self) -> int:
        """Number of ids, k."""
        return CHARACTERS + len(self.characters)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the characters; an unknown one has an id of its own.

        >>> Alphabet("あい").encode("いあう")
        (3, 2, 1)
        """
        return tuple(self._ids.get(character, UNKNOWN) for character in text)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: CHARACTERS + i for i, character in enumerate(self.characters)}

    def decode(self, ids: Iterable[int]) -> str:
        """Characters up to the end; ``\N{REPLACEMENT CHARACTER}`` where one is unknown."""
        text = ""
        for token in ids:
            if token == END:
                break
            text += "\N{REPLACEMENT CHARACTER}" if token == UNKNOWN else self.characters[token - CHARACTERS]
        return text


AUTO = "auto"
"""In a recipe: the characters of the manifest's transcripts."""


@dataclass(frozen=True)
class RewardSizes:
    """Sizes and tasks of a reward model; what ``config.json`` in its directory holds.

    Args:
        codebook_size: number of speech tokens of the tokenizer.
        characters: characters that texts are made of, each once; ``auto`` in a recipe takes those of the transcripts in
            its manifest. In Python see :func:`collect_characters`.
        attributes: utterance-level tasks.
        width: width of the vectors; even, and a multiple of ``heads``.
        layers: number of blocks of the encoder.
        heads: attention heads.
        feed_forward: width inside the feed-forward layers.
        decoder_layers: number of blocks of the text decoder, the task ``asr``; 0 for none.
        ctc: whether there is the task ``ctc``.
        dropout: dropout in the model's own training.
    """

    codebook_size: int
    characters: str = ""
    attributes: tuple[Attribute, ...] = ()
    width: int = 256
    layers: int = 6
    heads: int = 4
    feed_forward: int = 1024
    decoder_layers: int = 2
    ctc: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        faults = []
        if (
            min(self.codebook_size, self.width, self.layers, self.heads, self.feed_forward) < 1
            or self.decoder_layers < 0
        ):
            faults.append(
                "speech tokens, width, layers, heads and feed_forward must be above 0, decoder_layers at least 0"
            )
        elif self.width % self.heads or self.width % 2:
            faults.append(f"width must be even and a multiple of heads, got {self.width} and {self.heads}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout must lie in [0, 1), got {self.dropout}")
        if bool(self.characters) != (self.decoder_layers > 0 or self.ctc):
            faults.append("characters and a task that reads them, decoder_layers above 0 or ctc, need each other")
        if self.characters == AUTO:
            faults.append("characters: auto is for recipes; in Python give collect_characters(texts)")
        if len(set(self.characters)) < len(self.characters):
            faults.append(f"characters must be different, got {self.characters!r}")
        if len(set(self.tasks)) < len(self.tasks) or not self.tasks:
            faults.append(f"expected one or more tasks of different names, got {self.tasks}")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks."""
        text = [ASR] * (self.decoder_layers > 0) + [CTC] * self.ctc
        return (*text, *(attribute.name for attribute in self.attributes))

    @classmethod
    def read(cls, path: Path) -> RewardSizes:
        """From a ``config.json``.

        Raises:
            ReadError: it is another model's, or damaged.
        """
        values = read_config(path)
        rows = values.pop("attributes", None)
        with reading(path, "sizes of a reward model", "is it the directory of another kind of model?"):
            check_values(path.parent, values, cls)
            if not isinstance(rows, list):
                raise ValueError("there is no list of `attributes`")
            attributes = [Attribute(**{**row, "classes": tuple(row["classes"])}) for row in rows]
            return cls(**values, attributes=tuple(attributes))


def collect_characters(texts: Iterable[str]) -> str:
    """All characters of some texts, each once, sorted.

    >>> collect_characters(["ななつ", "つなみ"])
    'つなみ'
    """
    return "".join(sorted(set().union(*texts)))
