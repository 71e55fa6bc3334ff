# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are spread over processes, a share in each, and how to have it whole (PyTorch's FSDP2)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

Model = TypeVar("Model", bound=nn.Module)
_FRAME = "_whole_frame"
"""Attribute of a sharded model: the model as it was, without memory for its weights."""


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the weights of a model over processes, in place; one that is spread already stays as it is.

    Its forward, gradient and optimiser then work as before, as long as all processes call it in step: forward
    passes as often in each, a backward in all or in none.

    Args:
        model: on its device, with the same weights in every process; may return a dataclass.
        blocks: parts of it whose weights are gathered only while they compute.
        mesh: the processes, in one row.
    """
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        return
    frame = copy.deepcopy(model, {id(value): _without_memory(value) for value in model.parameters()})
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    object.__setattr__(model, _FRAME, frame)  # not a part of the model, which is what setattr would make of it
    units = _units(model)
    # A part that is called first, as when the policy speaks before its first step, would take itself for the whole.
    units[0]._get_fsdp_state()._lazy_init()
    # What is gathered ahead in a backward is the block before, and not what the history of this process suggests:
    # processes may have made unequal numbers of forward passes within `whole`, and would wait for different blocks.
    for before, unit in zip((units[-1], *units[:-1]), units, strict=True):
        unit.set_modules_to_backward_prefetch([before])


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are spread over processes."""
    return bool(_units(model))


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights, so that processes need not compute in step.

    For forward passes and speaking, without gradients; no hindrance for a model that is whole anyway. All processes
    must enter. What changes a weight, and what reads ``state_dict``, works on :func:`plain`.
    """
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def plain(model: Model) -> Model:
    """A model of its own with the weights of a sharded one; a model that is whole anyway is given back itself.

    All processes must call it.
    """
    if not is_sharded(model):
        return model
    state = whole_state(model)
    copied: Model = copy.deepcopy(getattr(model, _FRAME))
    tied = _tied(copied)
    copied.load_state_dict(state, assign=True)
    for first, others in tied.items():
        for name in others:
            owner, _, own = name.rpartition(".")
            copied.get_submodule(owner)._parameters[own] = copied.get_parameter(first)
    return copied.train(model.training)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameters that are one under several names: the first name -> the others."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return {first: others for first, *others in names.values() if others}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights and buffers by name; all processes must call it."""
    return {name: whole_tensor(value) for name, value in model.state_dict().items()}


def whole_tensor(value: Any) -> Any:
    """A tensor that is spread over processes, put together in each of them; anything else as it is."""
    return value.full_tensor() if is_share(value) else value


def share_of(value: Any, like: Tensor) -> Any:
    """This process's share of a whole tensor, if it belongs to a tensor that is spread over processes.

    Args:
        value: the same in every process; a tensor of another shape, or no tensor, is given back as it is.
        like: what it belongs to.
    """
    if not is_share(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    spread = cast("Any", like)
    return distribute_tensor(value.to(like.device), spread.device_mesh, spread.placements, src_data_rank=None)


def is_share(value: Any) -> bool:
    """Whether a tensor is spread over processes."""
    tensors = sys.modules.get("torch.distributed.tensor")  # whoever has not imported it has no such tensor
    return tensors is not None and isinstance(value, tensors.DTensor)


def _units(model: nn.Module) -> list[FSDPModule]:
    """Parts of a model whose weights are gathered together, the model itself first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [unit for unit in model.modules() if isinstance(unit, fsdp.FSDPModule)]


def _without_memory(value: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
