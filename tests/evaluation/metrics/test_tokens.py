# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import side_by_side

from tts_align.evaluation.metrics.tokens import TokenCounts, entropy_bits, mutual_information_bits, used_share

CODES = 6
ROWS = st.lists(st.lists(st.integers(0, CODES - 1), max_size=9), min_size=1, max_size=6)


def batch(rows: list[list[int]], padding: int = CODES + 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded with what is no token, and where they are real."""
    width = max(len(row) for row in rows) + 1
    tokens = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    return tokens, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def counted(rows: list[list[int]], codebook_size: int = CODES) -> TokenCounts:
    return TokenCounts.of(*batch(rows), codebook_size)


def slow_entropy(counter: Counter) -> float:
    n = sum(counter.values())
    return -sum(c / n * math.log2(c / n) for c in counter.values())


def slow_correction(counter: Counter) -> float:
    return (len(counter) - 1) / (2 * sum(counter.values())) / math.log(2)


@given(ROWS)
@settings(deadline=None, max_examples=60)
def test_they_are_the_formulas_typed_slowly(rows):
    counts = counted(rows)
    tokens = Counter(token for row in rows for token in row)
    pairs = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert counts.tokens.tolist() == [tokens[code] for code in range(CODES)]
    found = {
        (key // CODES, key % CODES): n
        for key, n in zip(counts.pairs.tolist(), counts.pair_counts.tolist(), strict=True)
    }
    assert found == dict(pairs)
    assert counts.used_share() == pytest.approx(len(tokens) / CODES)
    if not tokens:
        assert counts.entropy_bits().isnan()
    else:
        assert counts.entropy_bits().item() == pytest.approx(slow_entropy(tokens), abs=1e-12)
        corrected = slow_entropy(tokens) + slow_correction(tokens)
        assert counts.entropy_bits(miller_madow=True).item() == pytest.approx(corrected, abs=1e-12)
    if not pairs:
        assert counts.mutual_information_bits().isnan()
        return
    n = sum(pairs.values())
    first, second = (Counter() for _ in range(2))
    for (a, b), c in pairs.items():
        first[a] += c
        second[b] += c
    slow = sum(c / n * math.log2(c * n / (first[a] * second[b])) for (a, b), c in pairs.items())
    assert counts.mutual_information_bits().item() == pytest.approx(slow, abs=1e-12)
    correction = slow_correction(first) + slow_correction(second) - slow_correction(pairs)
    assert counts.mutual_information_bits(True).item() == pytest.approx(slow + correction, abs=1e-12)


@given(ROWS, ROWS)
@settings(deadline=None, max_examples=40)
def test_counts_add_up_over_batches(left, right):
    total, whole = counted(left) + counted(right), counted(left + right)
    for name in ("tokens", "pairs", "pair_counts"):
        assert torch.equal(getattr(total, name), getattr(whole, name)), name
    assert torch.equal((TokenCounts.none(CODES) + whole).pairs, whole.pairs)


def test_tokens_that_are_drawn_uniformly_say_nothing_of_each_other():
    codebook_size = 16
    tokens = torch.randint(codebook_size, (50, 4000), generator=torch.Generator().manual_seed(0))
    counts = TokenCounts.of(tokens, torch.ones_like(tokens, dtype=torch.bool), codebook_size)
    assert counts.entropy_bits().item() == pytest.approx(math.log2(codebook_size), abs=1e-3)
    assert counts.mutual_information_bits().item() == pytest.approx(0, abs=2e-3)
    assert counts.used_share() == 1


def test_a_cycle_is_known_from_any_of_its_tokens():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    tokens = order.repeat(100)[None, : 12 * 100 - 11]  # one more than whole cycles: as many pairs as in whole cycles
    counts = TokenCounts.of(tokens, torch.ones_like(tokens, dtype=torch.bool), 6561)
    assert counts.mutual_information_bits().item() == pytest.approx(math.log2(12), abs=1e-9)
    assert counts.mutual_information_bits() == pytest.approx(counts.entropy_bits().item(), abs=1e-4)
    assert counts.used_share() == pytest.approx(12 / 6561)


def test_one_token_for_ever_is_no_information():
    counts = counted([[2] * 30])
    assert (counts.entropy_bits(), counts.mutual_information_bits()) == (0, 0)


def test_the_correction_is_nearer_the_truth_for_few_tokens():
    """200 tokens of 64 speech tokens: the plug-in estimators are far off, which the first-order correction reduces."""
    plain, corrected, mutual, mutual_corrected = [], [], [], []
    for seed in range(20):
        tokens = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(seed))
        counts = TokenCounts.of(tokens, torch.ones_like(tokens, dtype=torch.bool), 64)
        plain.append(counts.entropy_bits())
        corrected.append(counts.entropy_bits(miller_madow=True))
        mutual.append(counts.mutual_information_bits())
        mutual_corrected.append(counts.mutual_information_bits(miller_madow=True))
    means = [torch.stack(some).mean().item() for some in (plain, corrected, mutual, mutual_corrected)]
    assert abs(means[1] - 6) < abs(means[0] - 6) / 3
    assert abs(means[3]) < abs(means[2])


def test_pairs_are_within_one_utterance_and_between_real_tokens():
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 0]])
    mask = torch.tensor([[True, True, False, True], [True, True, False, False]])
    counts = TokenCounts.of(tokens, mask, CODES)
    assert counts.pairs.tolist() == [0 * CODES + 1, 4 * CODES + 5]
    assert counts.tokens.tolist() == [1, 1, 0, 1, 1, 1]


def test_short_types_do_not_overflow():
    tokens = torch.tensor([[6560, 6559, 6560]], dtype=torch.int16)
    counts = TokenCounts.of(tokens, torch.ones(1, 3, dtype=torch.bool), 6561)
    assert counts.pairs.tolist() == [6559 * 6561 + 6560, 6560 * 6561 + 6559]


def test_what_is_no_code_and_other_codebooks_are_refused():
    with pytest.raises(ValueError, match=r"0 to 5, got 1 to 9: leave special tokens out"):
        counted([[1, 9]])
    with pytest.raises(ValueError, match=r"got 6 and 7 speech tokens"):
        counted([[1]]) + TokenCounts.none(7)


def test_functions_of_counts_alone():
    assert entropy_bits(torch.tensor([4, 4, 0, 8])).item() == pytest.approx(1.5)
    first, second, n = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([3, 3, 5, 5])
    assert mutual_information_bits(first, second, n).item() == pytest.approx(0, abs=1e-12)
    assert used_share(torch.tensor([0, 2])) == 0.5


def _rank(rank: int, store: str, found: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    counts = counted([[0, 1, 2], [3]]) if rank == 0 else TokenCounts.none(CODES)  # the second has nothing to add
    total = counts.across_ranks()
    torch.save((total.tokens, total.pairs, total.pair_counts), f"{found}{rank}")
    total = counted([[rank, 1, 2]]).across_ranks()
    torch.save((total.tokens, total.pairs, total.pair_counts), f"{found}both{rank}")
    dist.destroy_process_group()


def test_ranks_add_up(tmp_path):
    alone = counted([[1, 2]])
    assert alone.across_ranks() is alone
    side_by_side(_rank, str(tmp_path / "store"), str(tmp_path / "found"))
    for rank in range(2):
        for name, rows in (("", [[0, 1, 2], [3]]), ("both", [[0, 1, 2], [1, 1, 2]])):
            whole = counted(rows)
            total = torch.load(tmp_path / f"found{name}{rank}")
            assert all(map(torch.equal, total, (whole.tokens, whole.pairs, whole.pair_counts)))
