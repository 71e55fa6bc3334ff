# SPDX-License-Identifier: Apache-2.0
"""A CosyVoice directory is read as data: nothing in it is run, and what is wrong with it is said."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import save_directory, save_text_tokenizer
from safetensors.torch import save_file

from tts_align.models.cosyvoice.directory import BackboneSizes, Frames, ModelDirectory, backbone_sizes, load_state
from tts_align.models.cosyvoice.plain_yaml import read_plain_yaml


def plain(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "some.yaml"
    path.write_text(text, "utf-8")
    return read_plain_yaml(path)


@pytest.mark.parametrize(("family", "fmax"), [("cosyvoice2", 8000.0), ("cosyvoice3", None)])
def test_a_directory_tells_its_family_and_numbers(tmp_path: Path, family: str, fmax: float | None):
    found = ModelDirectory.find(str(save_directory(tmp_path / "model", family, codebook_size=77)))
    assert (found.path, found.family, found.codebook_size) == (tmp_path / "model", family, 77)
    assert found.frames == Frames(fmax=fmax)
    assert found.backbone == tmp_path / "model" / "CosyVoice-BlankEN"
    assert found.file("campplus.onnx").is_file()
    llm = found.config["llm"]
    assert llm == {
        "llm_input_size": 896,
        "speech_token_size": 77,
        "mix_ratio": [5, 15],
        "llm": {"pretrain_path": ""},
    }
    decoder = found.config["flow"]["decoder"]
    assert decoder == {"cfm_params": {"content": {"sigma_min": 1e-6}}, "estimator": {"static_chunk_size": 50}}
    assert found.config["data_pipeline"] == [{}, {"feat_extractor": found.config["feat_extractor"]}]


@pytest.mark.parametrize(("family", "fmax"), [("cosyvoice2", 8000.0), ("cosyvoice3", None)])
def test_a_silent_yaml_means_the_published_numbers(tmp_path: Path, family: str, fmax: float | None):
    (tmp_path / f"{family}.yaml").write_text("other: 1")
    found = ModelDirectory.find(tmp_path)
    assert (found.frames, found.codebook_size) == (Frames(24000, 25, 2, 80, 1920, 480, 0.0, fmax), 6561)


def test_other_numbers_are_read(tmp_path: Path):
    text = "sample_rate: 16000\ntoken_frame_rate: 20\ntoken_mel_ratio: 4\nfeat_extractor: !name:mel\n  "
    text += "n_fft: 800\n  num_mels: 40\n  hop_size: 200\n  fmin: 20\n  fmax: 7000"
    (tmp_path / "cosyvoice3.yaml").write_text(text)
    assert ModelDirectory.find(tmp_path).frames == Frames(16000, 20, 4, 40, 800, 200, 20.0, 7000.0)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("sample_rate: 16000", "must give sample_rate, got 24000 and 16000"),
        ("sample_rate: fast", "expected a number for sample_rate, got 'fast'"),
        ("token_mel_ratio: true", "expected a number for token_mel_ratio, got True"),
    ],
)
def test_contradicting_numbers_are_named(tmp_path: Path, text: str, what: str):
    (tmp_path / "cosyvoice2.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"cosyvoice2\.yaml: .*{what}"):
        _ = ModelDirectory.find(tmp_path).frames


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([], "expected cosyvoice2.yaml or cosyvoice3.yaml in it; .* holds nothing"),
        (["llm.pt"], "not a CosyVoice directory.* holds llm.pt"),
        (["cosyvoice.yaml"], "holds the first CosyVoice"),
        (["cosyvoice2.yaml", "cosyvoice3.yaml"], "holds cosyvoice2.yaml and cosyvoice3.yaml: keep the right one"),
    ],
)
def test_what_is_no_such_directory(tmp_path: Path, names: list[str], what: str):
    for name in names:
        (tmp_path / name).write_text("a: 1")
    with pytest.raises(ValueError, match=what):
        ModelDirectory.find(tmp_path)


def test_what_is_missing_is_named_with_what_is_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*none: expected that of a CosyVoice2"):
        ModelDirectory.find(tmp_path / "none")
    (tmp_path / "cosyvoice2.yaml").write_text("a: 1")
    found = ModelDirectory.find(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no llm\.pt: .* holds cosyvoice2\.yaml"):
        found.file("llm.pt")
    with pytest.raises(FileNotFoundError, match=r"has no CosyVoice-BlankEN/config\.json"):
        _ = found.backbone


def test_nothing_in_a_yaml_is_run(tmp_path: Path):
    mark, state = tmp_path / "mark", random.getstate()
    text = f"""
    a: !apply:random.seed [1986]
    b: !new:pathlib.Path.touch {{self: '{mark}'}}
    c: !name:os.system ['touch {mark}']
    d: !!python/object/apply:os.system ['touch {mark}']
    e: !!python/name:os.system ''
    f: !!python/object/new:subprocess.Popen [['touch', '{mark}']]
    g: !!python/module:this ''
    h: !include:{mark}.yaml {{x: 1}}
    i: !apply:os.system
        command: touch {mark}
    j: !ref __import__('os').system('touch {mark}')
    k: !ref <a> + __import__('os').system('touch {mark}')
    l: !new:os.system
    m: !whatever 3
    n: !module:this x
    """
    values = plain(tmp_path, text)
    assert not mark.exists()
    assert "this" not in sys.modules
    assert random.getstate() == state
    assert values["a"] == [1986]
    assert values["d"] == [f"touch {mark}"]
    assert values["f"] == [["touch", str(mark)]]
    assert (values["h"], values["i"]) == ({"x": 1}, {"command": f"touch {mark}"})
    assert values["k"] == f"[1986] + __import__('os').system('touch {mark}')"
    assert (values["l"], values["m"], values["n"]) == ({}, 3, "x")


def test_references_become_what_they_refer_to(tmp_path: Path):
    text = """
    a: 6
    b: !ref <a> * 2 + 1
    c: !ref (<a> + <b>) / 2
    d: !new:some.Class {e: [1, !ref <a>], f: !ref <b>}
    g: !ref <d[e][1]> // 4
    h: !copy <d[e]>
    i: !ref <folder>/<name>.pt
    j: !ref <d[f]>
    k: !ref -<a> % 4
    folder: data
    name: !ref <folder>_2
    l: !name:f
        x: !ref <a> ** 9
    m: [1e-06, 2.5E3, '1e5', -3e+2, e5, !new:float 1e3]
    n: !ref <o>
    o: null
    """
    values = plain(tmp_path, text)
    assert (values["b"], values["c"], values["g"], values["j"], values["k"]) == (13, 9.5, 1, 13, 2)
    assert values["h"] == [1, 6]
    assert (values["i"], values["name"]) == ("data/data_2.pt", "data_2")
    assert values["l"] == {"x": "6 ** 9"}  # a power could be too large a number
    assert values["m"] == [1e-6, 2500.0, "1e5", -300.0, "e5", 1000.0]
    assert values["n"] is None


@given(st.integers(-1000, 1000), st.integers(1, 1000), st.sampled_from(["+", "-", "*", "/", "//", "%"]))
def test_arithmetic_is_pythons(tmp_path_factory: pytest.TempPathFactory, a: int, b: int, sign: str):
    folder = tmp_path_factory.mktemp("yaml")
    expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b, "//": a // b, "%": a % b}[sign]
    assert plain(folder, f"a: {a}\nb: {b}\nc: !ref (<a>) {sign} <b>")["c"] == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: !ref <b>", "<b> refers to 'b', which is not there"),
        ("a: {b: 1}\nc: !ref <a[d]>", "refers to 'd', which is not there"),
        ("a: [1]\nc: !ref <a[1]>", "refers to '1', which is not there"),
        ("a: !ref <a>", "'<a>' refers to itself"),
        ("a: !ref <b> + 1\nb: {c: !ref <a>}", "refers to itself"),
        ("a: &x [*x]", "refers to itself"),
        ("a: [1", "while parsing a flow sequence"),
        ("- 1", "expected names and values, got list"),
        ("", "expected names and values, got NoneType"),
        ("a: {? !ref <a> : 1}", "expected plain names"),
        ("? !ref <a>\n: 1", "expected names and values"),
        ("1: 2", "expected names and values"),
        ("? [1]\n: 1", "found unhashable key"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a0: xxxxxxxxxx\n" + "\n".join(f"a{i + 1}: !ref {f'<a{i}>' * 10}" for i in range(9)), "longer than 1000"),
    ],
)
def test_a_damaged_yaml_is_named(tmp_path: Path, text: str, what: str):
    with pytest.raises(ValueError, match=rf"(?s)some\.yaml.*{what}"):
        plain(tmp_path, text)


def test_sharing_does_not_multiply(tmp_path: Path):
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
    value = plain(tmp_path, "\n".join(lines[:4]))["a3"]
    assert all(one is value[0] for one in value)
    with pytest.raises(ValueError, match="more than 100000 values, most of them behind aliases"):
        plain(tmp_path, "\n".join(lines))


WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_weights_come_back_without_counters(tmp_path: Path):
    torch.save(WEIGHTS | {"epoch": 3, "step": 70}, tmp_path / "a.pt")
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    for name in ("a.pt", "old.pt", "a.safetensors"):
        state = load_state(tmp_path / name)
        assert state.keys() == WEIGHTS.keys()
        assert all(torch.equal(state[key], WEIGHTS[key]) for key in WEIGHTS), name


def test_tied_weights_stay_tied(tmp_path: Path):
    torch.save({"a": WEIGHTS["b"], "b": WEIGHTS["b"]}, tmp_path / "a.pt")
    state = load_state(tmp_path / "a.pt")
    assert state["a"].data_ptr() == state["b"].data_ptr()


def test_a_weight_called_step_is_a_weight(tmp_path: Path):
    torch.save({"step": torch.ones(1)}, tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt")["step"].item() == 1


def test_what_is_changed_does_not_reach_the_file(tmp_path: Path):
    torch.save(WEIGHTS, tmp_path / "a.pt")
    load_state(tmp_path / "a.pt")["a.weight"].zero_()
    assert torch.equal(load_state(tmp_path / "a.pt")["a.weight"], WEIGHTS["a.weight"])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_code_in_weights_is_run(tmp_path: Path):
    for name, zipped in (("a.pt", True), ("b.pt", False)):
        torch.save({"a": Evil(tmp_path / "mark")}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"{name}: holds more than tensors and plain values"):
            load_state(tmp_path / name)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"model": {"a": torch.ones(1)}, "step": 3}, r"1 of 1 entries are others, such as 'model' \(dict\)"),
        ({"a": torch.ones(1), "lr": 0.1}, r"1 of 2 entries are others, such as 'lr' \(float\)"),
        ([torch.ones(1)], "does not hold tensors by name, but list"),
        ({1: torch.ones(1)}, "does not hold tensors by name"),
        ({"epoch": 1, "step": 2}, "holds no weights"),
    ],
)
def test_what_are_no_weights_is_named(tmp_path: Path, content: object, what: str):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt .*{what}"):
        load_state(tmp_path / "a.pt")


def test_damaged_and_missing_weights_are_named(tmp_path: Path):
    torch.save(WEIGHTS, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for name, data in (("b.pt", whole[: len(whole) // 2]), ("c.pt", b""), ("d.pt", b"text"), ("e.safetensors", b"x")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_state(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"f\.pt does not exist"):
        load_state(tmp_path / "f.pt")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        load_state(tmp_path)


def test_sizes_of_the_text_model(tmp_path: Path):
    path = save_text_tokenizer(tmp_path / "text")
    config = json.loads((path / "config.json").read_text())
    expected = BackboneSizes(24, 3, 4, 2, 40, config["vocab_size"], 5000.0, 1e-5, 0.1)
    assert backbone_sizes(path) == expected
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (path / "config.json").write_text(json.dumps(config))
    assert backbone_sizes(str(path)) == expected


def test_sizes_that_transformers_writes(tmp_path: Path):
    from transformers import Qwen2Config

    sizes = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 48, "vocab_size": 99, "rms_norm_eps": 1e-4, "attention_dropout": 0.2}
    Qwen2Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 777.0}).save_pretrained(tmp_path)
    assert backbone_sizes(tmp_path) == BackboneSizes(32, 5, 8, 4, 48, 99, 777.0, 1e-4, 0.2)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[]", "expected the config of a qwen2 model, got 'list'"),
        ('{"model_type": "llama"}', "expected the config of a qwen2 model, got 'llama'"),
        ('{"model_type": [' + "0, " * 99 + "0]}", r"expected the config of a qwen2 model, got \[0, 0.{50,60}$"),
        ('{"model_type": "qwen2", "hidden_size": 3}', "lacks num_hidden_layers, num_attention_heads"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, what: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{what}"):
        backbone_sizes(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the config of the text model"):
        backbone_sizes(tmp_path)
