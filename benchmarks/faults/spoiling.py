# SPDX-License-Identifier: Apache-2.0
"""Ways to spoil bytes, documents, tables, YAML, recipes, archives and sounds, drawn from a generator."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**63, -(2**63), 10**40, 1e308, float("inf"), float("nan"), "", " ", "\0", "a\nb"),
    *(
        "../../outside",
        "/etc/passwd",
        "x" * 5000,
        "x" * 300,
        "\ud800",
        "\u202e\u200b",
        "NaN",
        "1",
        "true",
        "~",
        "[]",
        "{}",
    ),
    *(
        [],
        {},
        [None],
        [[]],
        [1, "a", None],
        {"": None},
        {"a": {"b": {"c": []}}},
        [0] * 3000,
        ["x"] * 300,
        {"start": 0.5},
    ),
    *("__import__('os').system('touch touched')", "!!python/object/apply:os.system [touch touched]", "${HOME}", "%n%s"),
)
"""What stands where something else should."""


def deep(levels: int) -> str:
    """A text of so many levels in JSON, which is YAML too."""
    return "[" * levels + "]" * levels


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes that are nearly those of a good file."""
    ways: list[Callable[[], bytes]] = [
        lambda: data[: draw.randrange(len(data) + 1)],
        lambda: _turned(data, draw, draw.choice((1, 8, 200))),
        lambda: data[: (cut := draw.randrange(len(data) + 1))] + draw.randbytes(draw.choice((1, 40))) + data[cut:],
        lambda: data + draw.choice((data, b"\0" * 4096, b"{", b"\n\n")),
        lambda: data[draw.randrange(1, 64) :],
        lambda: draw.choice(
            (b"", b"\0", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"RIFF", b"PAR1", b"null")
        ),
        lambda: draw.randbytes(draw.choice((7, 300, 5000))),
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
    ]
    return draw.choice(ways)()


def _turned(data: bytes, draw: random.Random, count: int) -> bytes:
    turned = bytearray(data)
    for _ in range(count if turned else 0):
        turned[draw.randrange(len(turned))] = draw.randrange(256)
    return bytes(turned)


def spoil_value(value: Any, draw: random.Random) -> Any:
    """A document with one thing in it replaced, removed, added or repeated."""
    copy = json.loads(json.dumps(value))
    places = list(_places(copy))
    if not places or draw.random() < 0.05:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    way = draw.random()
    if way < 0.7:
        holder[key] = draw.choice(VALUES)
    elif way < 0.8:
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw.choice((*map(str, holder), "", "id", "__class__", "x" * 300, "class_path"))] = draw.choice(VALUES)
    else:
        holder.extend(holder * draw.choice((1, 50)))
    return copy


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def as_json(value: Any, draw: random.Random) -> bytes:
    """A document in JSON, now and then with what JSON does not have."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.08:
        text = draw.choice(
            (deep(3000), deep(200), "1" * 6000, text + ",", text.replace('"', "'"), f"[{text}", "Infinity")
        )
    return text.encode("utf-8", "surrogatepass")


def bomb(references: int = 9, levels: int = 12) -> str:
    """YAML whose aliases hold more than there is memory."""
    lines = [f"a0: &a0 [{', '.join(['x'] * references)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * references)}]" for i in range(1, levels)]
    return "\n".join(lines)


def compressed(path: Path, out: Path) -> None:
    """An archive of ``torch.save`` whose members are compressed: a thousandth of what it becomes."""
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for member in good.infolist():
            content = good.read(member)
            made.writestr(member.filename, b"\0" * 2**20 if "/data/" in member.filename else content)


def odd_table(path: Path, draw: random.Random) -> None:
    """A Parquet file whose columns hold something else than they should."""
    import pyarrow as pa
    from pyarrow import parquet

    odd = [pa.array([b"\xff", b""]), pa.array([1.5, None]), pa.array([[[1]], []]), pa.array([{"a": 1}, None])]
    odd += [pa.array(["x", "y"]), pa.array([[1, 2], [3]]), pa.array([2**40, -1]), pa.array([True, False])]
    names = ("id", "text", "speech", "label", "pair", "spans", "scores", "utt", "spk", "speech_token", "audio_data")
    columns = {name: draw.choice(odd) for name in draw.sample(names, draw.randrange(1, len(names)))}
    parquet.write_table(pa.table(columns), path)


def spoilt_yaml(text: str, draw: random.Random) -> bytes:
    """YAML with broken bytes, too many aliases, references to itself, depth, or tags that call."""
    ways: list[Callable[[], bytes]] = [
        lambda: spoil_bytes(text.encode(), draw),
        lambda: bomb().encode(),
        lambda: (text + "\nx: &x [*x]\n").encode(),
        lambda: (text + "\nx: !ref <x>\n").encode(),
        lambda: (text + f"\nx: {deep(draw.choice((100, 3000)))}\n").encode(),
        lambda: (text + "\nx: !!python/object/apply:os.mkdir [touched]\n").encode(),
        lambda: (text + "\nx: !apply:os.mkdir [touched]\n").encode(),
        lambda: (text + "\nx: !ref <sample_rate> ** 99999999\n").encode(),
        lambda: "\n".join(_swapped_lines(text.splitlines(), draw)).encode(),
    ]
    return draw.choice(ways)()


def _swapped_lines(lines: list[str], draw: random.Random) -> list[str]:
    lines = list(lines)
    for _ in range(3):
        at = draw.randrange(len(lines))
        name, mark, _ = lines[at].partition(":")
        value = draw.choice([one for one in VALUES if not isinstance(one, str) or one.isprintable()])
        lines[at] = f"{name}{mark} {json.dumps(value)[:300]}"
    return lines


PLACES = (
    *("model.optimizer", "model.lr_scheduler", "model.judge", "model.vocoder", "model.policy", "objective"),
    *("trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.profiler", "trainer.strategy"),
    "trainer.accelerator",
)
CALLABLE = ("os.mkdir", "builtins.exec", "subprocess.Popen", "torch.hub.load", "shutil.rmtree", "functools.partial")


def hostile_recipe(draw: random.Random) -> dict[str, Any]:
    """A recipe that names what must not be called, in one of the places where classes are named."""
    place = draw.choice(PLACES)
    named: Any = {"class_path": draw.choice(CALLABLE)}
    if draw.random() < 0.5:
        named["init_args"] = draw.choice(({"args": ["mkdir", "touched"]}, {"path": "touched"}, {"source": "1"}))
    if draw.random() < 0.3:
        named = {
            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
            "init_args": {"setup": draw.choice(CALLABLE)},
        }
    if draw.random() < 0.2:
        named = named["class_path"]
    section, _, key = place.partition(".")
    if not key:
        return {section: named}
    return {section: {key: [named] if key in ("callbacks", "logger", "plugins") else named}}


def lying(sound: bytes, draw: random.Random) -> bytes:
    """A WAV file whose header promises other channels, rates or lengths."""
    data = bytearray(sound)
    where, kind, values = draw.choice(
        (
            (22, "<H", (0, 1, 255, 65535)),
            (24, "<I", (0, 1, 7, 2**31, 2**32 - 1)),
            (34, "<H", (0, 1, 7, 64, 65535)),
            (40, "<I", (0, 1, 2**31, 2**32 - 1)),
            (4, "<I", (0, 2**32 - 1)),
            (16, "<I", (0, 18, 2**31)),
        )
    )
    struct.pack_into(kind, data, where, draw.choice(values))
    return bytes(data)


def document(good: Any, lines: bool = False) -> Callable[[random.Random], bytes]:
    """Spoils a document of JSON, or a file of such lines."""

    def made(draw: random.Random) -> bytes:
        rows = good if lines else [good]
        if draw.random() < 0.25:
            return spoil_bytes(b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows), draw)
        spoilt = list(rows)
        at = draw.randrange(len(spoilt))
        parts = [json.dumps(row, ensure_ascii=False).encode() for row in spoilt]
        parts[at] = as_json(spoil_value(spoilt[at], draw), draw)
        return b"\n".join(parts) + b"\n" * (draw.random() < 0.9)

    return made
