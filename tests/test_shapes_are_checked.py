# SPDX-License-Identifier: Apache-2.0
"""The tests check shapes and types of whatever the package's functions are given and give back."""

from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int, config
from lazily import jaxtyped, jaxtyping_own
from torch import Tensor

from tts_align.batch import Mean
from tts_align.logprobs import chosen_logp


def product(left: Float[Tensor, "a b"], right: Float[Tensor, "b c"], wrong: bool = False) -> Float[Tensor, "a c"]:
    return left.new_zeros(1, 1) if wrong else left @ right


def repeated(tokens: Int[Tensor, " n"], size: int, wrong: bool = False) -> Int[Tensor, " {size}"]:
    return tokens if wrong else tokens.new_zeros(size)


def counted(count: int, *, name: str = "x") -> str:
    return name * count


@dataclass
class Scored:
    tokens: Int[Tensor, "rows time"]
    mask: Float[Tensor, "rows time"] | None = None


CASES = (
    (product, (torch.ones(2, 3), torch.ones(3, 4)), True),
    (product, (torch.ones(2, 3), torch.ones(2, 4)), False),
    (product, (torch.ones(2, 3), torch.ones(3, 4), True), False),
    (product, (torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 4)), False),
    (counted, (2,), True),
    (counted, ("2",), False),
    (Scored, (torch.ones(2, 3, dtype=torch.int64),), True),
    (Scored, (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), True),
    (Scored, (torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 2)), False),
)


def verdict(checked: Any, given: tuple[Any, ...]) -> bool:
    """Whether it is taken."""
    try:
        checked(*given)
    except (jaxtyping.TypeCheckError, BeartypeCallHintViolation):
        return False
    return True


def copied(plain: Any) -> Any:
    """A class of its own: a decorator changes a dataclass in place."""
    return dataclass(type("Copied", (), {"__annotations__": plain.__annotations__, "mask": None}))


@pytest.mark.parametrize(("plain", "given", "right"), CASES)
def test_what_is_refused_is_what_jaxtyping_refuses(plain: Any, given: tuple[Any, ...], right: bool) -> None:
    ours, theirs = (copied(plain), copied(plain)) if isinstance(plain, type) else (plain, plain)
    assert verdict(jaxtyped(ours, typechecker=beartype), given) is right
    assert verdict(jaxtyping_own(theirs, typechecker=beartype), given) is right


def test_sizes_that_an_argument_gives() -> None:
    checked = jaxtyped(repeated, typechecker=beartype)
    assert len(checked(torch.arange(3), 6)) == 6
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(torch.arange(3), 6, True)


def test_a_name_means_one_size_within_a_call_only() -> None:
    checked = jaxtyped(product, typechecker=beartype)
    assert checked(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert checked(torch.ones(5, 1), torch.ones(1, 2)).shape == (5, 2)


def test_no_checks_where_they_are_switched_off() -> None:
    checked = jaxtyped(counted, typechecker=beartype)
    config.update("jaxtyping_disable", True)
    try:
        assert checked(2, name=[0]) == [0, 0]
    finally:
        config.update("jaxtyping_disable", False)
    with pytest.raises(BeartypeCallHintViolation):
        checked(2, name=[0])


def test_functions_and_records_of_the_package_are_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="target"):
        chosen_logp(torch.zeros(2, 4), torch.tensor([0, 3, 1]))
    with pytest.raises(BeartypeCallHintViolation):
        Mean("0.5", torch.tensor(1.0))  # type: ignore[arg-type]
