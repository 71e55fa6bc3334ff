# SPDX-License-Identifier: Apache-2.0
"""Directories for the runtime: what is new in them, what is the source's, and what must not be there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from parity import FOLDER, parity
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_directory import FAMILIES, STALE, make_directory
from torch import Tensor

from tts_align.models.cosyvoice import export
from tts_align.models.cosyvoice.directory import ModelDirectory, load_state
from tts_align.models.cosyvoice.export import (
    EMBEDDING,
    HEAD,
    published_from_vllm,
    vllm_names,
    write_directory,
    write_vllm,
)

BOTH = pytest.mark.parametrize("family", FAMILIES)


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same names and shapes, in another order and nothing shared."""
    return {key: value * 1.5 + 0.25 for key, value in reversed(state.items())}


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory.find(make_directory(tmp_path / "source"))


@BOTH
def test_names_shapes_and_precision_are_the_sources(family: str, tmp_path: Path):
    source = ModelDirectory.find(
        make_directory(tmp_path / "source", family, hidden=12, heads=3, layers=3, codebook_size=7)
    )
    before = load_state(source.path / "llm.pt")
    state = changed(before)
    write_directory(source, {key: value.double() for key, value in state.items()}, tmp_path / "out")
    written = torch.load(tmp_path / "out/llm.pt", weights_only=True)
    assert list(written) == list(before)
    assert all(type(value) is Tensor and value.dtype == torch.float32 for value in written.values())
    for key in before.keys() - {HEAD}:
        assert torch.equal(written[key], state[key])
    assert written[HEAD].data_ptr() == written[EMBEDDING].data_ptr()
    # The tied head is written once, and no tensor drags a larger one along.
    once = sum(value.nbytes for key, value in written.items() if key != HEAD)
    assert once < (tmp_path / "out/llm.pt").stat().st_size < once + 400 * len(written)


def test_a_part_of_a_larger_tensor_is_written_alone(source: ModelDirectory, tmp_path: Path):
    state = load_state(source.path / "llm.pt")
    large = torch.zeros(1000, *state["llm_decoder.weight"].shape)
    write_directory(source, state | {"llm_decoder.weight": large[3]}, tmp_path / "out")
    assert (tmp_path / "out/llm.pt").stat().st_size < 1.1 * (source.path / "llm.pt").stat().st_size


@BOTH
def test_everything_else_is_the_sources(family: str, tmp_path: Path):
    path = make_directory(tmp_path / "source", family, stale=True, voices=True)
    (path / ".cache").mkdir()
    (path / ".cache" / "download.lock").write_text("")
    source = ModelDirectory.find(path)
    write_directory(source, changed(load_state(path / "llm.pt")), tmp_path / "out")
    left = {".gitattributes", ".cache/download.lock", "vllm/config.json", "flow.decoder.estimator.fp32.mygpu.plan"}
    assert files(tmp_path / "out") == files(path) - left
    assert {"CosyVoice-BlankEN/model.safetensors", "asset/picture.png", "flow.encoder.fp16.zip"} <= files(
        tmp_path / "out"
    )
    for name in files(tmp_path / "out") - {"llm.pt"}:
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    if family == "cosyvoice3":
        assert "llm.rl.pt" in files(tmp_path / "out")
    assert ModelDirectory.find(tmp_path / "out").config == source.config
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir() if file.is_dir()} == {0o755}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_large_files_take_no_room_and_small_ones_can_be_edited(source: ModelDirectory, tmp_path: Path):
    (source.path / "large.onnx").write_bytes(bytes(2**20 + 1))
    (tmp_path / "blob").write_bytes(bytes(2**20 + 1))
    (source.path / "link.onnx").symlink_to(tmp_path / "blob")
    before = {name: (source.path / name).read_bytes() for name in files(source.path)}
    write_directory(source, changed(load_state(source.path / "llm.pt")), tmp_path / "out")
    out = tmp_path / "out"
    assert os.path.samefile(out / "large.onnx", source.path / "large.onnx")
    assert not (out / "link.onnx").is_symlink()
    assert not os.path.samefile(out / "link.onnx", tmp_path / "blob")
    (out / "cosyvoice2.yaml").write_text("edited: 1")
    torch.save({}, out / "llm.pt")
    assert {name: (source.path / name).read_bytes() for name in files(source.path)} == before


def test_where_links_are_impossible_files_are_copied(
    source: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    (source.path / "large.onnx").write_bytes(b"x" * (2**20 + 1))
    monkeypatch.setattr(os, "link", refuse)
    write_directory(source, load_state(source.path / "llm.pt"), tmp_path / "out")
    assert (tmp_path / "out/large.onnx").read_bytes() == b"x" * (2**20 + 1)


def test_a_linked_source_and_linked_folders(source: ModelDirectory, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (source.path / "asset").rename(tmp_path / "elsewhere/asset")
    (source.path / "asset").symlink_to(tmp_path / "elsewhere/asset")
    (tmp_path / "name").symlink_to(source.path)
    linked = ModelDirectory.find(tmp_path / "name")
    write_directory(linked, load_state(source.path / "llm.pt"), tmp_path / "out")
    assert (tmp_path / "out/asset/picture.png").read_bytes() == b"a picture"
    (source.path / "round").symlink_to(source.path)
    with pytest.raises(ValueError, match="is a link to a folder around it"):
        write_directory(linked, load_state(source.path / "llm.pt"), tmp_path / "other")
    with pytest.raises(ValueError, match="must stay as it is"):
        write_directory(linked, load_state(source.path / "llm.pt"), source.path, overwrite=True)


def test_a_new_flow_leaves_what_was_made_from_the_old_one(tmp_path: Path):
    path = make_directory(tmp_path / "source", stale=True)
    source, flow = ModelDirectory.find(path), load_state(path / "flow.pt")
    (path / "flow.cache.pt").write_bytes(b"old")
    new = {key: value + 1 for key, value in flow.items()}
    write_directory(source, load_state(path / "llm.pt"), tmp_path / "out", flow=new)
    assert files(tmp_path / "out") == files(path) - {
        *STALE,
        "flow.decoder.estimator.fp32.onnx",
        "flow.cache.pt",
        ".gitattributes",
    }
    written = torch.load(tmp_path / "out/flow.pt", weights_only=True)
    assert list(written) == list(flow)
    assert all(torch.equal(written[key], new[key]) for key in new)
    del new[next(iter(new))]
    with pytest.raises(ValueError, match=r"flow\.pt in 1 of"):
        write_directory(source, load_state(path / "llm.pt"), tmp_path / "other", flow=new)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_what_differs_from_the_source_is_named(source: ModelDirectory, tmp_path: Path):
    state = load_state(source.path / "llm.pt")
    wrong = {key: value for key, value in state.items() if key != "llm_decoder.bias"}
    wrong |= {"module.extra": torch.zeros(1), "llm_embedding.weight": torch.zeros(3, 16)}
    with pytest.raises(ValueError, match="3 of 31 names or shapes") as raised:
        write_directory(source, wrong, tmp_path / "out")
    assert "llm_decoder.bias (there (43,), here None)" in str(raised.value)
    assert "llm_embedding.weight (there (2, 16), here (3, 16))" in str(raised.value)
    assert "module.extra (there None, here (1,))" in str(raised.value)
    assert os.listdir(tmp_path) == ["source"]
    with pytest.raises(ValueError, match="embed_tokens"):
        write_directory(source, {key: value for key, value in state.items() if key != EMBEDDING}, tmp_path / "out")


def test_counters_of_a_training_are_left_out_and_a_missing_head_is_added(source: ModelDirectory, tmp_path: Path):
    state = {key: value.clone() for key, value in load_state(source.path / "llm.pt").items()}
    counted = {key: value for key, value in state.items() if key != HEAD} | {"epoch": 3, "step": 12}
    torch.save(counted, source.path / "llm.pt")
    write_directory(source, state, tmp_path / "out")
    assert set(torch.load(tmp_path / "out/llm.pt", weights_only=True)) == set(state)


def test_what_is_there_is_not_overwritten_unless_asked(source: ModelDirectory, tmp_path: Path):
    state = load_state(source.path / "llm.pt")
    out = tmp_path / "out"
    out.mkdir()
    write_directory(source, state, out)  # an empty one is free
    (out / "vllm").mkdir()
    (out / "vllm/model.safetensors").write_bytes(b"of the first export")
    with pytest.raises(ValueError, match="is there already"):
        write_directory(source, state, out)
    write_directory(source, changed(state), out, overwrite=True)
    assert not (out / "vllm").exists()
    assert torch.equal(load_state(out / "llm.pt")["llm_decoder.bias"], changed(state)["llm_decoder.bias"])
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("where", ["source", "source/out", ".", "home", "file"])
def test_nothing_else_is_ever_overwritten(where: str, source: ModelDirectory, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letters.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for write in (write_directory, write_vllm):
        with pytest.raises(ValueError, match=r"must stay as it is|something else than a model"):
            write(source, load_state(source.path / "llm.pt"), tmp_path / where, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_failure_leaves_nothing_and_keeps_what_was(
    source: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = load_state(source.path / "llm.pt")
    write_directory(source, state, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export.torch, "save", full)
    for name in ("out", "other"):
        with pytest.raises(OSError, match="No space left"):
            write_directory(source, changed(state), tmp_path / name, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    assert torch.equal(load_state(tmp_path / "out/llm.pt")[EMBEDDING], state[EMBEDDING])


# --- vLLM ---


def published_source(name: str, tmp_path: Path) -> tuple[ModelDirectory, dict[str, Tensor]]:
    """A directory around the weights of a dump, with the config that they were made with, and these weights."""
    dump = parity(name)
    state = load_file(FOLDER / name / "state_dict.safetensors")
    path = make_directory(tmp_path / "source", dump.layout.family, codebook_size=dump.layout.codebook_size)
    torch.save(state, path / "llm.pt")
    given = json.loads((FOLDER / name / "config.json").read_text())["qwen2_config"]
    # What transformers 4.51.3 adds by itself, and the text model's own kind.
    defaults = {"model_type": "qwen2", "hidden_act": "silu", "use_cache": True, "rope_scaling": None}
    defaults |= {"sliding_window": 4096, "max_window_layers": 28, "transformers_version": "4.51.3"}
    defaults |= {"architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float32"}
    blank = path / "CosyVoice-BlankEN"
    (blank / "config.json").write_text(json.dumps(defaults | given))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.51.3"}
    (blank / "generation_config.json").write_text(json.dumps(generation))
    return ModelDirectory.find(path), state


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_vllm_is_what_the_runtime_makes(version: str, tmp_path: Path):
    source, state = published_source(f"llm_{version}", tmp_path)
    dump = FOLDER / f"vllm_export_{version}"
    write_vllm(source, state, tmp_path / "vllm")
    assert sorted(os.listdir(tmp_path / "vllm")) == ["config.json", "generation_config.json", "model.safetensors"]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "vllm" / name).read_text()) == json.loads((dump / name).read_text())
    with safe_open(tmp_path / "vllm/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        listing = {key: [file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()] for key in file.keys()}  # noqa: SIM118
    assert listing == json.loads((dump / "listing.json").read_text())
    ours, theirs = load_file(tmp_path / "vllm/model.safetensors"), load_file(dump / "model.safetensors")
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@BOTH
def test_vllm_config_of_a_published_directory(family: str, tmp_path: Path):
    source = ModelDirectory.find(make_directory(tmp_path / "source", family))
    config = json.loads((source.backbone / "config.json").read_text())
    write_vllm(source, load_state(source.path / "llm.pt"), tmp_path / "vllm")
    written = json.loads((tmp_path / "vllm/config.json").read_text())
    extra = {"cosyvoice2": (43, True, "CosyVoice2ForCausalLM"), "cosyvoice3": (240, False, "Qwen2ForCausalLM")}[family]
    changes = dict(zip(("vocab_size", "use_bias"), extra, strict=False)) | {"architectures": [extra[2]]}
    changes |= {"tie_word_embeddings": False, "rope_scaling": None}
    expected = {key: value for key, value in config.items() if key not in ("bos_token_id", "eos_token_id")} | changes
    assert written == expected
    generation = json.loads((tmp_path / "vllm/generation_config.json").read_text())
    assert "eos_token_id" not in generation
    assert generation["pad_token_id"] == 258


def test_vllm_config_in_the_words_of_transformers_5(source: ModelDirectory, tmp_path: Path):
    path = source.backbone / "config.json"
    config = json.loads(path.read_text())
    del config["rope_theta"], config["torch_dtype"]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"}
    path.write_text(json.dumps(config))
    write_vllm(source, load_state(source.path / "llm.pt"), tmp_path / "vllm")
    written = json.loads((tmp_path / "vllm/config.json").read_text())
    assert written["rope_parameters"] == config["rope_parameters"]
    assert not {"rope_scaling", "dtype"} & written.keys()
    assert written["torch_dtype"] == "bfloat16"


@BOTH
def test_names_there_and_back(family: str, tmp_path: Path):
    state = load_state(make_directory(tmp_path / "source", family) / "llm.pt")
    back = published_from_vllm(vllm_names(state))
    assert state.keys() - back.keys() == {EMBEDDING, HEAD} | ({"llm_embedding.weight"} & state.keys())
    assert all(torch.equal(back[key], state[key].bfloat16()) for key in back)
    assert set(back) <= set(state)
