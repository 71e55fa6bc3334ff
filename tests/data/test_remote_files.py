# SPDX-License-Identifier: Apache-2.0
"""Manifests in a store of objects: its files are read by ranges of bytes and know less than a file here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from letters import make_rows

from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.records import ManifestError


class Ranges(AbstractBufferedFile):
    """As S3's, Google's and HTTP's files are: ``readline`` takes no limit."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.objects[self.path][start:end]


class Bucket(AbstractFileSystem):
    """Objects by name."""

    protocol = "bucket"
    objects: ClassVar[dict[str, bytes]] = {}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in self.objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        names = [name for name in self.objects if name.startswith(f"{self._strip_protocol(path)}/")]
        return [self.info(name) for name in names] if detail else names

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Ranges:
        return Ranges(self, path, mode, block_size=1000, size=len(self.objects[path]))


@pytest.fixture
def bucket() -> Iterator[dict[str, bytes]]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    yield Bucket.objects
    Bucket.objects.clear()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_are_those_of_a_file_here(name: str, tmp_path: Path, bucket: dict[str, bytes]) -> None:
    rows = make_rows(30, 8)
    write_manifest(rows, tmp_path / name)
    bucket[f"in/{name}"] = (tmp_path / name).read_bytes()
    for place in (f"bucket://in/{name}", "bucket://in"):
        assert list(read_manifest(place).rows) == list(read_manifest(tmp_path / name).rows)


def test_a_fault_is_named_by_the_object_and_its_line(bucket: dict[str, bytes]) -> None:
    bucket["in/a.jsonl"] = b'{"text": "a", "speech": [1]}\n{"text": "b", "speech": []}\n'
    with pytest.raises(ManifestError, match=r"bucket://in/a\.jsonl:2: speech"):
        read_manifest("bucket://in")
