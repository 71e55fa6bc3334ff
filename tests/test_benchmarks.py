# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and what they compare does the same work; no time is asserted."""

import importlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import BENCHMARKS

from tts_align.evaluation.protocols import PROTOCOLS
from tts_align.models.base.generation import Sampling
from tts_align.models.policy.qwen2 import Sizes
from tts_align.objectives import DiffRO

pytestmark = pytest.mark.whole_runs

SIZES = Sizes(20, 12, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=24)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def loaded(name: str) -> ModuleType:
        return importlib.import_module(name)

    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step")


def toy(step: ModuleType, folder: Path) -> Any:
    shape = step.Shape(SIZES, sentences=6, text=(2, 5), speech=(3, 12), rows_per_step=4)
    if not (folder / "policy").exists():
        shape.save_models(folder)
        shape.save_rows(folder)
    return shape


@pytest.mark.parametrize(
    ("name", "bucketed"), [("sft", True), ("dpo", True), ("kto", True), ("tkto", True), ("kto", False)]
)
def test_a_step_does_what_the_lean_loop_does(name: str, bucketed: bool, folder: Path, load: Any) -> None:
    step = load("step")
    row = step.compare(name, bucketed, folder, toy(step, folder), steps=1, rounds=1)
    assert row["first_step_differs"] <= step.AGREES
    assert row["any_step_differs"] <= 1e-3
    assert row["passes"] == step.PASSES[name]
    assert row["seconds_per_step"].keys() == {"ours", "lean"}
    ratio = row["ratio_to_lean"]["cpu"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert f"{name} tiny {'bucketed' if bucketed else 'random'}" in step.table([{"size": "tiny", **row}])


def test_a_lean_loop_that_does_other_work_is_found_out(
    folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = load("step")
    monkeypatch.setattr(load("lean"), "BETA", 0.1002)
    with pytest.raises(AssertionError, match="do not do the same work"):
        step.compare("dpo", True, folder, toy(step, folder), steps=1, rounds=1)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step_rewards")


def toy_rewards(rewards: ModuleType, step: ModuleType, folder: Path) -> tuple[Path, Any, Any]:
    """Nine speech tokens; rows of different lengths, and twice as many that are desirable as one step takes."""
    sizes = replace(SIZES, codebook_size=9)
    shape = step.Shape(sizes, sentences=8, text=(2, 5), speech=(8, 16), rows_per_step=4)
    if not (folder / "policy").exists():
        shape.save_models(folder)
        rewards.save_rows(shape, folder)
    return folder, shape, rewards.parts_of(16, 1, 2, codebook=(3, 3))


@pytest.mark.parametrize("name", ["mtr", "diffro", "e2e2", "e2e3"])
def test_a_step_with_a_reward_model_does_what_its_lean_loop_does(name: str, spoken: Path, load: Any) -> None:
    """Rows of different lengths in one step, whose noise both sides draw."""
    rewards, step = load("step_rewards"), load("step")
    row = rewards.compare(name, "any", *toy_rewards(rewards, step, spoken), rounds=2)
    assert row["first_step_differs"] <= step.AGREES
    assert row["any_step_differs"] <= 1e-3
    assert f"{name} tiny any" in step.table([{"size": "tiny", **row}])


@pytest.mark.parametrize(
    ("name", "module", "constant", "value"),
    [
        ("mtr", "lean_rewards", "WAVELENGTH", 1.1e4),
        ("diffro", "lean_rewards", "BETA", 0.1002),
        ("e2e2", "lean_flow", "PROMPT_SHARE", 0.5),
        ("e2e2", "lean_flow", "LM", 0.11),
        ("e2e3", "lean_flow", "PROMPT_SHARE", 0.5),
        ("e2e3", "lean_flow", "VOICE", 0.11),
    ],
)
def test_a_lean_loop_with_a_reward_model_that_does_other_work_is_found_out(
    name: str, module: str, constant: str, value: float, spoken: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards, step = load("step_rewards"), load("step")
    monkeypatch.setattr(load(module), constant, value)
    with pytest.raises(AssertionError, match="do not do the same work"):
        rewards.compare(name, "any", *toy_rewards(rewards, step, spoken), rounds=1)


@pytest.mark.parametrize("clip", [0.002, 0.004])
def test_the_lean_loop_clips_the_gradient_of_each_row(
    clip: float, spoken: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sizes of the test the default of 1 is never reached."""
    rewards, step = load("step_rewards"), load("step")
    monkeypatch.setattr(rewards, "objective_of", lambda _: DiffRO(gradient_clip=0.002))
    monkeypatch.setattr(load("lean_rewards"), "ROW_CLIP", clip)
    with nullcontext() if clip == 0.002 else pytest.raises(AssertionError, match="do not do the same work"):
        rewards.compare("diffro", "any", *toy_rewards(rewards, step, spoken), rounds=1)


def test_utterances_are_the_same_in_a_batch_and_alone(load: Any) -> None:
    sampling = load("sampling")
    model, prompts = sampling.random_model(SIZES), sampling.random_prompts(5, SIZES, text=(1, 4))
    row = sampling.compare(model, prompts, Sampling(min_ratio=1.0, max_ratio=4.0), rounds=1)
    assert row["same_alone"] == 1
    assert row["utterances"] == 5
    assert row["tokens"] >= 5
    assert row["one_by_one_to_batched"]["cpu"]["low"] > 0


def test_the_demos_sentences_are_spoken_too(load: Any) -> None:
    sampling = load("sampling")
    model = load("tts_align.models.policy.qwen2").Qwen2CodecLM("demo:audio/base")
    prompts = sampling.demo_prompts(model, 3)
    assert [prompt.prefix for prompt in prompts] == [1, 1, 1]
    row = sampling.compare(model, prompts, Sampling(min_ratio=1.0, max_ratio=2.0), rounds=1)
    assert row["same_alone"] >= sampling.SAME


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("case", ["full", "lora", "lora_bfloat16", "decoding"])
def test_memory_is_measured_at_any_size(case: str, load: Any, tmp_path: Path) -> None:
    size, sizes = load("cosyvoice_size"), replace(SIZES, text_vocabulary=600)
    model = size.make_directory(tmp_path / "model", sizes)
    row = size.measure(case, model, rows=2, text=4, speech=6, device="cpu")
    assert row["peak_bytes"] > 1e8
    assert row["seconds"].keys() == {"cpu", "wall"}
    if case == "decoding":
        assert row["codes"] == 8
        return
    every = sum(value.numel() for value in load("tts_align.models.policy.qwen2").Qwen2CodecLM(sizes=sizes).parameters())
    assert row["trained_parameters"] == every if case == "full" else 0 < row["trained_parameters"] < every


def test_results_say_where_they_come_from(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load("machine")
    monkeypatch.setattr(machine, "HERE", tmp_path)
    found = json.loads(machine.save("toy", {"machine": machine.machine()}).read_text())["machine"]
    assert found.keys() >= {"commit", "versions", "device", "threads"}
    assert found["versions"]["torch"].startswith("2.")


def test_the_end_to_end_benchmark_collects_what_its_runs_say(
    folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All three losses, one optimiser step in each stage, and the longer stages behind; then nothing is run again."""
    monkeypatch.setattr("sys.argv", ["tts-align"])
    e2e = load("e2e")
    monkeypatch.setattr(e2e, "save", lambda name, results: (tmp_path / name).write_text(json.dumps(results)))
    short: dict[str, Any] = {"systems": (), "first": 1, "long": 1, "last": 1, "sentences": 2, "rows": 3, "max_rows": 16}
    e2e.main(tmp_path / "work", (0,), **short, out="found")
    found = json.loads((tmp_path / "found").read_text())
    rows = {row["system"]: row for row in found["rows"]}
    assert rows.keys() == {"base", "rm_fm_lm", "stage2", "stage2_as_long", "stage3"}
    for row in rows.values():
        assert (row["seed"], row["n"], row["reconstruction_utterances"]) == (0, 4, 3)
        assert 0 <= row["nearest_cer"] <= row["cer"]
        assert row["entropy_bits"] > 0
        assert 0 < row["tokens_unchanged"] <= 1
    assert rows["base"]["tokens_unchanged"] == 1
    command = rows["rm_fm_lm"]["command"]
    assert command.startswith("tts-align fit --config recipes/e2e.yaml --config recipes/e2e/stage2.yaml")
    (compared,) = (one for one in found["comparisons"] if (one["first"], one["second"]) == ("stage2", "stage3"))
    difference = rows["stage3"]["cer"] - rows["stage2"]["cer"]
    assert compared["cer"]["value"] == pytest.approx(difference, abs=2e-4)
    monkeypatch.setattr(e2e, "run", None)
    e2e.main(tmp_path / "work", (0,), **short, out="again")
    assert json.loads((tmp_path / "again").read_text())["rows"] == found["rows"]


def test_the_rates_of_the_second_stage_are_tried_on_the_policy_alone(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One step on one batch of good rows, and the rows add up over calls; the tokens of a run need its directory."""
    load("e2e")
    rates = load("e2e_rates")
    monkeypatch.setattr(rates, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    write = (tmp_path / "results/e2e_rates.json").write_text
    monkeypatch.setattr(rates, "save", lambda name, results: write(json.dumps(results)))
    for rate in (1e-9, 1e-2):
        rates.main("manifest", rates=(rate,), epochs=1, sentences=2, max_rows=16)
    still, moved = json.loads((tmp_path / "results/e2e_rates.json").read_text())["rows"]
    assert still["nats_before"] == moved["nats_before"]
    assert still["nats"] == pytest.approx(still["nats_before"], abs=0.002)
    assert moved["nats_of_training_rows"] < still["nats_of_training_rows"]
    assert (moved["n"], moved["steps"], moved["start"]) == (4, 1, "base")
    with pytest.raises(ValueError, match="expected --run for the speech tokens of a run"):
        rates.main("run")


def test_what_the_recipe_ends_with_is_read_from_its_run(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command itself is replaced by what it leaves; a folder that is there is no clean one."""
    recipe = load("e2e_recipe")
    rate = {"value": 0.25, "low": 0.1, "high": 0.4, "n": 8}
    heard = {name: rate for name in ("accuracy", "cer", "nearest_cer", "bad_case_ratio")}
    state = {"found": {"trained": {"cer": 0.01}, "base": {"cer": 0.02}}, "kept": ""}
    commands = []

    def leave(words: list[str], **_: Any) -> None:
        commands.append(words)
        run = Path(words[words.index("--run.directory") + 1])
        (run / "test").mkdir(parents=True)
        (run / "checkpoints").mkdir()
        (run / "test/summary.json").write_text(json.dumps({"base": heard, "aligned": heard, "failed": []}))
        torch.save({"callbacks": {"KeepBase": state, "Movement": {}}}, run / "checkpoints/last.ckpt")

    monkeypatch.setattr(recipe.subprocess, "run", leave)
    monkeypatch.setattr(recipe, "machine", dict)
    saved: dict[str, Any] = {}
    monkeypatch.setattr(recipe, "save", lambda name, results: saved.update({name: results}))
    recipe.main(tmp_path / "run", options="--trainer.max_steps 1")
    found = saved["e2e_recipe"]
    assert found["test"]["aligned"] == {name: rate for name in ("accuracy", "cer", "nearest_cer")}
    assert (found["held_out"], found["kept_base_because"]) == (state["found"], "")
    assert commands[0][-2:] == ["--trainer.max_steps", "1"]
    assert found["command"].startswith("tts-align fit --config recipes/e2e.yaml")
    with pytest.raises(FileExistsError, match="clean folder"):
        recipe.main(tmp_path / "run")


def test_scoring_counts_what_jiwer_counts(load: Any) -> None:
    """Times are only noted, but the saved ones keep the bound."""
    pytest.importorskip("jiwer")
    scoring = load("scoring")
    for name, language in (("cv3", "en"), ("cv3", "ja"), ("jkyb", "ja")):
        said, heard = zip(*scoring.make_pairs(language, 20), strict=True)
        protocol = scoring.find_protocol(name)
        references = [scoring.reference_of(text, language, place) for place, text in enumerate(said)]
        ours = scoring.ours(protocol, references, heard)
        # Its texts end with the punctuation that the protocol deletes.
        assert ours == scoring.theirs(protocol, language, [text[:-1] for text in said], [text[:-1] for text in heard])
    row = scoring.compare("cv3", "en", pairs=5, rounds=1)
    assert row["ratio"] > 0
    saved = json.loads((BENCHMARKS / "results" / "scoring.json").read_text())["rows"]
    assert {(row["protocol"], row["language"]) for row in saved} == set(scoring.CASES)
    assert set(PROTOCOLS) == {row["protocol"] for row in saved}
    assert not [row for row in saved if row["ratio"] > scoring.LIMIT]
    assert all(row["pairs"] == 2000 for row in saved)
