# SPDX-License-Identifier: Apache-2.0
"""Flows that are no published one: patches, learned upsampling, mel prediction, a prior; and their files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dit import SMALL, draw, length_mask, make
from torch import nn
from torch.nn import functional

from tts_align.models.base.flow_records import FlowDraws
from tts_align.models.codec.mel import MelDecoder
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.flow.prior import MelPrior, PriorSizes
from tts_align.utils.averages import moving_average

PRIOR = replace(SMALL, patch_frames=2, predicts="mel", prior=PriorSizes(7, 10, blocks=2, kernel=3))
LEARNED = replace(SMALL, upsampling="learned")


def draws_of(rows: int, frames: int, mel: int, time: float | None = None) -> FlowDraws:
    times = torch.linspace(0.1, 0.8, rows).double() if time is None else torch.full((rows,), time).double()
    nothing = torch.zeros(rows, dtype=torch.long)
    return FlowDraws(times, draw(rows, frames, mel, seed=4), nothing, torch.ones(rows, dtype=torch.bool))


def test_a_prior_is_the_decoder_that_it_takes_over():
    """The same mel as the codec's decoder, for both of its voices, whatever their projected vectors."""
    torch.manual_seed(0)
    decoder, prior = MelDecoder(7, 6, 2, 2, 10, 2, 3), MelPrior(PriorSizes(7, 10, 2, 3), 6, 2)
    voices, vectors, mask = torch.randn(2, 6), torch.randn(2, 5, 7), length_mask([5, 3])
    assert prior.take_over(decoder, voices) < 1e-5
    expected = decoder(vectors, mask, torch.tensor([1, 0]))
    found = prior(vectors, mask, voices[[1, 0]])
    real = mask.repeat_interleave(2, 1)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_a_new_flow_with_a_prior_says_what_the_prior_says():
    """In any number of steps, from any noise: the transformer's correction is 0 at first."""
    torch.manual_seed(0)
    flow = DiTFlow(PRIOR).double().eval()
    tokens, mask, speaker = torch.randint(0, 11, (2, 5)), length_mask([5, 3]), draw(2, 5)
    prior = flow.condition(flow.embed(tokens) * mask[..., None], mask, voice=flow.project_speaker(speaker))
    real = mask.repeat_interleave(2, 1)
    for steps in (1, 4):
        made = flow.sample(tokens, mask, speaker, steps=steps, guidance=0.0)
        torch.testing.assert_close(made.mel[made.mask], prior[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [replace(SMALL, predicts="mel"), PRIOR])
def test_the_loss_of_a_predicted_mel_is_its_squared_error(sizes: DiTFlowSizes):
    """Typed again: what the transformer makes, plus the prior, against the mel; at the very end of the way, too."""
    flow = make(sizes)
    tokens, mask, speaker = torch.randint(0, 11, (2, 4)), length_mask([4, 3]), draw(2, 5)
    mel, real = draw(2, 8, 6, seed=3), length_mask([8, 6])
    for time in (None, 0.998):
        draws = draws_of(2, 8, 6, time)
        total = 0.0
        for row in range(2):
            length = int(real[row].sum())
            speech = flow.embed(tokens[row : row + 1, : length // 2])
            voice = flow.project_speaker(speaker[row : row + 1])
            ones = torch.ones(1, length // 2, dtype=torch.bool)
            told = flow.condition(speech, ones, voice=voice)
            clean, noise, at = mel[row : row + 1, :length], draws.noise[row : row + 1, :length], draws.time[row]
            noisy = (1 - (1 - 1e-6) * at) * noise + at * clean
            nothing = torch.zeros_like(clean)
            made = flow.decoder["estimator"](
                noisy, told, voice, nothing, at[None], torch.ones(1, length, dtype=torch.bool)
            )
            made = made + told if sizes.prior else made
            total += (made - clean).square().sum().item()
        found = flow.loss(tokens, mask, mel, real, speaker, draws)
        assert found.total.item() == pytest.approx(total, rel=1e-4)
        assert int(found.count) == 14 * 6


def test_learned_upsampling_begins_as_repetition_and_tells_frames_apart_afterwards():
    torch.manual_seed(0)
    plain = DiTFlow(SMALL).double()
    learned = DiTFlow(LEARNED).double()
    learned.load_state_dict(plain.state_dict(), strict=False)
    vectors, mask = draw(2, 5, 6), length_mask([5, 5])
    expected = plain.condition(vectors, mask)
    torch.testing.assert_close(learned.condition(vectors, mask), expected)
    with torch.no_grad():
        learned.upsample.weight.normal_()
    made = learned.condition(vectors, mask).unflatten(1, (-1, 2))
    hidden = learned.pre_lookahead_layer(vectors)
    torch.testing.assert_close(made[:, :, 1], functional.linear(hidden, learned.upsample.weight[6:]))
    assert not torch.allclose(made[:, :, 0], made[:, :, 1])


def test_without_guidance_the_half_that_is_told_nothing_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    flow, seen = make(SMALL), []
    velocity = flow.velocity
    monkeypatch.setattr(flow, "velocity", lambda state, *rest: seen.append(len(state)) or velocity(state, *rest))
    tokens, mask, speaker = torch.randint(0, 11, (2, 5)), length_mask([5, 3]), draw(2, 5)
    without = flow.sample(tokens, mask, speaker, steps=2, guidance=0.0).mel
    assert seen == [2, 2]
    nearly = flow.sample(tokens, mask, speaker, steps=2, guidance=1e-12).mel
    assert seen[2:] == [4, 4]
    torch.testing.assert_close(without, nearly)


@pytest.mark.parametrize("sizes", [PRIOR, LEARNED])
def test_a_directory_holds_all_of_it(sizes: DiTFlowSizes, tmp_path: Path):
    flow = make(sizes, dtype=torch.float32)
    flow.save(tmp_path / "flow")
    again = DiTFlow(directory=str(tmp_path / "flow"))
    assert again.sizes == flow.sizes
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in flow.state_dict().items())
    with pytest.raises(ValueError, match="no effect beside"):
        DiTFlow(sizes, str(tmp_path / "flow"))
    with pytest.raises(ValueError, match=r"model\.flow\.directory"):
        DiTFlow(directory=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_frames": 3}, "must divide"),
        ({"patch_frames": 2, "chunk_frames": 5}, "must divide"),
        ({"prior": PriorSizes()}, "predicts: mel"),
        ({"prior": PriorSizes(), "predicts": "mel", "upsampling": "learned"}, "upsamples by itself"),
    ],
)
def test_sizes_that_do_not_go_together(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
    with pytest.raises(ValueError, match="odd kernel"):
        PriorSizes(kernel=4)


def test_a_moving_average_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    average = moving_average(layer, 0.9)
    kept = None
    for update, value in enumerate((1.0, 3.0, -2.0, 5.0)):
        nn.init.constant_(layer.weight, value)
        average.update_parameters(layer)
        share = min(0.9, (1 + update) / (10 + update))
        kept = value if kept is None else share * kept + (1 - share) * value
    assert average.module.weight.item() == pytest.approx(kept)
    with pytest.raises(ValueError, match="decay"):
        moving_average(layer, 1.0)
