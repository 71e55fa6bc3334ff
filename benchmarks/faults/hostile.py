# SPDX-License-Identifier: Apache-2.0
"""Broken and malicious inputs from a seed: each is taken or refused in plain words, and none runs, leaks or explodes.

A case takes a good file of one kind and spoils it: bytes that are cut, turned, repeated or invented; values of another
type, size or sign; names that lead elsewhere; documents that expand; archives that do. What reads the file in earnest
then reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hostile_commands
import yaml
from place import Place
from spoiling import (
    VALUES,
    Evil,
    compressed,
    document,
    hostile_recipe,
    lying,
    odd_table,
    spoil_bytes,
    spoilt_yaml,
)

LONGEST_LINES, LONGEST_CHARACTERS = 25, 6000
"""A message longer than that is no message; lists of faulty rows name twenty."""
MEMORY_MEGABYTES = 1500
"""By so much a reader may let the process grow; the files are a hundredth of that."""


@dataclass
class Kind:
    """One kind of input.

    Args:
        name: of the kind.
        share: of all cases.
        spoil: writes one case into a folder and says what reads it.
    """

    name: str
    share: float
    spoil: Callable[[Path, random.Random], Callable[[], object]]


@dataclass
class Result:
    """What became of the cases.

    Args:
        cases: how many of each kind.
        ends: taken, refused.
        faults: a case that was neither, with its number.
    """

    cases: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def kinds(place: Place, policy: Path) -> list[Kind]:
    """All kinds, made from good files of a place.

    Args:
        place: with its inputs.
        policy: directory of a tiny model.
    """
    from tts_align.cli.label import LabelRule, label
    from tts_align.data.manifest import read_manifest, write_manifest
    from tts_align.evaluation.candidates import read_candidates
    from tts_align.evaluation.prompts import read_prompts
    from tts_align.evaluation.report import read_utterances
    from tts_align.models.cosyvoice.directory import ModelDirectory, backbone_sizes, load_state
    from tts_align.models.policy.qwen2 import Qwen2CodecLM
    from tts_align.training.cache import TokenCache
    from tts_align.training.callbacks.logs import test_numbers
    from tts_align.training.run import Run
    from tts_align.utils.audio import load_audio

    rows = [json.loads(line) for line in (place.inputs / "rows.jsonl").read_text().splitlines()[:3]]
    rows.append(
        {"id": "p", "text": "あい", "pair": {"chosen": [1, 2], "rejected": [3]}, "attributes": {"a": 1, "b": "c"}}
    )
    heard = [json.loads(line) for line in (place.inputs / "heard.jsonl").read_text().splitlines()[:4]]
    sentences = [json.loads(line) for line in (place.inputs / "sentences.jsonl").read_text().splitlines()[:3]]
    said = [json.loads(line) for line in (place.inputs / "run/test/utterances.jsonl").read_text().splitlines()[:4]]
    summary = json.loads((place.inputs / "run/test/summary.json").read_text())
    config = json.loads((policy / "config.json").read_text())
    tokenizer = json.loads((policy / "tokenizer.json").read_text())
    sound = (place.inputs / "sounds").glob("*.wav").__next__().read_bytes()
    checkpoint = place.inputs / "run/checkpoints/last.ckpt"
    cosyvoice = (place.inputs / "cosyvoice/cosyvoice2.yaml").read_text()
    recipe = yaml.safe_load((place.inputs / "recipe.yaml").read_text())

    def manifest(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / "rows.jsonl"
        path.write_bytes(document(rows, lines=True)(draw))
        how = draw.choice(("stop", "drop"))
        return lambda: read_manifest(path, how, codebook_size=196)  # type: ignore[arg-type]

    def parquet(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / f"rows.{draw.choice(('parquet', 'tar'))}"
        if draw.random() < 0.5:
            write_manifest(read_manifest(place.inputs / "rows.jsonl").rows[:3], folder / "good.parquet")
            path.write_bytes(spoil_bytes((folder / "good.parquet").read_bytes(), draw))
        else:
            odd_table(path, draw)
        return lambda: read_manifest(path, "drop", unprepared=draw.random() < 0.5)

    def sentence(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / f"s.{draw.choice(('jsonl', 'jsonl', 'txt'))}"
        path.write_bytes(document(sentences, lines=True)(draw))
        return lambda: read_prompts(path)

    def candidate(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / "heard.jsonl"
        path.write_bytes(document(heard, lines=True)(draw))
        if draw.random() < 0.5:
            return lambda: read_candidates(path)
        return lambda: label(path, folder / "out.jsonl", LabelRule(keep="all", max_cer=10))

    def utterance(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / "utterances.jsonl"
        path.write_bytes(document(said, lines=True)(draw))
        return lambda: read_utterances(path)

    def numbers(folder: Path, draw: random.Random) -> Callable[[], object]:
        (folder / "summary.json").write_bytes(document(summary)(draw))
        return lambda: list(test_numbers(folder))

    def model(folder: Path, draw: random.Random) -> Callable[[], object]:
        shutil.copytree(policy, folder / "model")
        name = draw.choice(("config.json", "tokenizer.json", "model.safetensors"))
        path = folder / "model" / name
        spoilt = {"config.json": document(config), "tokenizer.json": document(tokenizer)}
        path.write_bytes(spoilt[name](draw) if name in spoilt else spoil_bytes(path.read_bytes(), draw))
        return lambda: Qwen2CodecLM(str(folder / "model"))

    def weights(folder: Path, draw: random.Random) -> Callable[[], object]:
        import torch

        path = folder / "checkpoints" / draw.choice(("last.ckpt", "last.ckpt", "llm.pt"))
        path.parent.mkdir()
        way = draw.random()
        if way < 0.6:
            path.write_bytes(spoil_bytes(checkpoint.read_bytes(), draw))
        elif way < 0.7:
            compressed(checkpoint, path)
        elif way < 0.8:
            path.write_bytes(pickle.dumps(Evil(place.work / "touched")))
        elif way < 0.9:
            torch.save(
                {"state_dict": draw.choice(VALUES[:40]), "epoch": draw.choice(VALUES[:9]), "global_step": 1}, path
            )
        else:
            torch.save({"a": Evil(place.work / "touched"), "b": torch.zeros(1).expand(10**11)}, path)
        if path.name == "llm.pt":
            return lambda: load_state(path)
        return lambda: (Run(folder).newest(), Run(folder).progress())

    def plain(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / "cosyvoice2.yaml"
        path.write_bytes(spoilt_yaml(cosyvoice, draw))
        return lambda: (ModelDirectory.find(folder).frames, ModelDirectory.find(folder).codebook_size)

    def backbone(folder: Path, draw: random.Random) -> Callable[[], object]:
        good = {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        (folder / "config.json").write_bytes(
            document(good | {"intermediate_size": 8, "vocab_size": 20, "rope_parameters": {"rope_theta": 1e6}})(draw)
        )
        return lambda: backbone_sizes(folder)

    def audio(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / "a.wav"
        path.write_bytes(lying(sound, draw) if draw.random() < 0.5 else spoil_bytes(sound, draw))
        return lambda: load_audio(path, 24000, draw.choice((None, 30.0)))

    def kaldi(folder: Path, draw: random.Random) -> Callable[[], object]:
        from sources import save_kaldi

        made = save_kaldi(folder / "kaldi", 3)
        path = draw.choice(sorted(one for one in made.iterdir() if one.is_file()))
        path.write_bytes(spoil_bytes(path.read_bytes(), draw))
        return lambda: read_manifest(made, "drop", unprepared=True)

    def listed(folder: Path, draw: random.Random) -> Callable[[], object]:
        path = folder / "data.list"
        path.write_bytes(spoil_bytes(f"{folder}/a.tar\n/dev/null\n{folder}\n".encode(), draw))
        return lambda: read_manifest(path, "drop")

    def cache(folder: Path, draw: random.Random) -> Callable[[], object]:
        import numpy as np
        from safetensors.numpy import save

        good = save(
            {"keys": np.zeros((2, 8), np.uint8), "offsets": np.array([0, 1, 3]), "values": np.zeros(3, np.float32)}
        )
        (folder / "c.safetensors").write_bytes(spoil_bytes(good, draw))
        return lambda: TokenCache.read(folder / "c.safetensors", needed=())

    def command(folder: Path, draw: random.Random) -> Callable[[], object]:
        from tts_align.cli.entry import main

        path = folder / "over.yaml"
        text = yaml.safe_dump(hostile_recipe(draw)) if draw.random() < 0.5 else ""
        path.write_bytes(text.encode() if text else spoilt_yaml(yaml.safe_dump(recipe), draw))
        base = ["--config", str(place.inputs / "recipe.yaml")] if text else []
        args = ["validate", *base, "--config", str(path), "--ckpt_path", str(folder / "nowhere.ckpt")]
        return lambda: main([*args, "--run.directory", str(folder / "run")])

    return [
        Kind("manifest", 0.2, manifest),
        Kind("parquet", 0.06, parquet),
        Kind("sentences", 0.1, sentence),
        Kind("candidates", 0.12, candidate),
        Kind("utterances", 0.05, utterance),
        Kind("summary", 0.04, numbers),
        Kind("model directory", 0.08, model),
        Kind("checkpoint", 0.07, weights),
        Kind("cosyvoice yaml", 0.06, plain),
        Kind("text model", 0.03, backbone),
        Kind("sound", 0.07, audio),
        Kind("kaldi folder", 0.04, kaldi),
        Kind("data.list", 0.02, listed),
        Kind("cache", 0.02, cache),
        Kind("recipe", 0.04, command),
        Kind("output is source", 0.03, hostile_commands.output_is_source(place, policy)),
        Kind("hub", 0.02, hostile_commands.hub(place, policy)),
        Kind("swapped files", 0.06, hostile_commands.swapped(place, policy)),
        Kind("numbers", 0.05, hostile_commands.numbers(place, rows)),
        Kind("second fit", 0.01, hostile_commands.again(place, policy)),
    ]


# ---------------------------------------------------------------------- the campaign


def campaign(place: Place, policy: Path, cases: int, seed: int) -> Result:
    """Spoil so many inputs, and see what their readers make of them.

    Args:
        place: with its inputs; what is written goes to its work folder.
        policy: directory of a tiny model.
        cases: how many.
        seed: of everything drawn; a case is drawn from it and its number alone.
    """
    every, result = kinds(place, policy), Result()
    shutil.rmtree(place.work, ignore_errors=True)
    place.work.mkdir(parents=True)
    before, here = sorted(os.listdir(place.work.parent)), Path.cwd()
    for number in range(cases):
        draw = random.Random(f"{seed} {number}")
        kind = draw.choices(every, [one.share for one in every])[0]
        folder = place.work / "case" / "folder"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        try:
            end = _tried(kind.spoil(folder, draw))
        finally:
            os.chdir(here)
        result.cases[kind.name] += 1
        result.ends[end.partition(":")[0]] += 1
        if end.startswith("fault"):
            result.faults.append(f"case {number}, {kind.name}: {end}")
        outside = sorted(one.name for one in folder.parent.iterdir()) + sorted(os.listdir(place.work))
        if outside != ["folder", "case"] or sorted(os.listdir(place.work.parent)) != before or _touched(folder):
            result.faults.append(f"case {number}, {kind.name}: something was run, or written elsewhere: {outside}")
            shutil.rmtree(place.work / "touched", ignore_errors=True)
    shutil.rmtree(place.work / "case", ignore_errors=True)
    return result


def _touched(folder: Path) -> bool:
    return any(path.name == "touched" for path in folder.rglob("*"))


def _tried(read: Callable[[], object]) -> str:
    """How a reader ended: taken, refused, or a fault with its reason."""
    from tts_align.cli.errors import explained_error

    said = io.StringIO()
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = "taken"
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            read()
    except SystemExit:
        message = said.getvalue().partition("tts-align: error: ")[2]
        end = _judged(message) if "ought not to happen" not in message else f"fault: {message[:500]}"
    except Exception as error:
        message = explained_error(error)
        end = _judged(message) if message is not None else f"fault: {type(error).__name__}: {error!s:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        end = f"fault: {type(error).__name__}: {error!s:.300}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    if grown > MEMORY_MEGABYTES or time.monotonic() - began > 20:
        return f"fault: took {grown} MB and {time.monotonic() - began:.0f} s ({end[:200]})"
    return end


def _judged(message: str) -> str:
    if not message.strip() or "Traceback" in message:
        return f"fault: no reason given: {message[:200]!r}"
    if message.count("\n") > LONGEST_LINES or len(message) > LONGEST_CHARACTERS:
        return f"fault: {message.count(chr(10))} lines, {len(message)} characters: {message[:200]!r}"
    return "refused"


if __name__ == "__main__":
    sys.exit("run benchmarks/faults/campaign.py")
