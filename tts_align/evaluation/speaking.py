# SPDX-License-Identifier: Apache-2.0
"""Speak every sentence several times in every voice."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tts_align.evaluation.candidates import Candidate, SpokenPiece, candidate_id, candidate_seed
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.models.base.generation import Context, Encoded, Sampling, Spoken
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.files import file_name

EncodedTexts = Mapping[tuple[str, str], tuple[tuple[str, Encoded], ...]]
"""Pieces of each sentence in each voice, as written and as the policy reads them."""


@dataclass(frozen=True)
class UtteranceRequest:
    """An utterance to be spoken.

    Args:
        prompt: the sentence.
        speaker: whose voice.
        sample: number among those of the sentence and voice.
        seed: of the utterance.
    """

    prompt: SentencePrompt
    speaker: str
    sample: int
    seed: int

    @property
    def id(self) -> str:
        """Name of the utterance."""
        return candidate_id(self.prompt.id, self.speaker, self.sample)


def evenly_spread(prompts: Sequence[SentencePrompt], count: int | None) -> list[SentencePrompt]:
    """A number of the sentences, spread evenly from the first to the last; all of them if there are no more.

    Args:
        prompts: the sentences.
        count: number of sentences wanted; ``None`` for all.
    """
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[place] for place in np.linspace(0, len(prompts) - 1, count).astype(int)]


class UtteranceRequests(Sequence[UtteranceRequest]):
    """All utterances to be spoken; each is made when it is asked for.

    A sentence that names its voice is spoken in that one only.

    Args:
        prompts: the sentences.
        speakers: voices of the others.
        samples: utterances per sentence and voice.
        seed: of all utterances.
        kept: numbers of those that are meant; all by default.
    """

    def __init__(
        self,
        prompts: Sequence[SentencePrompt],
        speakers: Sequence[str],
        samples: int,
        seed: int,
        kept: NDArray[np.int64] | None = None,
    ) -> None:
        self.prompts, self.speakers, self.samples, self.seed = prompts, list(speakers) or [""], samples, seed
        voices = np.array([1 if prompt.speaker else len(self.speakers) for prompt in prompts], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(voices * samples)])
        self._kept = np.arange(self._starts[-1]) if kept is None else kept

    def __len__(self) -> int:
        """How many utterances."""
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> UtteranceRequest: ...
    @overload
    def __getitem__(self, place: slice) -> UtteranceRequests: ...
    def __getitem__(self, place: int | slice) -> UtteranceRequest | UtteranceRequests:
        """One utterance, or some of them."""
        if isinstance(place, slice):
            return self.take(self._kept[place])
        number = int(self._kept[place])
        sentence = int(self._starts.searchsorted(number, "right")) - 1
        prompt = self.prompts[sentence]
        voice, sample = divmod(number - int(self._starts[sentence]), self.samples)
        speaker = prompt.speaker or self.speakers[voice]
        seed = candidate_seed(self.seed, prompt.id, speaker, sample)
        return UtteranceRequest(prompt, speaker, sample, seed)

    def take(self, kept: NDArray[np.int64]) -> UtteranceRequests:
        """Those of these numbers, in this order."""
        return UtteranceRequests(self.prompts, self.speakers, self.samples, self.seed, kept)

    def without(self, finished: Container[str]) -> UtteranceRequests:
        """Those whose names are not among these."""
        left = [item.id not in finished for item in self]
        return self.take(self._kept[np.array(left, bool)])


def utterance_requests(
    prompts: Sequence[SentencePrompt], speakers: Sequence[str], samples: int, seed: int
) -> list[UtteranceRequest]:
    """All utterances to be spoken: a sentence that names its voice is spoken in that one only."""
    return list(UtteranceRequests(prompts, speakers, samples, seed))


def chosen_speakers(
    policy: CodecLM, vocoder: Vocoder | None, prompts: Sequence[SentencePrompt], speakers: Sequence[str], option: str
) -> Sequence[str]:
    """Voices to speak in: those asked for or, if none is, the only one there is.

    Args:
        policy: what speaks.
        vocoder: what makes the sound; asked when the policy takes any name.
        prompts: the sentences; those that name their own voice need no other.
        speakers: voices asked for.
        option: what a user sets to choose some.

    Raises:
        ValueError: none is asked for, and there are several; the message lists them.
    """
    if speakers or all(prompt.speaker for prompt in prompts):
        return speakers
    known = policy.speakers or (None if vocoder is None else vocoder.speakers) or ()
    if len(known) > 1:
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise ValueError(f"no voice is named, and there are {len(known)}: {listed}; choose some with {option}")
    return known


def speak(
    policy: CodecLM,
    sampling: Sampling,
    items: Sequence[UtteranceRequest],
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
    encoded: EncodedTexts | None = None,
) -> Iterator[list[Candidate]]:
    """Speak utterances batch by batch, sentences of like length together.

    Args:
        policy: what speaks.
        sampling: how tokens are drawn.
        items: what is wanted; no utterance depends on another.
        batch_rows: utterances at a time.
        progress: called with the number of utterances that have ended since the last call.
        encoded: what :func:`encode` gave for these utterances; by default it is called here.

    Yields:
        The utterances of one batch.
    """
    encoded = encode(policy, items) if encoded is None else encoded
    lengths = (sum(len(part.text) for _, part in encoded[item.prompt.id, item.speaker]) for item in items)
    order = np.argsort(np.fromiter(lengths, np.int64, len(items)), kind="stable").tolist()
    for start in range(0, len(order), batch_rows):
        batch = [items[place] for place in order[start : start + batch_rows]]
        parts = [(item, *part) for item in batch for part in _numbered(encoded[item.prompt.id, item.speaker])]
        prompts = [part.prompt(_piece_seed(item, number)) for item, number, _, part in parts]
        whole = len(parts) == len(batch)
        spoken = policy.generate(prompts, sampling, progress if whole else None)
        if progress is not None and not whole:
            progress(len(batch))  # of utterances, not of their pieces
        said: dict[str, list[tuple[str, Spoken]]] = {item.id: [] for item in batch}
        for (item, _, text, _), one in zip(parts, spoken, strict=True):
            said[item.id].append((text, one))
        yield [_joined(item, said[item.id]) for item in batch]


def _numbered(parts: Sequence[tuple[str, Encoded]]) -> Iterator[tuple[int, str, Encoded]]:
    return ((number, *part) for number, part in enumerate(parts))


def _piece_seed(item: UtteranceRequest, number: int) -> int:
    """Of the first piece that of the utterance, so that a text of one piece is spoken as ever."""
    return candidate_seed(item.seed, "piece", "", number) if number else item.seed


def _joined(item: UtteranceRequest, said: Sequence[tuple[str, Spoken]]) -> Candidate:
    """One utterance of the pieces of a text."""
    speech = tuple(token for _, one in said for token in one.speech.tolist())
    finished = all(one.finished for _, one in said)
    whole = len(said) == 1 and said[0][0] == item.prompt.text
    pieces = () if whole else tuple(SpokenPiece(text, len(one.speech)) for text, one in said)
    return Candidate(item.prompt, item.speaker, item.sample, item.seed, speech, finished, pieces=pieces)


def encode(policy: CodecLM, items: Sequence[UtteranceRequest]) -> EncodedTexts:
    """What the policy reads for each sentence and voice: the pieces of its text, in their order."""
    return {name: _read(policy, name[1], prompt) for name, prompt in _once(items)}


def _once(items: Sequence[UtteranceRequest]) -> Iterator[tuple[tuple[str, str], SentencePrompt]]:
    """Each sentence and voice, once: samples of one lie side by side, and no two sentences have one name."""
    last: tuple[str, str] | None = None
    for item in items:
        name = item.prompt.id, item.speaker
        if name != last:
            yield name, item.prompt
        last = name


def _read(policy: CodecLM, speaker: str, prompt: SentencePrompt) -> tuple[tuple[str, Encoded], ...]:
    context = Context(speaker, prompt.instruct)
    return tuple((piece, policy.encode_text(piece, context)) for piece in policy.pieces(prompt.text))


class ReadTexts(EncodedTexts):
    """What :func:`encode` gives, read when it is asked for: hundreds of thousands of texts as numbers take gigabytes.

    Args:
        policy: what speaks.
        items: the utterances.
    """

    def __init__(self, policy: CodecLM, items: UtteranceRequests) -> None:
        self.policy, self._requests = policy, items
        self._numbers = {prompt.id: number for number, prompt in enumerate(items.prompts)}
        self._at_hand = lru_cache(256)(self._look)

    def _look(self, sentence: str, speaker: str) -> tuple[tuple[str, Encoded], ...]:
        return _read(self.policy, speaker, self._requests.prompts[self._numbers[sentence]])

    def __getitem__(self, name: tuple[str, str]) -> tuple[tuple[str, Encoded], ...]:
        """The pieces of a sentence in a voice."""
        return self._at_hand(*name)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Sentence and voice, in the order of the utterances."""
        return (name for name, _ in _once(self._requests))

    def __len__(self) -> int:
        """How many."""
        return sum(1 for _ in self)


def check_speakers(policy: CodecLM, items: Sequence[UtteranceRequest], vocoder: Vocoder | None = None) -> None:
    """Raise ``ValueError`` for voices that the policy does not know, before anything is spoken.

    Args:
        policy: what speaks.
        items: the utterances.
        vocoder: may know voices that the policy does not.
    """
    known = policy.speakers
    unknown = sorted({item.speaker for item in items} - {*(known or ()), ""})
    if known is not None and unknown:
        raise ValueError(f"unknown voices {', '.join(unknown)}: the policy speaks as {', '.join(known)}")
    named = next((item for item in items if item.speaker), None)
    if known is None and vocoder is None and named is not None:
        text, instruct = named.prompt.text, named.prompt.instruct
        contexts = Context(named.speaker, instruct), Context("", instruct)
        with_name, without = (policy.encode_text(text, context) for context in contexts)
        if with_name == without:
            raise ValueError(
                f"voice {named.speaker!r} has no effect: {type(policy).__name__} knows no voices, and the recipe names "
                "no model.vocoder that might; leave speakers out"
            )


def waveforms_of(vocoder: Vocoder, candidates: Sequence[Candidate]) -> list[Float[Tensor, " time"]]:
    """Sound of candidates that have speech tokens, as the vocoder gives it: pieces are vocoded apart, and joined."""
    parts = [(place, part) for place, one in enumerate(candidates) for part in one.cut if part]
    speech = [torch.tensor(part, dtype=torch.long) for _, part in parts]
    spoken = vocoder.speak(speech, [candidates[place].speaker for place, _ in parts])
    sounds: list[list[Tensor]] = [[] for _ in candidates]
    for (place, _), sound in zip(parts, spoken, strict=True):
        sounds[place].append(sound)
    return [one[0] if len(one) == 1 else torch.cat([torch.zeros(0), *one]) for one in sounds]


def write_sound(
    module: SpeaksAndListens, batch: Sequence[Candidate], folder: Path, start: Path
) -> dict[str, dict[str, str]]:
    """Write a WAV file of each utterance that has any speech.

    Args:
        module: its vocoder speaks.
        batch: utterances.
        folder: where to.
        start: directory that paths start from.

    Returns:
        The column ``audio`` of each utterance, by its name.
    """
    from tts_align.utils.audio import write_wav

    assert module.vocoder is not None
    spoken = [candidate for candidate in batch if candidate.speech]
    sounds = waveforms_of(module.vocoder, spoken)
    paths = [Path(folder, f"{file_name(one.id)}.wav") for one in spoken]
    for path, sound in zip(paths, sounds, strict=True):
        write_wav(path, sound, module.vocoder.sample_rate)
    return {one.id: {"audio": os.path.relpath(path, start)} for one, path in zip(spoken, paths, strict=True)}
