# SPDX-License-Identifier: Apache-2.0
"""Special tokens stand where the published models have them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import save_text_tokenizer
from parity import FOLDER

from tts_align.models.cosyvoice.text import TextTokenizer, special_tokens

PUBLISHED = FOLDER / "tokens" / "special_tokens.json"
needs_dump = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no dump at {PUBLISHED}")
VERSIONS = [("cosyvoice2", "v2"), ("cosyvoice3", "v3")]


@needs_dump
@pytest.mark.parametrize(("family", "version"), VERSIONS)
def test_tokens_and_their_order_are_the_published_ones(family: str, version: str):
    published = json.loads(PUBLISHED.read_text("utf-8"))[version]
    tokens = special_tokens(family)
    assert len(tokens) == len(set(tokens)) == published["listed"]
    ordered = sorted(published["ids"], key=published["ids"].__getitem__)
    assert list(tokens) == ordered[1:]  # the first stands for the end of text and is not listed


@needs_dump
@pytest.mark.parametrize(("family", "version"), VERSIONS)
def test_ids_on_a_vocabulary_of_the_published_size(tmp_path: Path, family: str, version: str):
    published = json.loads(PUBLISHED.read_text("utf-8"))[version]
    tokenizer = TextTokenizer(save_text_tokenizer(tmp_path, entries=151643), family)
    assert {token: tokenizer.id(token) for token in published["ids"]} == published["ids"]
    assert tokenizer.length == published["len_tokenizer"]
    assert tokenizer.encode("".join(published["ids"])) == list(published["ids"].values())


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
@pytest.mark.parametrize("entries", [None, 300, 1000])
def test_new_tokens_follow_any_vocabulary(tmp_path: Path, family: str, entries: int | None):
    path = save_text_tokenizer(tmp_path, entries)
    base = len(json.loads((path / "vocab.json").read_text("utf-8"))) + 3
    tokenizer = TextTokenizer(str(path), family)
    tokens = tokenizer.special
    assert [tokenizer.id(token) for token in tokens] == [base - 2, base - 1, *range(base, base + len(tokens) - 2)]
    assert tokenizer.length == base + len(tokens) - 2


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    path = save_text_tokenizer(tmp_path_factory.mktemp("text"))
    return {family: TextTokenizer(path, family) for family in ("cosyvoice2", "cosyvoice3")}


def test_text_is_bytes_and_merges(tokenizers: dict[str, TextTokenizer]):
    tokenizer = tokenizers["cosyvoice2"]
    assert tokenizer.encode("hello") == [tokenizer.id(token) for token in ("he", "ll", "o")]  # no first, no last
    assert tokenizer.encode("") == []
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")  # composed, as Qwen2 does
    with pytest.raises(ValueError, match="no token 'hell'"):
        tokenizer.id("hell")


def test_added_tokens_are_one_id_wherever_they_stand(tokenizers: dict[str, TextTokenizer]):
    tokenizer = tokenizers["cosyvoice3"]
    ids = tokenizer.encode("he[breath]he<|endofprompt|>[AA1][ǜ]he")
    he = tokenizer.id("he")
    own = [tokenizer.id(token) for token in ("[breath]", "<|endofprompt|>", "[AA1]", "[ǜ]")]
    assert ids == [he, own[0], he, *own[1:], he]


def test_version_2_knows_no_phonemes(tokenizers: dict[str, TextTokenizer]):
    tokenizer = tokenizers["cosyvoice2"]
    assert tokenizer.encode("[AA1]") == [tokenizer.id(letter) for letter in "[AA1]"]
    assert len(tokenizer.encode("[breath]")) == 1


@given(st.lists(st.one_of(st.text(), st.sampled_from(special_tokens("cosyvoice3")))))
def test_decoding_gives_the_text_back(tokenizers: dict[str, TextTokenizer], parts: list[str]):
    tokenizer = tokenizers["cosyvoice3"]
    ids = tokenizer.encode("".join(parts))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_tokenizers_can_be_copied_and_sent(tokenizers: dict[str, TextTokenizer]):
    tokenizer = tokenizers["cosyvoice3"]
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("he[ǜ]llo") == tokenizer.encode("he[ǜ]llo")


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    path = save_text_tokenizer(tmp_path / "a")
    (path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*merges\.txt: expected the tokenizer files"):
        TextTokenizer(path, "cosyvoice2")
    (path / "merges.txt").write_text("x y z w\n")
    with pytest.raises(ValueError, match="cannot read the text tokenizer in"):
        TextTokenizer(path, "cosyvoice2")
