# SPDX-License-Identifier: Apache-2.0
"""From files of answers to tables and to labelled rows, without a browser."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shlex
import shutil
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from studio import answers, attentive, scored, wavs
from tiny import build, gap, make_trainer, weights

from tts_align.cli.entry import main
from tts_align.cli.listen import label, make, score
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.listening_test.answers import read_key, read_sheets
from tts_align.evaluation.listening_test.design import Plan
from tts_align.evaluation.listening_test.labels import HumanRule
from tts_align.evaluation.listening_test.records import KINDS, ListeningTestError
from tts_align.evaluation.listening_test.screening import Rules
from tts_align.objectives import DPO

FEW = {"resamples": 200}


@pytest.fixture(scope="module")
def test(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A test of a run with everything, and its key."""
    folder = tmp_path_factory.mktemp("test")
    plan = Plan(kinds=KINDS, checks=1, repeats=1)
    made = make([str(scored(folder / "run", 6))], folder / "test.html", plan=plan)
    return made.key, json.loads(made.key.read_text("utf-8"))


def save(folder: Path, found: Any, name: str = "") -> Path:
    path = folder / f"{name or found['listener']}.json"
    path.write_text(json.dumps(found), "utf-8")
    return path


def about(key: dict[str, Any], name: str) -> tuple[str, str]:
    """Utterance and first system of a question."""
    recording = key["clips"][key["trials"][name]["clips"][0]]["recording"]
    return recording["id"], recording["system"]


def opinion(key: dict[str, Any], seed: int) -> Any:
    """Somebody who likes the aligned system better, mostly, and says the same when asked again."""

    def say(name: str, trial: dict[str, Any], again: bool = False) -> Any:
        draw = random.Random(f"{seed}-{name}")
        item, system = about(key, name)
        if trial["kind"] == "nmos":
            return 2 + 2 * (system == "aligned") + draw.randint(0, 1)
        if trial["kind"] == "cmos":
            return draw.choice([0, 1, 2])
        if trial["kind"] == "ab":
            return draw.choice([trial["clips"][1], trial["clips"][1], "same", trial["clips"][0]])
        if trial["kind"] == "abx":
            return draw.choice(trial["clips"])
        if item == "s5":
            return "unclear"
        return str(int(system == "base" or draw.random() < 0.1))

    return attentive(key, say)


@pytest.fixture(scope="module")
def five(test: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, Any]]]:
    """Files of five listeners."""
    _, key = test
    folder = tmp_path_factory.mktemp("answers")
    found = [answers(key, f"listener {seed}", opinion(key, seed)) for seed in range(5)]
    return [save(folder, one) for one in found], found


def plain(key: dict[str, Any], found: list[dict[str, Any]], kind: str) -> list[tuple[str, str, str, Any]]:
    """Listener, utterance, first system and answer of every question that counts, read from the files by hand."""
    rows = []
    for sheet in found:
        for one in sheet["answers"]:
            trial = key["trials"][one["trial"]]
            if trial["kind"] != kind or one.get("repeat") or any(key["clips"][c].get("check") for c in trial["clips"]):
                continue
            value = one["answer"]
            if kind == "cmos" and one["clips"] != trial["clips"]:
                value = -value
            if kind == "ab":
                value = {trial["clips"][0]: 1.0, trial["clips"][1]: 0.0, "same": 0.5}[value]
            if kind == "abx":
                value = float(value == one["x"])
            rows.append((sheet["listener"], *about(key, one["trial"]), value))
    return rows


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_naturalness(test: Any, five: Any, tmp_path: Path):
    path, key = test
    paths, found = five
    summary = score(paths, path, tmp_path / "numbers.json", **FEW)
    assert json.loads((tmp_path / "numbers.json").read_text()) == json.loads(json.dumps(summary))
    rows = plain(key, found, "nmos")
    assert len(rows) == 5 * 6 * 2
    means = {}
    for system in ("base", "aligned"):
        shown = summary["nmos"]["systems"][system]
        mine = [value for _, _, whose, value in rows if whose == system]
        assert shown["value"] == pytest.approx(mean(mine))
        assert shown["low"] < shown["value"] < shown["high"]
        assert (shown["n"], shown["listeners"], shown["sentences"]) == (30, 5, 6)
        means[system] = {item: mean(v for _, i, s, v in rows if (i, s) == (item, system)) for _, item, *_ in rows}
    gains = [means["aligned"][item] - means["base"][item] for item in sorted(means["base"])]
    pair = summary["nmos"]["pairs"]["base | aligned"]
    assert pair["difference"] == pytest.approx(mean(gains))
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    assert pair["p_value"] == pytest.approx(slow_wilcoxon(gains))
    if len(set(map(abs, gains))) == len(gains):
        assert pair["p_value"] == pytest.approx(stats.wilcoxon(gains, method="exact").pvalue)


def slow_wilcoxon(values: list[float]) -> float:
    """Every choice of signs of the ranks, counted."""
    values = [value for value in values if value]
    order = sorted(map(abs, values))
    ranks = [mean(place + 1 for place, one in enumerate(order) if one == abs(value)) for value in values]
    total = sum(ranks)
    seen = min(sum(r for r, v in zip(ranks, values, strict=True) if v > 0), total)
    seen = min(seen, total - seen)
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=len(ranks))
    ]
    return min(1.0, sum(min(one, total - one) <= seen + 1e-9 for one in sums) / len(sums))


def test_comparisons_do_not_depend_on_the_side(test: Any, five: Any):
    path, key = test
    paths, found = five
    as_the_key = [one["clips"] == key["trials"][one["trial"]]["clips"] for one in found[0]["answers"]]
    assert set(as_the_key) == {True, False}
    summary = score(paths, path, **FEW)
    cmos = plain(key, found, "cmos")
    assert summary["cmos"]["pairs"]["base | aligned"]["value"] == pytest.approx(mean(row[-1] for row in cmos))
    items = {row[1]: mean(one[-1] for one in cmos if one[1] == row[1]) for row in cmos}
    assert summary["cmos"]["pairs"]["base | aligned"]["p_value"] == pytest.approx(slow_wilcoxon(list(items.values())))
    for kind in ("ab", "abx"):
        votes = plain(key, found, kind)
        values = [row[-1] for row in votes]
        shown = summary[kind]["pairs"]["base | aligned"]
        assert shown["value"] == pytest.approx(mean(values))
        first, second = values.count(1.0) + values.count(0.5) // 2, values.count(0.0) + values.count(0.5) // 2
        assert shown["p_votes"] == pytest.approx(slow_binomial(first, second))
        means = [mean(one[-1] for one in votes if one[1] == item) for item in {row[1] for row in votes}]
        sides = sum(one > 0.5 for one in means), sum(one < 0.5 for one in means)
        assert shown["p_value"] == pytest.approx(slow_binomial(*sides))
    dropped = score(paths, path, ties="drop", **FEW)["ab"]["pairs"]["base | aligned"]
    values = [row[-1] for row in plain(key, found, "ab")]
    assert (dropped["first"], dropped["same"]) == (values.count(1.0), values.count(0.5))
    assert dropped["value"] == pytest.approx(mean(value for value in values if value != 0.5))


def slow_binomial(first: int, second: int) -> float:
    n = first + second
    likely = [math.comb(n, k) / 2**n for k in range(n + 1)]
    return min(1.0, sum(one for one in likely if one <= likely[first] * (1 + 1e-9)))


def test_readings_are_what_most_listeners_heard(test: Any, five: Any, capsys: pytest.CaptureFixture[str]):
    path, key = test
    paths, found = five
    shown = score(paths, path, **FEW)["reading"]
    rows = plain(key, found, "reading")
    for system in ("base", "aligned"):
        mine = [value for _, _, whose, value in rows if whose == system]
        counts = {"right": mine.count("0"), "wrong": mine.count("1"), "unclear": mine.count("unclear")}
        assert {name: shown["systems"][system][name] for name in counts} == counts
        assert shown["systems"][system]["value"] == pytest.approx(counts["right"] / len(mine))
    right = {
        (item, system): mean(v == "0" for _, i, s, v in rows if (i, s) == (item, system)) > 0.5
        for _, item, system, _ in rows
    }
    items = sorted({item for item, _ in right})
    mended = sum(right[item, "aligned"] and not right[item, "base"] for item in items)
    assert (shown["pairs"]["base | aligned"]["mended"], shown["pairs"]["base | aligned"]["broken"]) == (mended, 0)
    # The judge of the run called base wrong and aligned right, as they did; of s5 nobody could say.
    assert (shown["judge"]["value"], shown["judge"]["n"]) == (pytest.approx(10 / 12), 12)
    out = capsys.readouterr().out
    assert "5 of 5 listeners count" in out
    assert "the judge heard what most listeners heard in 83.3 %" in out


def test_holm_is_over_all_pairs(tmp_path: Path):
    systems = [f"{name}={wavs(tmp_path / name, seed, 6)}" for seed, name in enumerate("abc")]
    made = make(systems, tmp_path / "t.html", plan=Plan(kinds=("nmos",), checks=0, repeats=0, training=0))
    key = json.loads(made.key.read_text())
    order = {"a": 1, "b": 2, "c": 5}
    sheet = answers(key, "x", lambda name, *_: order[about(key, name)[1]], repeats=0)
    pairs = score([save(tmp_path, sheet)], made.key, **FEW)["nmos"]["pairs"]
    assert list(pairs) == [f"{one} | {other}" for one, other in combinations("abc", 2)]
    assert {one["p_value"] for one in pairs.values()} == {2 / 2**6}
    assert {one["p_holm"] for one in pairs.values()} == {6 / 2**6}


# --- who counts ---


def test_listeners_are_screened_by_stated_rules(
    test: Any, five: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, key = test
    good = opinion(key, 1)
    deaf = answers(key, "deaf", lambda name, trial, again: _wrong(key, name, trial) or good(name, trial, again))
    fickle = answers(
        key,
        "fickle",
        lambda name, trial, again: _other(trial, good(name, trial, again)) if again else good(name, trial, again),
    )
    hasty = answers(key, "hasty", good)
    hasty["answers"] = hasty["answers"][:-3]
    files = [*five[0], *(save(tmp_path, one) for one in (deaf, fickle, hasty))]
    summary = score(files, path, **FEW)
    reasons = {one["listener"]: one["reason"] for one in summary["listeners"]}
    assert {name for name, reason in reasons.items() if not reason} == {f"listener {seed}" for seed in range(5)}
    assert reasons["deaf"] == "0 of 5 checks right"
    assert reasons["fickle"].endswith("repeated questions answered alike")
    assert reasons["hasty"].startswith("answered ")
    assert "5 of 8 listeners count" in capsys.readouterr().out
    lenient = Rules(min_checks=0.0, min_consistency=0.0, min_answered=0.0)
    assert not any(one["reason"] for one in score(files, path, rules=lenient, **FEW)["listeners"])
    strict = score(files, path, rules=Rules(headphones=True), **FEW)
    assert strict["nmos"] == summary["nmos"]
    with pytest.raises(ListeningTestError, match="no listener counts:\n  listener listener 0: native: not said"):
        score(files, path, rules=Rules(native=True), **FEW)
    with pytest.raises(ListeningTestError, match=r"rules.min_checks must lie in 0\.\.1, got 2"):
        Rules(min_checks=2.0)


def _wrong(key: dict[str, Any], name: str, trial: dict[str, Any]) -> Any:
    if not any(key["clips"][clip].get("check") for clip in trial["clips"]):
        return None
    return {"nmos": 5, "cmos": 2, "ab": trial["clips"][-1], "abx": trial["clips"][-1]}.get(trial["kind"], "other")


def _other(trial: dict[str, Any], value: Any) -> Any:
    if trial["kind"] == "nmos":
        return value + 2 if value < 4 else value - 2
    if trial["kind"] == "cmos":
        return value + 2 if value < 2 else value - 2
    if trial["kind"] in ("ab", "abx"):
        return next(one for one in trial["clips"] if one != value)
    return "other" if value != "other" else "0"


# --- hostile files ---


def broken(key: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Files that cannot be used, and what is said of them."""
    good = answers(key, "x", opinion(key, 3))
    first = next(place for place, one in enumerate(good["answers"]) if one["kind"] == "nmos")
    pair = next(place for place, one in enumerate(good["answers"]) if one["kind"] == "abx")

    def change(place: int | None = None, **values: Any) -> dict[str, Any]:
        found = copy.deepcopy(good)
        target = found if place is None else found["answers"][place]
        for name, value in values.items():
            if value is KeyError:
                del target[name]
            else:
                target[name] = value
        return found

    text = json.dumps(good)
    return {
        "truncated": (text[: len(text) // 2], "not whole, or not JSON"),
        "empty": ("", "not whole, or not JSON"),
        "deep": ("[" * 100000, "not whole, or not JSON"),
        "binary": (b"\xff\xfe\x00", "not text in UTF-8"),
        "list": ([], "not a file of answers"),
        "number": (3, "not a file of answers"),
        "another": (change(test="0123"), f"answers to another test: '0123', the key is that of {key['test']!r}"),
        "version": (change(version=2), "answers of version 2, expected 1"),
        "no test": (change(test=KeyError), "'test' is missing"),
        "no listener": (change(listener=" "), "listener: expected a name, got ' '"),
        "listener": (change(listener=7), "listener: expected a name, got 7"),
        "answers": (change(answers={}), "answers: expected a list, got dict"),
        "entry": (change(answers=[3]), "answer 1: expected an object, got int"),
        "missing": (change(first, milliseconds=KeyError), "'milliseconds' is missing"),
        "trial": (change(first, trial="t999"), "no question of this test is called 't999'"),
        "trial list": (change(first, trial=["t001"]), "no question of this test is called"),
        "clips": (change(first, clips=["c999"]), "clips: expected c"),
        "clips text": (change(first, clips="c001"), "clips: expected names, got 'c001'"),
        "x": (change(pair, x="c999"), "x: expected one of c"),
        "high": (change(first, answer=6), "answer: expected a whole number from 1 to 5, got 6"),
        "true": (change(first, answer=True), "answer: expected a whole number from 1 to 5, got True"),
        "nan": (text.replace('"answer": 3', '"answer": NaN', 1).replace('"answer": 2', '"answer": NaN', 1), "got nan"),
        "word": (change(pair, answer="A"), "answer: expected one of c"),
        "time": (change(first, milliseconds=-1), "milliseconds: expected a number of at least 0, got -1"),
        "unheard": (change(first, plays={}), "plays: expected that every clip was heard to its end"),
        "half": (change(first, plays={"A": 0}), "plays: expected that every clip was heard to its end"),
        "twice": (change(answers=good["answers"][:1] * 2), "is answered twice"),
    }


def test_a_file_that_cannot_be_used_is_named_and_the_others_count(test: Any, five: Any, tmp_path: Path, caplog: Any):
    path, key = test
    known = read_key(path)
    cases = broken(key)
    for name, (content, message) in cases.items():
        file = tmp_path / f"{name}.json"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        read = read_sheets([file, five[0][0]], known)
        assert len(read.faults) == 1, name
        assert read.faults[0].startswith(f"{file}: "), name
        assert message in read.faults[0], (name, read.faults[0])
        assert [one.listener for one in read.sheets] == ["listener 0"]
    (tmp_path / "test.key.json").write_text("{}")
    everything = score([tmp_path, *five[0]], path, **FEW)
    assert len(everything["refused"]) == len(cases)
    alone = score(five[0], path, **FEW)
    assert everything["nmos"] == alone["nmos"]
    assert caplog.text.count("refused: ") == len(cases)
    with pytest.raises(ListeningTestError, match=r"no listener counts:\n  .*answers to another test"):
        score([tmp_path / "another.json"], path)
    with pytest.raises(ListeningTestError, match="no file of answers"):
        score([tmp_path / "test.key.json"][:0], path)


def test_a_listener_counts_once(test: Any, five: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, key = test
    known = read_key(path)
    part = copy.deepcopy(five[1][0])
    part["answers"] = part["answers"][:7]
    early = save(tmp_path, part, "early")
    for order in ([early, five[0][0]], [five[0][0], early], [five[0][0], five[0][0]]):
        read = read_sheets(order, known)
        assert not read.faults
        assert len(read.sheets) == 1
        assert len(read.sheets[0].answers) > 7
    other = save(tmp_path, {**answers(key, "listener 0", opinion(key, 9))}, "other")
    read = read_sheets([five[0][0], other], known)
    assert len(read.sheets) == 1
    assert read.faults == (
        f"{other}: listener 'listener 0' has answered differently in {five[0][0]}, which counts: "
        "if these are two persons, give one of them another name in the file",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not the key of a listening test"),
        ('{"format": "other"}', "expected what `tts-align listen make` wrote"),
        ('{"format": "tts-align listening key", "version": 9}', "key of version 9, expected 1"),
        ('{"format": "tts-align listening key", "version": 1}', "damaged key of a listening test: KeyError: 'test'"),
        (None, "there is no such key"),
    ],
)
def test_a_key_that_is_none(content: str | None, message: str, tmp_path: Path):
    path = tmp_path / "some.key.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ListeningTestError, match=message):
        read_key(path)


# --- labels ---


def test_answers_become_rows_that_say_where_they_come_from(test: Any, five: Any, tmp_path: Path):
    path, key = test
    made = label(five[0], path, tmp_path / "rows" / "manifest.jsonl")
    rows = {row.id: row for row in read_manifest(tmp_path / "rows" / "manifest.jsonl").rows}
    assert rows.keys() == {f"s{number}-{system}" for number in range(5) for system in ("base", "aligned")}
    assert {name: row.desirable for name, row in rows.items()} == {name: name.endswith("aligned") for name in rows}
    assert (made.undecided, made.unheard) == (0, 0)
    row = rows["s1-aligned"]
    assert (row.speech, row.speaker, row.language) == ((1, 1, 7), "anna", "ja")
    assert row.transcript == "このきょうです"
    assert (tmp_path / "rows" / row.audio).resolve() == (path.parent / "run/test/audio/s1-aligned.wav").resolve()
    assert row.notes["labelled_by"] == f"listening test {key['test']}"
    assert (row.notes["question"], row.notes["system"]) == ("reading", "aligned")
    assert row.scores["listeners"] == 5
    assert row.spans[0].right == ("きょう",)


def test_every_kind_labels_in_its_own_way(test: Any, five: Any, tmp_path: Path):
    path, key = test
    paths, found = five
    for kind in ("nmos", "cmos", "ab"):
        out = tmp_path / f"{kind}.jsonl"
        label(paths, path, out, HumanRule(kinds=(kind,), agreement=0.6))
        rows = {row.id: row.desirable for row in read_manifest(out).rows}
        votes: dict[str, list[bool]] = {}
        for _, item, system, value in plain(key, found, kind):
            if kind == "nmos":
                if value != 3:
                    votes.setdefault(f"{item}-{system}", []).append(value >= 4)
            elif value not in ({"cmos": 0}.get(kind), 0.5):
                better = value == 1.0 if kind == "ab" else value < 0
                votes.setdefault(f"{item}-base", []).append(better)
                votes.setdefault(f"{item}-aligned", []).append(not better)
        expected = {name: mean(some) > 0.5 for name, some in votes.items() if max(mean(some), 1 - mean(some)) >= 0.6}
        assert rows == expected, kind
    few = label(paths[:2], path, tmp_path / "few.jsonl", HumanRule(min_listeners=2, agreement=1.0))
    assert few.undecided + few.unheard + len(few.rows) >= 8


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_labelled_rows_train(test: Any, five: Any, tmp_path: Path, tiny_policy: Path):
    """Straight into ``fit``: the recordings were made of speech tokens, which the key has kept."""
    label(five[0], test[0], tmp_path / "rows.jsonl")
    module, data = build(DPO(), tiny_policy, str(tmp_path / "rows.jsonl"), tmp_path / "cache", rows_per_step=4)
    before = weights(module)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert gap(weights(module), before) > 0


def test_the_readme(test: Any, five: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Every command of the section on listening tests, as it stands there."""
    text = (ROOT / "tts_align/evaluation/README.md").read_text("utf-8").partition("## Listening tests")[2]
    block = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(test[0].parent / "run", "runs/tkto")
    Path("answers").mkdir()
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[2] for words in commands] == ["make", "score", "label"]
    for words in commands:
        some = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
        monkeypatch.setattr(sys, "argv", [word for part in some for word in part])
        main()
        if words[2] == "make":
            key = json.loads(Path("test.key.json").read_text())
            for seed in range(3):
                sheet = answers(key, str(seed), opinion(key, seed), repeats=2)
                save(Path("answers"), sheet)
    assert {row.desirable for row in read_manifest("heard.jsonl").rows} == {True, False}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"min_listeners": 0}, "rule.min_listeners must be at least 1"),
        ({"agreement": 0.5}, "rule.agreement must be more than 0.5"),
        ({"good": 2}, "rule.bad must be less than rule.good"),
        ({"kinds": ("abx",)}, "abx says whether two recordings differ"),
    ],
)
def test_wrong_rules(rule: dict[str, Any], message: str):
    with pytest.raises(ListeningTestError, match=message):
        HumanRule(**rule)


def test_what_cannot_be_labelled_says_why(test: Any, five: Any, tmp_path: Path):
    path, _ = test
    with pytest.raises(ListeningTestError, match="the rule keeps no row"):
        label(five[0][:1], path, tmp_path / "none.jsonl", HumanRule(min_listeners=3))
    assert not (tmp_path / "none.jsonl").exists()
    run = path.parent / "run"
    made = make([str(run)], tmp_path / "x.html", plan=Plan(kinds=("abx",), checks=0, repeats=0))
    key = json.loads(made.key.read_text())
    sheet = save(tmp_path, answers(key, "a", opinion(key, 0), repeats=0))
    with pytest.raises(ListeningTestError, match="answers to abx say of no recording whether it is good"):
        label([sheet], made.key, tmp_path / "none.jsonl")
    with pytest.raises(ListeningTestError, match="this test does not ask nmos, only abx"):
        label([sheet], made.key, tmp_path / "none.jsonl", HumanRule(kinds=("nmos",)))


def test_the_commands(test: Any, five: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    path, _ = test

    def command(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["tts-align", "listen", *map(str, words)])
        main()
        return capsys.readouterr().out

    run = path.parent / "run"
    said = command("make", run, "--out", tmp_path / "t.html", "--plan.kinds", "[ab, reading]", "--plan.sentences", "2")
    assert f"page:         {tmp_path / 't.html'}" in said
    said = command("score", *five[0], "--key", path, "--resamples", "100", "--out", tmp_path / "n.json")
    assert "base | aligned" in said
    assert (tmp_path / "n.json").is_file()
    said = command(
        "label", five[0][0].parent, "--key", path, "--out", tmp_path / "rows.jsonl", "--rule.agreement", "0.55"
    )
    assert "desirable:    5 rows\nundesirable:  5 rows" in said
    for words, message in (
        (("mak",), "expected `tts-align listen` with one of make, score, label; did you mean 'make'?"),
        (("score", tmp_path / "nowhere.json", "--key", path), "no listener counts:\n  "),
        (("make", run, "--out", tmp_path / "t.html"), "is there already"),
    ):
        with pytest.raises(SystemExit):
            command(*words)
        assert message in capsys.readouterr().err
