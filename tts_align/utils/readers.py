# SPDX-License-Identifier: Apache-2.0
"""Reading files of others: whatever is wrong with one is said in a line or two, and nothing is expanded unseen.

Every reader of the package goes through here. A reader raises :class:`ReadError`, which names the file and, where there
is one, the line; or ``FileNotFoundError``, which does too.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_NESTING = 64
"""Levels of lists and objects in one document; no file of ours has ten."""
MAX_NODES = 100_000
"""Values in one YAML document, those behind aliases counted as often as they are referred to."""
MAX_TEXT_BYTES = 2**28
"""Largest document that is read at once, in bytes."""
MAX_YAML_BYTES = 2**24
MAX_LINE_BYTES = 2**26
"""Longest line of a file of rows, in bytes: a day of speech tokens needs a tenth of it."""
_PIECES = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

_ADVICE = {
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "is a directory, expected a file",
    errno.ENOTDIR: "a part of the path is a file, expected a directory",
    errno.EACCES: "permission denied: change its permissions, or run as its owner",
    errno.EPERM: "the operation is not permitted: change its permissions, or run as its owner",
    errno.ENAMETOOLONG: "the name is too long for a file: shorten it",
    errno.ENOSPC: "no space left on the disk: free some, then give the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, then give the same command again",
    errno.EFBIG: "larger than a file may be here (ulimit -f, or the file system): raise the limit, then give the same "
    "command again",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ELOOP: "links that lead to each other: remove them",
    errno.EXDEV: "lies on another file system",
    errno.EBUSY: "is in use, or something is mounted there: choose another place",
    errno.EIO: "the disk or the network behind it failed",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}


class ReadError(ValueError):
    """A file that cannot be read as what it should be.

    Args:
        where: file, and line or key if known.
        what: was expected, came, and is to be changed.
    """

    def __init__(self, where: str | Path, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where, self.what = str(where), what


def described(error: OSError, path: str | Path | None = None) -> str:
    """What the operating system says, in a line with the file and advice.

    >>> described(OSError(28, "No space left on device"), "a.ckpt")
    'a.ckpt: no space left on the disk: free some, then give the same command again'
    """
    where = error.filename if path is None else path
    said = _ADVICE.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(where)}: {said}" if isinstance(where, (str, bytes, os.PathLike)) else said


@contextmanager
def reading(path: str | Path, kind: str = "", hint: str = "") -> Iterator[None]:
    """Whatever goes wrong in the block is said of the file.

    Args:
        path: of the file.
        kind: what it should be, such as ``JSON``.
        hint: what to change.

    Raises:
        FileNotFoundError: it is not there.
        ReadError: anything else.
    """
    try:
        yield
    except (ReadError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno == errno.EINVAL and kind:  # PyTorch seeks before the beginning of a file that was cut
            raise ReadError(path, f"cannot be read as {kind}, is it damaged?{f' {hint}' if hint else ''}") from error
        raise ReadError(path, described(error, path).removeprefix(f"{path}: ")) from error
    except MemoryError as error:
        raise ReadError(path, "needs more memory than there is") from error
    except Exception as error:
        raise ReadError(path, f"{_fault(error, kind)}{f'; {hint}' if hint else ''}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        raise ReadError(path, f"cannot be read as {kind}: {' '.join(str(error).split())[:300]}") from None


def _fault(error: Exception, kind: str) -> str:
    """What is wrong with a file, in a line."""
    if isinstance(error, UnicodeError):
        return f"expected text in UTF-8 ({error})"
    if isinstance(error, RecursionError):
        return f"is nested too deeply, expected at most {MAX_NESTING} levels"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    said = " ".join(str(error).split())[:300]
    detail = f"{type(error).__name__}: {said}" if not isinstance(error, ValueError) else said
    return f"cannot be read as {kind}: {detail}" if kind else detail


def read_bytes(path: str | Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """A whole file, if it is not larger than a limit; devices and pipes end there too."""
    with reading(path), Path(path).open("rb") as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise ReadError(path, f"is larger than {limit >> 20} MB, which is too large for a file of this kind")
        return content


def read_text(path: str | Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A whole file of text in UTF-8, with or without a byte order mark."""
    with reading(path):
        return read_bytes(path, limit).decode("utf-8-sig")


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """What a text in JSON holds.

    Args:
        text: in UTF-8 if it is bytes.
        where: what errors call it: file, or file and line.

    Raises:
        ReadError: it is not JSON, nested too deeply, or holds a number of more digits than any.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        _check_nesting(text)
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ReadError(where, f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ReadError(where, _fault(error, "JSON").replace("cannot be read as", "not")) from None


def _check_nesting(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return
    depth = 0
    for piece in _PIECES.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece[0], 0)
        if depth > MAX_NESTING:
            raise RecursionError


def read_json(path: str | Path) -> Any:
    """What a JSON file holds."""
    return parse_json(read_text(path), path)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """What a JSON file holds that must be names and values."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ReadError(path, f"expected names and values in braces, got {type(value).__name__}")
    return value


def byte_lines(path: str | Path, opened: Any = None) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of each line of a file; none may be of a length that no row has.

    Args:
        path: of the file.
        opened: the file, if it is open already; whatever has ``readline`` will do.
    """
    with reading(path), nullcontext(opened) if opened is not None else Path(path).open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ReadError(f"{path}:{number}", f"the line is longer than {MAX_LINE_BYTES >> 20} MB: is it a file "
                                "of rows?")  # fmt: skip
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def load_yaml(text: str, where: str | Path = "recipe", loader: Any = None) -> Any:
    """What a text in YAML holds, tags of objects refused; aliases are counted before they are expanded.

    Args:
        text: the document.
        where: what errors call it.
        loader: of what tags mean; that of plain values by default.

    Raises:
        ReadError: it is not YAML, nested too deeply, or its aliases hold more values than any recipe has.
    """
    import yaml

    made = None
    loader = loader or fast_loader()
    try:
        _check_levels(yaml.parse(text, loader))  # before libyaml composes nodes, which it does by recursion in C
        made = loader(text)
        node = made.get_single_node()
        if node is None:
            return None
        _count(node, {}, set(), 0)
        return made.construct_document(node)
    except yaml.YAMLError as error:
        if "maximum nesting depth" in str(error):  # of libyaml, which looks ahead
            raise ReadError(where, f"is nested too deeply, expected at most {MAX_NESTING} levels") from None
        raise ReadError(where, f"not YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise ReadError(where, f"is nested too deeply, expected at most {MAX_NESTING} levels") from None
    except OverflowError as error:
        raise ReadError(where, str(error)) from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # constructors of numbers and dates
        raise ReadError(where, f"not YAML: {' '.join(str(error).split())[:300]}") from None
    finally:
        if made is not None:
            made.dispose()


def fast_loader() -> Any:
    """PyYAML's safe loader in C, ten times as fast; or in Python, where PyYAML was built without libyaml."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_levels(events: Iterable[Any]) -> None:
    depth = 0
    for kind in (type(event).__name__ for event in events):
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > MAX_NESTING + 2:  # stream and document are levels, too
            raise RecursionError


def _count(node: Any, known: dict[int, int], above: set[int], depth: int) -> int:
    """Number of values under a node of YAML, aliases expanded."""
    if id(node) in above:
        raise OverflowError("an alias refers to itself")
    if id(node) in known:
        return known[id(node)]
    if depth > MAX_NESTING:
        raise RecursionError
    above.add(id(node))
    children = node.value if isinstance(node.value, list) else []
    total = 1
    for child in children:
        for one in child if isinstance(child, tuple) else (child,):
            total += _count(one, known, above, depth + 1)
        if total > MAX_NODES:
            raise OverflowError(f"holds more than {MAX_NODES} values, most of them behind aliases: write them out")
    above.discard(id(node))
    known[id(node)] = total
    return total


def read_yaml(path: str | Path, loader: Any = None) -> Any:
    """What a YAML file holds; see :func:`load_yaml`."""
    return load_yaml(read_text(path, MAX_YAML_BYTES), path, loader)


def load_tensors(path: str | Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values; code in the file is never run.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is none.
        ReadError: it is something else, is damaged, or would become larger than it is.
    """
    import torch

    path = Path(path)
    with reading(path, "weights", "was it copied or downloaded completely?"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        path.open("rb").close()  # whether it may be read, before anything else is said of it
        archive = zipfile.is_zipfile(path)
        if archive:
            check_archive(path)
        try:  # files of before PyTorch 1.6 are no archives and cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
        except pickle.UnpicklingError:
            raise ReadError(path, "holds more than tensors and plain values, or is damaged: it is not loaded") from None
        _check_sizes(path, found)
        return found


def check_archive(path: str | Path, contents: bool = False) -> None:
    """Refuse an archive that would become larger than it is; PyTorch stores tensors uncompressed.

    Args:
        path: of a file that ``torch.save`` wrote.
        contents: also read every byte, and compare with the sums that were stored with them.

    Raises:
        ReadError: it is no such archive, or damaged.
    """
    with reading(path, "an archive of weights"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = next((one for one in members if one.compress_type != zipfile.ZIP_STORED), None)
        total, size = sum(one.file_size for one in members), Path(path).stat().st_size
        if packed is not None or total > size:
            raise ReadError(
                path, f"its {size} bytes would become {total}: PyTorch compresses nothing, so it is not loaded"
            )
        if contents and (bad := archive.testzip()) is not None:
            raise ReadError(path, f"is damaged: {bad} is not what was written")


def _check_sizes(path: Path, value: Any) -> None:
    """Refuse tensors that claim more numbers than are stored: one that repeats a number needs no memory until used."""
    import torch

    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, torch.Tensor):
            if one.layout is torch.strided and one.numel() * one.element_size() > one.untyped_storage().nbytes():
                raise ReadError(path, f"a tensor of shape {tuple(one.shape)} is larger than what is stored of it")
        elif isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, (list, tuple)):
            stack += one


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file by name, on the CPU."""
    from safetensors.torch import load_file

    with reading(path, "safetensors", "was it copied or downloaded completely?"):
        Path(path).open("rb").close()
        return load_file(path)
