# SPDX-License-Identifier: Apache-2.0
"""What owns its device: any form of method, container and record goes in and comes out as it is."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tts_align.models.base.device import OwnsItsDevice, at_home, on_cpu
from tts_align.models.base.precision import full_precision


class Listener(OwnsItsDevice):
    on_own_device: ClassVar[tuple[str, ...]] = ("hear", "again")

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def hear(self, sound: Tensor) -> Any:
        return sound


def grad_is_on() -> bool:
    return torch.is_grad_enabled()


class OfAStatic(Listener):
    @staticmethod
    def hear(sound: Tensor) -> Any:  # type: ignore[override]
        return sound.dtype, grad_is_on()


class OfAClass(Listener):
    @classmethod
    def hear(cls, sound: Tensor) -> Any:  # type: ignore[override]
        return cls.__name__, sound.dtype, grad_is_on()


class OfAGenerator(Listener):
    def hear(self, sound: Tensor) -> Any:
        yield sound.dtype
        yield grad_is_on()


def test_static_and_class_methods_and_generators_run_at_home():
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert OfAStatic().hear(half) == (torch.float32, False)
    assert OfAClass().hear(half) == ("OfAClass", torch.float32, False)
    assert list(OfAGenerator().hear(half)) == [torch.float32, False]


class CallsItself(Listener):
    seen: Any = None

    def hear(self, sound: Tensor) -> Any:
        # Within its own method nothing is moved twice: an autocast that it opens itself stays open.
        with torch.autocast("cpu", torch.bfloat16):
            return self.again(sound)

    def again(self, sound: Tensor) -> Any:
        return torch.is_autocast_enabled("cpu")


def test_a_method_that_another_calls_is_at_home_already():
    assert CallsItself().hear(torch.zeros(1)) is True
    assert CallsItself().again(torch.zeros(1)) is False


def test_another_listener_that_one_calls_has_a_home_of_its_own():
    class Asks(Listener):
        def __init__(self) -> None:
            super().__init__()
            self.other = CallsItself()

        def hear(self, sound: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return self.other.again(sound)

    assert Asks().hear(torch.zeros(1)) is False


def test_float64_stays_float64_and_whole_numbers_stay_whole():
    moved = at_home(
        [torch.zeros(1, dtype=kind) for kind in (torch.float64, torch.float16, torch.int16)], torch.device("cpu")
    )
    assert [one.dtype for one in moved] == [torch.float64, torch.float32, torch.int16]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_of_the_cpu_is_off_in_full_precision(kind: torch.dtype):
    linear = nn.Linear(3, 3)
    with torch.autocast("cpu", kind):
        assert linear(torch.zeros(1, 3)).dtype == kind
        for device in ("cpu", "cuda"):
            with full_precision(device):
                assert linear(torch.zeros(1, 3)).dtype == torch.float32
        assert linear(torch.zeros(1, 3)).dtype == kind


@dataclass(frozen=True)
class Sound:
    wave: Tensor
    made: int = field(default=0, compare=False)
    energy: float = field(init=False)

    def __post_init__(self) -> None:
        if self.wave.dtype == torch.float32:
            raise ValueError("a record is not made a second time")
        object.__setattr__(self, "energy", 1.0)


def test_containers_keep_their_kind_and_records_what_they_worked_out():
    half = torch.zeros(1, dtype=torch.float16)
    home = torch.device("cpu")
    counts: defaultdict[str, Any] = defaultdict(list, a=half)
    moved = at_home({"ordered": OrderedDict(b=half, a=1), "counts": counts, "sound": Sound(half)}, home)
    assert list(moved["ordered"]) == ["b", "a"]
    assert isinstance(moved["ordered"], OrderedDict)
    assert moved["counts"]["new"] == []
    assert counts["a"] is half
    assert moved["counts"]["a"].dtype == moved["sound"].wave.dtype == torch.float32
    assert moved["sound"].energy == 1.0
    fixed = MappingProxyType({"a": half})
    assert at_home(fixed, home)["a"].dtype == torch.float32
    untouched = {"a": 1, "b": ["c"]}
    assert on_cpu(untouched) is untouched
