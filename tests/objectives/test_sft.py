# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy, token by token."""

import math

import pytest
import torch
from steps import gradient, make_step, tokens, with_logp

from tts_align.batch import Reads, Totals
from tts_align.objectives import SFT


def test_golden_value():
    """Rows of 4, 2, 6 and 3 targets, each of probability 1/4: −ln(1/4) = 1.386294 whatever the lengths."""
    step = make_step([True] * 4)
    quarter = torch.full_like(step.policy.logp, math.log(0.25)) * step.policy.mask
    assert SFT()(with_logp(step, quarter)).loss.item() == pytest.approx(1.386294, abs=1e-6)


def test_equals_a_loop_over_tokens():
    step = make_step([True] * 4)
    every = [logp for row in tokens(step, step.policy.logp) for logp in row]
    found = SFT()(step)
    assert found.loss.item() == pytest.approx(-sum(every) / len(every), abs=1e-6)
    assert found.metrics["desirable_logp"].value.item() == pytest.approx(sum(every) / len(every), abs=1e-6)
    assert found.metrics["desirable_logp"].count.item() == 15


def test_a_token_counts_the_same_wherever_it_stands():
    step = make_step([True] * 4)
    pull = gradient(SFT(), step)
    torch.testing.assert_close(pull, step.policy.mask / -15.0)


def test_the_share_is_of_the_whole_step():
    whole, share = make_step([True] * 4), make_step([True] * 4, totals=Totals(8, 60, 8, 60))
    torch.testing.assert_close(SFT()(share).loss * 4, SFT()(whole).loss)


def test_facts():
    assert SFT.reads is Reads.SPEECH
    assert not SFT.needs
