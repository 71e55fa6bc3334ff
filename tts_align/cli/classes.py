# SPDX-License-Identifier: Apache-2.0
"""Which classes a recipe may name: those of the kind that its place wants, and nothing else that can be called.

A recipe is read, not run. Where it names a class, that class must be what the place is for; where a place has no type,
it must at least be a part of a training. Code of one's own comes in by ``run.modules``, or by the class path of an
objective, model, callback or the like in a module of one's own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from tts_align.cli.errors import RecipeError

STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)
_PACKAGE = "tts_align"
_OF_THE_MODEL = ("objective", "policy", "reference", "reward", "flow", "tokenizer", "vocoder", "judge", "optimizer")
_OF_THE_TRAINER = ("accelerator", "strategy", "callbacks", "logger", "profiler", "plugins")
PLACES = frozenset(
    (
        "objective",
        *(f"model.{name}" for name in (*_OF_THE_MODEL, "lr_scheduler")),
        *map("trainer.{}".format, _OF_THE_TRAINER),
    )
)
"""Keys of a recipe that take a class: those of :func:`slots`, without importing what they are for."""


def check_not_standard(path: str, key: str) -> None:
    """Refuse, before it is imported, a class path into Python's standard library: nothing in it is part of a training.

    Args:
        path: as a recipe gives it.
        key: where it stands.

    Raises:
        RecipeError: it is one.
    """
    root, *rest = path.split(".")
    if rest and root in STANDARD_LIBRARY:
        raise RecipeError(f"{key}: {path} is no class that a recipe may name: it belongs to Python's standard library")
    if "__main__" in rest[:-1]:
        raise RecipeError(f"{key}: {path} is no class that a recipe may name: it belongs to a program")


def check_written(recipe: Any, key: str = "") -> None:
    """Refuse class paths into Python's standard library in a recipe that was read, not yet parsed: parsing imports.

    Args:
        recipe: what a file or a flag holds: names and values, a list of such, or a class path.
        key: where it stands; empty for a whole recipe.

    Raises:
        RecipeError: it names one.
    """
    if isinstance(recipe, str) and (key in PLACES or key.endswith(".class_path")):
        check_not_standard(recipe, key.removesuffix(".class_path"))
    elif isinstance(recipe, Mapping):
        for name, value in recipe.items():
            alias = key == "objective" and name == "name"  # objective: {name: ..., ...}
            check_written(value, key if alias else f"{key}.{name}" if key else str(name))
    elif isinstance(recipe, list | tuple):
        for value in recipe:
            check_written(value, key)


def slots() -> dict[str, tuple[type, ...]]:
    """What each place of a recipe that takes a class is for, by its dotted key."""
    from lightning.pytorch import Callback
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

    from tts_align.evaluation.judges.base import Judge
    from tts_align.models.base.flow import FlowHead
    from tts_align.models.base.policy import CodecLM
    from tts_align.models.base.reward import RewardHead
    from tts_align.models.base.tokenizer import TokenizerHead
    from tts_align.models.base.vocoder import Vocoder
    from tts_align.objectives import Objective

    return {
        "objective": (Objective,),
        "model.objective": (Objective,),
        "model.policy": (CodecLM,),
        "model.reference": (CodecLM,),
        "model.reward": (RewardHead,),
        "model.flow": (FlowHead,),
        "model.tokenizer": (TokenizerHead,),
        "model.vocoder": (Vocoder,),
        "model.judge": (Judge,),
        "model.optimizer": (Optimizer,),
        "model.lr_scheduler": (LRScheduler, ReduceLROnPlateau),
        "trainer.accelerator": (Accelerator,),
        "trainer.strategy": (Strategy,),
        "trainer.callbacks": (Callback,),
        "trainer.logger": (Logger,),
        "trainer.profiler": (Profiler,),
        "trainer.plugins": _plugins(),
    }


def _plugins() -> tuple[type, ...]:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch.plugins import LayerSync, Precision

    return CheckpointIO, ClusterEnvironment, LayerSync, Precision


def _parts() -> tuple[type, ...]:
    """Kinds of classes that may be an argument of another class, where that does not say what it wants."""
    from torch import nn

    from tts_align.evaluation.measures.base import UtteranceMeasure

    return (*{kind for kinds in slots().values() for kind in kinds}, nn.Module, UtteranceMeasure)


def check_classes(recipe: Mapping[str, Any] | Namespace, modules: Any = ()) -> None:
    """Refuse a recipe that names what its places are not for; nothing has been called yet.

    Args:
        recipe: as it was parsed.
        modules: names of the user's own modules, whose classes and functions may be arguments of other classes.

    Raises:
        RecipeError: with the key, what it may be, and what it is.
    """
    own = {name.partition(".")[0] for name in ([modules] if isinstance(modules, str) else modules or ())}
    wanted, parts = slots(), _parts()
    for key, value, inside in _named(recipe):
        if isinstance(value, str):
            check_not_standard(value, key)
        found = _imported(value, key) if isinstance(value, str) else value
        root = str(getattr(found, "__module__", "")).partition(".")[0]
        kinds = wanted.get(key)
        if kinds is not None:
            if not (inspect.isclass(found) and issubclass(found, kinds)):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise RecipeError(f"{key}: expected a class of the kind {expected}, got {_said(value)}")
        elif root not in own | ({inside} - {"lightning", "torch", "pytorch_lightning"}) and not (
            inspect.isclass(found) and (issubclass(found, parts) or root == _PACKAGE)
        ):
            raise RecipeError(
                f"{key}: {_said(value)} is no part of a training; if it is yours, name its module in run.modules"
            )


def _named(node: Any, key: str = "", inside: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key and value of everything in a recipe that names a class or a function, and whose class's argument it is."""
    if isinstance(node, Mapping | Namespace):
        values = vars(node) if isinstance(node, Namespace) else node
        path = values.get("class_path")
        if isinstance(path, str):
            yield key, path, inside
            inside = path.partition(".")[0]
        for name, value in values.items():
            if name in ("init_args", "dict_kwargs") and isinstance(path, str):
                yield from _named(value, f"{key}.{name}", inside)
            elif name != "class_path":
                yield from _named(value, f"{key}.{name}" if key else str(name), inside)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _named(value, key, inside)
    elif inspect.isroutine(node) or inspect.isclass(node) or isinstance(node, functools.partial):
        yield key, node, inside


def _imported(path: str, key: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise RecipeError(f"{key}: cannot import {path}: {type(error).__name__}: {error}") from error


def _said(value: Any) -> str:
    return (
        value if isinstance(value, str) else f"{getattr(value, '__module__', '')}.{getattr(value, '__name__', value)}"
    )
