# SPDX-License-Identifier: Apache-2.0
"""Speak every sentence several times in every voice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_align.data.candidates import Candidate, candidate_id, candidate_seed
from tts_align.data.prompts import SentencePrompt, read_prompts
from tts_align.models.base import CodecLM, Prompt, Sampling
from tts_align.verbs.parts import SpeaksAndListens, bar
from tts_align.verbs.shards import Shards, digest


@dataclass(frozen=True)
class Wanted:
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


def wanted(prompts: Sequence[SentencePrompt], speakers: Sequence[str], samples: int, seed: int) -> list[Wanted]:
    """All utterances to be spoken: a sentence that names its voice is spoken in that one only."""
    return [
        Wanted(prompt, speaker, number, candidate_seed(seed, prompt.id, speaker, number))
        for prompt in prompts
        for speaker in ([prompt.speaker] if prompt.speaker else speakers or [""])
        for number in range(samples)
    ]


def speak(
    policy: CodecLM,
    sampling: Sampling,
    items: Sequence[Wanted],
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[Candidate]]:
    """Speak utterances batch by batch, sentences of like length together.

    Args:
        policy: what speaks.
        sampling: how tokens are drawn.
        items: what is wanted; no utterance depends on another.
        batch_rows: utterances at a time.
        progress: called with the number of utterances that have ended since the last call.

    Yields:
        The utterances of one batch.
    """
    texts = {(item.prompt.id, item.speaker): (item.prompt.text, item.speaker) for item in items}
    encoded = {name: policy.encode_text(*text) for name, text in texts.items()}
    order = sorted(items, key=lambda item: len(encoded[item.prompt.id, item.speaker][0]))
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        tokens = [encoded[item.prompt.id, item.speaker] for item in batch]
        prompts = [Prompt(text, item.seed, prefix) for item, (text, prefix) in zip(batch, tokens, strict=True)]
        spoken = policy.generate(prompts, sampling, progress)
        yield [
            Candidate(item.prompt, item.speaker, item.sample, item.seed, tuple(one.speech.tolist()), one.finished)
            for item, one in zip(batch, spoken, strict=True)
        ]


def sample(
    module: SpeaksAndListens,
    prompts: str | Path,
    out: Path,
    samples: int = 5,
    speakers: Sequence[str] = (),
    batch_rows: int = 64,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    overwrite: bool = False,
    barrier: Callable[[], None] | None = None,
) -> Path:
    """Speak every sentence several times in every voice, and write the utterances to one file.

    What is finished when the process is killed is kept: the same call goes on from there, with any number of processes.

    Args:
        module: its policy speaks, as its sampling says.
        prompts: JSONL file of sentences.
        out: JSONL file of candidates, written when all are there.
        samples: utterances per sentence and voice.
        speakers: voices; a sentence that names its own is spoken in that one only.
        batch_rows: utterances at a time; does not change them.
        seed: of all utterances.
        rank: number of this process.
        world: how many processes share the work.
        overwrite: replace a file made with other settings.
        barrier: waits for the other processes.
    """
    if samples < 1 or batch_rows < 1:
        raise ValueError(f"samples and batch_rows must be at least 1, got {samples} and {batch_rows}")
    sentences = read_prompts(prompts)
    items = wanted(sentences, speakers, samples, seed)
    key = digest("sample", module.policy.digest(), module.sampling, sentences, tuple(speakers), samples, seed)
    shards = Shards(out, key, [item.id for item in items], rank, world, overwrite)
    missing = set(shards.missing)
    mine = [item for item in items[rank::world] if item.id in missing]
    share = len(items[rank::world])
    with bar(share, share - len(mine), "sample", rank) as shown:
        for batch in speak(module.policy, module.sampling, mine, batch_rows, shown.advance):
            shards.append(candidate.to_row() for candidate in batch)
    shards.merge(barrier, rank)
    return Path(out)
