# SPDX-License-Identifier: Apache-2.0
"""A training of the builder that was interrupted ends as one that was not."""

import pytest
import torch
from torch import nn

from tts_align.cli.demo import training
from tts_align.cli.demo.stages import Stages
from tts_align.cli.demo.training import Schedule, optimise


class InterruptedAt(Exception):
    pass


def train(kept, stop=None):
    torch.manual_seed(3)
    model, given = nn.Linear(4, 1), iter(torch.randn(20, 8, 4, generator=torch.Generator().manual_seed(5)))
    done = 0

    def loss():
        nonlocal done
        if done == stop:
            raise InterruptedAt
        done += 1
        return (model(next(given)) - 1).square().mean()

    optimise(model, loss, Schedule(20, 8, 0.1), "toy", kept, lambda steps: [next(given) for _ in range(steps)])
    return model.weight.detach(), done


def test_resumes_where_it_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "KEPT_STEPS", 6)
    kept = tmp_path / "toy.pt"
    whole, _ = train(None)
    with pytest.raises(InterruptedAt):
        train(kept, stop=15)
    assert kept.exists()
    resumed, done = train(kept)
    assert torch.equal(resumed, whole)
    assert done == 20 - 12
    assert not kept.exists()


@pytest.mark.parametrize("stamp", ["", "[1]", "[" * 100_000, "{}", None])
def test_a_stage_that_says_nothing_of_itself_is_made_anew(tmp_path, stamp):
    stages, made = Stages(tmp_path, "sound"), []
    stages.run("base", [1], made.append)
    stages.run("base", [1], made.append)
    assert len(made) == 1
    (tmp_path / "base.json").unlink()
    if stamp is not None:
        (tmp_path / "base.json").write_text(stamp)
    assert stages.seconds(["base"]) == {"base": 0.0}
    stages.run("base", [1], made.append)
    assert len(made) == 2


def test_other_inputs_do_not_resume_it(tmp_path):
    stages = Stages(tmp_path, "sound")
    assert stages.unfinished("base", [1]) == stages.unfinished("base", [1])
    assert stages.unfinished("base", [1]) != stages.unfinished("base", [2])
    assert Stages(tmp_path, "other").unfinished("base", [1]) != stages.unfinished("base", [1])
