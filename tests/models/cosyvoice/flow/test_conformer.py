# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from parity import parity
from unet_dump import ENCODER, TOLERANCE, dump, length_mask, off, weights

from tts_align.models.cosyvoice.flow.conformer import (
    RelativeAttention,
    UpsamplingConformer,
    align_distances,
    relative_positions,
)

SIZES = [
    {"channels": 6, "width": 8, "heads": 2, "hidden": 12, "blocks": 1, "up_blocks": 1, "chunk": 3},
    {"channels": 10, "width": 12, "heads": 3, "hidden": 8, "blocks": 2, "up_blocks": 1, "chunk": 5, "lookahead": 1},
    {"channels": 8, "width": 16, "heads": 1, "hidden": 8, "blocks": 0, "up_blocks": 2, "stride": 3, "lookahead": 4},
]


def make(sizes: dict[str, int], seed: int = 0) -> UpsamplingConformer:
    torch.manual_seed(seed)
    return UpsamplingConformer(**sizes).double().eval()


@pytest.fixture(scope="module")
def published() -> UpsamplingConformer:
    io = dump()
    assert io
    encoder = UpsamplingConformer(**ENCODER).eval()
    encoder.load_state_dict(weights("encoder."))
    return encoder


def inputs(streaming: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    io = dump()
    lengths = io["train.speech_token_len"]
    return io["enc.token_emb"], length_mask(lengths), io[f"enc.out_stream{int(streaming)}"]


def test_sinusoids_are_the_published_ones():
    io = parity("misc").io
    assert off(relative_positions(5, 8), io["relpos.pos_emb"][0]) < TOLERANCE


@pytest.mark.parametrize(("length", "channels"), [(1, 2), (4, 6), (9, 16)])
def test_sinusoids_are_the_formula(length, channels):
    table = relative_positions(length, channels)
    assert table.shape == (2 * length - 1, channels)
    for row, distance in enumerate(range(length - 1, -length, -1)):
        for k in range(channels // 2):
            angle = distance / 10000 ** (2 * k / channels)
            assert table[row, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[row, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_distances_go_to_their_keys(length):
    distance = torch.arange(length - 1, -length, -1).double().expand(2, length, -1)
    expected = torch.arange(length)[:, None] - torch.arange(length)
    torch.testing.assert_close(align_distances(distance), expected.double().expand(2, -1, -1), rtol=0, atol=0)


@pytest.mark.parametrize(("width", "heads", "length"), [(8, 2, 5), (12, 3, 1), (6, 1, 7)])
def test_attention_is_the_formula(width, heads, length):
    torch.manual_seed(width)
    attention = RelativeAttention(width, heads, 0.3).double().eval()
    vectors, size = torch.randn(2, length, width, dtype=torch.float64), width // heads
    visible = (torch.rand(2, length, length) > 0.4) | torch.eye(length, dtype=torch.bool)
    positions = relative_positions(length, width).double()
    expected = torch.zeros(2, length, width, dtype=torch.float64)
    for b in range(2):
        q, k, v = (layer(vectors[b]) for layer in (attention.linear_q, attention.linear_k, attention.linear_v))
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            for i in range(length):
                seen = [j for j in range(length) if visible[b, i, j]]
                scores = []
                for j in seen:
                    p = attention.linear_pos(positions[length - 1 - (i - j)])[own]
                    content = (q[i, own] + attention.pos_bias_u[h]) @ k[j, own]
                    place = (q[i, own] + attention.pos_bias_v[h]) @ p
                    scores.append((content + place) / math.sqrt(size))
                share = torch.stack(scores).softmax(0)
                expected[b, i, own] = sum(a * v[j, own] for a, j in zip(share, seen, strict=True))
    torch.testing.assert_close(attention(vectors, positions, visible), attention.linear_out(expected))


@pytest.mark.parametrize("streaming", [False, True])
def test_longest_utterance_of_a_batch_equals_the_published_one(published, streaming):
    vectors, mask, expected = inputs(streaming)
    assert mask[0].all()
    assert off(published(vectors, mask, streaming)[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize("streaming", [False, True])
def test_shorter_utterances_differ_only_through_padding(published, streaming):
    """With the padding left as the embedding makes it, every real frame is what the published code computes."""
    vectors, mask, expected = inputs(streaming)
    frames = mask.repeat_interleave(2, 1)
    seen = published.encode_embedded(published.embed(vectors), mask, streaming, final=True)
    assert off(seen[frames], expected[frames]) < TOLERANCE


@pytest.mark.parametrize("streaming", [False, True])
def test_which_frames_padding_changes_in_the_published_code(published, streaming):
    """The last three tokens read it. When streaming, nobody before their chunk hears of it; otherwise all do."""
    vectors, mask, expected = inputs(streaming)
    difference = (published(vectors, mask, streaming) - expected).abs().amax(-1) / expected.abs().max()
    for item, tokens in enumerate(mask.sum(1).tolist()[1:], start=1):
        reads = 2 * (tokens - 3)  # the first frame that reads padding
        hears = reads // 8 * 8 if streaming else 0  # the first frame of its chunk
        assert (difference[item, :hears] < TOLERANCE).all()
        assert ((difference[item, hears:reads] > 5e-4) & (difference[item, hears:reads] < 5e-3)).all()
        assert ((difference[item, reads : 2 * tokens] > 1e-2) & (difference[item, reads : 2 * tokens] < 0.1)).all()


def test_context_equals_the_published_one(published):
    vectors, mask, _ = inputs(False)
    assert off(published(vectors[:1], mask[:1], final=False), dump()["enc.out_context"]) < TOLERANCE


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_an_utterance_does_not_depend_on_its_neighbours(sizes, streaming, final):
    encoder = make(sizes)
    lengths = torch.tensor([13, 6, 9])
    vectors = torch.randn(3, 13, sizes["channels"], dtype=torch.float64)  # padding is not zero here
    together = encoder(vectors, length_mask(lengths), streaming, final)
    for item, length in enumerate(lengths.tolist()):
        alone = encoder(vectors[item : item + 1, :length], torch.ones(1, length, dtype=torch.bool), streaming, final)
        torch.testing.assert_close(together[item, : alone.shape[1]], alone[0])
        assert not together[item, alone.shape[1] :].any(), "padding is 0"


@pytest.mark.parametrize("sizes", SIZES)
def test_streaming_frames_do_not_change_when_more_is_said(sizes):
    """Chunk by chunk, the frames of what was said so far are those of the whole."""
    encoder = make(sizes, seed=1)
    chunk, stride, look = encoder.chunk, encoder.stride, encoder.lookahead
    length = 3 * chunk + look + 1
    vectors = torch.randn(1, length, sizes["channels"], dtype=torch.float64)
    whole = encoder(vectors, torch.ones(1, length, dtype=torch.bool), streaming=True)
    for said in range(chunk, length - look, chunk):
        mask = torch.ones(1, said + look, dtype=torch.bool)
        part = encoder(vectors[:, : said + look], mask, streaming=True, final=False)
        torch.testing.assert_close(part, whole[:, : said * stride])


def test_attention_of_a_whole_utterance_sees_all_of_it():
    encoder = make(SIZES[0])
    vectors = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 20, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(encoder(vectors, mask)[0, 0, 0], vectors)
    assert gradient[0].any(-1).all()
    (gradient,) = torch.autograd.grad(encoder(vectors, mask, streaming=True)[0, 0, 0], vectors)
    assert gradient[0].any(-1).sum() == 3 + 3, "its chunk and the look-ahead"


def test_a_row_without_tokens_does_no_harm():
    encoder = make(SIZES[0])
    vectors = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    frames = encoder(vectors, length_mask(torch.tensor([5, 0])))
    frames.sum().backward()
    assert not frames[1].any()
    assert vectors.grad[0].any()
    assert not vectors.grad[1].any()
    assert vectors.grad.isfinite().all()


def test_dropout_acts_in_training_only():
    encoder = make(SIZES[0])
    vectors, mask = torch.randn(1, 4, 6, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(encoder(vectors, mask), encoder(vectors, mask))
    encoder.train()
    assert not torch.equal(encoder(vectors, mask), encoder(vectors, mask))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of its 3 heads, got 8"):
        UpsamplingConformer(width=8, heads=3)
