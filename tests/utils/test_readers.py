"""Whatever is wrong with a file is said in a line with its name, and nothing is expanded unseen."""

import errno
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tts_align.utils import readers
from tts_align.utils.readers import (
    MAX_NESTING,
    ReadError,
    byte_lines,
    check_archive,
    described,
    load_safetensors,
    load_tensors,
    load_yaml,
    read_json,
    read_json_object,
    read_text,
    read_yaml,
)

BOMB = "a: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"b{i}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("content", "reader", "what"),
    [
        (b'{"a": 1', read_json, "not JSON: Expecting ',' delimiter at column 8"),
        (b'{\n"a": }', read_json, "not JSON: Expecting value at line 2, column 6"),
        (b"\xff\xfe{}", read_json, "expected text in UTF-8"),
        (b"[" * 5000 + b"]" * 5000, read_json, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, read_json, "nested too deeply, expected at most 64 levels"),
        (b"1" * 5000, read_json, "Exceeds the limit"),
        (b"[1]", read_json_object, "expected names and values in braces, got list"),
        (b"a: [1", read_yaml, "not YAML: while parsing"),
        (b"a: !!python/object/apply:os.system [id]", read_yaml, "not YAML: could not determine a constructor"),
        (BOMB.encode(), read_yaml, "more than 100000 values, most of them behind aliases"),
        (b"a: &a [*a]", read_yaml, "an alias refers to itself"),
        (b"<<: &a {<<: *a}", read_yaml, "an alias refers to itself"),
        (b"a: " + b"[" * 3000, read_yaml, "nested too deeply"),
        (b"a: 2001-99-99", read_yaml, "not YAML: month must be in"),
        (b"no tensors", load_tensors, "cannot be read as weights|holds more than tensors"),
        (b"", load_tensors, "cannot be read as weights: EOFError"),
        (b"PK\x03\x04cut", load_tensors, "cannot be read as weights|holds more than tensors"),
        (b"\xff" * 64, load_safetensors, "cannot be read as safetensors"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, content: bytes, reader, what: str) -> None:
    path = tmp_path / "some.file"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=f"(?s)some.file: .*({what})") as raised:
        reader(path)
    assert str(raised.value).count("\n") == 0
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("reader", [read_json, read_yaml, load_tensors, load_safetensors, read_text])
def test_no_file_a_directory_a_long_name_a_device(tmp_path: Path, reader) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        reader(tmp_path / "nowhere")
    with pytest.raises(ReadError, match="is a directory, expected a file"):
        reader(tmp_path)
    with pytest.raises(ReadError, match="the name is too long for a file: shorten it"):
        reader(tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("")
    with pytest.raises(ReadError, match="a part of the path is a file"):
        reader(tmp_path / "file" / "more")


def test_what_never_ends_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReadError, match="/dev/zero: is larger than 1 MB"):
        read_text("/dev/zero", 2**20)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    with pytest.raises(ReadError, match="/dev/zero:1: the line is longer"):
        next(byte_lines("/dev/zero"))


RAW = re.compile(r"\b(json\.loads?|yaml\.\w*load\w*|torch\.load|np\.load|(pickle|joblib|marshal)\.\w*[lL]oad\w*)\(")
RAW_IMPORT = re.compile(
    r"^\s*(from (json|yaml|pickle|joblib|marshal) import .*load|from torch import .*\bload\b)", re.M
)
ALLOWED = {
    "utils/readers.py": "the readers themselves",
    "data/refused.py": "lines of a temporary file without a name, written by the same process",
    "data/table/columns.py": "a column of the cache of rows, read for every row, whose file is checked as a whole",
    "data/demo/espeak.py": "lines and arrays that a process and its worker leave for each other",
    "models/cosyvoice/vllm.py": "answers of a process that this one has started",
    "models/cosyvoice/vllm_process.py": "questions of the process that has started this one",
    "cli/restore.py": "what json.dumps has just written, to make plain values of it",
}
"""Files of the package that read something else than files of others, and what."""


def test_files_are_read_through_the_readers_alone() -> None:
    """Raw readers end in a traceback, or expand what they read without a limit."""
    package = Path(readers.__file__).parents[1]
    texts = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    raw = {name for name, text in texts.items() if RAW.search(text) or RAW_IMPORT.search(text)}
    assert raw == ALLOWED.keys()


def test_good_files_come_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a"
    value = {"a": ["[[[[" * 99, {"b": 1.5}], "c": '\\"[{'}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read_json(path) == value
    merged = load_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}\n")
    assert merged == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
    assert load_yaml("") is None
    path.write_bytes(b"\xef\xbb\xbfa\nb\x0cc\xe2\x80\xa8d\n")
    assert list(byte_lines(path)) == [(1, b"a\n"), (2, b"b\x0cc\xe2\x80\xa8d\n")]
    for new in (True, False):  # an archive, and a file of before PyTorch 1.6
        torch.save({"a": torch.ones(3), "b": {"c": [torch.zeros(2)[1:]]}}, path, _use_new_zipfile_serialization=new)
        assert load_tensors(path)["a"].sum() == 3
    save_file({"a": torch.ones(3)}, path)
    assert load_safetensors(path)["a"].sum() == 3


def test_an_archive_does_not_become_larger_than_it_is(tmp_path: Path) -> None:
    """1.5 MB that became 3.4 GB: zeros, compressed, behind the name of a tensor."""
    path, bomb = tmp_path / "good.pt", tmp_path / "bomb.ckpt"
    torch.save({"a": torch.zeros(2**18)}, path)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as bad:
        for member in good.infolist():
            bad.writestr(member.filename, good.read(member))
    assert bomb.stat().st_size < 2**14
    with pytest.raises(ReadError, match=r"bomb.ckpt: its \d+ bytes would become 10\d+: PyTorch compresses nothing"):
        load_tensors(bomb)
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)  # a number that repeats itself
    with pytest.raises(ReadError, match=r"a tensor of shape \(1000000000000,\) is larger than what is stored"):
        load_tensors(path)


def test_a_damaged_archive_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.arange(1000)}, path)
    check_archive(path, contents=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    check_archive(path)  # all that is stored in it has its place
    with pytest.raises(ReadError, match=r"a.ckpt: is damaged: .* is not what was written"):
        check_archive(path, contents=True)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ReadError, match="holds more than tensors and plain values"):
        load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EDQUOT, errno.ELOOP])
def test_the_operating_system_speaks_with_advice(number: int) -> None:
    said = described(OSError(number, "what it says", "a.ckpt"))
    assert said.startswith("a.ckpt: ")
    assert "what it says" not in said
    assert described(OSError(99999, "odd"), "b") == "b: odd"


def test_depth_is_checked_before_anything_recurses(tmp_path: Path) -> None:
    """Composing nodes is recursion in C: what is too deep must not get there, however it is written."""
    for text in ("[" * 100_000, "- " * 100_000, "{a: " * 500, "".join(" " * n + "a:\n" for n in range(900))):
        with pytest.raises(ReadError, match="nested too deeply"):
            load_yaml(text)
    assert load_yaml("[" * MAX_NESTING + "]" * MAX_NESTING) is not None
    with pytest.raises(ReadError, match="nested too deeply"):
        load_yaml("[" * (MAX_NESTING + 2) + "]" * (MAX_NESTING + 2))
