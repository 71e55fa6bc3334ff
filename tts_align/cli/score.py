# SPDX-License-Identifier: Apache-2.0
"""Score a folder of recordings of any system: no model speaks, only judge and measures listen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from tts_align.cli.prepare import Processes
from tts_align.cli.recipe import full_path
from tts_align.cli.writing import writing_into
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.listening import MAX_FAILED_SHARE
from tts_align.evaluation.measures.base import UtteranceMeasure
from tts_align.evaluation.recordings import RecordedTest
from tts_align.evaluation.table import print_table
from tts_align.utils.assets import resolve
from tts_align.utils.files import check_not_source
from tts_align.utils.messages import quiet, say
from tts_align.utils.progress import bar
from tts_align.utils.readers import ReadError, read_yaml
from tts_align.utils.signals import check, finishing


class _Listening(LightningModule):
    """Carries what listens onto the devices of a trainer."""

    def __init__(self, listeners: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.listeners = torch.nn.ModuleList(listeners).requires_grad_(False).eval()


def score(
    folder: Path,
    prompts: str,
    suite: str = "sentences",
    judge: Judge | None = None,
    protocol: str | None = None,
    language: str = "",
    measures: Sequence[UtteranceMeasure] = (),
    readings: Judge | None = None,
    system: str | None = None,
    out: Path | None = None,
    batch_rows: int = 32,
    max_failed_share: float = MAX_FAILED_SHARE,
    trainer: Processes | None = None,
) -> None:
    """Score a folder of recordings of any system, named as the utterances of a test set, without a model that speaks.

    Writes what a test writes: utterances.jsonl and summary.json. A recording that is missing, unreadable, empty or
    silent counts as if nothing had been said, and is named. What is finished when the process is killed is kept: the
    same command resumes from there, with any number of processes.

    Args:
        folder: recordings, NAME.wav for each utterance of the test set (.flac, .ogg and .mp3 are taken, too); may be
            given without its flag.
        prompts: file or folder of the test set.
        suite: kind of the test set: sentences, manifest, seed (a .lst of Seed-TTS-Eval), cv3 (a folder of CV3-Eval) or
            jkyb (a file of Joyo-Kanji-Yomi, Parakeet edition).
        judge: listener that transcribes: a class, or a recipe whose model.judge is taken; without one only measures
            are made.
        protocol: rules that turn transcripts into error rates: seed, cv3, whisper, kana, pinyin or jkyb; by default the
            test set's own.
        language: BCP 47 code of the sentences, where the test set does not say it.
        measures: numbers of voice, quality and prosody, by class path.
        readings: listener that tells the readings of marked words, if it is not the judge that transcribes.
        system: name of the system in the tables; that of the folder by default.
        out: folder to write; that of the recordings with .scored behind its name by default.
        batch_rows: recordings heard together; does not change the numbers.
        max_failed_share: largest share of the recordings that may go without a verdict because a listener failed.
        trainer: where the work is done.
    """
    quiet()
    folder = Path(folder)
    if batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}")
    place = Path(out) if out is not None else folder.with_name(f"{folder.name}.scored")
    check_not_source(place, folder, resolve(prompts))
    test = RecordedTest(folder, prompts, suite, judge, protocol, language, measures, readings, system, max_failed_share)
    for line in test.remarks():
        say(line)
    module = _Listening([one for one in (judge, readings, *measures) if one is not None])
    work = partial(score_share, test=test, out=place, batch_rows=batch_rows)
    processes = (trainer or Processes()).trainer()  # which knows which of them is the first
    with writing_into(place, "score"):
        processes.work(module, lambda _, **where: work(**where))
    say(f"scored:       {place}")


def score_share(
    test: RecordedTest,
    out: Path,
    batch_rows: int,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
) -> None:
    """Listen to one process's share; the first writes the report.

    Args:
        test: what is scored, and who listens.
        out: folder to write.
        batch_rows: recordings heard together.
        rank: number of this process.
        world: number of processes that share the work.
        barrier: waits for the other processes, so that the rows are gathered by all of them or by none, and all
            end alike.
    """
    batches = test.begin(out, batch_rows, rank, world)
    with bar(sum(map(len, batches)), 0, "score", rank) as shown, finishing():
        for batch in batches:
            test.step(batch)
            shown.advance(len(batch))
            check()
    if barrier is not None:
        barrier()
    summary = test.finish(out, rank == 0)
    if summary is not None:
        print_table(summary)
    if barrier is not None:
        barrier()


def with_recipes(args: Sequence[str]) -> list[str]:
    """The command line with the folder behind its flag, and listeners that recipes or short names say in full.

    Args:
        args: the command line after the command.

    Raises:
        ValueError: a recipe names no judge.

    >>> with_recipes(["wavs", "--judge", "CTCJudge"])
    ['--folder', 'wavs', '--judge', 'tts_align.evaluation.judges.ctc.CTCJudge']
    """
    words = list(args)
    if words and not words[0].startswith("-"):
        words.insert(0, "--folder")
    for place, word in enumerate(words):
        flag, joined, value = word.partition("=")
        if flag not in ("--judge", "--readings"):
            continue
        if joined:
            words[place] = f"{flag}={_listener(value)}"
        elif place + 1 < len(words):
            words[place + 1] = _listener(words[place + 1])
    return words


def _listener(word: str) -> str:
    """A class or a recipe as the parser takes it."""
    if not word.endswith((".yaml", ".yml")):
        return word if word.startswith("{") else full_path(word)
    recipe = read_yaml(word)
    recipe = recipe if isinstance(recipe, Mapping) else {}
    model, key = recipe.get("model") or {}, "judge"
    if not isinstance(model, Mapping):
        raise ReadError(f"{word}: model", f"expected names and values, got {model!r:.60}")
    node = recipe.get("judge")
    if not node:
        node, key = model.get("judge"), "model.judge"
    if not node:
        raise ValueError(f"{word} names no model.judge to listen with")
    if not isinstance(node, Mapping) or "class_path" not in node:
        raise ReadError(f"{word}: {key}", f"expected class_path and init_args, got {node!r:.60}")
    if not isinstance(name := node["class_path"], str):
        raise ReadError(f"{word}: {key}.class_path", f"expected the name of a class, got {name!r:.60}")
    try:
        return json.dumps({**node, "class_path": full_path(name)})
    except TypeError as error:
        raise ReadError(f"{word}: {key}", f"expected text, numbers and lists ({error})") from None
