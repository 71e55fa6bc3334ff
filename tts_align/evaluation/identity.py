# SPDX-License-Identifier: Apache-2.0
"""What a number depends on besides the utterance: class, version, arguments and weights of what listened."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from torch import Tensor, nn

from tts_align.utils.shards import digest


class Identified(nn.Module):
    """Has an :meth:`identity`, with which its answers are kept; another one answers anew.

    Class, constructor arguments and registered weights are part of it by themselves; a class whose code changes says so
    with ``version``.
    """

    version: ClassVar[str] = "1"
    """Of the code: change it when the same utterance may get another answer than before."""
    neutral_arguments: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    """Constructor arguments that change no answer."""
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Identified:
        """Note the constructor's arguments."""
        made = super().__new__(cls)
        # A copy is made without arguments and takes over those of the original.
        given = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs)
        given.apply_defaults()
        object.__setattr__(made, "_arguments", dict(list(given.arguments.items())[1:]))
        return made

    def identity(self) -> dict[str, str]:
        """What an answer depends on besides the utterance: class, version, arguments and weights."""
        known = {name: value for name, value in self._arguments.items() if name not in self.neutral_arguments}
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "version": self.version,
            "arguments": digest({name: _plain(value) for name, value in sorted(known.items())}),
            "weights": digest([(name, _sum(value)) for name, value in self.state_dict().items()]),
        }


def _plain(value: Any) -> str:
    """A constructor's argument as text that is the same in every process; of other objects their class."""
    if value is None or isinstance(value, (bool, int, float, str, PurePath)) or is_dataclass(value):
        return repr(value)
    if isinstance(value, Mapping):
        return repr({str(name): _plain(one) for name, one in value.items()})
    if isinstance(value, (list, tuple)):
        return repr([_plain(one) for one in value])
    if isinstance(value, (set, frozenset)):
        return repr(sorted(_plain(one) for one in value))
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _sum(value: Tensor) -> str:
    return digest(tuple(value.shape), value.detach().cpu().contiguous().view(-1).double().sum().item())
