# SPDX-License-Identifier: Apache-2.0
import json
import math
import unicodedata

import pytest

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.forgetting import (
    LANGUAGES,
    ForgettingProbe,
    forgetting_summary,
    general_sentences,
    probe_sentences,
    write_forgetting,
)
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import SentencePrompt, read_prompts
from tts_align.models.base.generation import Sampling
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM

SCRIPTS = {"en": "LATIN", "ja": "HIRAGANA", "zh": "CJK"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_general_sentences_are_whole_different_and_in_their_script(language):
    sentences = general_sentences(language)
    assert len({one.text for one in sentences}) == len({one.id for one in sentences}) == 20
    for one in sentences:
        assert (one.language, one.spans) == (language, ())
        assert one.text[-1] in ".?!。？！"
        assert any(unicodedata.name(character, "").startswith(SCRIPTS[language]) for character in one.text)
        assert 8 <= len(one.text) <= 80


def test_the_probe_follows_the_languages_of_the_test_set():
    found = probe_sentences("sentences.jsonl", ["ja", "en", "ja", "fr", ""], 3)
    assert [one.id for one in found] == [
        *("general-en-1", "general-en-10", "general-en-20"),
        *("general-ja-1", "general-ja-10", "general-ja-20"),
    ]


def test_the_embedded_experiment_speaks_its_own_grammar():
    found = probe_sentences("demo:audio/sentences/test.jsonl", ["ja"])
    assert len(found) == 20
    dev = {one.text for one in read_prompts("demo:audio/sentences/dev.jsonl")}
    assert {one.text for one in found} <= dev
    assert all(one.right == ("からい", "つらい") and not one.spans for one in found)


def candidate(name, rate=0.0, language="ja", error=""):
    verdict = None if error else Verdict("", Reading.UNMARKED, rate, rate)
    return Candidate(SentencePrompt(name, "文", language), "", 0, 1, (1,), True, verdict, error)


def test_summary_is_paired_by_language_and_counts_what_failed():
    judged = {
        "base": [
            candidate("a", 0.1),
            candidate("b", 0.2),
            candidate("c", 0.0, error="silent"),
            candidate("d", 0.0, "en"),
        ],
        "aligned": [candidate("a", 0.3), candidate("b", 0.2), candidate("c", 0.0), candidate("d", 0.0, "en", "silent")],
    }
    found = forgetting_summary(judged, 100)
    assert found["ja"]["base"]["value"] == pytest.approx(0.15)
    assert found["ja"]["difference"]["value"] == pytest.approx(0.1)
    assert (found["ja"]["failed"], found["en"]["failed"]) == (1, 1)
    assert found["en"]["base"]["value"] is None
    alone = forgetting_summary({"base": [], "aligned": judged["aligned"][:2]}, 100)
    assert set(alone["ja"]) == {"aligned", "failed"}


def test_numbers_go_into_the_summary_and_are_said(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"base": {}}')
    write_forgetting(tmp_path, {"base": [candidate("a", 0.1)], "aligned": [candidate("a", 0.3)]})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"base", "forgetting"}
    assert summary["forgetting"]["ja"]["aligned"]["value"] == pytest.approx(0.3)
    assert "general sentences, ja: CER base 10.00 %, aligned 30.00 % (p = " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "forgetting.jsonl").read_text().splitlines()]
    assert [row["system"] for row in rows] == ["aligned", "base"]


@pytest.mark.parametrize(("content", "fault"), [("[1]", "in braces, got list"), ("{", "not JSON")])
def test_a_spoiled_summary_is_named(tmp_path, content, fault):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=rf"summary\.json: .*{fault}"):
        write_forgetting(tmp_path, {"base": [candidate("a", 0.1)], "aligned": [candidate("a", 0.3)]})


def test_the_embedded_models_are_probed_and_know_their_grammar(tmp_path):
    """The base experiment says all of a sentence but its marked word right: few errors, the same in both systems."""
    policy = Qwen2CodecLM("demo:audio/base").eval()
    parts = Parts(policy, CTCJudge("demo:audio/judge"), Sampling(top_p=0.9), MelVocoder("demo:audio/codec"))
    probe = ForgettingProbe(parts, policy, probe_sentences("demo:audio", [], 6), ["sakura", "takumi"], 3)
    assert [one.speaker for one in probe.requests] == ["sakura", "takumi"] * 3
    judged = probe.run(tmp_path)
    summary = forgetting_summary(judged, 100)["ja"]
    assert set(summary) == {"base", "failed"}  # nothing was trained: spoken once
    assert summary["base"]["value"] < 0.3
    assert not math.isnan(summary["base"]["value"])
