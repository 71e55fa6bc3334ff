# SPDX-License-Identifier: Apache-2.0
"""What tells one judge from another."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.judges.symbolic import SymbolicJudge


class Rule(Judge):
    def __init__(self, first, *more, words=("a",), helper=None, batch_size=1, **knobs):
        super().__init__()

    def judge(self, samples, expected):
        return []


class Helper:
    pass


@pytest.mark.parametrize(
    "other",
    [Rule(2), Rule(1, 2), Rule(1, words=("b",)), Rule(1, words=None), Rule(1, helper=Helper()), Rule(1, mood="sad")],
)
def test_every_argument_counts(other):
    assert other.identity() != Rule(1).identity()
    assert not other.same_as(Rule(1))


def test_the_same_however_it_is_written_or_copied():
    one = Rule(1, words=["a"], helper=Helper())
    for same in (Rule(first=1, words=("a",), helper=Helper(), batch_size=7), copy.deepcopy(one)):
        assert same.identity() == one.identity()


def test_the_same_in_every_process():
    """No address and no salted hash is part of it: a killed judge resumes."""
    code = (
        "from test_identity import Rule, Helper; print(Rule({'b': {1, 2}, 'a': Helper()}, words={'x', 'y'}).identity())"
    )
    here = Path(__file__).parent
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, **TEXT)
    assert other.stdout.strip() == str(Rule({"b": {1, 2}, "a": Helper()}, words={"x", "y"}).identity())


TEXT = {"capture_output": True, "text": True, "check": True}


def test_embedded_listeners():
    judge, labeller = CTCJudge("demo:audio/judge"), CTCJudge("demo:audio/labeller")
    assert not judge.same_as(labeller)
    assert judge.same_as(CTCJudge("demo:audio/judge", batch_size=2))
    assert SymbolicJudge().same_as(SymbolicJudge())
    with torch.no_grad():
        next(labeller.recogniser.head.parameters()).add_(1)
    assert not labeller.same_as(CTCJudge("demo:audio/labeller"))
