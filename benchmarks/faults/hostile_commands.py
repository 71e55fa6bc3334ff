# SPDX-License-Identifier: Apache-2.0
"""Whole commands with hostile names and values: outputs that are inputs, hubs that are not there, swapped files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from place import Place

SCRIPT = {
    "sample": ("--prompts", "sentences.jsonl"),
    "judge": ("--candidates", "drawn.jsonl"),
    "label": ("--judged", "heard.jsonl"),
    "prepare": ("--source", "recordings.jsonl"),
}
"""Commands that read a file and write another: the option of the first, and a good one among the inputs."""
HUBS = (
    "nobody/no-such-model",
    "../../etc",
    "hf://x/y",
    "http://127.0.0.1:1/x",
    "file:///etc",
    "a" * 300,
    "~",
    "-",
    "\0",
)
"""Names of models that are none; nothing is to be fetched, and nothing read from elsewhere."""
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 400, "true", '"1"', "null", "[1]", "{}")
"""What may stand for a number in JSON."""


def run(args: list[str]) -> None:
    """Run a command in this process."""
    from tts_align.cli.entry import main

    main(args)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, links followed."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


def called(path: Path, draw: random.Random) -> Path:
    """The same file or folder by another name: through a link, a detour, or as a hard link."""
    beside = path.with_name(f"other{path.suffix}")
    ways: list[Callable[[], Path]] = [
        lambda: path,
        lambda: Path(os.path.relpath(path)),
        lambda: path.parent / "." / ".." / path.parent.name / path.name,
        lambda: (beside.symlink_to(path), beside)[1],
        lambda: (beside.symlink_to(path.parent), beside / path.name)[1],
    ]
    if path.is_file():
        ways.append(lambda: (beside.hardlink_to(path), beside)[1])
    return draw.choice(ways)()


def output_is_source(place: Place, policy: Path) -> Callable[[Path, random.Random], Callable[[], object]]:
    """Commands that are told to write where they read: they refuse, and what they read stays as it was."""

    def made(folder: Path, draw: random.Random) -> Callable[[], object]:
        sources = folder / "sources"
        sources.mkdir()
        command = draw.choice((*SCRIPT, "export", "score", "compare", "recipes"))
        args = COMMANDS.get(command, _plain)(place, policy, sources, command, draw)

        def work() -> None:
            before = content(sources)
            try:
                run(args)
            finally:
                after = content(sources)
                gone = [name for name, data in before.items() if after.get(name) != data]
                if gone:
                    raise AssertionError(f"`{' '.join(args)[:300]}` has changed what it reads: {gone[:3]}")

        return work

    return made


def _plain(place: Place, policy: Path, sources: Path, command: str, draw: random.Random) -> list[str]:
    option, name = SCRIPT[command]
    source = sources / name
    shutil.copy(place.inputs / name, source)
    args = place.args(command)
    args[args.index(option) + 1] = str(source)
    args[args.index("--out") + 1] = str(called(source, draw))
    return [*args, "--overwrite", "true"] if command in ("sample", "judge") else args


def _export(place: Place, policy: Path, sources: Path, command: str, draw: random.Random) -> list[str]:
    source = Path(shutil.copytree(policy, sources / "model"))
    target = draw.choice((called(source, draw), source / "inside", sources))
    model = ["--model.policy.init_args.directory", str(source), "--run.directory", str(sources.parent / "run")]
    return ["export", "--config", str(place.inputs / "recipe.yaml"), *model, "--to", str(target), "--overwrite", "true"]


def _score(place: Place, policy: Path, sources: Path, command: str, draw: random.Random) -> list[str]:
    sounds = Path(shutil.copytree(place.inputs / "sounds", sources / "sounds"))
    prompts = sources / "prompts.jsonl"
    names = sorted(one.stem for one in sounds.glob("*.wav"))
    prompts.write_text("".join(json.dumps({"id": name, "text": "a"}) + "\n" for name in names))
    out = draw.choice((called(sounds, draw), called(prompts, draw), sounds / names[0]))
    return ["score", str(sounds), "--prompts", str(prompts), "--out", str(out), *_measure()]


def _measure() -> list[str]:
    """A measure that needs no model."""
    return ["--measures", '["tts_align.evaluation.measures.repetition.Repetition"]']


def _compare(place: Place, policy: Path, sources: Path, command: str, draw: random.Random) -> list[str]:
    tested = Path(shutil.copytree(place.inputs / "run/test", sources / "run/test"))
    (tested / "report.html").write_text("of the run")
    out = draw.choice((called(tested, draw), tested / "utterances.jsonl"))
    return ["compare", str(tested.parent), "--out", str(out), "--resamples", "10"]


def _recipes(place: Place, policy: Path, sources: Path, command: str, draw: random.Random) -> list[str]:
    (sources / "tkto.yaml").write_text("mine: 1\n")
    return ["recipes", "--copy", str(draw.choice((called(sources, draw), sources / "tkto.yaml")))]


COMMANDS: dict[str, Callable[[Place, Path, Path, str, random.Random], list[str]]] = {
    "export": _export,
    "score": _score,
    "compare": _compare,
    "recipes": _recipes,
}


def hub(place: Place, policy: Path) -> Callable[[Path, random.Random], Callable[[], object]]:
    """Models by names that are none, without a network."""

    def made(folder: Path, draw: random.Random) -> Callable[[], object]:
        from tts_align.models.cosyvoice.lm import CosyVoiceLM
        from tts_align.models.policy.qwen2 import Qwen2CodecLM
        from tts_align.models.reward.model import RewardModel

        name, kind = draw.choice(HUBS), draw.choice((Qwen2CodecLM, RewardModel, CosyVoiceLM))
        return lambda: kind(name)

    return made


def swapped(place: Place, policy: Path) -> Callable[[Path, random.Random], Callable[[], object]]:
    """Model directories whose files come from others, or are each other's."""

    def made(folder: Path, draw: random.Random) -> Callable[[], object]:
        from tiny import make_reward

        from tts_align.models.policy.qwen2 import Qwen2CodecLM
        from tts_align.models.reward.model import RewardModel

        mine = Path(shutil.copytree(policy, folder / "mine"))
        other = folder / "other"
        if draw.random() < 0.5:
            shutil.copytree(place.inputs / "cosyvoice", other)
        else:
            make_reward().save(other)
        into = draw.choice(sorted(one for one in mine.iterdir() if one.is_file()))
        taken = draw.choice(
            sorted(one for one in (*other.rglob("*"), *mine.iterdir()) if one.is_file() and one != into)
        )
        shutil.copy(taken, into)
        kind: Any = draw.choice((Qwen2CodecLM, Qwen2CodecLM, RewardModel))
        return lambda: kind(str(mine))

    return made


def numbers(place: Place, rows: list[dict[str, Any]]) -> Callable[[Path, random.Random], Callable[[], object]]:
    """Numbers that are none in the columns of a manifest: rewards, attributes, vectors, languages and labels."""

    def made(folder: Path, draw: random.Random) -> Callable[[], object]:
        from tts_align.data.manifest import read_manifest

        row = dict(rows[0])
        column = draw.choice(("scores", "attributes", "speaker_vector", "label", "speech", "language", "notes"))
        mark = "NUMBER"
        shape = {"speaker_vector": [0.5, mark], "label": mark, "speech": [1, mark], "language": mark}
        row[column] = shape.get(column, {"reward": mark, "": 1})
        text = json.dumps(row, ensure_ascii=False).replace(f'"{mark}"', draw.choice((*NUMBERS, '"klingon"', '"e n"')))
        path = folder / "rows.jsonl"
        path.write_text(text + "\n")
        how: Any = draw.choice(("stop", "drop"))

        def read() -> None:
            found = read_manifest(path, how, codebook_size=196).rows
            if column == "language" and found and found[0].language:  # null is none
                raise AssertionError(f"taken as a language: {found[0].language!r}")

        return read

    return made


def again(place: Place, policy: Path) -> Callable[[Path, random.Random], Callable[[], object]]:
    """A second ``fit`` in the directory of a run that another recipe made: told so, and the run stays as it is."""

    def made(folder: Path, draw: random.Random) -> Callable[[], object]:
        run_directory = Path(shutil.copytree(place.inputs / "run", folder / "run"))
        name, value = draw.choice(
            (
                ("model.optimizer.init_args.lr", "0.5"),
                ("objective", "sft"),
                ("data.rows_per_step", "8"),
                ("run.directory", ""),
                ("model.policy.init_args.directory", "demo:audio/base"),
            )
        )
        args = place.args("fit")
        args[args.index("--run.directory") + 1] = str(run_directory)
        args += [f"--{name}", value]

        def work() -> None:
            before = content(run_directory / "checkpoints")
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    run(args)
                finally:
                    if content(run_directory / "checkpoints") != before:
                        raise AssertionError(f"another recipe ({name} {value}) has written over the run")
            raise AssertionError(f"another recipe ({name} {value}) was not refused")

        return work

    return made


def names(folder: Path, cases: int, seed: int) -> list[str]:
    """Hostile names of utterances become files in their folder, and different names different files."""
    import numpy as np

    from tts_align.evaluation.audio import write_pair

    faults = []
    for number in range(cases):
        draw = random.Random(f"{seed} {number}")
        pieces = ("../", "..", "/", "\\", "\0", "a", "あ", "\n", "%2F", "\ud800", "x" * 200, "C:", "~", "-", " ", ".")
        name = "".join(draw.choices(pieces, k=draw.randrange(1, 6)))
        inside = folder / "names" / "audio"
        try:
            write_pair(inside, name, {"base": np.zeros(8)}, 24000)
        except Exception as error:
            faults.append(f"name {name!r:.60}: {type(error).__name__}: {error}")
        odd = [path for path in (folder / "names").rglob("*") if path.is_file() and path.parent != inside]
        faults += [f"name {name!r:.60} wrote {one}" for one in odd]
        if len(list(inside.iterdir())) != 1:
            faults.append(f"name {name!r:.60} wrote {len(list(inside.iterdir()))} files")
        shutil.rmtree(folder / "names")
    return faults
