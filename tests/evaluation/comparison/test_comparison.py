# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from rich.console import Console
from scored import row, scored, sound

from tts_align.evaluation.comparison.compare import compare_systems
from tts_align.evaluation.comparison.scored import read_systems, system_of
from tts_align.evaluation.comparison.table import print_comparison
from tts_align.evaluation.statistics.intervals import paired_difference
from tts_align.evaluation.statistics.significance import holm


def before(number, **more):
    """Every second utterance is read wrong; those sound like an error rate of .2."""
    wrong = number % 2 == 0
    return row(number, "base", "wrong" if wrong else "right", 0.2 if wrong else 0.0, **more)


def after(number, **more):
    """Every tenth utterance is read wrong, and number 1 besides, which was right."""
    wrong = number % 10 == 0 or number == 1
    return row(number, "aligned", "wrong" if wrong else "right", 0.3 if wrong else 0.0, **more)


@pytest.fixture
def both(tmp_path):
    folder = scored(tmp_path / "run/test", [one for i in range(80) for one in (before(i), after(i))])
    return read_systems(tmp_path / "run")["base"], system_of(folder)


def test_mended_and_broken_are_counted_and_tested(both):
    """40 wrong before, of which 8 stay wrong: 32 mended, number 1 broken."""
    comparison = compare_systems(*both, 500)
    assert (comparison.readings.mended, comparison.readings.broken) == (32, 1)
    assert comparison.readings.p_value == pytest.approx(2 * (1 + 33) / 2**33)
    assert len(comparison.mended) == 32
    assert [pair.first.id for pair in comparison.pairs if pair.broken] == ["s0-v1"]


def test_numbers_are_paired_over_sentences_and_corrected_by_holm(both):
    comparison = compare_systems(*both, 500)
    numbers = {one.name: one for one in comparison.numbers}
    assert set(numbers) == {"accuracy", "cer", "nearest_cer", "bad_case_ratio", "failures", "finished", "length"}
    rates = [[before(i)["cer"] for i in range(80)], [after(i)["cer"] for i in range(80)]]
    order = sorted(range(80), key=lambda i: before(i)["id"])
    sentences = [before(i)["sentence"] for i in order]
    expected = paired_difference(*([one[i] for i in order] for one in rates), sentences, 500)
    assert numbers["cer"].difference == expected
    assert numbers["accuracy"].first.value == pytest.approx(0.5)
    assert numbers["accuracy"].second.value == pytest.approx(71 / 80)
    assert numbers["accuracy"].verdict == "better"
    assert numbers["nearest_cer"].verdict == numbers["length"].verdict == "not shown"
    p_values = {name: one.difference.p_value for name, one in numbers.items()}
    assert {name: one.adjusted_p_value for name, one in numbers.items()} == pytest.approx(holm(p_values))


def test_regressions_come_worst_first(tmp_path):
    """Broken readings, then new faults of the speech, then rising error rates."""
    rows = [
        *(row(0, system, cer=rate) for system, rate in (("base", 0.1), ("aligned", 0.2))),
        *(row(1, system, cer=rate) for system, rate in (("base", 0.1), ("aligned", 0.9))),
        *(row(2, system, reading) for system, reading in (("base", "right"), ("aligned", "neither"))),
        *(row(3, system, cer=1.0, failure=fault) for system, fault in (("base", ""), ("aligned", "silent"))),
        *(row(4, system) for system in ("base", "aligned")),
    ]
    folder = scored(tmp_path / "test", rows)
    comparison = compare_systems(*(read_systems(folder)[name] for name in ("base", "aligned")), 50)
    assert [pair.first.id for pair in comparison.regressions] == ["s0-v2", "s0-v3", "s0-v1", "s0-v0"]
    found = comparison.to_json()["regressions"][0]
    assert found["first"]["reading"] == "right"
    assert found["second"]["reading"] == "neither"


def test_failures_are_not_right_and_are_never_dropped(tmp_path):
    """Speech that nobody understands reads no word right; a fault of the judge is no verdict on the speech."""
    nothing = {"reading": "", "transcript": ""}
    rows = [
        row(0, "base"),
        {**row(0), **nothing, "failure": "silent", "error": "silent"} | {"cer": None},
        row(1, "base"),
        {**row(1), **nothing, "error": "RuntimeError: no judge"} | {"cer": None},
        row(2, "base", "wrong"),
        row(2, abstained=True),
    ]
    rows[1]["reading"] = "neither"
    comparison = compare_systems(*(read_systems(scored(tmp_path, rows))[name] for name in ("base", "aligned")), 50)
    assert (comparison.readings.mended, comparison.readings.broken) == (0, 1)
    numbers = {one.name: one for one in comparison.numbers}
    assert numbers["failures"].second.value == pytest.approx(1 / 3)
    assert numbers["accuracy"].difference.n == 1
    assert numbers["cer"].difference.n == 1


def test_few_sentences_get_no_verdict(tmp_path):
    rows = [one for i in range(20) for one in (row(i, "base", "wrong", 0.5), row(i))]
    numbers = compare_systems(*(read_systems(scored(tmp_path, rows))[name] for name in ("base", "aligned")), 50).numbers
    assert {one.verdict for one in numbers} == {"too few sentences"}


def hacked(system, number, **measures):
    rate = 0.2 if system == "base" else 0.0
    return row(number, system, cer=rate + 0.01 * (number % 3), measures=measures)


@pytest.mark.parametrize(
    ("measures", "words"),
    [
        ({"similarity_seed": (0.7, 0.6)}, "similarity seed got worse"),
        ({"pitch_spread": (3.0, 2.0)}, "the speech became flatter"),
        ({"duration_ratio": (1.0, 0.8)}, "the speech became hastier"),
        ({"dnsmos_overall": (3.4, 3.1)}, "dnsmos overall got worse"),
        ({"longest_silence": (0.2, 0.5)}, "longest silence got worse"),
        ({"similarity_seed": (0.6, 0.7), "pitch_spread": (2.0, 3.0)}, ""),
    ],
)
def test_what_fewer_errors_were_bought_with_is_called_out(tmp_path, measures, words):
    rows = []
    for place, system in enumerate(("base", "aligned")):
        for number in range(40):
            noise = 0.01 * (number % 5)
            known = {name: values[place] * (1 + noise * (place + 1) / 2) for name, values in measures.items()}
            rows.append(hacked(system, number, **known))
    comparison = compare_systems(*(read_systems(scored(tmp_path, rows))[name] for name in ("base", "aligned")), 500)
    assert bool(comparison.call_outs) == bool(words)
    if words:
        assert comparison.call_outs[0].startswith("possible reward hacking: CER improved (-20.00 (")
        assert words in comparison.call_outs[0]


def test_forgotten_sentences_are_called_out(tmp_path):
    rows = [row(i, system) for system in ("base", "aligned") for i in range(8)]
    lost = {language: {"difference": {"value": 0.03, "p_value": p}} for language, p in (("ja", 0.01), ("zh", 0.3))}
    systems = read_systems(scored(tmp_path, rows, forgetting=lost))
    assert compare_systems(systems["base"], systems["aligned"], 50).call_outs == [
        "possible forgetting: the error rate of general sentences (ja) rose by 3.00 points (p = 0.01)"
    ]
    assert compare_systems(systems["aligned"], systems["base"], 50).call_outs == []


def test_more_errors_are_no_bargain(tmp_path):
    """Nothing was bought where errors did not fall."""
    rows = [
        hacked(system, i, similarity_seed=0.5 + 0.2 * (system == "base"))
        for system in ("base", "aligned")
        for i in range(40)
    ]
    systems = read_systems(scored(tmp_path, rows))
    worse = compare_systems(systems["aligned"], systems["base"], 1000)
    assert worse.call_outs == []
    assert "cer" in worse.worse


def test_what_makes_numbers_incomparable_is_said(tmp_path):
    rows = [row(i, "scored") for i in range(8)]
    measures = [{"similarity_seed": {"digest": digest, "higher_is_better": True}} for digest in ("a", "b")]
    models = [{"judge": judge, "base": judge} | known for judge, known in zip("xy", measures, strict=True)]
    suites = [{"name": "seed", "path": path, "digest": "1"} for path in ("here", "there")]  # that is no difference
    one = scored(tmp_path / "one", rows, protocol={"name": "seed", "version": "1"}, models=models[0], suite=suites[0])
    two = scored(tmp_path / "two", rows[:6], protocol={"name": "cv3"}, models=models[1], suite=suites[1])
    comparison = compare_systems(system_of(one), system_of(two), 50)
    assert comparison.warnings == [
        "the protocol differs: seed 1 and cv3",
        "judge is not the same in both: x and y",
        "similarity_seed is not the same in both: a and b",
        "6 utterances are in both; 2 only in the first, 0 only in the second are left out",
    ]
    assert comparison.unmatched == ["s1-v2", "s1-v3"]


def test_systems_without_a_common_utterance_or_text(tmp_path):
    one, two = scored(tmp_path / "one", [row(0)]), scored(tmp_path / "two", [row(9)])
    with pytest.raises(ValueError, match="no utterance in common"):
        compare_systems(system_of(one), system_of(two))
    other = scored(tmp_path / "three", [row(0, text="別の文")])
    with pytest.raises(ValueError, match=r"'s0-v0' is '鍋は辛い' in .*one and '別の文' in .*three"):
        compare_systems(system_of(one), system_of(other))


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"holds no utterances.jsonl .* tts-align score wrote"):
        read_systems(tmp_path)
    (tmp_path / "utterances.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no utterance"):
        read_systems(tmp_path)
    (tmp_path / "utterances.jsonl").write_text('{"name": 1}\n')
    with pytest.raises(ValueError, match=r"utterances.jsonl:1: expected an utterance with an id"):
        read_systems(tmp_path)
    scored(tmp_path, [row(0), row(0)])
    with pytest.raises(ValueError, match=r"utterances.jsonl:2: utterance 's0-v0' appears twice"):
        read_systems(tmp_path)
    scored(tmp_path, [row(0), row(0, "base")])
    with pytest.raises(ValueError, match="holds the systems aligned, base: name one of them, not 'best'"):
        system_of(tmp_path, "best")


def test_table_says_it_in_words(both, tmp_path):
    sound(both[1].folder / "audio/broken.wav")
    rows = [one | ({"audio": "audio/broken.wav"} if one["id"] == "s0-v1" else {}) for one in map(after, range(80))]
    spoken = system_of(scored(tmp_path / "two/test", rows))
    sound(tmp_path / "two/test/audio/broken.wav")
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(compare_systems(both[0], spoken, 1000), 3, console)
    console.file.close()
    text = console.export_text()
    assert text.startswith("readings: 32 mended, 1 broken (exact McNemar p < 0.001; 80 utterances)")
    assert "right readings, %" in text
    assert "better" in text
    assert "two/test/audio/broken.wav" in text.replace("\n", "")
    assert "s0-v1: broken" in text
    assert "and " in text
    assert "more, in comparison.json" in text


def test_rows_round_trip_to_json(both):
    found = json.loads(json.dumps(compare_systems(*both, 50).to_json()))
    assert found["readings"] == {"mended": 32, "broken": 1, "p_value": pytest.approx(2 * 34 / 2**33)}
    assert found["numbers"]["accuracy"]["second"]["n"] == 80


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("cer", "0.1", r"cer: expected a number, got '0\.1'"),
        ("error_rate", [1], r"error_rate: expected a number, got \[1\]"),
        ("seconds", 10**400, "seconds: expected a number that a float can hold, got one of 401 digits"),
        ("reading", 3, "reading: expected text, got 3"),
        ("measures", "abc", "measures: expected a number for each name, got 'abc'"),
        ("measures", [1], r"measures: expected a number for each name, got \[1\]"),
        ("measures", {"similarity": "0.7"}, "measures: expected a number for each name, got {'similarity'"),
        ("measures", {"similarity": None}, "measures: expected a number for each name, got {'similarity'"),
        ("text", 5, "text: expected text, got 5"),
        ("sentence", ["a"], r"sentence: expected text, got \['a'\]"),
        ("audio", {"a": 1}, "audio: expected text, got {'a': 1}"),
        ("speech", 5, "speech: expected a list of speech tokens, got 5"),
    ],
)
def test_columns_of_wrong_type_are_named_with_file_and_line(tmp_path, column, value, what):
    folder = scored(tmp_path, [row(0), row(1, **{column: value})])
    with pytest.raises(ValueError, match=rf"utterances\.jsonl:2: {what}"):
        read_systems(folder)


def test_columns_without_a_value_are_as_good_as_missing(tmp_path):
    empty = dict.fromkeys(("cer", "reading", "measures", "text", "sentence", "audio", "speech", "seconds"))
    one = system_of(scored(tmp_path, [row(0) | empty], measures=None)).utterances["s0-v0"]
    assert (one.text("reading"), one.sentence, one.audio) == ("", "s0-v0", None)
    assert one.number("cer") != one.number("cer")
