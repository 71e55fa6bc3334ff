# SPDX-License-Identifier: Apache-2.0
"""Directories of models: sizes in ``config.json``, weights in ``model.safetensors``, replaced as a whole."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from tts_align.utils.assets import resolve
from tts_align.utils.files import directory_written_atomically, read_config
from tts_align.utils.readers import ReadError, load_safetensors, reading

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
Sizes = TypeVar("Sizes")


def find_model(directory: str | Path, option: str) -> Path:
    """Path of a model's directory; names that begin with ``demo:`` are those of the embedded ones.

    Args:
        directory: as the recipe gives it.
        option: of the recipe whose ``directory`` it is.

    Raises:
        ValueError: it holds no ``config.json``.
    """
    path = resolve(directory)
    if not (path / CONFIG).is_file():
        raise ValueError(f"expected a model directory with {CONFIG}, got {str(directory)!r}: check {option}.directory")
    return path


def read_sizes(directory: Path, kind: type[Sizes], part: bool = False) -> Sizes:
    """Sizes that ``config.json`` holds, as a record; lists become tuples.

    Args:
        directory: of the model.
        kind: the dataclass.
        part: leave out what the record does not know: the model is a part of the one that is stored.
    """
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in read_config(directory / CONFIG).items()
    }
    if part:
        known = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
        values = {key: value for key, value in values.items() if key in known}
    check_values(directory, values, kind)
    try:
        return kind(**values)
    except TypeError as error:  # a size that is missing or unknown
        raise ReadError(directory / CONFIG, f"{error}: is it the config of another kind of model?") from None


def check_values(directory: Path, values: Mapping[str, Any], kind: type) -> None:
    """Refuse values of other types than the record's, and sizes that the stored weights cannot have.

    Args:
        directory: of the model.
        values: of its ``config.json``.
        kind: the record.

    Raises:
        ReadError: a value is not what it should be.
    """
    path, stored = directory / CONFIG, directory / WEIGHTS
    numbers = stored.stat().st_size if stored.is_file() else None  # each weight takes a byte at least
    for name, hint in get_type_hints(kind).items():
        if name not in values:
            continue
        value = values[name]
        if not _fits(value, hint):
            raise ReadError(path, f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r:.60}")
        # A rate in Hz is no number of weights.
        if numbers is not None and type(value) is int and abs(value) > numbers and name != "sample_rate":
            raise ReadError(path, f"{name}: {value} is more than {WEIGHTS} holds numbers")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of an annotated type, as far as that is a simple one."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inside[0]) for one in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint if hint in (int, str, bool, type(None)) else True


def read_weights_of(directory: Path) -> dict[str, Tensor]:
    """The weights as float32, on the CPU."""
    return {name: value.float() for name, value in load_safetensors(directory / WEIGHTS).items()}


def load_weights_of(module: nn.Module, directory: Path) -> None:
    """Give a module the weights of its directory.

    Raises:
        ReadError: they are another model's, or damaged.
    """
    with reading(directory / WEIGHTS, f"weights of {type(module).__name__} as {CONFIG} describes it"):
        module.load_state_dict(read_weights_of(directory))


def half_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters in half precision; buffers are made again by the constructor."""
    return {name: value.detach().half() for name, value in module.named_parameters()}


def load_parameters(module: nn.Module, directory: Path) -> None:
    """Copy what :func:`half_parameters` gave from a model's directory.

    Raises:
        ValueError: these are not the module's parameters.
    """
    stored, parameters = read_weights_of(directory), dict(module.named_parameters())
    if stored.keys() != parameters.keys():
        raise ValueError(f"{directory / WEIGHTS} holds other weights than its {CONFIG} describes")
    with torch.no_grad():
        for name, value in stored.items():
            parameters[name].copy_(value)


def write_model(
    directory: str | Path, sizes: Any, weights: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write sizes and weights; the directory appears whole or not at all, also in the place of an earlier model.

    Args:
        directory: what is written.
        sizes: a dataclass.
        weights: by name, on any device.
        texts: further files of the model by name.

    Raises:
        ValueError: the directory holds something that is not part of a model.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    check_replaceable(directory)
    config = json.dumps(dataclasses.asdict(sizes), indent=2, ensure_ascii=False)
    with directory_written_atomically(directory, overwrite=True) as scratch:
        for name, text in {CONFIG: f"{config}\n", **(texts or {})}.items():
            (scratch / name).write_text(text, "utf-8")
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, scratch / WEIGHTS)
        (scratch / WEIGHTS).chmod((scratch / CONFIG).stat().st_mode & 0o777)  # safetensors lets nobody else read it


def check_replaceable(directory: Path) -> None:
    """Raise ``ValueError`` if a directory cannot be replaced, or holds what is no part of a model and would be lost."""
    if directory.is_mount():
        raise ValueError(f"something is mounted at {directory}, which cannot be replaced: name a folder inside it")
    names = sorted(one.name for one in directory.iterdir()) if directory.is_dir() else []
    if others := [name for name in names if name not in (CONFIG, WEIGHTS, TOKENIZER)]:
        raise ValueError(f"{directory} holds {others[0]}, which is not part of a model: choose another directory")


def check_nothing_lost(directory: Path, new: Path, dropped: Sequence[str] = ()) -> None:
    """Raise ``ValueError`` if a directory holds a file that has no successor in the one that is to take its place.

    Args:
        directory: is to be replaced; it need not exist.
        new: takes its place.
        dropped: patterns of files and folders that need none.
    """
    for place, folders, names in os.walk(directory):
        here = Path(place).relative_to(directory)
        folders[:] = sorted(one for one in folders if not _is_among((here / one).as_posix(), dropped))
        for file in (here / name for name in sorted(names)):
            if not _is_among(file.as_posix(), dropped) and not (new / file).is_file():
                raise ValueError(
                    f"{directory} holds {file}, which is not part of the model that is written and would be lost: "
                    "choose another directory, or remove the file"
                )


def _is_among(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
