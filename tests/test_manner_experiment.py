# SPDX-License-Identifier: Apache-2.0
"""The manner experiment at toy size: it is built, the recipe trains on it, the benchmark measures it."""

import importlib
import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from pitched import pitched_bank
from places import BENCHMARKS, RECIPES

from tts_align.cli.demo import manner_build
from tts_align.cli.demo.build import GateError
from tts_align.cli.demo.gates import Gate
from tts_align.cli.demo.manner_build import MannerPlan, build_manner
from tts_align.cli.demo.training import Schedule
from tts_align.cli.entry import label, run
from tts_align.cli.label import LabelRule
from tts_align.data.demo.manner import MANNERS, QUALITIES
from tts_align.data.demo.sentences import SPEAKERS
from tts_align.data.manifest import read_manifest
from tts_align.models.codec.mel import CodecSizes
from tts_align.models.policy.qwen2 import Sizes
from tts_align.utils import assets
from tts_align.utils.files import read_json_lines, write_json_lines

pytestmark = pytest.mark.whole_runs
ONE_STEP = Schedule(1, 2, 1e-3)
CODEC = CodecSizes(
    SPEAKERS,
    mel_channels=16,
    embedding_channels=8,
    encoder_channels=8,
    encoder_blocks=1,
    decoder_channels=8,
    decoder_blocks=1,
)
BASE = Sizes(
    0, 0, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=24, prefix_format="<{speaker}>"
)
PLAN = MannerPlan(0, CODEC, ONE_STEP, 4, BASE, ONE_STEP, ONE_STEP, 1, 2, 1, sentences=4, heard=16, spoken=1)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory):
    """Built although nothing is learnt in one step: babble has no reading, so what says neither is undesirable."""
    place = tmp_path_factory.mktemp("manner")
    with pytest.MonkeyPatch.context() as patch:
        pitched_bank(patch)
        with pytest.raises(GateError, match=r"because of: .*base CER"):
            build_manner(place / "assets/manner", plan=PLAN, work=place / "work")
        assert not (place / "assets").exists()
        patch.setattr(Gate, "passed", True)
        patch.setattr(manner_build, "LabelRule", lambda keep: LabelRule(keep=keep, neither="undesirable"))
        build_manner(place / "assets/manner", plan=PLAN, work=place / "work")
        (place / "assets/audio").symlink_to(assets.ASSETS / "audio")
        patch.setattr(assets, "ASSETS", place / "assets")
        yield place


def test_holds_all_that_the_recipe_names(experiment: Path, capsys: pytest.CaptureFixture) -> None:
    made = {str(path.relative_to(experiment / "assets/manner")) for path in (experiment / "assets/manner").rglob("*.*")}
    assert made == {
        *("base/config.json", "base/model.safetensors", "base/tokenizer.json", "build.json"),
        *("codec/config.json", "codec/model.safetensors"),
        *("dev.parquet", "preference.parquet", "recordings.parquet", "recordings_dev.parquet", "rule.json"),
        *(f"sentences/{split}.jsonl" for split in ("dev", "preference", "test")),
    }
    rows = read_manifest(experiment / "assets/manner/recordings.parquet").rows
    assert len(rows) == 4 * 2 * 2
    assert {row.attributes["manner"] for row in rows} <= set(MANNERS)
    assert {row.attributes["quality"] for row in rows} <= set(map(float, QUALITIES))
    for row in rows:
        assert row.desirable == (row.notes["transcript"] == row.target_text)
    assert not any(row.attributes for row in read_manifest(experiment / "assets/manner/preference.parquet").rows)
    build_manner(experiment / "assets/manner", plan=PLAN, work=experiment / "work")
    assert capsys.readouterr().out.count("already there") == 8


def test_all_rounds_run_by_the_commands_of_the_recipe(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(RECIPES)
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.callbacks", "null"]
    short += ["--model.test", "null", "--run.threads", "1"]
    header = (RECIPES / "diffro/next_round.yaml").read_text().splitlines()
    commands = [shlex.split(line[1:])[1:] for line in header if line.startswith("#   tts-align ")]
    assert [words[0] for words in commands] == ["fit", *["sample", "judge", "label", "fit"] * 2]
    cli = run([*commands[0], *short, "--model.reward_fit.epochs", "1"])
    assert cli.model.objective.targets == {"manner": "lively"}
    assert {"asr", "ctc", "manner", "quality"} == set(cli.model.parts.reward.tasks)
    for number, (speak, listen, choose, learn) in enumerate((commands[1:5], commands[5:]), 1):
        run(speak)
        run(listen)
        all_right(None, Path(f"runs/heard{number}.jsonl"), Path(f"runs/heard{number}.jsonl"))
        label([*choose[1:], "--rule.min_measures", "{manner.lively: 0}"])
        assert len(read_manifest(f"runs/spoken{number}.parquet").rows) == 4 * 2 * 4
        cli = run([*learn, *short])
        assert cli.trainer.global_step == 2
        assert cli.config["fit"]["data"]["manifest"] == f"runs/spoken{number}.parquet"
        assert Path(f"runs/manner{number + 1}/config.yaml").is_file()
        assert cli.model.objective.sft_weight > 0
        assert not cli.model.objective.free
        assert str(cli.model.parts.reward.directory) == "runs/manner1/reward/model"


def all_right(parts: object, drawn: Path, heard: Path, *_: object, **__: object) -> None:
    """Babble has no reading."""
    verdict = {"reading": "right", "cer": 0.0, "nearest_cer": 0.0, "transcript": "", "finished": True}
    write_json_lines(heard, [row | verdict for _, row in list(read_json_lines(drawn))])


def test_without_a_build_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="tts-align demo build --corpus manner"):
        assets.resolve("demo:manner/base")


def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("diffro_manner")


def test_the_benchmark_measures_both_ways_and_resumes(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load(monkeypatch)
    listener = importlib.import_module("style_listener")
    monkeypatch.setattr(listener, "SCHEDULE", Schedule(2, 4, 1e-3))
    monkeypatch.setattr(benchmark, "LISTENER_CLIPS", 8)
    monkeypatch.setattr(benchmark, "TOLD_CLIPS", 6)
    monkeypatch.setattr(benchmark, "GRID", {name: (benchmark.Setting(),) for name in ("manner", "quality")})
    later = {
        number: tuple(benchmark.Setting(1e-4, 1.0, round=number, imitate=imitate) for imitate in (False, True))
        for number in (2, 3)
    }
    monkeypatch.setattr(benchmark, "LATER", {"manner": later})
    monkeypatch.setattr(benchmark, "SPEAKS", {"manner": {2: benchmark.Setting(1e-4, free=True), 3: later[2][0]}})
    alone = {n: (benchmark.Setting(1e-4, round=n, imitate=True, alone=True),) for n in (1, 2)}
    monkeypatch.setattr(benchmark, "ALONE", {"manner": alone})
    monkeypatch.setattr(benchmark, "SPEAKS_ALONE", {1: benchmark.BASE, 2: alone[1][0]})
    monkeypatch.setattr(benchmark, "LEAST", {"manner": {"manner.lively": 0.0}})  # nobody has learnt to hear it
    monkeypatch.setattr(benchmark, "judge", all_right)
    given = {
        "seeds": (0,),
        "assets": experiment / "assets/manner",
        "work": tmp_path,
        "results": tmp_path / "found.json",
    }
    for _ in range(2):
        benchmark.main(**given, sentences=2, dev_sentences=2, reward_epochs=1)
    found = json.loads((tmp_path / "found.json").read_text())
    systems = {name: ["base", "diffro_text", f"diffro_{name}"] for name in ("manner", "quality")}
    rounds = [f"{name}_manner_round{number}" for number in (2, 3) for name in ("diffro", "sft")]
    rounds += [f"sft_manner_alone_round{number}" for number in (1, 2)]
    systems["manner"] += rounds
    assert [(row["attribute"], row["system"]) for row in found["rows"]] == [
        (name, system) for name, names in systems.items() for system in names
    ]
    for name in ("second-0-manner", "third-0-manner", "first-0-manner-alone", "second-0-manner-alone"):
        spoken = read_manifest(tmp_path / f"{name}.parquet").rows
        assert spoken
        assert all(row.desirable for row in spoken)
    assert all(row["n"] == 4 and 0 <= row["wanted_by_listener"] <= 1 for row in found["rows"])
    assert [one["system"] for one in found["pooled"]] == ["diffro_manner", *rounds, "diffro_quality"]
    monkeypatch.setattr(benchmark.MannerCorpus, "hear", None)  # nothing is spoken again
    benchmark.main(**given, sentences=2, dev_sentences=2, reward_epochs=1)


def test_a_setting_must_stay_clear_and_is_as_good_as_its_weaker_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load(monkeypatch)
    base = {"cer": 0.02, "nearest_cer": 0.01}

    def heard(rule: float, listener: float, cer: float) -> dict[str, float]:
        return {"wanted_by_rule": rule, "wanted_by_listener": listener, "cer": cer, "nearest_cer": 0.01}

    tried = [
        (benchmark.Setting(anchor=anchor), heard(*numbers))
        for anchor, numbers in enumerate([(0.99, 0.99, 0.03), (0.95, 0.5, 0.02), (0.8, 0.8, 0.024)])
    ]
    assert benchmark.choose(tried, base).anchor == 2
    assert benchmark.choose(tried[:2], base).anchor == 0  # what does not move is no use, however clear
    assert benchmark.choose(tried[1:2], base).anchor == 1
    unclear = [(setting, numbers | {"nearest_cer": 0.05 - setting.anchor / 100}) for setting, numbers in tried]
    assert benchmark.choose(unclear, base).anchor == 2  # both that reach the share are unclear: the clearer one
    assert benchmark.choose(unclear[1:2], base).anchor == 1
    style = benchmark.Style("lively", 5)
    one = benchmark.Heard("a", "sakura", style, benchmark.Style("plain", 3), 0.1, 0.0, 1.0)
    assert one.numbers("manner")["wanted_by_rule"] == one.numbers("quality")["wanted_by_rule"] == 1
    assert one.numbers("manner")["wanted_by_listener"] == one.numbers("quality")["wanted_by_listener"] == 0
