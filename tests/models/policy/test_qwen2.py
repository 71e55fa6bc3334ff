# SPDX-License-Identifier: Apache-2.0
"""The policy: as the published models compute, the same however rows are batched, and its adapters."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Parity, parity
from safetensors.torch import load_file, save_file
from tiny import CODES, LORA, SIZES, save_policy, save_tokenizer

from tts_align.batch import Rows
from tts_align.models.base.generation import Context, Encoded, Prompt, Sampling
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.policy import decoding
from tts_align.models.policy.decoding import Decoding
from tts_align.models.policy.matrices import matrix
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM, Sizes
from tts_align.utils.readers import ReadError

BISTREAM = (2, 4)


def random_rows(count: int = 6, seed: int = 0) -> list[TokenRow]:
    """Rows of very different lengths, the last one bistream."""
    random = torch.Generator().manual_seed(seed)

    def draw(high: int, length: int) -> tuple[int, ...]:
        return tuple(torch.randint(high, (length,), generator=random).tolist())

    rows = [TokenRow(draw(9, 1 + i % 4), draw(CODES, 1 + 5 * i % 13), prefix=i % 2) for i in range(count - 1)]
    return [*rows, TokenRow(draw(9, 5), draw(CODES, 13), prefix=1, bistream=True)]


@pytest.fixture
def model(tiny_policy: Path) -> Qwen2CodecLM:
    return Qwen2CodecLM(str(tiny_policy), bistream=BISTREAM).eval()


def disturb(model: Qwen2CodecLM, seed: int = 3) -> None:
    """Change everything that trains, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn(value.shape, generator=random))


# --- the published models ---


@pytest.mark.parametrize("name", ["llm_v2", "llm_v3"])
class TestParity:
    """Against numbers of the published code on the same weights."""

    @pytest.mark.parametrize("kind", ["uni", "bi"])
    def test_inputs_logits_and_log_probabilities(self, name: str, kind: str):
        dump: Parity = parity(name)
        model, rows = dump.model(), collate(dump.rows(bistream=kind == "bi"), dump.layout)
        with torch.no_grad():
            found = model(rows, logits=True)
        targets = dump.io[f"{kind}.lm_target"]
        # Real targets come row by row in both, so the dumped logits at them are in our order.
        torch.testing.assert_close(found.logits, dump.io[f"{kind}.logits"][targets != -1], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.sums(), dump.io[f"{kind}.seq_logp_sum"], rtol=1e-5, atol=1e-3)
        loss = -found.logp.sum() / found.mask.sum()
        torch.testing.assert_close(loss, dump.io[f"{kind}.loss"], rtol=1e-5, atol=1e-5)
        vectors, inputs = model.embed(rows.token, rows.table), dump.io[f"{kind}.lm_input"]
        assert list(rows.lengths) == dump.io[f"{kind}.lm_input_len"].tolist()
        for i, own in enumerate(vectors.split(rows.lengths)):
            torch.testing.assert_close(own, inputs[i, : len(own)], rtol=0, atol=0)

    def test_gradients(self, name: str):
        dump = parity(name)
        model, rows = dump.model(), collate(dump.rows(), dump.layout)
        found = model(rows)
        (-found.logp.sum() / found.mask.sum()).backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        norm = torch.stack([value.norm() for value in gradients.values()]).norm()
        torch.testing.assert_close(norm, dump.io["uni.grad_norm"], rtol=1e-4, atol=0)
        ours = {"q_proj0": "backbone.layers.0.self_attn.q_proj.weight"}
        stored = {key.removeprefix("uni.grad."): value for key, value in dump.io.items() if "uni.grad." in key}
        assert stored.keys() == {"q_proj0", "llm_decoder.weight", "speech_embedding.weight"}
        for key, expected in stored.items():
            torch.testing.assert_close(gradients[ours.get(key, key)], expected, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("kind", ["zs", "zs_noprompt"])
    def test_greedy_decoding_of_codes(self, name: str, kind: str):
        """30 most probable speech tokens for 6 text tokens, with and without a recording to continue."""
        dump = parity(name)
        prompt = tuple(dump.io["zs.prompt_text"][0].tolist())
        speech = tuple(dump.io["zs.prompt_speech_token"][0].tolist()) if kind == "zs" else ()
        one = Prompt((*prompt, *dump.io["zs.text"][0].tolist()), seed=0, prefix=len(prompt), speech=speech)
        exactly = Sampling(temperature=0.0, min_ratio=5.0, max_ratio=5.1)
        found = dump.model().generate([one], exactly)[0]
        assert found.speech.tolist() == dump.io[f"{kind}.tokens"].tolist()
        assert not found.finished

    def test_greedy_decoding_with_an_end(self, name: str):
        """No end before twice the text's length, none after twenty times; the reference never ends here either."""
        dump = parity(name)
        prompt = tuple(dump.io["zs.prompt_text"][0].tolist())
        speech = tuple(dump.io["zs.prompt_speech_token"][0].tolist())
        one = Prompt((*prompt, *dump.io["zs.text"][0].tolist()), seed=0, prefix=len(prompt), speech=speech)
        found = dump.model().generate([one], Sampling(temperature=0.0))[0]
        assert found.speech.tolist() == dump.io["greedy.tokens"].tolist()


def test_sums_over_speech_and_not_over_the_rest():
    """The published DPO averages over prompt and padding positions; ours must not agree with it."""
    dump = parity("llm_v2")
    rows = [*dump.rows(), *dump.rows(speech="reject_speech_token")]
    with torch.no_grad():
        found = dump.model()(collate(rows, dump.layout))
    torch.testing.assert_close(found.sums(), dump.io["dpo_right.sum_logps"], rtol=1e-5, atol=1e-3)
    means = found.sums() / found.mask.sum(-1)
    torch.testing.assert_close(means, dump.io["dpo_right.mean_logps"], rtol=1e-5, atol=1e-4)
    wrong = torch.cat([dump.io["dpo_ref.chosen_logps"], dump.io["dpo_ref.rejected_logps"]])
    for ours in (found.sums(), means):
        assert ((ours - wrong).abs() > 0.05).sum() >= 7


# --- one number for a row, however it is batched ---


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
def test_together_and_alone_agree(family: str, tmp_path: Path):
    model = Qwen2CodecLM(str(save_policy(tmp_path / "policy", family=family)), bistream=BISTREAM).eval()
    rows = random_rows()
    with torch.no_grad():
        together = model(collate(rows, model.layout))
        alone = [model(collate([row], model.layout)).logp[0] for row in rows]
    assert together.logp.std() > 0.5
    for i, logp in enumerate(alone):
        torch.testing.assert_close(together.logp[i, : len(logp)], logp, rtol=0, atol=1e-5)
        assert (together.logp[i, len(logp) :] == 0).all()


def test_gradients_of_rows_together_and_alone_agree(model: Qwen2CodecLM):
    found = []
    for batches in ([random_rows()], [[row] for row in random_rows()]):
        model.zero_grad()
        for rows in batches:
            model(collate(rows, model.layout)).logp.sum().backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-4)


def test_neighbours_do_not_matter(model: Qwen2CodecLM):
    rows = collate(random_rows(), model.layout)
    with torch.no_grad():
        clean = model(rows).logp
    first = random_rows()[0]
    changed = [replace(first, speech=(first.speech[0] ^ 1, *first.speech[1:])), *random_rows()[1:]]
    with torch.no_grad():
        other = model(collate(changed, model.layout)).logp
    torch.testing.assert_close(other[1:], clean[1:], rtol=0, atol=1e-5)
    assert (other[0] - clean[0]).abs().max() > 0.01


def test_layers_that_are_computed_again_give_the_same_gradients(tiny_policy: Path):
    found, kept = [], []
    for recompute in (False, True):
        model = Qwen2CodecLM(str(tiny_policy), bistream=BISTREAM, recompute=recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, to=sizes: to.append(one.numel()) or one, lambda one: one
        ):
            logp = model(collate(random_rows(), model.layout)).logp
        logp.sum().backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


def test_logits_only_when_asked(model: Qwen2CodecLM):
    rows = collate(random_rows(), model.layout)
    assert model(rows).logits is None
    found = model(rows, logits=True)
    assert found.logits.shape == (int(rows.mask.sum()), model.layout.vocabulary)
    torch.testing.assert_close(
        rows.scatter(found.logits.log_softmax(-1).gather(1, rows.target[:, None])[:, 0]), found.logp
    )


# --- speaking ---

PROMPTS = [
    Prompt((1, 2, 3), seed=11),
    Prompt((4,), seed=12),
    Prompt((0, 5, 6, 7, 1), seed=13, prefix=1),
    Prompt((2, 2), seed=14, speech=(3, 9, 4)),
    Prompt((1, 2, 3), seed=15),
]
FREE = Sampling(top_p=0.95, top_k=0, repetition_window=4, repetition_share=0.5, min_ratio=0.0, max_ratio=6.0)


def said(model: Qwen2CodecLM, prompts: list[Prompt], sampling: Sampling = FREE) -> list[tuple[list[int], bool]]:
    return [(one.speech.tolist(), one.finished) for one in model.generate(prompts, sampling)]


def test_speech_does_not_depend_on_the_batch(model: Qwen2CodecLM):
    together = said(model, PROMPTS)
    assert len({len(speech_tokens) for speech_tokens, _ in together}) > 2  # some end earlier and leave the batch
    assert {finished for _, finished in together} == {True, False}
    assert together == [said(model, [one])[0] for one in PROMPTS]
    assert together == said(model, PROMPTS[::-1])[::-1]


def test_seeds(model: Qwen2CodecLM):
    assert said(model, PROMPTS) == said(model, PROMPTS)
    assert len({str(said(model, [replace(PROMPTS[0], seed=seed)])) for seed in range(8)}) > 4


def test_the_global_seed_does_not_matter_and_is_not_touched(model: Qwen2CodecLM):
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), said(model, PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert said(model, PROMPTS) == one


@pytest.mark.parametrize("ratios", [(1.5, 3.0), (3.0, 3.5), (0.0, 0.2)])
def test_lengths_follow_the_text_without_its_prefix(model: Qwen2CodecLM, ratios: tuple[float, float]):
    found = model.generate(PROMPTS, replace(FREE, min_ratio=ratios[0], max_ratio=ratios[1]))
    for prompt, one in zip(PROMPTS, found, strict=True):
        words = len(prompt.text) - prompt.prefix
        assert int(ratios[0] * words) <= len(one.speech) <= max(int(ratios[1] * words), 1)
        assert one.finished or len(one.speech) == max(int(ratios[1] * words), 1)


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
def test_only_codes_come_out(family: str, tmp_path: Path):
    model = Qwen2CodecLM(str(save_policy(tmp_path / "policy", family=family)))
    with torch.no_grad():
        model.llm_decoder.weight[CODES:].mul_(3)  # the special tokens are what it would say
    found = model.generate(PROMPTS, replace(FREE, temperature=3.0, min_ratio=1.0))
    assert max(int(one.speech.max()) for one in found) < CODES


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
def test_cached_decoding_is_what_scoring_says(family: str, tmp_path: Path):
    """Greedy speech is, code by code, the most probable one of a whole forward over prompt and speech."""
    model = Qwen2CodecLM(str(save_policy(tmp_path / "policy", family=family))).eval()
    spoken = model.generate(PROMPTS, Sampling(temperature=0.0, min_ratio=4.0, max_ratio=5.0))
    for prompt, one in zip(PROMPTS, spoken, strict=True):
        speech_tokens = one.speech.tolist()
        rows = collate([TokenRow(prompt.text, (*prompt.speech, *speech_tokens), prompt.prefix)], model.layout)
        with torch.no_grad():
            logits = model(rows, logits=True).logits[len(prompt.speech) :]
        logits[:, CODES:] = -torch.inf
        assert logits.argmax(-1)[: len(speech_tokens)].tolist() == speech_tokens


def test_it_keeps_its_mode_and_reports_progress(model: Qwen2CodecLM):
    for mode in (True, False):
        model.train(mode)
        ended: list[int] = []
        model.generate(PROMPTS, FREE, ended.append)
        assert model.training is mode
        assert sum(ended) == len(PROMPTS)
    assert model.generate([], FREE) == []


def test_dropout_is_off_while_it_speaks(tiny_dropout: Path):
    model = Qwen2CodecLM(str(tiny_dropout)).train()
    assert said(model, PROMPTS) == said(model, PROMPTS)


def decoded(model: Qwen2CodecLM, sampling: Sampling = FREE, **options: Any) -> list[tuple[list[int], bool]]:
    with torch.no_grad():
        found = Decoding(model, PROMPTS, sampling, **options).run(None)
    return [(one.speech.tolist(), one.finished) for one in found]


def test_a_whole_cache_says_the_same(model: Qwen2CodecLM):
    """What a CUDA graph would replay: every token reads all columns, empty ones too."""
    assert decoded(model, whole_cache=True) == decoded(model)


def test_cuda_graphs_take_a_cuda_device(model: Qwen2CodecLM):
    with pytest.raises(ValueError, match=r"model\.sampling\.cuda_graphs has no effect on a cpu"):
        Decoding(model, PROMPTS, dataclasses.replace(FREE, cuda_graphs=True))


def test_a_tick_works_in_place(model: Qwen2CodecLM):
    """A CUDA graph reads and writes the tensors that it was made of, and no others."""
    with torch.no_grad():
        one = Decoding(model, PROMPTS, FREE, whole_cache=True)
        one.draw_token()
        places = [value.data_ptr() for value in one.state()]
        before = [value.clone() for value in one.state()]
        for _ in range(2):
            one.tick()
    assert [value.data_ptr() for value in one.state()] == places
    changed = [not torch.equal(new, old) for new, old in zip(one.state(), before, strict=True)]
    assert sum(changed) >= len(changed) - 1  # all but, perhaps, where the first end was


def test_a_cache_that_grows_and_rare_looks_say_the_same(model: Qwen2CodecLM, monkeypatch: pytest.MonkeyPatch):
    expected = decoded(model)
    monkeypatch.setattr(decoding, "_GROWTH", 4)
    monkeypatch.setattr(decoding, "POLLED_EVERY", {"cpu": 3})
    assert decoded(model) == decoded(model, whole_cache=True) == expected


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_coarser_weights_change_few_tokens(weights: Any, model: Qwen2CodecLM):
    greedy = Sampling(temperature=0.0, min_ratio=4.0, max_ratio=5.0)
    exact, coarse = decoded(model, greedy), decoded(model, replace(greedy, weights=weights))
    pairs = [
        pair for one, other in zip(exact, coarse, strict=True) for pair in zip(one[0][:3], other[0][:3], strict=True)
    ]
    assert sum(one == other for one, other in pairs) / len(pairs) > 0.7
    assert {value.dtype for value in model.parameters()} == {torch.float32}  # the model itself stays as it is


def test_int8_products_are_near_the_exact_ones(model: Qwen2CodecLM):
    vectors = torch.randn(9, SIZES.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = model.llm_decoder(vectors)
    found = matrix([model.llm_decoder], "int8")(vectors)
    assert (found - expected).norm() / expected.norm() < 0.02


def test_under_autocast_it_speaks_in_bfloat16(model: Qwen2CodecLM):
    greedy = Sampling(temperature=0.0, min_ratio=4.0, max_ratio=5.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = said(model, PROMPTS, greedy)
    assert [len(one) for one, _ in inside] == [len(one) for one, _ in decoded(model, greedy)]


# --- directories ---


def test_save_and_load(model: Qwen2CodecLM, tmp_path: Path):
    disturb(model)
    model.save(tmp_path / "saved")
    again = Qwen2CodecLM(str(tmp_path / "saved"), bistream=BISTREAM).eval()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]  # and no scratch beside it
    assert again.digest() == model.digest()
    assert again.sizes == model.sizes
    rows = collate(random_rows(), model.layout)
    torch.testing.assert_close(again(rows).logp, model(rows).logp, rtol=0, atol=0)
    assert again.encode_text("ab", Context("x")) == model.encode_text("ab", Context("x"))
    disturb(model)
    model.save(tmp_path / "saved")  # over the old one
    assert Qwen2CodecLM(str(tmp_path / "saved")).digest() == model.digest()


def test_rebuild_is_what_the_directory_holds(model: Qwen2CodecLM, tiny_policy: Path):
    before = model.digest()
    disturb(model)
    assert model.digest() != before
    assert model.rebuild().digest() == before
    assert model.rebuild().layout == model.layout


def test_half_precision_files_are_read_in_full(model: Qwen2CodecLM, tmp_path: Path):
    model.half().save(tmp_path / "half")
    assert {value.dtype for value in Qwen2CodecLM(str(tmp_path / "half")).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("both", [True, False])
def test_directory_or_sizes(both: bool, tiny_policy: Path):
    given: dict[str, Any] = {"directory": str(tiny_policy), "sizes": SIZES} if both else {}
    with pytest.raises(ValueError, match="exactly one of `directory`"):
        Qwen2CodecLM(**given)


def test_a_directory_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"expected a model directory with config\.json, got .*model\.policy\.directory"
    ):
        Qwen2CodecLM(str(tmp_path))


def test_a_broken_weights_file_is_not_read_in_part(model: Qwen2CodecLM, tmp_path: Path):
    model.save(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    del state["llm_decoder.bias"]
    save_file(state, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ReadError, match=r"model\.safetensors: .*llm_decoder\.bias"):
        Qwen2CodecLM(str(tmp_path / "saved"))


def test_a_new_model_has_no_directory_to_go_back_to():
    model = Qwen2CodecLM(sizes=SIZES)
    with pytest.raises(ValueError, match="made from `sizes` cannot be rebuilt"):
        model.rebuild()
    with pytest.raises(ValueError, match="no text tokenizer"):
        model.encode_text("a")


def test_text_and_voice(tmp_path: Path):
    tokenizer = str(save_tokenizer(tmp_path))
    plain = Qwen2CodecLM(sizes=SIZES, tokenizer=tokenizer)
    assert plain.encode_text("ba", Context("a")) == Encoded((1, 0))
    voiced = Qwen2CodecLM(sizes=replace(SIZES, prefix_format="{speaker}"), tokenizer=tokenizer)
    assert voiced.encode_text("ba", Context("c")) == Encoded((2, 1, 0), 1)
    assert voiced.encode_text("ba", Context("ch")) == Encoded((2, 7, 1, 0), 2)  # no token of its own: spelt


def test_config_holds_the_sizes(tiny_policy: Path):
    assert Sizes(**json.loads((tiny_policy / "config.json").read_text())) == SIZES


# --- adapters ---


@pytest.fixture
def adapted(tiny_policy: Path) -> Qwen2CodecLM:
    torch.manual_seed(0)
    return Qwen2CodecLM(str(tiny_policy), lora=LORA, bistream=BISTREAM).eval()


def score(model: Qwen2CodecLM, rows: Rows | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(collate(random_rows(), model.layout) if rows is None else rows).logp


def test_only_adapters_train(adapted: Qwen2CodecLM):
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 7 * SIZES.layers
    assert all(".lora_" in name for name in trained)
    assert adapted.adapted


def test_a_new_adapter_changes_nothing(adapted: Qwen2CodecLM, model: Qwen2CodecLM):
    torch.testing.assert_close(score(adapted), score(model), rtol=0, atol=0)
    assert adapted.digest() == model.digest()


def test_with_the_adapter_off_it_is_its_base_bit_for_bit(adapted: Qwen2CodecLM, model: Qwen2CodecLM):
    disturb(adapted)
    rows = collate(random_rows(), model.layout)
    assert (score(adapted, rows) - score(model, rows)).abs().max() > 0.01
    changed = score(adapted, rows)
    with adapted.without_adapter():
        torch.testing.assert_close(score(adapted, rows), score(model, rows), rtol=0, atol=0)
        with adapted.without_adapter():
            pass
        torch.testing.assert_close(score(adapted, rows), score(model, rows), rtol=0, atol=0)  # still off
    torch.testing.assert_close(score(adapted, rows), changed, rtol=0, atol=0)


def test_the_adapter_is_on_again_after_an_error(adapted: Qwen2CodecLM):
    disturb(adapted)
    before = score(adapted)
    with pytest.raises(ZeroDivisionError), adapted.without_adapter():
        raise ZeroDivisionError
    torch.testing.assert_close(score(adapted), before, rtol=0, atol=0)


def test_digests_of_adapters(adapted: Qwen2CodecLM, model: Qwen2CodecLM):
    disturb(adapted)
    assert adapted.digest() != model.digest()
    with adapted.without_adapter():
        assert adapted.digest() == model.digest()


def test_a_saved_adapter_is_merged(adapted: Qwen2CodecLM, tmp_path: Path):
    disturb(adapted)
    adapted.save(tmp_path / "merged")
    merged = Qwen2CodecLM(str(tmp_path / "merged"), bistream=BISTREAM).eval()
    torch.testing.assert_close(score(merged), score(adapted), rtol=0, atol=1e-5)
    assert merged.digest() == adapted.digest()
    assert not merged.adapted


def test_speech_with_an_adapter(adapted: Qwen2CodecLM, model: Qwen2CodecLM, tmp_path: Path):
    disturb(adapted)
    adapted.save(tmp_path / "merged")
    assert said(adapted, PROMPTS) == said(Qwen2CodecLM(str(tmp_path / "merged")), PROMPTS) != said(model, PROMPTS)
    with adapted.without_adapter():
        assert said(adapted, PROMPTS) == said(model, PROMPTS)


def test_without_an_adapter_there_is_none_to_take_off(model: Qwen2CodecLM):
    with pytest.raises(RuntimeError, match="no adapter to take off"), model.without_adapter():
        pass


def test_with_loose_weights_the_base_is_not_the_reference(adapted: Qwen2CodecLM):
    """Rule 12: an embedding or the head that trains too would be in the reference."""
    adapted.llm_decoder.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"llm_decoder\.weight and 1 more train"), adapted.without_adapter():
        pass


def test_dropout_of_adapters_is_in_training_only(tiny_policy: Path):
    model = Qwen2CodecLM(str(tiny_policy), lora=LoRA(2, 4, dropout=0.5))
    disturb(model)
    rows = collate(random_rows()[:-1], model.layout)
    model.train()
    assert (score(model, rows) - score(model, rows)).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(score(model, rows), score(model, rows), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_using_other_weights(kind: str, tiny_policy: Path):
    lora = LORA if kind == "adapter" else None
    torch.manual_seed(0)
    one, other = (Qwen2CodecLM(str(tiny_policy), lora=lora, bistream=BISTREAM).eval() for _ in range(2))
    disturb(one)
    disturb(other, seed=8)
    worn = {name: value.detach().clone() for name, value in other.named_parameters() if value.requires_grad}
    mine, digest = score(one), one.digest()
    theirs = score(other)
    with one.with_weights(worn):
        torch.testing.assert_close(score(one), theirs, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), one.with_weights(worn):
        raise ZeroDivisionError
    torch.testing.assert_close(score(one), mine, rtol=0, atol=0)
    assert one.digest() == digest
    first = min(worn)
    del worn[first]
    with pytest.raises(ValueError, match=f"lack 1 of .*{first}"), one.with_weights(worn):
        pass


def test_dropout_of_attention_is_in_training_only(tiny_dropout: Path):
    model = Qwen2CodecLM(str(tiny_dropout)).train()
    rows = collate(random_rows()[:-1], model.layout)
    assert (score(model, rows) - score(model, rows)).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(score(model, rows), score(model, rows), rtol=0, atol=0)


def test_a_recording_that_is_continued_is_no_repetition() -> None:
    """Repetition-aware sampling looks at what was drawn: a window full of the prompt's tokens must not matter."""
    model = Qwen2CodecLM(sizes=Sizes(CODES, 9, hidden_size=16, layers=1, heads=2, key_value_heads=1))
    with torch.no_grad():
        model.llm_decoder.weight.zero_()
        model.llm_decoder.bias.fill_(-20.0)
        model.llm_decoder.bias[3] = 20.0  # nothing but code 3 is ever probable
    window = Sampling(repetition_window=10, repetition_share=0.1, min_ratio=1.0, max_ratio=2.0)
    (spoken,) = model.generate([Prompt((1,), seed=5, speech=(3,) * 10)], window)
    assert spoken.speech[0] == 3
    assert 3 not in spoken.speech[1:]  # now it has been drawn


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(tiny_policy: Path):
    tokenizer = str(tiny_policy / "tokenizer.json")
    Qwen2CodecLM(sizes=SIZES, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"ids up to 8, the text embedding 8 rows: check model\.policy\.tokenizer"):
        Qwen2CodecLM(sizes=dataclasses.replace(SIZES, text_vocabulary=8), tokenizer=tokenizer)
