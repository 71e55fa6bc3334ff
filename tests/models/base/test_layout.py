# SPDX-License-Identifier: Apache-2.0
"""Where text and speech stand in a sequence: by hand, and as the published models' own code arranges them."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from parity import Parity, parity

from tts_align.models.base.layout import SPECIAL, SPEECH, TEXT, Layout, TokenRow, collate

V2, V3 = Layout("cosyvoice2", 10, text_block=2, speech_block=3), Layout("cosyvoice3", 10, text_block=2, speech_block=3)
ROW = TokenRow(text=(7, 1, 2, 3), speech=(4, 5, 6, 7), prefix=1)


@pytest.mark.parametrize(
    ("layout", "ids"),
    [
        # vocabulary, end, fill, sos, task
        (Layout("cosyvoice2", 6561), (6564, 6561, 6563, (0, SPECIAL), (1, SPECIAL))),
        (Layout("cosyvoice3", 6561), (6761, 6562, 6564, (6561, SPEECH), (6563, SPEECH))),
    ],
)
def test_ids_of_the_published_models(layout: Layout, ids: tuple):
    assert (layout.vocabulary, layout.end, layout.fill, layout.sos, layout.task) == ids


def test_unistream_by_hand():
    """sos 7 1 2 3 task | 4 5 6 7: the task token predicts 4, the last token predicts the end."""
    found = V2.arrange(ROW)
    assert found.token == [0, 7, 1, 2, 3, 1, 4, 5, 6, 7]
    assert found.table == [SPECIAL, *[TEXT] * 4, SPECIAL, *[SPEECH] * 4]
    assert found.predicted_at == [5, 6, 7, 8, 9]
    assert found.target == [4, 5, 6, 7, V2.end]


def test_bistream_by_hand():
    """Blocks of two words and three tokens: sos 7 [1 2][4 5 6] 3 task [7 8]; the block ends with a predicted fill."""
    row = TokenRow((7, 1, 2, 3), (4, 5, 6, 7, 8), prefix=1, bistream=True)
    found = V3.arrange(row)
    assert found.token == [10, 7, 1, 2, 4, 5, 6, 3, 12, 7, 8]
    assert found.table == [SPEECH, TEXT, TEXT, TEXT, SPEECH, SPEECH, SPEECH, TEXT, SPEECH, SPEECH, SPEECH]
    assert found.predicted_at == [3, 4, 5, 6, 8, 9, 10]
    assert found.target == [4, 5, 6, V3.fill, 7, 8, V3.end]


def test_bistream_needs_strictly_more_speech_than_its_blocks():
    three_words = TokenRow((7, 1, 2, 3), (4,) * 4, prefix=1)
    assert not V2.can_bistream(three_words)  # 4 * 2 is not more than 3 * 3
    assert not V2.can_bistream(TokenRow((1, 2), (4,) * 3))  # exactly 3 : 2
    assert V2.can_bistream(TokenRow((1, 2), (4,) * 4))
    assert V2.can_bistream(replace(three_words, speech=(4,) * 5))
    assert not V2.can_bistream(TokenRow((7,), (4,) * 5, prefix=1))
    with pytest.raises(ValueError, match="more than 3 speech tokens per 2 text tokens, got 4 for 3"):
        V2.arrange(replace(three_words, bistream=True))


@pytest.mark.parametrize("code", [-1, 10])
def test_codes_outside_the_codebook_are_refused(code: int):
    with pytest.raises(ValueError, match=r"speech tokens must lie in 0\.\.9, got .*another tokenizer"):
        V2.arrange(replace(ROW, speech=(1, code)))


@pytest.mark.parametrize("name", ["llm_v2", "llm_v3"])
@pytest.mark.parametrize("kind", ["uni", "bi"])
def test_parity_with_the_published_code(name: str, kind: str):
    dump: Parity = parity(name)
    rows = dump.rows(bistream=kind == "bi")
    assert sum(row.bistream for row in rows) == (2 if kind == "bi" else 0)
    for i, row in enumerate(rows):
        arranged = dump.layout.arrange(row)
        targets = np.full(len(arranged.token), -1)
        targets[arranged.predicted_at] = arranged.target
        length = int(dump.io[f"{kind}.lm_input_len"][i])
        assert len(arranged.token) == dump.layout.input_count(row) == length
        assert targets.tolist() == dump.io[f"{kind}.lm_target"][i, :length].tolist()


texts = st.lists(st.integers(0, 9), max_size=9).map(tuple)
speeches = st.lists(st.integers(0, 9), max_size=30).map(tuple)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([V2, V3, Layout("cosyvoice2", 10), Layout("cosyvoice3", 10)]),
    st.lists(st.tuples(texts, speeches, st.integers(0, 3), st.booleans()), min_size=1, max_size=6),
)
def test_collated_rows_hold_every_row_once(layout: Layout, drawn: list):
    rows = []
    for text, speech, prefix, bistream in drawn:
        row = TokenRow(text, speech, min(prefix, len(text)))
        rows.append(replace(row, bistream=bistream and layout.can_bistream(row)))
    found = collate(rows, layout)
    arranged = [layout.arrange(row) for row in rows]
    assert found.keys == tuple(map(layout.key, rows))
    assert found.mask.sum(-1).tolist() == list(map(layout.target_count, rows))
    targets = found.scatter(found.target.float()).long()
    for i, one in enumerate(arranged):
        assert targets[i, : len(one.target)].tolist() == one.target
        assert found.end[i].nonzero().flatten().tolist() == [len(one.target) - 1]
        assert len(one.token) == layout.input_count(rows[i])
    # The input that predicts each target, and all that stands before it in its row, are the row's own.
    flat = found.hidden_index.tolist()
    start = 0
    assert found.lengths == tuple(len(one.token) for one in arranged)
    assert found.offset.tolist() == [0, *np.cumsum(found.lengths)]
    for i, one in enumerate(arranged):
        at = flat[start : start + len(one.target)]
        start += len(one.target)
        first = at[0] - one.predicted_at[0]
        assert first == found.offset[i]
        where = slice(first, first + len(one.token))
        assert found.token[where].tolist() == one.token
        assert found.table[where].tolist() == one.table
        assert found.position[where].tolist() == list(range(len(one.token)))
        assert [index - first for index in at] == one.predicted_at
        assert (found.row[where] == i).all()
    assert len(found.token) == sum(found.lengths)  # and nothing is padded


def test_keys_change_with_everything_that_changes_a_models_numbers():
    changes = [
        replace(ROW, text=(7, 1, 2, 4)),
        replace(ROW, speech=(4, 5, 6, 8)),
        replace(ROW, bistream=True),
        replace(ROW, text=(7, 1, 2), speech=(3, 4, 5, 6, 7)),
    ]
    layouts = [V3, replace(V2, codebook_size=11), replace(V2, text_block=3), replace(V2, speech_block=4)]
    keys = {V2.key(ROW), *map(V2.key, changes), *(layout.key(ROW) for layout in layouts)}
    assert len(keys) == 1 + len(changes) + len(layouts)
    assert V2.key(replace(ROW)) == V2.key(ROW)


def test_nothing_to_collate():
    with pytest.raises(ValueError, match="at least one row"):
        collate([], V2)


def test_scatter_puts_numbers_where_targets_are():
    rows = collate([TokenRow((1,), (2, 3)), TokenRow((1,), (4,))], V2)
    found = rows.scatter(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert found.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]


@pytest.mark.parametrize("layout", [V2, V3], ids=["v2", "v3"])
def test_a_prompt_is_read_and_never_predicted(layout):
    row = TokenRow((1, 2), (5, 6, 7), prompt=(3, 4))
    arranged = layout.arrange(row)
    plain = layout.arrange(TokenRow((1, 2), (3, 4, 5, 6, 7)))
    assert (arranged.token, arranged.table) == (plain.token, plain.table)
    assert arranged.target == [5, 6, 7, layout.end]
    assert arranged.predicted_at == plain.predicted_at[2:]  # the prompt's last token predicts the first of its own
    assert layout.input_count(row) == len(arranged.token)
    assert layout.target_count(row) == 4
    assert layout.key(row) != layout.key(replace(row, prompt=()))


def test_a_prompt_keeps_its_row_together_and_lies_in_the_codebook():
    row = TokenRow((1, 2), (4,) * 9, prompt=(3,))
    assert V2.can_bistream(replace(row, prompt=()))
    assert not V2.can_bistream(row)
    with pytest.raises(ValueError, match="cannot continue a recording"):
        V2.arrange(replace(row, bistream=True))
    with pytest.raises(ValueError, match="another tokenizer"):
        V2.arrange(replace(row, prompt=(V2.codebook_size,)))
