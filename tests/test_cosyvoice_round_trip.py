# SPDX-License-Identifier: Apache-2.0
"""A CosyVoice directory goes in, another comes out, by the commands that README.md names: fit, export, sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from places import RECIPES
from sources import save_shard, shard_rows, sound
from tiny import gap
from tiny_directory import FAMILIES, STALE, make_directory

from tts_align.cli.entry import label, run
from tts_align.cli.export import score
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.models.base.generation import Context
from tts_align.models.base.layout import TokenRow
from tts_align.models.cosyvoice.directory import load_state
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.cosyvoice.vocoder import thin_silence
from tts_align.utils.files import read_json_lines

OBJECTIVES = ("sft", "dpo", "kto", "tkto")
CODES, SAMPLES_PER_FRAME = 40, 480
# What a recipe for 0.5B parameters and a GPU needs to run here in a blink.
TINY = {
    "model.optimizer.init_args.lr": "0.01",
    "data.rows_per_step": "4",
    "trainer.accumulate_grad_batches": "1",
    "trainer.max_steps": "2",
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "run.threads": "1",
}
pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Recipes here set it for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_rows(seed: int = 0, **columns: Any) -> list[Row]:
    """Eight sentences, said well and badly; long enough for their text to be interleaved with it."""
    random = np.random.default_rng(seed)
    return [
        Row(
            id=f"{sentence}-{label}",
            text=f"Hello {sentence}",
            speech=tuple(random.integers(0, CODES, random.integers(26, 40)).tolist()),
            desirable=label == "good",
            **columns,
        )
        for sentence in range(8)
        for label in ("good", "bad")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each family, a manifest, sentences, and recordings of voices in every mode."""
    folder = tmp_path_factory.mktemp("cosyvoice")
    for family in FAMILIES:
        make_directory(folder / family, family, stale=True, voices=True)
    write_manifest(make_rows(), folder / "rows.jsonl")
    save_lines(folder / "sentences.jsonl", [{"id": "a", "text": "Hello"}, {"id": "b", "text": "Bye"}])
    voices = (
        (16_000, 1, {"speaker": "zero_shot", "audio": "0.wav", "text": "Hello."}),
        (44_100, 2, {"speaker": "cross_lingual", "audio": "1.wav"}),
        (22_050, 1, {"speaker": "instruct", "audio": "2.wav", "instruct": "Whisper."}),
    )
    for number, (rate, channels, _) in enumerate(voices):
        wave = np.stack([sound(number + channel, 0.6, rate) for channel in range(channels)], 1)
        soundfile.write(folder / f"{number}.wav", wave, rate)
    save_lines(folder / "voices.jsonl", [columns for _, _, columns in voices])
    return folder


def save_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(subcommand: str, objective: str, family: str, directory: Path, *overlays: str, **changes: Any) -> list[str]:
    """The command of the overlay's first lines, with changes: dotted keys with ``__`` for the dot."""
    names = (f"{objective}.yaml", f"models/{family}.yaml", *overlays)
    recipes = [part for name in names for part in ("--config", str(RECIPES / name))]
    options = {"model.policy.init_args.directory": directory, **TINY}
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    return [subcommand, *recipes, *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def fit_and_export(
    objective: str, family: str, source: Path, manifest: Path, folder: Path, *overlays: str, **changes: Any
) -> tuple[Any, Path]:
    """The fitted parts, and the directory that was written."""
    changes = {"data__manifest": manifest, "run__directory": folder / "run", **changes}
    cli = run(command("fit", objective, family, source, *overlays, **changes))
    assert cli.trainer.global_step == 2
    out = folder / "better"
    run(["export", "--config", str(folder / "run/config.yaml"), "--to", str(out)])
    return cli, out


def token_rows(policy: CosyVoiceLM, rows: Sequence[Row]) -> list[TokenRow]:
    contexts = [Context(row.speaker, row.instruct, row.prompt_text, row.prompt_speech) for row in rows]
    return [policy.encode_text(row.text, one).row(row.speech) for row, one in zip(rows, contexts, strict=True)]


def contents(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def farthest(one: CosyVoiceLM, other: CosyVoiceLM, rows: Sequence[Row]) -> float:
    """Largest difference of a log-probability between two models."""
    both = zip(score(one, token_rows(one, rows)), score(other, token_rows(other, rows)), strict=True)
    return max(float((mine - theirs).abs().max()) for mine, theirs in both)


def check_directory(source: Path, out: Path, moved: Sequence[str] = ()) -> None:
    """What was written has the source's files without those that would be stale, and other weights of equal shapes."""
    before, after = contents(source), contents(out)
    stale = {name for name in STALE if name.endswith(".plan") or name.startswith("vllm/")}
    hidden = {name for name in before if name.startswith(".")}
    assert after.keys() == before.keys() - stale - hidden
    assert [name for name in after if after[name] != before[name]] == ["llm.pt"]
    given, made = load_state(source / "llm.pt"), load_state(out / "llm.pt")
    assert list(made) == list(given)
    for name, value in made.items():
        assert (value.shape, value.dtype) == (given[name].shape, torch.float32)
    assert made["llm.model.lm_head.weight"].data_ptr() == made["llm.model.model.embed_tokens.weight"].data_ptr()
    changed = [name for name, value in made.items() if not torch.equal(value, given[name])]
    assert gap(made, given) > 1e-4
    assert not moved or all(any(part in name for part in moved) for name in changed)


def speak(
    objective: str, family: str, directory: Path, place: Path, folder: Path, recipe: Path | None = None, **changes: Any
) -> dict[str, Any]:
    """Rows by name, with their sound, which is checked; by another recipe, if one is given."""
    changes = {"model__policy__init_args__voices": place / "voices.jsonl", "model__sampling__max_ratio": 3, **changes}
    args = command("sample", objective, family, directory, **changes)
    if recipe is not None:
        args[1:5] = ["--config", str(recipe)]
    args += ["--prompts", str(place / "sentences.jsonl"), "--out", str(folder / "spoken.jsonl")]
    run(
        [
            *args,
            "--samples",
            "1",
            "--audio",
            "true",
            "--speakers",
            "[known,zero_shot,cross_lingual,instruct]",
        ]
    )
    rows = {row["id"]: row for _, row in read_json_lines(folder / "spoken.jsonl")}
    for row in rows.values():
        wave, rate = soundfile.read(folder / row["audio"], dtype="float32")
        heard = thin_silence(torch.tensor(row["speech"])) if family == "cosyvoice3" else row["speech"]
        assert (rate, wave.shape) == (24_000, (2 * len(heard) * SAMPLES_PER_FRAME,))
        assert np.isfinite(wave).all()
        assert np.abs(wave).max() > 1e-2
        row["wave"] = wave
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("overlays", [(), ("lora.yaml",)], ids=["full", "lora"])
def test_a_directory_goes_in_gets_other_weights_comes_out_and_speaks(
    family: str, objective: str, overlays: tuple[str, ...], place: Path, tmp_path: Path
):
    source, rows = place / family, make_rows()
    before = contents(source)
    cli, out = fit_and_export(objective, family, source, place / "rows.jsonl", tmp_path, *overlays)
    assert (tmp_path / "run/contrast").exists() == (objective == "tkto")
    # The recipe beneath names directories of the embedded model, which another class of the argument would inherit.
    assert cli.model.vocoder.directory.path == source
    assert "demo:" not in cli.saved_recipe()
    check_directory(source, out, moved=("self_attn.", "mlp.") if overlays else ())
    trained, again, base = cli.model.policy.eval(), CosyVoiceLM(str(out)).eval(), CosyVoiceLM(str(source)).eval()
    assert farthest(trained, again, rows) < 1e-4
    assert farthest(base, again, rows) > 1e-3
    report = json.loads((tmp_path / "run/export.json").read_text())
    assert report["difference"] < 1e-4
    assert len(speak(objective, family, out, place, tmp_path)) == 8
    assert contents(source) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_it_speaks_with_its_checkpoint_as_with_its_directory(family: str, place: Path, tmp_path: Path):
    """And its sound does not depend on how many speak at a time."""
    _, out = fit_and_export("dpo", family, place / family, place / "rows.jsonl", tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    exported = speak("dpo", family, out, place, tmp_path / "one", recipe=tmp_path / "run/config.yaml")
    last = tmp_path / "run/checkpoints/last.ckpt"
    trained = speak("dpo", family, place / family, place, tmp_path / "two", ckpt_path=last, batch_rows=1)
    base = speak("dpo", family, place / family, place, tmp_path / "three")
    assert exported.keys() == trained.keys() == base.keys()
    for name, row in exported.items():
        assert row["speech"] == trained[name]["speech"]
        np.testing.assert_allclose(row["wave"], trained[name]["wave"], rtol=0, atol=1e-4)
    assert any(row["speech"] != base[name]["speech"] for name, row in exported.items())


def test_rows_that_interleave_text_and_speech(place: Path, tmp_path: Path):
    out = {}
    for share in (0, 1):
        folder = tmp_path / str(share)
        folder.mkdir()
        cli, out[share] = fit_and_export(
            "sft", "cosyvoice2", place / "cosyvoice2", place / "rows.jsonl", folder, data__bistream_share=share
        )
        check_directory(place / "cosyvoice2", out[share])
        assert farthest(cli.model.policy.eval(), CosyVoiceLM(str(out[share])), make_rows()) < 1e-4
    weights = [load_state(out[share] / "llm.pt") for share in (0, 1)]
    assert gap(*weights) > 1e-4
    fill = [
        value["llm_decoder.bias"][CODES + 2] - load_state(place / "cosyvoice2/llm.pt")["llm_decoder.bias"][CODES + 2]
        for value in weights
    ]
    assert fill[1] > 5e-3  # which only these rows ask for, and the others push down
    assert fill[0] < 0


def test_cosyvoices_own_shards_hold_pairs(place: Path, tmp_path: Path):
    random = np.random.default_rng(0)

    def speech_tokens(_: int) -> list[int]:
        return random.integers(0, CODES, 12).tolist()

    instruct = "You are a helpful assistant.<|endofprompt|>"
    rows = shard_rows(8, speech_token=speech_tokens, reject_speech_token=speech_tokens, instruct=instruct)
    for number in range(2):
        save_shard(tmp_path / f"data/parquet_{number:09d}.tar", rows[4 * number : 4 * number + 4])
    names = "".join(f"{tmp_path}/data/parquet_{number:09d}.tar\n" for number in range(2))
    (tmp_path / "data/data.list").write_text(names)
    cli, out = fit_and_export("dpo", "cosyvoice3", place / "cosyvoice3", tmp_path / "data/data.list", tmp_path)
    check_directory(place / "cosyvoice3", out)
    kept = cli.datamodule.rows().values()
    assert len(kept) == 16
    assert sorted(row.speech for row in kept) == sorted(
        tuple(row[name]) for row in rows for name in ("speech_token", "reject_speech_token")
    )
    texts = {cli.model.policy.text.decode(row.text) for row in kept}
    assert texts == {f"{instruct}say {number}" for number in range(8)}


def test_an_instruction_stands_before_the_text(place: Path, tmp_path: Path):
    rows = make_rows(instruct="Speak softly.", prompt_text="Well, ", prompt_speech=(3, 4))
    rows[0] = replace(rows[0], instruct="")
    manifest = write_manifest(rows, tmp_path / "told.parquet")
    cli, out = fit_and_export("sft", "cosyvoice3", place / "cosyvoice3", manifest, tmp_path)
    check_directory(place / "cosyvoice3", out)
    kept = list(cli.datamodule.rows().values())
    texts = [cli.model.policy.text.decode(row.text) for row in kept]
    told = "You are a helpful assistant. Speak softly.<|endofprompt|>Well, Hello"
    assert sum(text.startswith(told) for text in texts) == len(rows) // 2 - 1
    assert sum(text.startswith("You are a helpful assistant.<|endofprompt|>Well, Hello") for text in texts) == 1
    assert {row.prompt for row in kept} == {(3, 4)}
    assert farthest(cli.model.policy.eval(), CosyVoiceLM(str(out)), rows) < 1e-4


def test_other_weights_of_the_directory_and_the_short_name(place: Path, tmp_path: Path):
    source = place / "cosyvoice3"
    choice = {"model__policy": "cosyvoice", "model__policy__init_args__directory": source}
    changes = {**choice, "model__policy__init_args__weights": "llm.rl.pt"}
    cli, out = fit_and_export("kto", "cosyvoice3", source, place / "rows.jsonl", tmp_path, **changes)
    assert isinstance(cli.model.policy, CosyVoiceLM)
    check_directory(source, out)
    given, made = load_state(source / "llm.rl.pt"), load_state(out / "llm.pt")
    assert 1e-4 < gap(made, given) < 0.1  # a few steps away from these weights
    assert gap(made, load_state(source / "llm.pt")) > 0.5  # not from those
    assert farthest(cli.model.policy.eval(), CosyVoiceLM(str(out)), make_rows()) < 1e-4


def test_a_directory_that_came_out_goes_in_again(place: Path, tmp_path: Path):
    _, first = fit_and_export("sft", "cosyvoice2", place / "cosyvoice2", place / "rows.jsonl", tmp_path)
    (tmp_path / "more").mkdir()
    _, second = fit_and_export("tkto", "cosyvoice2", first, place / "rows.jsonl", tmp_path / "more")
    assert contents(first).keys() == contents(second).keys()
    assert gap(load_state(first / "llm.pt"), load_state(second / "llm.pt")) > 1e-4


class LoudThirdJudge(Judge):
    """Finds a third of all sounds too loud for the words in them."""

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        for one in samples:
            assert one.waveform is not None
            assert one.sample_rate == 24_000
        errors = [1.0 if int(one.speech.sum()) % 3 == 0 else 0.0 for one in samples]
        return [Verdict(one.text, Reading.UNMARKED, cer, cer) for one, cer in zip(expected, errors, strict=True)]


def test_the_whole_way_from_sentences(place: Path, tmp_path: Path):
    source, file = place / "cosyvoice3", {name: str(tmp_path / f"{name}.jsonl") for name in ("drawn", "heard", "rows")}
    voices = {"model__policy__init_args__voices": place / "voices.jsonl", "model__sampling__max_ratio": 3}
    names = "[zero_shot,instruct]"
    sample = command("sample", "tkto", "cosyvoice3", source, **voices)
    sample += ["--prompts", str(place / "sentences.jsonl"), "--samples", "6", "--speakers", names]
    run([*sample, "--out", file["drawn"], "--audio", "true"])
    assert len(list((tmp_path / "drawn.jsonl.audio").glob("*.wav"))) == 24
    judge = command(
        "judge", "tkto", "cosyvoice3", source, **voices, model__judge="test_cosyvoice_round_trip.LoudThirdJudge"
    )
    run([*judge, "--candidates", file["drawn"], "--out", file["heard"]])
    label(["--judged", file["heard"], "--out", file["rows"], "--rule.keep", "all", "--rule.neither", "undesirable"])
    cli, out = fit_and_export("tkto", "cosyvoice3", source, Path(file["rows"]), tmp_path, **voices)
    check_directory(source, out)
    policy = cli.model.policy
    clone = policy.voices["zero_shot"]
    assert {row.prompt for row in cli.datamodule.rows().values()} == {clone.speech, ()}  # trained as it was spoken
    texts = {policy.text.decode(row.text) for row in cli.datamodule.rows().values()}
    assistant = "You are a helpful assistant."
    assert texts <= {
        f"{assistant}{told}<|endofprompt|>{before}{text}"
        for told, before in (("", "Hello."), (" Whisper.", ""))
        for text in ("Hello", "Bye")
    }
