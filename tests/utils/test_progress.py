"""Progress bars: lines in a file, one live line in a terminal, and text on lines of its own."""

from pathlib import Path

import pytest
from terminal import on_a_terminal

from tts_align.utils.progress import Bar, above_bars, bar


def test_lines_in_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tts_align.utils.progress._SECONDS_BETWEEN_LINES", 0.0)
    with bar(4, 1, "sample") as shown:
        shown.advance(1)
        with above_bars():
            print("text")
        shown.advance(2)
    out, err = capsys.readouterr()
    assert out == "text\n"
    assert "\r" not in err
    assert [line.split("|")[0] for line in err.splitlines()] == ["sample:  50%", "sample: 100%"]


def test_a_line_now_and_then_and_one_at_the_end(capsys: pytest.CaptureFixture[str]):
    assert list(Bar(range(1000), desc="read")) == list(range(1000))
    assert [line.split("|")[0] for line in capsys.readouterr().err.splitlines()] == ["read: 100%"]


def test_nothing_to_do_and_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]):
    bar(4, 4, "sample").close()
    with bar(4, 0, "sample", rank=1) as shown:
        shown.advance(4)
    assert capsys.readouterr() == ("", "")


def test_text_has_lines_of_its_own_on_a_terminal(tmp_path: Path):
    code = (
        "from tts_align.utils.progress import bar\n"
        "from tts_align.utils.messages import say\n"
        "shown = bar(10, 0, 'fit', unit='step')\n"
        "shown.advance(5); shown.refresh()\n"
        "say('said')\n"
        "shown.advance(5); shown.close()\n"
        "say('at the end')\n"
    )
    lines = on_a_terminal(code, tmp_path)
    assert lines[0] == "said"
    assert lines[1].startswith("fit: 100%")
    assert lines[2] == "at the end"
