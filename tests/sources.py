# SPDX-License-Identifier: Apache-2.0
"""Recordings, and what other tools keep them in: CosyVoice's Parquet shards, Kaldi-style folders."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from pyarrow import parquet

RATE = 16000
COLUMNS = {
    "utt": pa.string(),
    "audio_data": pa.binary(),
    "wav": pa.string(),
    "text": pa.string(),
    "spk": pa.string(),
    "utt_embedding": pa.list_(pa.float64()),
    "spk_embedding": pa.list_(pa.float64()),
    "speech_token": pa.list_(pa.int64()),
    "instruct": pa.string(),
    "reject_speech_token": pa.list_(pa.int64()),
}
"""Of a shard, in the order in which CosyVoice's tool writes them."""


def sound(seed: int, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A tone that swells and fades, another for each seed."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    swell = 0.5 + 0.4 * np.sin(2 * np.pi * generator.uniform(1, 4) * time + generator.uniform(0, 6))
    return swell * np.sin(2 * np.pi * generator.uniform(100, 900) * time) * 0.5


def sound_file(seed: int, seconds: float = 0.5, rate: int = RATE) -> bytes:
    """The same as the bytes of a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, sound(seed, seconds, rate), rate, format="WAV")
    return file.getvalue()


def save_sounds(folder: Path, count: int) -> list[str]:
    """Files 0.wav, 1.wav, ... of different lengths; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.wav").write_bytes(sound_file(number, 0.3 + 0.07 * (number * 5 % 7)))
    return [f"{number}.wav" for number in range(count)]


def save_shard(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 1000) -> Path:
    """A shard with the columns that its rows name."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    schema = pa.schema({name: COLUMNS[name] for name in names})
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def shard_rows(count: int, first: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """Rows of a shard with what every shard has, and columns that may be functions of the number."""
    return [
        {"utt": f"u{i}", "text": f"say {i}", "spk": "ab"[i % 2], "wav": f"/elsewhere/{i}.wav"}
        | {name: value(i) if callable(value) else value for name, value in columns.items()}
        for i in range(first, first + count)
    ]


def save_kaldi(folder: Path, count: int, **tables: str) -> Path:
    """A folder with recordings, and tables that replace or add to the usual ones."""
    names = save_sounds(folder / "sounds", count)
    usual = {
        "wav.scp": "".join(f"u{i} sounds/{name}\n" for i, name in enumerate(names)),
        "text": "".join(f"u{i} say {i}\n" for i in range(count)),
        "utt2spk": "".join(f"u{i} {'ab'[i % 2]}\n" for i in range(count)),
    }
    for name, content in (usual | tables).items():
        (folder / name).write_text(content, "utf-8")
    return folder
