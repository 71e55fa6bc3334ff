# SPDX-License-Identifier: Apache-2.0
"""The reward model: what it says of hard and soft tokens, how it learns, what padding and neighbours must not do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch.nn import functional

from tts_align.gumbel import RowNoise, gumbel_softmax_st, row_generators
from tts_align.models.base.reward_records import AttributeLabels, Regularisers, RewardLabels
from tts_align.models.reward.config import Attribute, RewardSizes, collect_characters, mos_bin, mos_expectation
from tts_align.models.reward.layers import soft_lookup
from tts_align.models.reward.losses import adversarial_step, draw_mixture
from tts_align.models.reward.model import RewardModel

CODES = 11
ATTRIBUTES = (
    Attribute("emotion", "classes", ("happy", "sad", "angry")),
    Attribute("audio.events", "events", ("cough", "laugh")),
    Attribute("mos", "mos"),
    Attribute("age", "regression", centre=40.0, spread=10.0),
)
SIZES = RewardSizes(
    CODES, "あいうえ", ATTRIBUTES, width=12, layers=2, heads=3, feed_forward=20, decoder_layers=2, ctc=True, dropout=0.2
)
TEXTS = ("あいいう", None, "", "うえん")
KNOWN = (
    {"emotion": "sad", "audio.events": "laugh, cough", "mos": 4.6, "age": 33.0, "place": "Paris"},
    {"emotion": "angry", "mos": 1.0},
    {"audio.events": ""},
    {"age": 51},
)
LENGTHS = (12, 7, 3, 9)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return RewardModel(sizes=dataclasses.replace(SIZES, **changes)).eval()


def batch(model, seed=1, rows=range(4), width=12):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randint(model.codebook_size, (width,), generator=random) for _ in LENGTHS])
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    rows = list(rows)
    return tokens[rows], mask[rows], model.encode_labels([TEXTS[i] for i in rows], [KNOWN[i] for i in rows])


@pytest.fixture
def model():
    return make()


def one_hot(tokens, codebook_size=CODES, dtype=torch.float32):
    return functional.one_hot(tokens, codebook_size).to(dtype)


# --- tokens, hard and soft ---


@pytest.mark.parametrize(("codebook_size", "width"), [(CODES, 12), (729, 48), (6561, 64)])
def test_hard_one_hots_give_the_ids_vectors_bit_for_bit(codebook_size, width):
    model = make(codebook_size=codebook_size, width=width, heads=1)
    tokens = torch.randint(codebook_size, (3, 50), generator=torch.Generator().manual_seed(0))
    soft = one_hot(tokens, codebook_size)
    assert torch.equal(model.embed(soft), model.embed(tokens))
    assert torch.equal(model.embed(soft.flatten(0, 1)), model.embed(tokens).flatten(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed(soft), model.embed(tokens))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(model.embed(soft), model.embed(tokens))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_score_is_the_same_for_ids_and_hard_one_hots(model):
    tokens, mask, labels = batch(model)
    hard, soft = model.score(tokens, mask, labels), model.score(one_hot(tokens), mask, labels)
    embedded = model.score_embedded(model.embed(one_hot(tokens).flatten(0, 1)).view(4, 12, -1), mask, labels)
    for task in hard.tasks:
        assert torch.equal(task.total, soft[task.name].total)
        assert torch.equal(task.total, embedded[task.name].total)
        assert torch.equal(task.count, soft[task.name].count)


def test_a_straight_through_sample_scores_like_its_ids_and_passes_the_gradient_on(model):
    model.requires_grad_(False)
    _, mask, labels = batch(model)
    logits = torch.randn(48, CODES + 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sample = gumbel_softmax_st(logits, CODES, RowNoise(row_generators([1, 2, 3, 4]), (12,) * 4)).view(4, 12, CODES)
    scores = model.score(sample, mask, labels)
    ids = model.score(sample.argmax(-1), mask, labels)
    assert torch.equal(scores.reward(), ids.reward())
    scores.reward().sum().backward()
    reached = logits.grad.view(4, 12, -1).abs().sum(-1) > 0
    assert torch.equal(reached, mask)
    assert not any(value.grad is not None for value in model.parameters())


def test_no_graph_is_kept_for_a_frozen_model_and_hard_tokens(model):
    model.requires_grad_(False)
    scores = model.score(*batch(model))
    assert not any(task.total.requires_grad for task in scores.tasks)


@pytest.mark.parametrize("task", ["asr", "ctc", "emotion", "audio.events", "mos"])
def test_gradients_through_soft_tokens_are_derivatives(task):
    model = make(width=6, layers=1, feed_forward=8, decoder_layers=1, heads=1).double().requires_grad_(False)
    labels = model.encode_labels(["あい", "う"], [KNOWN[0], KNOWN[0]])
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    logits = torch.randn(2, 4, CODES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total(logits):
        return model.score(logits.softmax(-1), mask, labels, [task])[task].total

    assert torch.autograd.gradcheck(total, logits.requires_grad_())


def test_soft_tokens_of_another_code_book_are_refused(model):
    with pytest.raises(ValueError, match="soft tokens over 11 speech tokens, got 5"):
        model.embed(torch.zeros(2, 3, 5))


def test_mixed_rows_of_a_table_are_the_products():
    random = torch.Generator().manual_seed(0)
    share, table = torch.rand(4, 5, generator=random), torch.randn(5, 3, generator=random)
    slow = torch.stack([sum(row[i] * table[i] for i in range(5)) for row in share])
    torch.testing.assert_close(soft_lookup(share, table), slow)


# --- padding and neighbours ---


def totals(model, tokens, mask, labels):
    scores = {task.name: task.total for task in model.score(tokens, mask, labels).tasks}
    hidden = model.encode(model.embed(tokens), mask)
    return scores | model.attributes(hidden, mask) | {"states": hidden.masked_fill(~mask[..., None], 0)}


@pytest.mark.parametrize("row", range(4))
def test_a_row_alone_without_padding_gives_the_same_numbers(model, row):
    together = totals(model, *batch(model))
    tokens, mask, labels = batch(model, rows=[row])
    alone = totals(model, tokens[:, : LENGTHS[row]], mask[:, : LENGTHS[row]], labels)
    for name, value in alone.items():
        theirs = together[name][row : row + 1]
        theirs = theirs[:, : LENGTHS[row]] if name == "states" else theirs
        torch.testing.assert_close(value, theirs, rtol=1e-6, atol=1e-6)


def test_what_stands_at_padding_means_nothing(model):
    tokens, mask, labels = batch(model)
    first = totals(model, tokens, mask, labels)
    noisy = one_hot(tokens)
    noisy[~mask] = torch.nan
    attributes = tuple(
        AttributeLabels(one.name, one.target.masked_fill(~one.mask.view(-1, *[1] * (one.target.ndim - 1)), 1), one.mask)
        for one in labels.attributes
    )
    text = labels.text.masked_fill(~labels.text_mask, 3)
    changed = RewardLabels(text, labels.text_mask, labels.has_text, attributes)
    second = totals(model, noisy, mask, changed)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_real_token_changes_everything(model):
    tokens, mask, labels = batch(model)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % CODES
    first, second = model.score(tokens, mask, labels), model.score(changed, mask, labels)
    assert all(task.total[0] != second[task.name].total[0] for task in first.tasks)
    assert all(torch.equal(task.total[1:], second[task.name].total[1:]) for task in first.tasks)


def test_a_row_without_speech_has_finite_scores_that_do_not_depend_on_its_padding(model):
    labels = model.encode_labels(["あ"], [KNOWN[0]])
    found = [
        model.score(torch.zeros(1, width, dtype=torch.long), torch.zeros(1, width, dtype=torch.bool), labels)
        for width in (1, 5)
    ]
    for task in found[0].tasks:
        assert task.total.isfinite().all()
        torch.testing.assert_close(task.total, found[1][task.name].total)
    assert found[0]["ctc"].count.tolist() == [0]


def test_dropout_is_off_in_evaluation_and_a_reward_is_refused_in_training(model):
    inputs = batch(model)
    assert torch.equal(model.score(*inputs).reward(), model.score(*inputs).reward())
    model.train()
    hidden = [model.encode(model.embed(inputs[0]), inputs[1]) for _ in range(2)]
    assert not torch.equal(*hidden)
    with pytest.raises(RuntimeError, match="must not depend on dropout"):
        model.score(*inputs)
    without = make(dropout=0.0)
    assert torch.equal(without.train().score(*inputs).reward(), without.eval().score(*inputs).reward())


# --- what each task says ---


def test_teacher_forced_text_is_the_product_of_single_steps(model):
    """Against one decoder call for each token, given only what precedes it."""
    tokens, mask, labels = batch(model)
    scores = model.score(tokens, mask, labels, ["asr"])["asr"]
    hidden = model.encode(model.embed(tokens), mask)
    each = model.asr(hidden, mask, labels.text, labels.text_mask)
    assert each.shape == (4, 5)
    for row, text in enumerate(TEXTS):
        ids = model.encode_text(text or "")
        expected = []
        for place, token in enumerate((*ids, 0)):
            past = torch.tensor([ids[:place]], dtype=torch.long).view(1, -1)
            logp = model.decoder(hidden[row : row + 1], mask[row : row + 1], past)[0, -1]
            assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
            expected.append(logp[token].item())
        assert each[row, : len(ids) + 1].tolist() == pytest.approx(expected, abs=1e-5)
        assert not each[row, len(ids) + 1 :].any()
        missing = text is None
        assert scores.total[row].item() == pytest.approx(0 if missing else sum(expected), abs=1e-5)
        assert int(scores.count[row]) == (0 if missing else len(ids) + 1)
    torch.testing.assert_close(scores.mean, scores.total / torch.tensor([5.0, 1, 1, 4]))


def test_ctc_is_the_sum_over_all_alignments():
    """Every path of 4 positions over 4 symbols, collapsed by hand."""
    model = make(characters="あい", width=8, heads=1)
    tokens, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    labels = model.encode_labels(["ああ", "い"], [{}, {}])
    scores = model.score(tokens, mask, labels, ["ctc"])["ctc"]
    logp = model.ctc(model.encode(model.embed(tokens), mask), mask)
    assert logp.shape == (2, 4, 4)
    for row, (length, text) in enumerate([(4, (2, 2)), (3, (3,))]):
        total = 0.0
        for path in itertools.product(range(4), repeat=length):
            if tuple(token for token, _ in itertools.groupby(path) if token != 0) == text:
                total += math.exp(sum(logp[row, place, token].item() for place, token in enumerate(path)))
        assert scores.total[row].item() == pytest.approx(math.log(total), abs=1e-5)
    assert scores.count.tolist() == [2, 1]


def test_speech_too_short_for_ctc_is_counted_as_missing(model):
    tokens, mask = torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2, dtype=torch.bool)
    soft = one_hot(tokens).requires_grad_()
    scores = model.score(soft, mask, model.encode_labels(["ああ", "あい"], [{}, {}]), ["ctc"])["ctc"]
    assert scores.count.tolist() == [0, 2]  # equal neighbours need a blank between them
    scores.total.sum().backward()
    assert not soft.grad[0].any()
    assert soft.grad[1].isfinite().all()


def test_attributes_are_their_distributions(model):
    tokens, mask, labels = batch(model)
    scores = model.score(tokens, mask, labels)
    logits = model.attributes(model.encode(model.embed(tokens), mask), mask)
    assert {name: value.shape[1] for name, value in logits.items()} == {
        "emotion": 3, "audio.events": 2, "mos": 5, "age": 1,
    }  # fmt: skip
    emotion = logits["emotion"].softmax(-1).log()
    torch.testing.assert_close(
        scores["emotion"].total, torch.stack([emotion[0, 1], emotion[1, 2], *[emotion.new_zeros(())] * 2])
    )
    mos = logits["mos"].softmax(-1).log()
    torch.testing.assert_close(scores["mos"].total[:2], torch.stack([mos[0, 4], mos[1, 0]]))
    there = logits["audio.events"].sigmoid()
    torch.testing.assert_close(scores["audio.events"].total[0], there[0].log().sum())
    torch.testing.assert_close(scores["audio.events"].total[2], (1 - there[2]).log().sum())
    assert [scores[name].count.tolist() for name in ("emotion", "audio.events", "mos")] == [
        [1, 1, 0, 0], [2, 0, 2, 0], [1, 1, 0, 0],
    ]  # fmt: skip
    assert all(not task.total[task.count == 0].any() for task in scores.tasks)


def test_reward_is_the_sum_of_the_chosen_tasks(model):
    tokens, mask, labels = batch(model)
    scores = model.score(tokens, mask, labels, ["asr", "mos"])
    assert [task.name for task in scores.tasks] == ["asr", "mos"]
    torch.testing.assert_close(scores.reward(), scores["asr"].mean + scores["mos"].total)
    torch.testing.assert_close(scores.reward(mean=False), scores["asr"].total + scores["mos"].total)
    everything = model.score(tokens, mask, labels)
    assert [task.name for task in everything.tasks] == ["asr", "ctc", "emotion", "audio.events", "mos"]
    with pytest.raises(KeyError, match="no task 'ctc' was scored: expected one of asr, mos"):
        scores["ctc"]


def test_tasks_that_cannot_be_scored_are_named(model):
    tokens, mask, labels = batch(model)
    with pytest.raises(ValueError, match=r"among asr, ctc, emotion, audio.events, mos, got age, pitch"):
        model.score(tokens, mask, labels, ["asr", "age", "pitch"])
    bare = RewardLabels(labels.text, labels.text_mask, labels.has_text)
    with pytest.raises(ValueError, match="the labels say nothing of mos"):
        model.score(tokens, mask, bare, ["mos"])
    assert [task.name for task in model.score(tokens, mask, bare).tasks] == ["asr", "ctc"]
    assert list(model.losses(tokens, mask, bare)) == ["asr", "ctc"]
    with pytest.raises(ValueError, match="nothing to score"):
        model.score(tokens, mask, labels, [])
    plain = make(decoder_layers=0, ctc=False, characters="")
    hidden = plain.encode(plain.embed(tokens), mask)
    with pytest.raises(ValueError, match="no text decoder"):
        plain.asr(hidden, mask, labels.text, labels.text_mask)
    with pytest.raises(ValueError, match="no CTC head"):
        plain.ctc(hidden, mask)


def test_opinion_scores_fall_into_five_bins():
    scores = torch.tensor([1.0, 1.49, 1.5, 3.2, 4.5, 5.0])
    assert mos_bin(scores).tolist() == [0, 0, 1, 2, 4, 4]
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    slow = [sum((k + 1) * float(p) for k, p in enumerate(row)) for row in logits.softmax(-1)]
    assert mos_expectation(logits).tolist() == pytest.approx(slow, abs=1e-5)
    torch.testing.assert_close(ATTRIBUTES[2].predict(logits), mos_expectation(logits))
    with pytest.raises(ValueError, match="5 bins, got 4"):
        mos_expectation(torch.zeros(1, 4))


def test_predictions_are_in_the_labels_words():
    assert ATTRIBUTES[0].predict(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [1]
    assert ATTRIBUTES[1].predict(torch.tensor([[0.1, -0.1]])).tolist() == [[True, False]]
    assert ATTRIBUTES[3].predict(torch.tensor([[-0.5]])).tolist() == [35.0]


# --- its own training ---


def test_losses_are_negated_scores_over_what_is_labelled(model):
    tokens, mask, labels = batch(model)
    scores, losses = model.score(tokens, mask, labels), model.losses(tokens, mask, labels)
    for task in scores.tasks:
        torch.testing.assert_close(losses[task.name].total, -task.total.sum())
        assert losses[task.name].count == task.count.sum()
    age = model.attributes(model.encode(model.embed(tokens), mask), mask)["age"][:, 0]
    torch.testing.assert_close(losses["age"].total, (age[0] + 0.7) ** 2 + (age[3] - 1.1) ** 2)
    assert {name: int(loss.count) for name, loss in losses.items()} == {
        "asr": 10, "ctc": 8, "emotion": 2, "audio.events": 4, "mos": 2, "age": 2,
    }  # fmt: skip


def test_losses_do_not_depend_on_how_rows_are_cut(model):
    whole = model.losses(*batch(model))
    parts = [model.losses(*batch(model, rows=rows)) for rows in ([0, 1], [2], [3])]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name].total for part in parts), loss.total)
        assert sum(part[name].count for part in parts) == loss.count


def test_rows_without_any_label_lose_nothing_and_give_no_gradient(model):
    tokens, mask, _ = batch(model)
    losses = model.losses(tokens, mask, model.encode_labels([None] * 4, [{}] * 4))
    sum(loss.total for loss in losses.values()).backward()
    assert all(loss.count == 0 and loss.total == 0 for loss in losses.values())
    assert all(not value.grad.any() for value in model.parameters())


def test_it_learns_a_small_language():
    """A token is a character: after some steps the transcripts are right, attributes too."""
    torch.manual_seed(0)
    sizes = RewardSizes(
        8, "abcd", ATTRIBUTES[:1], width=32, layers=1, heads=2, feed_forward=64, decoder_layers=1, ctc=True
    )
    model, random = RewardModel(sizes=sizes), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(161):
        codebook_size = torch.randint(4, (32, 5), generator=random)
        texts = ["".join("abcd"[code] for code in row) for row in codebook_size.tolist()]
        mood = [("happy", "sad", "angry")[min(row.count(0), 2)] for row in codebook_size.tolist()]
        # Each code is said twice, by one of two sounds.
        tokens = codebook_size.repeat_interleave(2, 1) * 2 + torch.randint(2, (32, 10), generator=random)
        inputs = tokens, torch.ones_like(tokens, dtype=torch.bool)
        labels = model.encode_labels(texts, [{"emotion": name} for name in mood])
        if step == 160:
            break
        losses = model.train().losses(*inputs, labels)
        optimiser.zero_grad()
        sum(loss.total / loss.count for loss in losses.values()).backward()
        optimiser.step()
    found = model.transcribe(*inputs)
    assert model.training  # as it was
    assert sum(one == two for one, two in zip(found, texts, strict=True)) >= 30
    model.eval()
    hidden = model.encode(model.embed(inputs[0]), inputs[1])
    right = ATTRIBUTES[0].predict(model.attributes(hidden, inputs[1])["emotion"]) == labels.attribute("emotion").target
    assert right.sum() >= 29
    true = model.score(*inputs, labels, ["asr"]).reward()
    false = model.score(*inputs, labels.take(torch.arange(32).roll(1)), ["asr"]).reward()
    assert (true > false).all()


# --- regularisers ---


def gradients(model, losses):
    model.zero_grad()
    sum(loss.total / loss.count for loss in losses.values()).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("strength", [{}, {"label_smoothing": 0.0, "mixup": 0.0, "adversarial": 0.0}])
def test_no_strength_is_no_change(model, strength):
    inputs = batch(model)
    plain = model.losses(*inputs)
    same = model.losses(*inputs, Regularisers(**strength), torch.Generator().manual_seed(0))
    assert all(torch.equal(loss.total, same[name].total) for name, loss in plain.items())
    one, two = gradients(model, plain), gradients(model, same)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_label_smoothing_is_that_of_torch(model):
    tokens, mask, labels = batch(model)
    losses = model.losses(tokens, mask, labels, Regularisers(label_smoothing=0.1))
    plain = model.losses(tokens, mask, labels)
    logits = model.attributes(model.encode(model.embed(tokens), mask), mask)

    def entropy(logits, target):
        return functional.cross_entropy(logits, torch.tensor(target), label_smoothing=0.1, reduction="sum")

    torch.testing.assert_close(losses["emotion"].total, entropy(logits["emotion"][:2], [1, 2]))
    torch.testing.assert_close(losses["mos"].total, entropy(logits["mos"][:2], [4, 0]))
    events = logits["audio.events"][[0, 2]]
    wanted = torch.tensor([[0.95, 0.95], [0.05, 0.05]])
    torch.testing.assert_close(
        losses["audio.events"].total,
        -(wanted * events.sigmoid().log() + (1 - wanted) * (-events).sigmoid().log()).sum(),
    )
    hidden = model.encode(model.embed(tokens), mask)
    logp = model.decoder(hidden, mask, labels.text)
    text = sum(
        entropy(logp[row, : len(ids) + 1], [*ids, 0])
        for row, ids in ((row, model.encode_text(text)) for row, text in enumerate(TEXTS) if text is not None)
    )
    torch.testing.assert_close(losses["asr"].total, text)
    for name in ("ctc", "age"):
        assert torch.equal(losses[name].total, plain[name].total)
    assert all(torch.equal(losses[name].count, plain[name].count) for name in plain)


def test_mixup_mixes_inputs_and_losses(model):
    """Against two rows mixed by hand, for the permutation and the share that the generator gives."""
    tokens, mask, labels = batch(model)
    regularisers = Regularisers(mixup=0.4)
    losses = model.losses(tokens, mask, labels, regularisers, torch.Generator().manual_seed(3))
    drawn = draw_mixture(4, 0.4, torch.Generator().manual_seed(3))
    assert sorted(drawn.partner.tolist()) == [0, 1, 2, 3]
    assert drawn.partner.tolist() != [0, 1, 2, 3]
    assert 0 < drawn.share < 1
    expected = dict.fromkeys(losses, 0.0)
    vectors = model.embed(tokens)
    for row, partner in enumerate(drawn.partner.tolist()):
        length = max(LENGTHS[row], LENGTHS[partner])
        mixed = torch.zeros(1, length, 12)
        mixed[0, : LENGTHS[row]] += drawn.share * vectors[row, : LENGTHS[row]]
        mixed[0, : LENGTHS[partner]] += (1 - drawn.share) * vectors[partner, : LENGTHS[partner]]
        real = torch.ones(1, length, dtype=torch.bool)
        hidden = model.encode(mixed, real)
        for index, share in ((row, drawn.share), (partner, 1 - drawn.share)):
            for name in losses:
                rows = model.task_rows(hidden, real, labels.take(torch.tensor([index])), name)
                expected[name] -= share * rows.total.item()
    for name, loss in losses.items():
        assert loss.total.item() == pytest.approx(expected[name], abs=1e-4)
    plain = model.losses(tokens, mask, labels)
    for name in plain:
        torch.testing.assert_close(losses[name].count, plain[name].count)
    again = model.losses(tokens, mask, labels, regularisers, torch.Generator().manual_seed(3))
    assert torch.equal(again["asr"].total, losses["asr"].total)
    with pytest.raises(ValueError, match="mixup draws partners"):
        model.losses(tokens, mask, labels, regularisers)


def test_shares_follow_the_beta_distribution():
    random = torch.Generator().manual_seed(0)
    shares = torch.tensor([draw_mixture(2, 0.5, random).share for _ in range(3000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(0.125, abs=0.01)  # 1 / (4 (2 alpha + 1))


def test_adversarial_step_has_its_norm_and_raises_the_loss(model):
    tokens, mask, labels = batch(model)
    hidden = model.encode(model.embed(tokens), mask).detach().requires_grad_()

    def objective(states):
        return -sum(model.task_rows(states, mask, labels, name).mean.sum() for name in model.tasks)

    step = adversarial_step(objective(hidden), hidden, 0.5)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((4,), 0.5))
    assert not step[~mask].any()
    assert objective(hidden + step) > objective(hidden)
    (gradient,) = torch.autograd.grad(objective(hidden), hidden)
    cosine = functional.cosine_similarity(step.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4))


def test_adversarial_loss_is_added_with_its_weight(model):
    tokens, mask, labels = batch(model)
    losses = model.losses(tokens, mask, labels, Regularisers(adversarial=0.5, radius=0.2))
    hidden = model.encode(model.embed(tokens), mask)
    rows = {name: model.task_rows(hidden, mask, labels, name) for name in model.tasks}
    (gradient,) = torch.autograd.grad(-sum(row.mean.sum() for row in rows.values()), hidden, retain_graph=True)
    moved = hidden + 0.2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    expected = {
        name: -row.total.sum() - 0.5 * model.task_rows(moved, mask, labels, name).total.sum()
        for name, row in rows.items()
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss.total, expected[name])
        assert loss.count == rows[name].count.sum()
    found = gradients(model, losses)
    # The step is a constant: no second derivatives.
    model.zero_grad()
    moved = hidden + (moved - hidden).detach()
    again = {
        name: -row.total.sum() - 0.5 * model.task_rows(moved, mask, labels, name).total.sum()
        for name, row in rows.items()
    }
    sum(value / losses[name].count for name, value in again.items()).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)


def test_adversarial_step_without_labels_or_gradients(model):
    tokens, mask, labels = batch(model)
    empty = model.encode_labels([None] * 4, [{}] * 4)
    losses = model.losses(tokens, mask, empty, Regularisers(adversarial=0.5))
    assert all(loss.total == 0 for loss in losses.values())
    with torch.no_grad(), pytest.raises(ValueError, match="needs gradients"):
        model.losses(tokens, mask, labels, Regularisers(adversarial=0.5))


def test_all_regularisers_together_train(model):
    every = Regularisers(label_smoothing=0.1, mixup=0.3, adversarial=0.5)
    losses = model.train().losses(*batch(model), every, torch.Generator().manual_seed(0))
    assert all(value.isfinite().all() for value in gradients(model, losses).values())


# --- transcripts, labels, files ---


def test_greedy_transcripts_are_those_of_single_steps(model):
    with torch.no_grad():
        model.decoder.head.bias[0] = 1.0  # ends come early enough to be seen
    tokens, mask, _ = batch(model)
    found = model.transcribe(tokens, mask, max_length=6)
    for row in range(4):
        hidden = model.encode(model.embed(tokens[row : row + 1, : LENGTHS[row]]), mask[row : row + 1, : LENGTHS[row]])
        ids = []
        while len(ids) < 6:
            past = torch.tensor([ids], dtype=torch.long).view(1, -1)
            best = int(model.decoder(hidden, mask[row : row + 1, : LENGTHS[row]], past)[0, -1].argmax())
            if best == 0:
                break
            ids.append(best)
        assert found[row] == "".join("\N{REPLACEMENT CHARACTER}あいうえ"[i - 1] for i in ids)


def test_transcripts_by_ctc_collapse_repeats_and_skip_blanks():
    model = make(decoder_layers=0)
    tokens, mask, _ = batch(model)
    best = model.ctc(model.encode(model.embed(tokens), mask), mask).argmax(-1)
    for row, text in enumerate(model.transcribe(one_hot(tokens), mask)):
        kept = [key for key, _ in itertools.groupby(best[row, : LENGTHS[row]].tolist()) if key != 0]
        assert text == "".join("\N{REPLACEMENT CHARACTER}あいうえ"[i - 1] for i in kept)


def test_labels_of_rows(model):
    labels = model.encode_labels(TEXTS, KNOWN)
    assert labels.text.tolist() == [[2, 3, 3, 4], [0] * 4, [0] * 4, [4, 5, 1, 0]]  # ん is unknown
    assert labels.text_mask.sum(-1).tolist() == [4, 0, 0, 3]
    assert labels.has_text.tolist() == [True, False, True, True]
    assert labels.attribute("emotion").mask.tolist() == [True, True, False, False]
    assert labels.attribute("audio.events").target.tolist()[0] == [True, True]
    assert labels.attribute("audio.events").mask.tolist() == [True, False, True, False]
    assert labels.attribute("mos").target[:2].tolist() == pytest.approx([4.6, 1.0])
    assert labels.attribute("place") is None
    assert labels.to("cpu").attributes[0].name == "emotion"
    assert model.encode_labels([], []).text.shape == (0, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"emotion": "bored"}, "emotion must be one of happy, sad, angry, got 'bored'"),
        ({"audio.events": ["cough", "bang"]}, "audio.events must be some of cough, laugh, got bang"),
        ({"audio.events": 1.0}, "audio.events must be names of events"),
        ({"mos": 5.5}, "mos must be a number between 1 and 5, got 5.5"),
        ({"age": "old"}, "age must be a number, got 'old'"),
        ({"age": math.nan}, "age must be a number between"),
    ],
)
def test_labels_that_cannot_be_are_named(model, value, message):
    with pytest.raises(ValueError, match=message):
        model.encode_labels(["あ"], [value])
    with pytest.raises(ValueError, match="as many texts as attributes, got 2 and 1"):
        model.encode_labels(["あ", "い"], [value])


def test_a_directory_gives_the_same_model(model, tmp_path):
    inputs = batch(model)
    model.save(tmp_path / "reward")
    model.save(tmp_path / "reward")  # over itself
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]
    loaded = RewardModel(str(tmp_path / "reward"))
    assert loaded.sizes == model.sizes
    assert loaded.digest() == model.digest()
    assert torch.equal(loaded.eval().score(*inputs).reward(), model.score(*inputs).reward())
    with torch.no_grad():
        loaded.norm.bias += 1
    assert loaded.digest() != model.digest()
    assert loaded.rebuild().digest() == model.digest()
    assert make(characters="えういあ").digest() != make().digest()


def test_exactly_one_source_of_a_model(tmp_path):
    with pytest.raises(ValueError, match="exactly one of `directory`"):
        RewardModel()
    with pytest.raises(ValueError, match="exactly one of `directory`"):
        RewardModel("somewhere", SIZES)
    with pytest.raises(ValueError, match=r"model directory with config\.json"):
        RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        make().rebuild()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 0}, "must be above 0"),
        ({"width": 14}, "a multiple of heads, got 14 and 3"),
        ({"width": 9}, "must be even"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"characters": ""}, "need each other"),
        ({"decoder_layers": 0, "ctc": False}, "need each other"),
        ({"characters": "ああ"}, "characters must be different"),
        ({"attributes": (ATTRIBUTES[0], ATTRIBUTES[0])}, "different names"),
        ({"attributes": (), "decoder_layers": 0, "ctc": False, "characters": ""}, "one or more tasks"),
    ],
)
def test_sizes_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("asr", "mos"), "a name other than 'asr' and 'ctc'"),
        (("emotion", "classes", ("one",)), "different names for its classes"),
        (("events", "events", ()), "different names for its events"),
        (("mos", "mos", ("1", "2")), "has no classes"),
        (("age", "regression", (), 0.0, 0.0), "spread of attribute 'age' must be above 0"),
        (("mos", "mos", (), 3.0), "need the kind regression"),
    ],
)
def test_attributes_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attribute(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"mixup": -1.0}, "must not be negative"),
        ({"adversarial": 1.0, "radius": 0.0}, "radius must be above 0"),
        ({"radius": 0.3}, "no effect without adversarial"),
    ],
)
def test_regularisers_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regularisers(**arguments)


def test_characters_are_collected():
    assert collect_characters(["つな", "なみ", ""]) == "つなみ"
    assert collect_characters([]) == ""


def test_another_kind_of_model_is_named(tmp_path):
    from tiny import save_policy

    policy = save_policy(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"json: cannot be read as sizes of a reward model: there is no list of"):
        RewardModel(str(policy))
    config = {"codebook_size": 10**9, "characters": "ab", "attributes": []}
    (policy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"codebook_size: 1000000000 is more than model\.safetensors holds numbers"):
        RewardModel(str(policy))
    (policy / "config.json").write_text(json.dumps(config | {"codebook_size": 9, "attributes": [{"name": 1}]}))
    with pytest.raises(ValueError, match=r"KeyError: 'classes'; is it the directory of another kind of model\?"):
        RewardModel(str(policy))
