# SPDX-License-Identifier: Apache-2.0
"""An accelerator that is not there: tensors that say they lie on ``cuda:0``, and do not mix with those on the CPU.

The numbers lie on the CPU. To Python a tensor of this device says ``cuda:0``, to the C++ below it ``meta``, which no
kernel computes on by accident; every operation arrives here, is refused if it mixes devices as CUDA would refuse it,
and is computed on the CPU otherwise. Generators have a device as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda:0")
_SHELL = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# What CUDA, too, does with tensors of two devices: copying, and looking up by indices from the CPU.
_CROSSING = {_aten.copy_.default, _aten._to_copy.default, _aten.set_.source_Storage_storage_offset}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class OnDevice(Tensor):
    """A tensor of the pretended device.

    Args:
        values: what it holds, on the CPU.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        shell = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=_SHELL,
        )
        shell.values = values
        return shell

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"{self.values!r} on {DEVICE}"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> OnDevice:
        return OnDevice(parts["values"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of the dispatcher."""
    if _real_meta:
        return func(*args, **kwargs)
    leaves = list(_tensors((*args, *kwargs.values())))
    here = [one for one in leaves if isinstance(one, OnDevice)]
    target = kwargs.get("device")
    check_waiting(func, args, kwargs, here)
    if not here and any(one.device == _SHELL for one in leaves):
        return func(*args, **kwargs)  # of a model without numbers
    check_devices(func, args, leaves, here)
    check_generator(func, kwargs.get("generator"), bool(here) if target is None else target == _SHELL)
    on_device = bool(here) if target is None else torch.device(target).type == _SHELL.type
    if func is _aten._local_scalar_dense.default:
        on_device = False
    if func is _aten.copy_.default:
        on_device = isinstance(args[0], OnDevice)
    plain_args, plain = _values(args), {name: _values(one) for name, one in kwargs.items()}
    if target is not None:
        plain["device"] = _CPU
    out = func(*plain_args, **plain)
    if not on_device:
        # A copy, where none was needed for lack of a second device.
        return out.clone() if func is _aten._to_copy.default and out is plain_args[0] else out
    wrapped = _on_device(out)
    if not here or func in (_aten._to_copy.default, _aten.copy_.default):
        return args[0] if func is _aten.copy_.default else wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if _aliases(func) else wrapped


_forbidden: list[bool] = []
_ASKING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default}


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Within the block it is an error to read a number of the device, or to copy to or from it and wait for that."""
    _forbidden.append(True)
    try:
        yield
    finally:
        _forbidden.pop()


def check_waiting(func: Any, args: Any, kwargs: dict[str, Any], here: list[OnDevice]) -> None:
    """Refuse what lets the host wait, as ``torch.cuda.set_sync_debug_mode`` does."""
    if not _forbidden:
        return
    target = kwargs.get("device")
    to_device = target is not None and torch.device(target).type == _SHELL.type
    crossing = func is _aten._to_copy.default and target is not None and to_device != bool(here)
    if func is _aten.copy_.default:
        crossing = isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and args[1].dim() > 0
        kwargs = {"non_blocking": args[2] if len(args) > 2 else kwargs.get("non_blocking", False)}
    masks = func in _INDEXING and any(
        one is not None and one.dtype == torch.bool for one in args[1] if isinstance(one, (Tensor, type(None)))
    )
    if (here and (func in _ASKING or masks)) or (crossing and not kwargs.get("non_blocking")):
        raise RuntimeError(f"{func} waits for the device")


def check_devices(func: Any, args: Any, leaves: list[Tensor], here: list[OnDevice]) -> None:
    """Refuse what CUDA refuses."""
    if here and any(one.device == _SHELL and not isinstance(one, OnDevice) for one in leaves):
        raise RuntimeError(f"{func} got a tensor that was made unseen by the pretended device: teach it to see that")
    if not here or len(here) == len(leaves) or func in _CROSSING:
        return
    if func in _INDEXING and isinstance(args[0], OnDevice):
        return
    if any(one.dim() for one in leaves if not isinstance(one, OnDevice)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} found at least two: {DEVICE}, cpu"
        )


def check_generator(func: Any, generator: Any, on_device: bool) -> None:
    """Refuse a generator of the other device."""
    if generator is not None and (generator._cdata in _generators) != on_device:
        wanted = (_CPU, DEVICE)[on_device]
        raise RuntimeError(f"Expected a '{wanted.type}' device type for generator of {func}, but found another")


class DeviceGenerator(torch.Generator):
    """A generator of the pretended device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


def _generator(device: Any = "cpu") -> torch.Generator:
    if str(device).split(":")[0] != DEVICE.type:
        return _REAL_GENERATOR(device)
    made = DeviceGenerator()
    _generators[made._cdata] = made
    return made


_generators: dict[int, DeviceGenerator] = {}
"""Those of the device by their address below: the dispatcher sees them without their class."""


_REAL_GENERATOR = torch.Generator


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """Those among the arguments of an operation, and in its lists."""
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one)


def _values(one: Any) -> Any:
    if isinstance(one, OnDevice):
        return one.values
    return type(one)(map(_values, one)) if type(one) in (list, tuple) else one


def _on_device(out: Any) -> Any:
    if isinstance(out, Tensor):
        return OnDevice(out)
    return type(out)(map(_on_device, out)) if type(out) in (list, tuple) else out


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether an operation returns one of its arguments, or a view of it."""
    return any(one.alias_info is not None for one in func._schema.returns)


def _shell(one: Any) -> Any:
    """What C++ is told of a device."""
    if isinstance(one, torch.device):
        return _SHELL if one.type == DEVICE.type else one
    return _SHELL if isinstance(one, str) and one.split(":")[0] == DEVICE.type else one


_real_meta: list[bool] = []


@contextmanager
def _without_numbers() -> Iterator[None]:
    _real_meta.append(True)
    try:
        yield
    finally:
        _real_meta.pop()


class _Computing(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs as much as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # there operations arrive whole that are otherwise made of others
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return compute(func, args, kwargs or {})


_ANSWERS: dict[Any, Callable[[OnDevice], Any]] = {
    Tensor.device.__get__: lambda one: DEVICE,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda one: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda one: False,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: lambda one: False,  # type: ignore[attr-defined]
    Tensor.get_device: lambda one: 0,
    Tensor.tolist: lambda one: one.values.tolist(),
    Tensor.data_ptr: lambda one: one.values.data_ptr(),
}


def _index(index: Any) -> Any:
    """Lists among indices become tensors of the device."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index, dtype=torch.long).to(_SHELL) if isinstance(index, list) else index


class _Naming(TorchFunctionMode):
    """Between Python's names of the devices and those below."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.device, torch.get_device_module, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if args and isinstance(args[0], OnDevice):
            if func in _ANSWERS:
                return _ANSWERS[func](args[0])
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError(f"can't convert {DEVICE} device type tensor to numpy: use Tensor.cpu() first")
            if func is Tensor.__reduce_ex__:
                return args[0].detach().values.__reduce_ex__(*args[1:])
        if func is Tensor.detach and isinstance(args[0], OnDevice) and torch.is_inference_mode_enabled():
            return OnDevice(args[0].values.detach())  # a wrapper made outside cannot be detached inside
        if func is Tensor.cuda:
            return args[0].to(_SHELL)
        if str(kwargs.get("device")) == "meta":  # models without numbers
            with _without_numbers():
                return func(*args, **kwargs)
        args, kwargs = tuple(map(_shell, args)), {name: _shell(one) for name, one in kwargs.items()}
        # They make their numbers unseen by the dispatcher.
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") == _SHELL:
            return func(*args, **kwargs | {"device": _CPU}).to(_SHELL)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            args = (args[0], _index(args[1]), *args[2:])
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return args[0].values.new_tensor(*args[1:], **kwargs).to(_SHELL)
        return func(*args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Within the block ``cuda:0`` is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", _generator)
        with _Naming(), _Computing():
            yield DEVICE


class SimulatedAccelerator(Accelerator):
    """To Lightning: one device, which is :data:`DEVICE`."""

    def setup_device(self, device: torch.device) -> None:
        assert device == DEVICE

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "simulated"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


AcceleratorRegistry.register("simulated", SimulatedAccelerator)
StrategyRegistry.register("simulated", SingleDeviceStrategy, device=DEVICE)
ON_SIMULATED_DEVICE = ("--trainer.accelerator", "simulated", "--trainer.strategy", "simulated")
"""Arguments of a command that runs within :func:`simulated_device`."""
