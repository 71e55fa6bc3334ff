# SPDX-License-Identifier: Apache-2.0
"""Where manifests lie: files and folders here, patterns of file names, and URLs of whatever fsspec can open."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.data.records import Fault, ManifestError
from tts_align.utils.assets import resolve
from tts_align.utils.files import file_digest
from tts_align.utils.readers import reading

_PATTERN = frozenset("*?[")
_SUFFIXES = (".parquet", ".jsonl")


def locate(name: str | Path) -> Path | str:
    """A path here, or, of a URL or a pattern of names, a string.

    >>> locate("s3://bucket/rows-*.parquet")
    's3://bucket/rows-*.parquet'
    """
    text = str(name)
    if "://" in text:
        return text
    path = resolve(name)
    return text if _PATTERN & set(text) and not path.exists() else path


@dataclass(frozen=True)
class Shard:
    """One file of a URL or a pattern.

    Args:
        name: as errors call it.
        system: of fsspec, which opens it.
        path: in that system.
    """

    name: str
    system: Any
    path: str

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The file, read as it is asked for."""
        from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

        with reading(self.name), self.system.open(self.path, "rb") as file:
            # Files in a store of objects know no limit to a line.
            yield io.BufferedReader(file) if isinstance(file, AbstractBufferedFile) else file


def shards(name: str) -> list[Shard]:
    """The files of a URL or a pattern, by name: of a folder its Parquet shards, or else its JSON lines.

    Raises:
        ManifestError: there are none, or what opens such URLs is not installed.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        system, path = fsspec.core.url_to_fs(name)
        if _PATTERN & set(path):
            found = [one for one in system.glob(path) if one.endswith(_SUFFIXES)]
        elif system.isdir(path):
            names = [str(one) for one in system.ls(path, detail=False)]
            found = next((some for end in _SUFFIXES if (some := [one for one in names if one.endswith(end)])), [])
        else:
            found = [path] if system.exists(path) else []
    except (ImportError, ValueError, OSError) as error:
        raise ManifestError(name, [Fault(name, f"cannot be opened: {' '.join(str(error).split())[:300]}")]) from None
    if not found:
        raise ManifestError(name, [Fault(name, "expected .parquet or .jsonl files, found none")])
    local = "://" not in name
    return [Shard(one if local else str(system.unstrip_protocol(one)), system, one) for one in sorted(map(str, found))]


def content(path: Path | str, files: list[Path]) -> str:
    """Digest of what a manifest holds.

    Args:
        path: of the manifest.
        files: those it is made of, if it lies here.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(path, str):
        for shard in shards(path):
            digest.update(f"{shard.name}\0{shard.system.ukey(shard.path)}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()
    for file in files:
        name = str(file.absolute()) if len(files) > 1 else file.suffix
        digest.update(f"{name}\0{file_digest(file)}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()
