# SPDX-License-Identifier: Apache-2.0
"""One base for everything that listens, speaks or makes speech tokens: it owns its device and its precision.

A vocoder, a tokenizer or a judge is written as if there were one device and one precision. The methods that the
interface names in ``on_own_device`` run, in every subclass, a user's too:

- with inputs on the module's own device, floating-point ones in float32 at least;
- with new tensors (``torch.arange``, ``torch.zeros``, ...) made there; beside a CPU generator name ``device="cpu"``;
- without autocast, with float32 as the default type, in evaluation mode and without gradients;
- and their results come back on the CPU.

Weights stay float32 when the whole is brought to half precision, as a trainer of ``bf16-true`` does.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tts_align.models.base.precision import coarser, full_precision

_running: ContextVar[frozenset[int]] = ContextVar("running", default=frozenset())
"""Modules one of whose methods runs: what it calls of itself, or of its base class, is at home already."""


class OwnsItsDevice(nn.Module):
    """What listens or speaks; see the module's own words."""

    on_own_device: ClassVar[tuple[str, ...]] = ()
    """Names of the methods that run on the module's own device."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the methods of a subclass run on its own device."""
        super().__init_subclass__(**options)
        for name in cls.on_own_device:
            method = inspect.getattr_static(cls, name, None)
            if callable(_function(method)) and not hasattr(method, "_runs_on_own_device"):
                setattr(cls, name, _on_own_device(_bound_like(method)))

    @property
    def own_device(self) -> torch.device:
        """Where its weights are; the CPU for what has none, such as a recogniser outside PyTorch."""
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow to another device, but never to a coarser type than float32."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if coarser(changed, tensor) else changed

        return super()._apply(at_least_float32, recurse)


def _function(method: Any) -> Any:
    """What is called in the end, behind ``staticmethod`` and ``classmethod``."""
    return method.__func__ if isinstance(method, (staticmethod, classmethod)) else method


def _bound_like(method: Any) -> Callable[..., Any]:
    """A method as a function of the instance and what it is given, as Python binds it; generators as lists.

    A generator's body would run after the device and the precision have been put back.
    """
    function = _function(method)

    @functools.wraps(function)
    def call(self: OwnsItsDevice, *args: Any, **options: Any) -> Any:
        if isinstance(method, staticmethod):
            found = function(*args, **options)
        else:
            found = function(type(self) if isinstance(method, classmethod) else self, *args, **options)
        return list(found) if inspect.isgenerator(found) else found

    return call


def _on_own_device(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: OwnsItsDevice, *args: Any, **options: Any) -> Any:
        running = _running.get()
        if id(self) in running:
            return method(self, *args, **options)
        device = self.own_device
        mark = _running.set(running | {id(self)})
        try:
            with torch.no_grad(), full_precision(device), evaluation_mode(self), device:
                return on_cpu(method(self, *at_home(args, device), **at_home(options, device)))
        finally:
            _running.reset(mark)

    run._runs_on_own_device = True  # type: ignore[attr-defined]
    return run


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within the block every part is in evaluation mode; afterwards each is in its own again."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def at_home(value: Any, device: torch.device) -> Any:
    """The same with every tensor on a device, those of half precision in float32."""

    def move(tensor: Tensor) -> Tensor:
        half = tensor.is_floating_point() and tensor.element_size() < 4
        return tensor.to(device, torch.float32 if half else tensor.dtype)

    return _mapped(value, move)


def on_cpu(value: Any) -> Any:
    """The same with every tensor on the CPU."""
    return _mapped(value, lambda tensor: tensor.cpu())


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in lists, tuples, dictionaries and records; what holds none stays the object it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        mapped = {key: _mapped(one, change) for key, one in value.items()}
        if all(mapped[key] is one for key, one in value.items()):
            return value
        return _with_items(value, mapped)
    if isinstance(value, (list, tuple)):
        changed = [_mapped(one, change) for one in value]
        if all(one is other for one, other in zip(changed, value, strict=True)):
            return value
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if hasattr(value, one.name)}
        changes = {name: _mapped(one, change) for name, one in fields.items()}
        changes = {name: one for name, one in changes.items() if one is not fields[name]}
        if not changes:
            return value
        same: Any = value
        changed = copy.copy(same)  # what __post_init__ worked out once is not worked out again
        for name, one in changes.items():
            object.__setattr__(changed, name, one)
        return changed
    return value


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """The same kind of mapping with other values; a plain dictionary where it cannot be changed."""
    if not isinstance(value, MutableMapping):
        return items
    changed = copy.copy(value)
    changed.update(items)
    return changed
