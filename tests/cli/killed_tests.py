# SPDX-License-Identifier: Apache-2.0
"""A program that tests and scores a small run: undisturbed, in two processes, and killed at many moments.

    python killed_tests.py FOLDER
    python killed_tests.py FOLDER short

The short form only scores, in one process and killed, which takes a second or two once the libraries are loaded.

Every command is a copy of this process, which has loaded the libraries once; what they leave behind is compared, and
the differences are written to ``FOLDER/result.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tts_align.evaluation.judges.base import Judge, Reading, Verdict
from tts_align.models.base.vocoder import Vocoder

RATE = 8000
NAMES = ("utterances.jsonl", "summary.json", "forgetting.jsonl")
READINGS = (Reading.RIGHT, Reading.WRONG, Reading.NEITHER)
RECIPE = ["--config", "recipe.yaml"]
SCORE = ["score", "spoken", "--prompts", "sentences.jsonl", "--judge", "killed_tests.Ear", "--language", "en"]
SCORE += ["--measures+", "tts_align.evaluation.measures.rhythm.DurationRatio", "--batch_rows", "3"]
CPU = ["--trainer.accelerator", "cpu"]
TWO = [*CPU, "--trainer.strategy", "ddp", "--trainer.devices", "2"]
KILLS = ("torn synthesise-aligned 2", "finish transcribe-base", "add transcribe-forgetting-aligned 1")
SCORE_KILLS = ("torn transcribe-theirs 2",)
SHORT_KILLS = ("torn transcribe-theirs 2", "write summary.json 1")


class Tube(Vocoder):
    """Half a period of a sine for each token, as high as the token's number."""

    sample_rate = RATE

    def speak(self, speech, speakers):
        waves = [torch.sin(torch.arange(80) * (1 + token) / 30) for token in range(20)]
        return [0.4 * torch.cat([waves[token] for token in one.tolist()]) for one in speech]


class Ear(Judge):
    """Hears a word for each hundredth of a second, and a reading by their number."""

    def judge(self, samples, expected):
        found = []
        for one, wanted in zip(samples, expected, strict=True):
            words = len(one.waveform) // 80
            rate = abs(words - len(wanted.text)) / 10
            reading = READINGS[words % 3] if wanted.right else Reading.UNMARKED
            found.append(Verdict(" ".join(["la"] * words), reading, rate, rate / 2, words / 7))
        return found


class OtherEar(Ear):
    """The same ear, as a judge of readings."""


def make_place(folder: Path) -> Path:
    """A fitted run, and recordings of another system."""
    from tiny import save_policy, save_recipe, save_rows

    from tts_align.data.records import Span
    from tts_align.evaluation.prompts import SentencePrompt, write_prompts
    from tts_align.utils.audio import write_wav

    place = folder / "place"
    place.mkdir()
    policy = save_policy(place / "policy")
    sentences = [
        SentencePrompt(
            f"s{i}",
            "abcdefgh"[i] * (2 + i % 3),
            "en",
            spans=(Span(0, 1, ("x",), ("y",)),),
            transcripts={"x": "x", "y": "y"},
        )
        for i in range(7)
    ]
    write_prompts(place / "sentences.jsonl", sentences)
    length = "tts_align.evaluation.measures.rhythm.DurationRatio"
    test = {"prompts": "sentences.jsonl", "batch_rows": 3, "language": "en", "audio": 3, "protocol": "cv3"}
    test |= {"readings": {"class_path": "killed_tests.OtherEar"}, "measures": [{"class_path": length}], "samples": 2}
    changes = {"judge": {"class_path": "killed_tests.Ear"}, "vocoder": {"class_path": "killed_tests.Tube"}}
    recipe = save_recipe(
        place,
        "sft",
        policy,
        save_rows(place),
        run__directory="run",
        run__threads=1,
        model__test=test,
        model__sampling={"max_ratio": 3},
        **{f"model__{name}": value for name, value in changes.items()},
    )
    assert recipe == str(place / "recipe.yaml")
    for number, one in enumerate(sentences[:-1]):
        write_wav(place / "spoken" / f"{one.id}.wav", torch.sin(torch.arange(80 * (3 + number)) / 9), RATE)
    return place


def kill_at(moment: str) -> Callable[[], None]:
    """What to do in a process so that it dies at a moment, as by ``kill -9``.

    Args:
        moment: ``add STAGE N``: behind the n-th rows of a stage; ``torn STAGE N``: in the middle of them; ``finish
            STAGE``: behind a stage's file; ``write NAME N``: behind the n-th writing of a file; ``sound N``: behind
            the n-th recording.
    """

    def arm() -> None:
        from tts_align.evaluation import audio, forgetting, report
        from tts_align.evaluation.stages.store import StageStore

        kind, *rest = moment.split()
        name, last = (rest[0] if kind != "sound" else ""), int(rest[-1]) if rest[-1].isdigit() else 1
        left = [last]

        def dying(counts: Callable[..., bool], real: Any, torn: bool = False) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                found = real(*args, **options)
                if counts(*args):
                    left[0] -= 1
                    if not left[0]:
                        if torn:
                            shard = args[0].shards.shard
                            os.truncate(shard, shard.stat().st_size - 9)
                        os.kill(os.getpid(), signal.SIGKILL)
                return found

            return call

        if kind in ("add", "torn"):
            StageStore.add = dying(lambda store, rows: store.shards.out.stem == name, StageStore.add, kind == "torn")
        elif kind == "finish":
            StageStore.finish = dying(lambda store, first: store.shards.out.stem == name, StageStore.finish)
        elif kind == "write":
            for module in (report, forgetting):
                for writes in ("write_json", "write_json_lines"):
                    setattr(module, writes, dying(lambda path, *_: Path(path).name == name, getattr(module, writes)))
        else:
            audio.write_wav = dying(lambda *_: True, audio.write_wav)

    return arm


def content(place: Path, part: str) -> dict[str, str]:
    """Text or digest of every file of a test that is compared."""
    import hashlib

    folder = place / part
    paths = [folder / name for name in NAMES] + sorted((folder / "audio").glob("*")) + sorted(folder.glob("stages/*"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in paths
        if path.exists()
    }


def run(place: Path, args: list[str], moment: str = "") -> dict[str, Any]:
    """One command; how it ended."""
    from forked import forked

    ended = forked(args, place, before=kill_at(moment) if moment else None)
    return {"moment": moment, "code": ended.code, "err": ended.err[-1500:]}


def in_two_processes(place: Path, args: list[str]) -> list[dict[str, Any]]:
    """One command in two processes that talk over gloo."""
    from forked import Started
    from processes import free_port

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    started = []
    for rank in range(2):
        named = place.with_name(f"{place.name}-{rank}")  # what it prints goes to files of this name
        if not named.exists():
            named.symlink_to(place, target_is_directory=True)
        started.append(Started([*args, *TWO], named, shared | {"LOCAL_RANK": str(rank)}))
    ended = [one.wait() for one in started]
    return [{"code": one.code, "err": one.err[-1500:], "out": one.out[-500:]} for one in ended if one is not None]


def killed(place: Path, args: list[str], moments: tuple[str, ...]) -> list[dict[str, Any]]:
    """One command, killed at one moment after another, and once left alone."""
    return [*(run(place, args, moment) for moment in moments), run(place, args)]


def main(folder: Path, short: bool) -> None:
    """Everything, for ``test_killed_tests.py``, or its short form."""
    from forked import preload

    if not short:  # it runs in a process that has loaded them
        preload()
    place = make_place(folder)
    if short:
        places = {name: Path(shutil.copytree(place, folder / name)) for name in ("whole", "killed")}
        score = [*SCORE, "--out", "run/theirs", "--system", "theirs", *CPU]
        ends = {"whole": [run(places["whole"], score)], "killed score": killed(places["killed"], score, SHORT_KILLS)}
        files = {name: {"theirs": content(one / "run", "theirs")} for name, one in places.items()}
        (folder / "result.json").write_text(json.dumps({"ends": ends, "files": files}))
        return
    ends = {"fit": [run(place, ["fit", *RECIPE, *CPU])]}
    places = {name: Path(shutil.copytree(place, folder / name)) for name in ("whole", "two", "killed")}
    test, score = ["test", *RECIPE], [*SCORE, "--out", "run/theirs", "--system", "theirs"]
    ends["whole"] = [run(places["whole"], [*test, *CPU]), run(places["whole"], [*score, *CPU])]
    ends["two"] = [*in_two_processes(places["two"], test), *in_two_processes(places["two"], score)]
    ends["killed"] = killed(places["killed"], [*test, *CPU], KILLS)
    ends["killed score"] = killed(places["killed"], [*score, *CPU], SCORE_KILLS)
    files = {name: {part: content(one / "run", part) for part in ("test", "theirs")} for name, one in places.items()}
    (folder / "result.json").write_text(json.dumps({"ends": ends, "files": files}))


if __name__ == "__main__":
    import killed_tests  # classes that recipes name are this module's by its own name

    killed_tests.main(Path(sys.argv[1]), short="short" in sys.argv[2:])
