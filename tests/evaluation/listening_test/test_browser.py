# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: from its first page to labelled rows."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
from browser import Keys, Listener, browser, until
from places import ROOT
from studio import attentive, scored, sound

from tts_align.cli.entry import main
from tts_align.cli.listen import make
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.listening_test.design import Plan
from tts_align.evaluation.listening_test.records import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """One browser for all tests, and the folder of what it saves."""
    folder = tmp_path_factory.mktemp("browser")
    with browser(folder) as driver:
        yield driver, folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored(tmp_path_factory.mktemp("listening") / "run", 3)


def opinion(key: dict[str, Any]) -> Any:
    """Hears checks, reads the base system wrong and the other right, and likes the other better."""

    def say(name: str, trial: dict[str, Any], again: bool) -> Any:
        better = trial["clips"][-1]
        system = key["clips"][trial["clips"][0]]["recording"]["system"]
        return {"nmos": 4, "cmos": 2, "ab": better, "reading": str(int(system == "base"))}[trial["kind"]]

    choose = attentive(key, say)

    def answer(question: dict[str, Any]) -> str:
        trial = key["trials"][question["trial"]]
        if trial["kind"] == "abx":
            return question["x"]
        value = choose(question["trial"], trial, bool(question.get("repeat")))
        turned = trial["kind"] == "cmos" and question["clips"] != trial["clips"]
        return str(-value if turned else value)

    return answer


def test_from_the_first_page_to_labelled_rows(
    chromium: Any, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    driver, folder = chromium
    made = make([str(run)], folder / "test.html", plan=Plan(kinds=KINDS, sentences=2, checks=1, repeats=1))
    key = json.loads(made.key.read_text("utf-8"))
    address = made.page.resolve().as_uri()
    anna = Listener(driver, opinion(key))
    driver.get(address)
    anna.run("document.getElementById('listener').focus()")
    anna.press(Keys.ENTER)  # without a name
    assert anna.run("return document.getElementById('said').textContent") == ""  # the field itself says what is wrong
    assert anna.run("return document.getElementById('listener').matches(':invalid')")
    anna.begin(address, "Anna 1")

    # Nothing can be answered before it was heard, by key or by mouse.
    anna.press("3", Keys.ENTER)
    assert anna.run("return document.getElementById('said').textContent") == "Please listen to the end first."
    assert anna.run("return document.querySelectorAll('input:disabled').length") == 5
    assert len(anna.session["answers"]) == 0
    anna.hear()
    anna.press(Keys.ENTER)
    assert anna.run("return document.getElementById('said').textContent") == "Please choose an answer first."
    anna.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert anna.run("return document.querySelector('input:checked').value") == "2"
    anna.press(" ")  # heard once more
    until(lambda: anna.session["heard"].get("play") == 2)

    # A reload keeps what was heard and chosen; another language keeps it, too.
    driver.refresh()
    assert anna.run("return document.activeElement.id") in ("page", "listener", "resume")
    anna.run("document.getElementById('resume').click()")
    assert anna.run("return document.querySelector('input:checked').value") == "2"
    anna.run("document.querySelector('[data-language=ja]').click()")
    assert anna.run("return document.querySelector('legend').textContent") == "どのくらい自然に聞こえますか？"
    assert anna.run("return document.documentElement.lang") == "ja"
    assert anna.run("return document.querySelector('input:checked').value") == "2"
    anna.press(Keys.ENTER)
    assert anna.session["answers"][0]["plays"] == {"play": 2}
    while len(anna.session["answers"]) < 9:
        anna.step()
    driver.refresh()
    anna.run("document.getElementById('resume').click()")
    copied = anna.finish()
    anna.run("document.getElementById('save').click()")
    written = folder.joinpath(f"{key['test']}-Anna_1.json")  # empty at first
    saved = until(lambda: written if written.is_file() and written.stat().st_size else None)
    assert json.loads(saved.read_text("utf-8")) == copied
    assert [one for one in driver.get_log("browser") if one["level"] == "SEVERE"] == []

    assert copied["complete"]
    assert (copied["listener"], copied["language"]) == ("Anna 1", "ja")
    counted = [one for one in copied["answers"] if not one.get("training")]
    assert Counter(one["kind"] for one in counted) == {"nmos": 6, "cmos": 4, "ab": 4, "abx": 4, "reading": 6}
    assert sum(bool(one.get("repeat")) for one in counted) == len(KINDS)
    assert all(one["milliseconds"] > 0 for one in counted)

    def command(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["tts-align", "listen", *map(str, words)])
        main()
        return capsys.readouterr().out

    said = command("score", saved, "--key", made.key, "--resamples", "100", "--out", folder / "numbers.json")
    assert "1 of 1 listeners count" in said
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["listeners"][0]["checks_right"] == numbers["listeners"][0]["checks"] == len(KINDS)
    assert numbers["listeners"][0]["alike"] == len(KINDS)
    assert numbers["cmos"]["pairs"]["base | aligned"]["value"] == 2
    assert numbers["ab"]["pairs"]["base | aligned"]["second"] == 2
    assert numbers["reading"]["pairs"]["base | aligned"]["mended"] == 2
    command("label", saved, "--key", made.key, "--out", folder / "rows.jsonl")
    rows = read_manifest(folder / "rows.jsonl").rows
    assert {row.id: row.desirable for row in rows} == {
        "s0-aligned": True, "s0-base": False, "s2-aligned": True, "s2-base": False,
    }  # fmt: skip
    assert all(row.speech for row in rows)


def test_orders_are_balanced_over_listeners(chromium: Any, run: Path):
    driver, folder = chromium
    for design in ("full", "latin"):
        plan = Plan(kinds=("nmos", "ab", "abx"), design=design, checks=1, training=0, repeats=1)
        page = make([str(run)], folder / f"{design}.html", plan=plan)
        key = json.loads(page.key.read_text("utf-8"))
        driver.get(page.page.resolve().as_uri())
        plans = [driver.execute_script("return listeningTest.planFor(String(arguments[0]))", n) for n in range(28)]
        for kind, count in (("nmos", 4 if design == "latin" else 7), ("ab", 4), ("abx", 4)):
            orders = [[one for one in plan if one["kind"] == kind and not one.get("repeat")] for plan in plans]
            assert {len(order) for order in orders} == {count}
            trials = sorted(name for name, one in key["trials"].items() if one["kind"] == kind)
            if design == "full":
                # Of so many listeners in a row, each question stands once in each place.
                for place in range(count):
                    assert sorted(order[place]["trial"] for order in orders[:count]) == trials
                # And follows each other equally often.
                rows = orders[: 2 * count]
                after = Counter((a["trial"], b["trial"]) for order in rows for a, b in pairwise(order))
                assert set(after.values()) == {2}
                assert len(after) == count * (count - 1)
            else:
                assert Counter(one["trial"] for order in orders for one in order).keys() == set(trials)
                if kind == "nmos":
                    assert all(len({key["trials"][o["trial"]]["group"] for o in order}) == count for order in orders)
                    heard = Counter(one["trial"] for order in orders for one in order)
                    assert set(heard.values()) <= {14, 28}  # each system as often; the check by everybody
            if kind != "nmos":
                first = [one["clips"][0] == key["trials"][one["trial"]]["clips"][0] for o in orders for one in o]
                assert sum(first) == len(first) / 2
                within = [sum(one["clips"][0] == key["trials"][one["trial"]]["clips"][0] for one in o) for o in orders]
                assert set(within) == {count // 2}
            if kind == "abx":
                third = [one["x"] == one["clips"][0] for order in orders for one in order]
                assert sum(third) == len(third) / 2
        again = [one for one in plans[5] if one.get("repeat")]
        assert len(again) == 3
        for one in again:
            first = next(other for other in plans[5] if other["trial"] == one["trial"])
            assert plans[5].index(one) - plans[5].index(first) > 1
            assert one["clips"] == list(reversed(first["clips"]))  # on the other side
        named = [
            driver.execute_script("return listeningTest.planFor(arguments[0])", name) for name in ("Bo", "Bo", "Bi")
        ]
        assert named[0] == named[1] != named[2]


def test_the_page_can_be_used_by_everybody(chromium: Any, run: Path):
    """Names of everything for a screen reader, a focus that can be seen, and no request to anywhere."""
    driver, folder = chromium
    made = make([str(run)], folder / "reach.html", plan=Plan(kinds=("reading", "ab"), training=0, language="zh"))
    key = json.loads(made.key.read_text("utf-8"))
    bo = Listener(driver, opinion(key))
    bo.begin(made.page.resolve().as_uri() + "?listener=", "Bo")
    bo.step()
    assert bo.run("return document.documentElement.lang") == "zh"
    assert bo.run("return document.querySelector('mark').textContent").__len__() == 2
    labels = bo.run("return [...document.querySelectorAll('input')].map(i => i.labels.length)")
    assert set(labels) == {1}
    names = bo.run("return [...document.querySelectorAll('button')].map(b => b.textContent.trim().length)")
    assert all(names)
    asked = bo.run("return document.getElementById(document.querySelector('[role=radiogroup]')"
                   ".getAttribute('aria-labelledby')).textContent")  # fmt: skip
    assert asked == "标出的词读成了什么？"
    assert bo.run("return document.getElementById('said').getAttribute('aria-live')") == "polite"
    assert bo.run("return document.querySelector('progress').getAttribute('aria-label')").startswith("第 1 题")
    bo.press(Keys.TAB, Keys.TAB)
    style = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]"
    assert bo.run(style) == ["solid", "3px"]
    assert bo.run("return performance.getEntriesByType('resource').filter(r => r.name.startsWith('http')).length") == 0
    wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    for width in (360, 1200):
        driver.set_window_size(width, 800)
        assert bo.run(wide)
    driver.set_window_size(900, 1000)


def test_a_picture_for_the_readme(chromium: Any, tmp_path: Path):
    """Written to ``benchmarks/results/pictures/listen.png`` where TTS_ALIGN_PICTURES is set."""
    driver, _ = chromium
    folder = tmp_path / "wavs"
    folder.mkdir()
    soundfile.write(folder / "record.wav", sound(1), 16000)
    text, readings = "They record a new song every week.", ("ri-KORD", "REK-erd")
    span = {"start": 5, "end": 11, "right": readings[:1], "wrong": readings[1:]}
    row = {"id": "record", "text": text, "language": "en", "spans": [span]}
    row["transcripts"] = {reading: text for reading in readings}
    (tmp_path / "sentences.jsonl").write_text(json.dumps(row) + "\n")
    plan = Plan(kinds=("reading",), training=0, checks=2, repeats=0, title="Which reading did you hear?")
    made = make([str(folder)], tmp_path / "test.html", str(tmp_path / "sentences.jsonl"), plan=plan)
    key = json.loads(made.key.read_text("utf-8"))
    carla = Listener(driver, opinion(key))
    driver.set_window_size(820, 640)
    carla.begin(made.page.resolve().as_uri(), "Carla")
    carla.press(Keys.ENTER)
    while not carla.run("return Boolean(document.querySelector('mark'))"):
        carla.step()
    carla.hear()
    carla.press("1")
    assert carla.run("return document.querySelector('mark').textContent") == "record"
    picture = tmp_path / "listen.png"
    driver.save_screenshot(str(picture))
    driver.set_window_size(900, 1000)
    assert picture.stat().st_size > 10_000
    if os.environ.get("TTS_ALIGN_PICTURES"):
        shown = ROOT / "benchmarks/results/pictures"
        shown.mkdir(exist_ok=True)
        picture.replace(shown / "listen.png")
