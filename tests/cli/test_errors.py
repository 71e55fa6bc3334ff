# SPDX-License-Identifier: Apache-2.0
"""Errors that nobody has foreseen: whose code they come from, and where."""

import pytest

from tts_align.batch import Mean
from tts_align.cli.errors import plain_errors
from tts_align.cli.own_code import own_place

pytestmark = pytest.mark.whole_runs  # the checks of shapes would find the fault first


def test_a_fault_of_the_package_says_so_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, plain_errors(faults=True):
        Mean.of(None)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert raised.value.code == 1
    assert (
        "tts-align: error: AttributeError: 'NoneType' object has no attribute 'detach' (in tts_align.batch, line "
        in said
    )
    assert "this ought not to happen: --debug shows where it comes from" in said
    assert "yours" not in said


@pytest.mark.parametrize("folder", [".local/lib/python3.12/site-packages", "/usr/lib/python3/dist-packages"])
def test_a_library_is_nobodys_own_code_wherever_it_lies(folder: str) -> None:
    found: dict[str, object] = {}
    exec(compile("def fail():\n    raise KeyError('x')\n", f"/home/user/{folder}/library.py", "exec"), found)
    with pytest.raises(KeyError) as raised:
        found["fail"]()  # type: ignore[operator]
    place = own_place(raised.value)
    assert place is not None
    assert place.startswith("test_errors.py, line ")
