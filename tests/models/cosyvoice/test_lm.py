# SPDX-License-Identifier: Apache-2.0
"""CosyVoice's language models out of directories as they are downloaded: numbers, words, voices, adapters, saving."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import FOLDER, Parity, parity
from safetensors.torch import load_file
from tiny_directory import BASE, FAMILIES, TRANSCRIPT, make_directory

from tts_align.batch import Rows
from tts_align.models.base.generation import Context, Encoded, Prompt, Sampling
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.cosyvoice.directory import load_state
from tts_align.models.cosyvoice.lm import CosyVoiceLM, backbone_names, prefix_text
from tts_align.models.cosyvoice.voices import Voice
from tts_align.models.policy.qwen2 import LoRA

BOTH = pytest.mark.parametrize("family", FAMILIES)
DUMPED = pytest.mark.parametrize("name", ["llm_v2", "llm_v3"])
ASSISTANT = "You are a helpful assistant."
END = "<|endofprompt|>"
ADAPTER = LoRA(rank=2, alpha=4)
FREE = Sampling(top_p=0.95, top_k=0, repetition_window=0, min_ratio=0.0, max_ratio=6.0)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family, with two stored voices."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make_directory(folder / family, family, voices=True) for family in FAMILIES}


def random_rows(model: CosyVoiceLM, count: int = 6, seed: int = 0) -> Rows:
    """Rows of very different lengths, one of which continues a recording."""
    random = torch.Generator().manual_seed(seed)

    def draw(high: int, length: int) -> tuple[int, ...]:
        return tuple(torch.randint(high, (length,), generator=random).tolist())

    text, speech_tokens = model.sizes.text_vocabulary, model.layout.codebook_size
    rows = [TokenRow(draw(text, 1 + i % 4), draw(speech_tokens, 1 + 5 * i % 13), prefix=i % 2) for i in range(count)]
    return collate([*rows[:-1], replace(rows[-1], prompt=draw(speech_tokens, 4))], model.layout)


def score(model: CosyVoiceLM, rows: Rows | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_rows(model) if rows is None else rows).logp


def disturb(model: CosyVoiceLM, seed: int = 3, by: float = 0.1) -> CosyVoiceLM:
    """Change everything that trains, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(by * torch.randn(value.shape, generator=random))
    return model


# --- the published models ---


def dumped(name: str, folder: Path, **options: str) -> tuple[Parity, CosyVoiceLM]:
    """A dump, and a model out of a directory around its weights."""
    dump = parity(name)
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "key_value_heads": 2, "intermediate": 128}
    path = make_directory(folder / name, dump.layout.family, codebook_size=dump.layout.codebook_size, **sizes)
    torch.save(load_file(FOLDER / name / "state_dict.safetensors"), path / "llm.pt")
    return dump, CosyVoiceLM(str(path), **options).eval()


@DUMPED
@pytest.mark.parametrize("kind", ["uni", "bi"])
def test_logits_and_log_probabilities_are_the_published_ones(name: str, kind: str, tmp_path: Path):
    dump, model = dumped(name, tmp_path)
    assert model.layout == dump.layout
    rows = collate(dump.rows(bistream=kind == "bi"), model.layout)
    with torch.no_grad():
        found = model(rows, logits=True)
    real = dump.io[f"{kind}.lm_target"] != -1
    torch.testing.assert_close(found.logits, dump.io[f"{kind}.logits"][real], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sums(), dump.io[f"{kind}.seq_logp_sum"], rtol=1e-5, atol=1e-3)


@DUMPED
def test_in_bfloat16_they_are_near(name: str, tmp_path: Path):
    dump, model = dumped(name, tmp_path, dtype="bfloat16")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = model(collate(dump.rows(), model.layout))
    expected = dump.io["uni.seq_logp_sum"]
    assert (found.sums() - expected).abs().max() / expected.abs().max() < 0.02


@DUMPED
def test_an_exported_dump_computes_the_same(name: str, tmp_path: Path):
    dump, model = dumped(name, tmp_path)
    model.save(tmp_path / "out")
    again = CosyVoiceLM(str(tmp_path / "out"))
    rows = collate(dump.rows(), model.layout)
    torch.testing.assert_close(score(again, rows), score(model, rows), rtol=0, atol=0)
    # The dump's own file holds the tied head twice; names, shapes and values are the same.
    written, given = load_state(tmp_path / "out/llm.pt"), load_file(FOLDER / name / "state_dict.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key]) for key in given)


@DUMPED
def test_a_recording_is_continued_as_published(name: str, tmp_path: Path):
    dump, model = dumped(name, tmp_path)
    prompt, text = (tuple(dump.io[f"zs.{part}"][0].tolist()) for part in ("prompt_text", "text"))
    speech = tuple(dump.io["zs.prompt_speech_token"][0].tolist())
    asked = Encoded((*prompt, *text), len(prompt), speech).prompt(seed=0)
    found = model.generate([asked], Sampling(temperature=0.0, min_ratio=5.0, max_ratio=5.1))[0]
    assert found.speech.tolist() == dump.io["zs.tokens"].tolist()


# --- directories ---


@BOTH
@pytest.mark.parametrize("sizes", [{}, {"hidden": 12, "heads": 3, "layers": 1, "codebook_size": 9, "spare_rows": 0}])
def test_sizes_come_from_config_yaml_and_shapes(family: str, sizes: dict[str, int], tmp_path: Path):
    model = CosyVoiceLM(str(make_directory(tmp_path / "model", family, seed=5, **sizes)))
    assert model.layout.family == family
    assert model.layout.codebook_size == sizes.get("codebook_size", 40)
    assert model.sizes.hidden_size == sizes.get("hidden", 16)
    assert model.sizes.text_vocabulary == BASE + 3 + {"cosyvoice2": 17, "cosyvoice3": 278}[family] + sizes.get(
        "spare_rows", 5
    )
    assert all(value.requires_grad for value in model.parameters())
    assert not model.adapted
    assert score(model).std() > 0.1


def test_other_weights_by_name_or_path(directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = directories["cosyvoice3"]
    base, tuned = CosyVoiceLM(str(path)), CosyVoiceLM(str(path), weights="llm.rl.pt")
    assert (score(base) - score(tuned)).abs().max() > 0.1
    assert tuned.rebuild().digest() == tuned.digest() != base.digest()
    # A file of a training, with its counters, lies elsewhere.
    state = {key: value.clone() for key, value in load_state(path / "llm.rl.pt").items()}
    torch.save(state | {"epoch": 3, "step": 1200}, tmp_path / "epoch_3_whole.pt")
    elsewhere = CosyVoiceLM(str(path), weights=str(tmp_path / "epoch_3_whole.pt"))
    assert elsewhere.digest() == tuned.digest()
    elsewhere.save(tmp_path / "out")
    assert "epoch" not in torch.load(tmp_path / "out/llm.pt", weights_only=True)
    assert CosyVoiceLM(str(tmp_path / "out")).digest() == tuned.digest()
    # A name is looked up in the directory first, wherever the command was started.
    torch.save({}, tmp_path / "llm.pt")
    monkeypatch.chdir(tmp_path)
    assert CosyVoiceLM(str(path)).digest() == base.digest()


@BOTH
def test_save_and_load_without_any_difference(family: str, directories: dict[str, Path], tmp_path: Path):
    model = disturb(CosyVoiceLM(str(directories[family])))
    model.save(tmp_path / "out")
    again = CosyVoiceLM(str(tmp_path / "out"))
    assert again.digest() == model.digest()
    torch.testing.assert_close(score(again), score(model), rtol=0, atol=0)
    assert again.speakers == model.speakers
    assert again.encode_text("Hi.", Context("cloned")) == model.encode_text("Hi.", Context("cloned"))
    with pytest.raises(ValueError, match="is there already"):
        model.save(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@BOTH
def test_rebuild_is_what_the_directory_holds(family: str, directories: dict[str, Path]):
    model = CosyVoiceLM(str(directories[family]), lora=ADAPTER, bistream=(2, 4))
    before = model.digest()
    again = disturb(model).rebuild()
    assert again.digest() == before != model.digest()
    assert (again.layout, again.adapted) == (model.layout, False)


def test_training_does_not_write_into_the_file(directories: dict[str, Path]):
    path = directories["cosyvoice2"]
    before = (path / "llm.pt").read_bytes()
    disturb(CosyVoiceLM(str(path)))
    assert (path / "llm.pt").read_bytes() == before


@BOTH
def test_in_bfloat16(family: str, directories: dict[str, Path], tmp_path: Path):
    path = str(directories[family])
    model = CosyVoiceLM(path, dtype="bfloat16")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert (score(model) - score(CosyVoiceLM(path))).abs().max() < 0.1
    model.save(tmp_path / "out")
    assert {value.dtype for value in load_state(tmp_path / "out/llm.pt").values()} == {torch.float32}
    assert CosyVoiceLM(str(tmp_path / "out"), dtype="bfloat16").digest() == model.digest()


# --- files that are wrong ---


def test_wrong_files_are_named(directories: dict[str, Path], tmp_path: Path):
    v2 = str(directories["cosyvoice2"])
    with pytest.raises(FileNotFoundError, match=r"has no llm\.rl\.pt"):
        CosyVoiceLM(v2, weights="llm.rl.pt")
    with pytest.raises(ValueError, match=r"not the weights of a CosyVoice2 .* no speech_embedding\.weight"):
        CosyVoiceLM(v2, weights="hift.pt")
    with pytest.raises(ValueError, match="does not hold this model's language model"):
        CosyVoiceLM(v2, weights=str(directories["cosyvoice3"] / "llm.pt"))
    with pytest.raises(ValueError, match=r"not a CosyVoice directory: expected cosyvoice2\.yaml"):
        CosyVoiceLM(str(tmp_path))
    state = {key: value.clone() for key, value in load_state(directories["cosyvoice2"] / "llm.pt").items()}
    del state["llm_decoder.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"1 of 30 weights differ, llm_decoder\.bias first \(expected .*, got None"):
        CosyVoiceLM(v2, weights=str(tmp_path / "cut.pt"))
    (tmp_path / "cut.pt").write_bytes((directories["cosyvoice2"] / "llm.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.pt: cannot be read as .*, is it damaged"):
        CosyVoiceLM(v2, weights=str(tmp_path / "cut.pt"))


def test_the_text_head_is_optional():
    names = ("speech_embedding.weight", "llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight")
    state = {name: torch.zeros(1) for name in names}
    assert set(backbone_names(state)) == {"speech_embedding.weight", "backbone.embed_tokens.weight"}


# --- words and voices ---


def read(model: CosyVoiceLM, encoded: Encoded) -> tuple[str, str, tuple[int, ...]]:
    """Prefix and words as text, and the speech tokens to continue."""
    prefix, words = encoded.text[: encoded.prefix], encoded.text[encoded.prefix :]
    return model.text.decode(prefix), model.text.decode(words), encoded.prompt_speech


@pytest.mark.parametrize(
    ("family", "mode", "prefix", "speech"),
    [
        ("cosyvoice2", "zero_shot", "A transcript.", (3, 1, 4)),
        ("cosyvoice3", "zero_shot", f"{ASSISTANT}{END}A transcript.", (3, 1, 4)),
        ("cosyvoice2", "cross_lingual", "", ()),
        ("cosyvoice3", "cross_lingual", f"{ASSISTANT}{END}", ()),
        ("cosyvoice2", "instruct", f"Softly.{END}", ()),
        ("cosyvoice3", "instruct", f"{ASSISTANT} Softly.{END}", ()),
        ("cosyvoice2", "sft", "", ()),
        ("cosyvoice3", "sft", f"{ASSISTANT}{END}", ()),
    ],
)
def test_what_stands_before_the_words_in_each_mode(
    family: str, mode: str, prefix: str, speech: tuple[int, ...], directories: dict[str, Path], monkeypatch
):
    model = CosyVoiceLM(str(directories[family]))
    transcript, instruct = ("A transcript." if mode == "zero_shot" else ""), ("Softly." if mode == "instruct" else "")
    heard = (3, 1, 4) if mode != "sft" else ()
    mel = torch.zeros(6, 80) if heard else None
    voice = Voice("anna", mode, transcript, instruct, heard, mel, torch.zeros(192))
    monkeypatch.setattr(CosyVoiceLM, "voices", {"anna": voice})
    found = model.encode_text("Hi [breath].", Context("anna"))
    assert read(model, found) == (prefix, "Hi [breath].", speech)
    # Ids by hand: the bytes' places in the alphabet, then the tokens that were added to it.
    assert found.text.count(BASE + 3) == prefix.count(END)
    assert BASE + 4 in found.text[found.prefix :]
    assert len(found.text) - found.prefix == len("Hi .") + 1


@BOTH
def test_stored_voices(family: str, directories: dict[str, Path]):
    model = CosyVoiceLM(str(directories[family]))
    assistant = f"{ASSISTANT}{END}" if family == "cosyvoice3" else ""
    assert model.speakers == ("known", "cloned")
    assert read(model, model.encode_text("Hi.", Context("known"))) == (assistant, "Hi.", ())
    cloned = read(model, model.encode_text("Hi.", Context("cloned")))
    assert cloned == (f"{assistant}{TRANSCRIPT}", "Hi.", tuple(range(10)))
    # A name that no voice has is just a name.
    assert model.encode_text("Hi.", Context("somebody")) == model.encode_text("Hi.")


@BOTH
def test_a_rows_own_context_stands_before_the_voices(family: str, directories: dict[str, Path]):
    model = CosyVoiceLM(str(directories[family]))
    assistant = ASSISTANT if family == "cosyvoice3" else ""

    def found(text: str = "Hi.", **context) -> tuple[str, str, tuple[int, ...]]:
        return read(model, model.encode_text(text, Context("cloned", **context)))

    led = f"{assistant} Softly.{END}" if assistant else f"Softly.{END}"
    assert found(instruct="Softly.") == (led, "Hi.", ())
    closed = f"Exactly this.{END}"
    assert found(instruct=closed) == (closed, "Hi.", ())
    own = found(prompt_text="Mine.", prompt_speech=(7, 7))
    assert own == (f"{assistant}{END if assistant else ''}Mine.", "Hi.", (7, 7))
    # A text may bring its own instruction; the voice's transcript and recording stay.
    assert found(f"Sing.{END}La.") == (f"Sing.{END}{TRANSCRIPT}", "La.", tuple(range(10)))
    twice = found(f"A.{END}B.{END}La.")
    assert twice == (f"A.{END}B.{END}{TRANSCRIPT}", "La.", tuple(range(10)))
    with pytest.raises(ValueError, match=r"brings its own <\|endofprompt\|>, and so does its instruction"):
        found(f"Sing.{END}La.", instruct="Softly.")


def test_instructions_are_closed_once():
    assert prefix_text("cosyvoice2", "", "") == ""
    assert prefix_text("cosyvoice3", f"{ASSISTANT} Fast.{END}", "Yes.") == f"{ASSISTANT} Fast.{END}Yes."


@BOTH
def test_phonemes_are_tokens_in_version_3_only(family: str, directories: dict[str, Path]):
    model = CosyVoiceLM(str(directories[family]))
    found = model.encode_text("[AA1]")
    assert (len(found.text) - found.prefix == 1) is (family == "cosyvoice3")
    assert max(found.text) < model.sizes.text_vocabulary


# --- speaking ---


@BOTH
def test_prompt_speech_is_heard_and_not_repeated(family: str, directories: dict[str, Path]):
    model = CosyVoiceLM(str(directories[family]))
    plain, cloned = (model.encode_text("Hello there", Context(name)).prompt(seed=1) for name in ("known", "cloned"))
    words = len(cloned.text) - cloned.prefix
    for temperature in (1.0, 0.0):
        sampling = replace(FREE, temperature=temperature, min_ratio=2.0, max_ratio=3.0)
        alone = [model.generate([one], sampling)[0].speech.tolist() for one in (plain, cloned)]
        assert alone == [one.speech.tolist() for one in model.generate([plain, cloned], sampling)]
        assert temperature == 0.0 or alone[0] != alone[1]
        assert 2 * words <= len(alone[1]) <= 3 * words  # tokens of transcript and recording do not count
    # As scoring has it: the speech tokens that were said are the most probable ones behind the recording.
    row = TokenRow(cloned.text, tuple(alone[1]), cloned.prefix, prompt=cloned.speech)
    with torch.no_grad():
        logits = model.eval()(collate([row], model.layout), logits=True).logits
    logits[:, model.layout.codebook_size :] = -torch.inf
    assert logits.argmax(-1)[: len(alone[1])].tolist() == alone[1]


@BOTH
def test_the_shortest_length_holds_back_the_end(family: str, directories: dict[str, Path]):
    """Version 3's end is not the id that the published code holds back, its start of a sequence."""
    model = CosyVoiceLM(str(directories[family]))
    end = model.layout.end
    assert end - model.layout.codebook_size == {"cosyvoice2": 0, "cosyvoice3": 1}[family]
    with torch.no_grad():  # the model would end at once
        model.llm_decoder.weight[end] = 50 * common_direction(model)
    prompts = [Prompt((1, 2, 3, 4), seed=i) for i in range(4)]
    assert all(len(one.speech) == 0 and one.finished for one in model.generate(prompts, FREE))
    for one in model.generate(prompts, replace(FREE, min_ratio=2.0)):
        assert len(one.speech) == 8
        assert one.finished
        assert int(one.speech.max()) < model.layout.codebook_size


def common_direction(model: CosyVoiceLM) -> torch.Tensor:
    """Weights under which every state of a few utterances scores about one, by least squares."""
    spoken = model.generate(
        [Prompt((1, 2, 3, 4), seed=i) for i in range(4)], replace(FREE, min_ratio=2.0, max_ratio=3.0)
    )
    states: list[torch.Tensor] = []
    hook = model.backbone.register_forward_hook(lambda *given: states.append(given[-1]))
    with torch.no_grad():
        model(collate([TokenRow((1, 2, 3, 4), tuple(one.speech.tolist())) for one in spoken], model.layout))
    hook.remove()
    seen = torch.cat(states).double()
    return torch.linalg.lstsq(seen, torch.ones(len(seen), 1, dtype=torch.double)).solution[:, 0].float()


# --- adapters ---


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_a_frozen_base(family: str, dtype: str, directories: dict[str, Path]):
    path = str(directories[family])
    base = CosyVoiceLM(path, dtype=dtype)
    model = CosyVoiceLM(path, dtype=dtype, lora=ADAPTER)
    assert model.adapted
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)
    types = {".lora_" in name: value.dtype for name, value in model.named_parameters()}
    assert types == {True: torch.float32, False: getattr(torch, dtype)}
    torch.testing.assert_close(score(model), score(base), rtol=0, atol=0)
    disturb(model)
    assert (score(model) - score(base)).abs().max() > 0.01
    with model.without_adapter():
        torch.testing.assert_close(score(model), score(base), rtol=0, atol=0)
        assert model.digest() == base.digest()
    assert model.digest() != base.digest()


@BOTH
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_a_saved_adapter_is_merged(
    family: str, dtype: str, within: float, directories: dict[str, Path], tmp_path: Path
):
    model = disturb(CosyVoiceLM(str(directories[family]), dtype=dtype, lora=ADAPTER))
    model.save(tmp_path / "out")
    again = CosyVoiceLM(str(tmp_path / "out"))
    assert not again.adapted
    torch.testing.assert_close(score(again), score(model), rtol=0, atol=within)
    # Nothing is rounded in merging: the same sums in float32 agree.
    torch.testing.assert_close(score(again), score(model.float()), rtol=0, atol=1e-5)
    state, base = load_state(tmp_path / "out/llm.pt"), load_state(directories[family] / "llm.pt")
    same = {key for key in base if torch.equal(state[key], base[key].to(getattr(torch, dtype)).float())}
    assert {key for key in base if key not in same} == {key for key in base if "_proj.weight" in key}
