# SPDX-License-Identifier: Apache-2.0
"""What a researcher's own objective gets wrong is said where it goes wrong, in words of the extension point."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked, in_two_processes
from tiny import build, make_trainer, save_recipe
from torch import Tensor

from tts_align.batch import Mean, Reads
from tts_align.cli.entry import main
from tts_align.objectives import Objective, Outcome, Part, Step

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


class Own(Objective):
    """Raises or lowers the likelihood of rows, and hands on whatever it is told to."""

    reads = Reads.LABELLED
    made: Callable[[Step, Tensor], Any] = staticmethod(lambda step, loss: Outcome(loss))

    def forward(self, step: Step) -> Outcome:
        sign = torch.where(step.batch.desirable, -1.0, 1.0)
        return self.made(step, step.mean(step.policy.sums() * sign))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda step, loss: loss, r"Own\.forward must return an Outcome\(loss, metrics\), got a tensor of"),
        (lambda step, loss: None, r"Own\.forward must return an Outcome\(loss, metrics\), got NoneType"),
        (lambda step, loss: Outcome(loss.detach()), r"the loss of Own depends on no weight that trains"),
        (lambda step, loss: Outcome(loss, {"loss": Mean.of(loss)}), r"a string other than 'loss'; got 'loss'"),
    ],
    ids=["no outcome", "nothing", "detached", "name of the loss"],
)
def test_what_forward_returns_by_mistake_is_named(
    made: Callable[..., Any], words: str, tiny_policy: Path, tiny_rows: str, tmp_path: Path
):
    objective = Own()
    object.__setattr__(objective, "made", made)
    module, data = build(objective, tiny_policy, tiny_rows, tmp_path / "cache")
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path).fit(module, data)


WRONG = {
    "Outcome(ones(3))": r"without axes; got a tensor of float32 and shape \(3,\): sum its rows up with step\.mean",
    "Outcome(one[None])": r"without axes; got a tensor of float32 and shape \(1,\)",
    "Outcome(2.5)": r"a floating-point tensor without axes; got float 2\.5",
    "Outcome(one.long())": r"got a tensor of int64 and shape \(\)",
    "Outcome(one, {'a': 0.5})": r"metric 'a' .* got float 0\.5: write Mean\.of\(values\)",
    "Outcome(one, {'a': Mean(ones(3), ones(3))})": r"metric 'a' .* a Mean of a tensor of float32 and shape \(3,\)",
    "Outcome(one, {'a': Mean(1.0, 2)})": r"metric 'a' .* a Mean of float 1\.0 and int 2",
    "Outcome(one, {1: Mean.of(one)})": r"a name of its own, a string other than 'loss'; got 1",
}


def test_an_outcome_checks_itself(tmp_path: Path):
    """In a process without the checker of shapes, which would be the first to say it."""
    lines = ["from torch import ones", "from tts_align import Mean, Outcome", "one = ones(())"]
    lines += [
        f"for code in {list(WRONG)}:",
        "    try:",
        "        eval(code)",
        "    except ValueError as error:",
        "        print(error)",
    ]
    (tmp_path / "wrong.py").write_text("\n".join(lines))
    (done,) = forked([[sys.executable, str(tmp_path / "wrong.py")]], [tmp_path], [{}])
    said = done.stdout.splitlines()
    assert len(said) == len(WRONG), done
    for line, words in zip(said, WRONG.values(), strict=True):
        assert re.search(words, line), line


def test_facts_are_checked_when_the_class_is_defined():
    class Lists(Objective):
        needs, reads = ["reference"], "pair"  # type: ignore[assignment]

    assert Lists.needs == frozenset({Part.REFERENCE})
    assert isinstance(Lists.reads, Reads)
    with pytest.raises(TypeError, match=r"Wrong: `needs` must be a frozenset of Part\.REFERENCE.*got \{'refrence'\}"):
        type("Wrong", (Objective,), {"needs": {"refrence"}})
    with pytest.raises(TypeError, match=r"Wrong: `reads` must be one of Reads\.SPEECH.*got 'labeled'"):
        type("Wrong", (Objective,), {"reads": "labeled"})


def test_init_and_prepare_are_checked(tiny_policy: Path, tiny_rows: str, tmp_path: Path):
    hasty = type("Hasty", (Own,), {"__init__": lambda self: None})
    with pytest.raises(ValueError, match=r"Hasty\.__init__ must begin with super\(\)\.__init__\(\)"):
        build(hasty(), tiny_policy, tiny_rows, tmp_path / "cache")
    empty = type("Empty", (Own,), {"prepare": lambda *_: None})
    module, data = build(empty(), tiny_policy, tiny_rows, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"Empty\.prepare must return a Batch, got NoneType"):
        make_trainer(tmp_path).fit(module, data)


def test_metrics_keep_no_graph(tiny_policy: Path, tiny_rows: str, tmp_path: Path):
    """Or the activations of all steps would stay in memory until the next log."""
    objective = Own()
    object.__setattr__(objective, "made", lambda step, loss: Outcome(loss, {"a": Mean(loss + 0, torch.ones(()))}))
    module, data = build(objective, tiny_policy, tiny_rows, tmp_path / "cache")
    make_trainer(tmp_path, log_every_n_steps=2, max_steps=1).fit(module, data)
    module.means["train"].note(objective.made(None, torch.ones((), requires_grad=True) * 2).metrics)
    assert not module.means["train"].sums["a"].total.requires_grad


OWN_FILE = """
import torch
import torch.distributed as dist
from tts_align import Mean, Objective, Outcome, Reads

class Ranked(Objective):
    reads = Reads.LABELLED

    def forward(self, step):
        rank = dist.get_rank() if dist.is_initialized() else 0
        value = Mean.of(torch.tensor([10.0 * rank + 1]))
        both = {f"only{rank}": value} | ({"second": value} if rank else {})
        return Outcome(-step.mean(step.policy.sums()), both)

class Failing(Ranked):
    def forward(self, step):
        return {}["my key"]

class Unfinished(Objective):
    reads = Reads.LABELLED
"""


@pytest.mark.whole_runs
def test_ranks_may_count_different_things(tiny_policy: Path, tiny_rows: str, tmp_path: Path):
    """Each mean is over the ranks that have it; before, numbers of two names were added up, or the ranks hung."""
    (tmp_path / "ranked.py").write_text(OWN_FILE)
    path = save_recipe(tmp_path, "ranked.Ranked", tiny_policy, tiny_rows)
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    in_two_processes(tmp_path, "fit", "--config", path, "--run.directory", "two", *flags)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "two/tensorboard")).Reload()
    found = {name: {one.value for one in events.Scalars(f"train/{name}")} for name in ("only0", "only1", "second")}
    assert found == {"only0": {1.0}, "only1": {11.0}, "second": {11.0}}
    assert all(math.isfinite(one.value) for one in events.Scalars("train/loss"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_faults.Failing", r"KeyError: 'my key' \(in own_faults\.py, line 17\)\n  it comes from code of yours"),
        ("own_faults.Unfinished", r"own_faults\.Unfinished lacks what a class of its kind must define: forward"),
        ("own_raises.Any", r"objective: own_raises\.Any cannot be imported: KeyError: 'x' \(own_raises\.py, line 2\)"),
        ("own_syntax.Any", r"own_syntax\.Any cannot be imported: SyntaxError: .* \(own_syntax\.py, line 1\)"),
    ],
)
def test_faults_in_code_of_the_users_are_said_with_their_place(
    name: str, words: str, tiny_policy: Path, tiny_rows: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_faults.py").write_text(OWN_FILE)
    (tmp_path / "own_raises.py").write_text("given = {}\ngiven['x']\n")
    (tmp_path / "own_syntax.py").write_text("class Any(\n")
    path = save_recipe(tmp_path, "kto", tiny_policy, tiny_rows)
    with pytest.raises(SystemExit):
        main(["fit", "--config", path, "--objective", name])
    said = capsys.readouterr().err
    assert re.search(words, said), said
