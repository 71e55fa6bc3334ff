# SPDX-License-Identifier: Apache-2.0
"""Where tables lie: one file for a manifest's content and what it was checked against, made once, shared by all."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from tts_align.utils.files import written_atomically
from tts_align.utils.readers import parse_json

VERSION = 1
"""Changes when the same manifest would give another table."""
STORED_FROM_BYTES = 2**22
"""Manifests of fewer bytes are read anew by every process, which takes less than a second."""
_META = b"tts_align"


def name_of(*parts: object) -> str:
    """Name of a stored file, that changes with everything it is made of."""
    return hashlib.blake2b(repr((VERSION, *parts)).encode(errors="surrogatepass"), digest_size=12).hexdigest()


def stored(path: Path, make: Callable[[Path], None]) -> Path:
    """A file that the first process to ask makes, while others on this machine wait; it appears whole or not at all.

    Args:
        path: of the file.
        make: writes it at the path it is given.
    """
    if path.is_file():
        return path
    with alone(path):
        if not path.is_file():
            with written_atomically(path) as scratch:
                make(scratch)
    return path


def release() -> None:
    """Give memory that is no longer used back to the system, where allocators keep it for later: after a large pass."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time is in such a block for a path; network disks may not offer that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    try:
        import fcntl
    except ImportError:  # no Unix
        yield
        return
    handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def write_table(path: Path, columns: dict[str, pa.Array], meta: dict[str, Any]) -> None:
    """Columns of one length as one batch, and what is known about them."""
    schema = pa.schema([(name, one.type) for name, one in columns.items()], {_META: json.dumps(meta).encode()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))


def read_table(path: Path) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """What was written so; the columns stay on the disk until they are looked at."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0), parse_json((reader.schema.metadata or {}).get(_META, b"{}"), path)
