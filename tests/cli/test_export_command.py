# SPDX-License-Identifier: Apache-2.0
"""From a run's checkpoint to a model directory, by the command, and what stops it."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_policy, save_rows
from tiny_directory import make_directory

from tts_align.cli.entry import run
from tts_align.cli.export import ExportError, choose_rows, export, score
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.cosyvoice.directory import load_state
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
ROWS = [TokenRow((1, 2, 3), (4, 5, 6, 7)), TokenRow((8,), (9, 10))]


def disturb(policy, seed=1):
    """Change what trains, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in policy.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn(value.shape, generator=random))
    return policy


def make_manifest(folder):
    rows = [
        Row(id=str(i), text=f"Sentence {i}.", speech=tuple((7 * i + k) % 40 for k in range(9)), desirable=i % 2 == 0)
        for i in range(14)
    ]
    return str(write_manifest(rows, folder / "rows.jsonl"))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write a recipe for a policy, and give its path."""
    monkeypatch.chdir(tmp_path)

    def write(policy, manifest=None, **extra):
        recipe = {
            "objective": "kto",
            "model": {"policy": policy, "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}},
            "data": {"manifest": manifest or make_manifest(tmp_path), "rows_per_step": 4},
            "trainer": {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, **extra},
            "run": {"test_after_fit": False, "directory": str(tmp_path / "run")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_what_was_trained_is_what_the_directory_holds(family, lora, tmp_path, recipe, capsys):
    source = make_directory(tmp_path / "source", family)
    policy = {"class_path": "CosyVoiceLM", "init_args": {"directory": str(source), "lora": lora}}
    config = recipe(policy)
    trained = run(["fit", "--config", config]).model.policy.eval()
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    capsys.readouterr()
    cli = run(["export", "--config", config, "--to", str(tmp_path / "out")])
    assert "parts.reference" not in str(dict(cli.model.named_modules()).keys())
    again = CosyVoiceLM(str(tmp_path / "out")).eval()
    for one, other, base in zip(
        *(score(model, ROWS) for model in (again, trained, CosyVoiceLM(str(source)).eval())), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        assert (one - base).abs().max() > 5e-4
    report = json.loads((tmp_path / "run" / "export.json").read_text())
    assert report["tensors"] == len(load_state(source / "llm.pt"))
    assert (report["rows"], report["tokens"], report["format"]) == (10, 100, "cosyvoice")
    assert report["difference"] < report["tolerance"] == 1e-4
    assert report["checkpoint"].endswith("last.ckpt")
    said = capsys.readouterr().out
    assert f"exported:     {tmp_path / 'out'} (cosyvoice)" in said
    assert "10 rows, 100 tokens of " in said
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml", "rows.jsonl", "run", "source"]


def test_vllm_beside_the_directory(tmp_path, recipe):
    source = make_directory(tmp_path / "source")
    config = recipe({"class_path": "CosyVoiceLM", "init_args": {"directory": str(source)}})
    run(["fit", "--config", config])
    run(["export", "--config", config, "--to", str(tmp_path / "out")])
    run(["export", "--config", config, "--to", str(tmp_path / "out" / "vllm"), "--format", "vllm"])
    assert sorted(path.name for path in (tmp_path / "out" / "vllm").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    report = json.loads((tmp_path / "run" / "export.json").read_text())
    assert report["tolerance"] is None
    assert 0 < report["difference"] < 0.1  # bfloat16 keeps 8 bits of a weight
    weights, trained = load_state(tmp_path / "out/vllm/model.safetensors"), load_state(tmp_path / "out/llm.pt")
    assert torch.equal(weights["lm_head.weight"], trained["llm_decoder.weight"].bfloat16())


def test_other_policies_export_as_themselves(tmp_path, recipe, capsys):
    policy = save_policy(tmp_path / "policy")
    config = recipe(
        {"class_path": "Qwen2CodecLM", "init_args": {"directory": str(policy)}}, save_rows(tmp_path), precision=None
    )
    trained = run(["fit", "--config", config]).model.policy
    run(["export", "--config", config, "--to", str(tmp_path / "out")])
    assert Qwen2CodecLM(str(tmp_path / "out")).digest() == trained.digest()
    with pytest.raises(SystemExit):
        run(["export", "--config", config, "--to", str(tmp_path / "more"), "--format", "vllm"])
    assert "only a CosyVoiceLM can be exported as vllm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["export", "--config", config, "--to", str(tmp_path / "out")])
    assert "is there already" in capsys.readouterr().err
    run(["export", "--config", config, "--to", str(tmp_path / "out"), "--overwrite", "true"])
    with pytest.raises(SystemExit):
        run(["export", "--config", config, "--to", str(policy), "--overwrite", "true"])
    assert f"--to {policy} is what model.policy.init_args.directory names" in capsys.readouterr().err
    diary = tmp_path / "out/sub/diary.txt"
    diary.parent.mkdir()
    diary.write_text("mine")
    with pytest.raises(SystemExit):
        run(["export", "--config", config, "--to", str(tmp_path / "out"), "--overwrite", "true"])
    assert "out holds sub/diary.txt, which is not part of the model" in capsys.readouterr().err
    assert diary.read_text() == "mine"


def test_it_needs_a_checkpoint(tmp_path, recipe, capsys):
    config = recipe({"class_path": "CosyVoiceLM", "init_args": {"directory": str(make_directory(tmp_path / "source"))}})
    with pytest.raises(SystemExit):
        run(["export", "--config", config, "--to", str(tmp_path / "out")])
    assert "train first with `tts-align fit`" in capsys.readouterr().err
    (tmp_path / "sharded").mkdir()
    with pytest.raises(SystemExit):
        run(["export", "--config", config, "--to", str(tmp_path / "out"), "--ckpt_path", str(tmp_path / "sharded")])
    assert "consolidate_checkpoint" in capsys.readouterr().err


def test_it_needs_neither_the_devices_nor_the_objective_of_the_training(tmp_path, recipe):
    source = make_directory(tmp_path / "source")
    config = Path(recipe({"class_path": "CosyVoiceLM", "init_args": {"directory": str(source)}}))
    run(["fit", "--config", str(config)])
    alone = yaml.safe_load(config.read_text())
    del alone["objective"], alone["data"]
    alone["trainer"] |= {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "precision": "16-mixed"}
    alone["trainer"] |= {"strategy": {"class_path": "FSDPStrategy"}}
    config.write_text(yaml.safe_dump(alone))
    run(["export", "--config", str(config), "--to", str(tmp_path / "out")])
    assert json.loads((tmp_path / "run" / "export.json").read_text())["of"] == "random rows"


@pytest.mark.parametrize("lora", [None, LoRA(2, 4)])
def test_a_policy_in_bfloat16_is_exported_without_rounding(lora, tmp_path):
    source = make_directory(tmp_path / "source", "cosyvoice3")
    policy = disturb(CosyVoiceLM(str(source), dtype="bfloat16", lora=lora))
    found = export(policy, tmp_path / "out")
    assert found.difference < 1e-5
    state, base = load_state(tmp_path / "out/llm.pt"), load_state(source / "llm.pt")
    name = "llm.model.model.layers.0.mlp.up_proj.weight"
    exact = torch.equal(state[name], state[name].bfloat16().float())
    assert exact is (lora is None)  # a merged adapter is finer than its base
    if lora is not None:
        update = policy.backbone.layers[0].mlp.up_proj.get_delta_weight("policy")
        torch.testing.assert_close(state[name], base[name].bfloat16().float() + update, rtol=0, atol=1e-7)


def test_what_is_not_the_same_model_is_not_kept(tmp_path, monkeypatch):
    policy = CosyVoiceLM(str(make_directory(tmp_path / "source")))
    save = policy.save

    def wrong(directory):
        save(directory)
        state = torch.load(directory / "llm.pt")
        state["llm_decoder.bias"][3] += 0.01
        torch.save(state, directory / "llm.pt")

    monkeypatch.setattr(policy, "save", wrong)
    with pytest.raises(ExportError, match=r"a log-probability differs by 0\.0\d+, allowed is 0\.0001; nothing is kept"):
        export(policy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_weights_that_are_no_numbers_are_not_exported(tmp_path):
    policy = CosyVoiceLM(str(make_directory(tmp_path / "source")))
    policy.llm_decoder.weight.data[0] = torch.nan
    with pytest.raises(ExportError, match="differs by nan"):
        export(policy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_rows_of_the_manifest_in_its_own_words(tmp_path):
    policy = CosyVoiceLM(str(make_directory(tmp_path / "source", "cosyvoice3")))
    path = tmp_path / "rows.jsonl"
    lines = [
        {"id": "a", "text": "One.", "audio": "nowhere.wav"},
        {"id": "b", "text": "Two.", "speech": [1, 99]},
        {"id": "c", "text": "Three.", "speech": [1, 2], "instruct": "Softly."},
        {"id": "d", "text": "Four.", "pair": {"chosen": [3], "rejected": [4]}},
        {"id": "e", "text": "Five.", "speech": [5], "prompt_text": "Six.", "prompt_speech": [6]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    rows, of = choose_rows(policy, str(path))
    assert of == str(path)
    assert [(row.speech, row.prompt) for row in rows] == [((1, 2), ()), ((3,), ()), ((5,), (6,))]
    text = [policy.text.decode(row.text) for row in rows]
    assert text[0] == "You are a helpful assistant. Softly.<|endofprompt|>Three."
    assert text[2] == "You are a helpful assistant.<|endofprompt|>Six.Five."
    assert len(choose_rows(policy, str(path), 2)[0]) == 2
    path.write_text(json.dumps(lines[0]) + "\n")
    rows, of = choose_rows(policy, str(path))
    assert of == "random rows"
    assert len(rows) == 10
    collate(rows, policy.layout)  # they fit it


def test_a_source_without_the_text_head_gets_one(tmp_path: Path) -> None:
    """The runtime wants it; and weights of another name stay beside the new ones, which the report says."""
    source = make_directory(tmp_path / "source", "cosyvoice3")
    state = torch.load(source / "llm.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if "lm_head" not in key}, source / "llm.pt")
    checked = export(CosyVoiceLM(str(source)), tmp_path / "out")
    assert "llm.model.lm_head.weight" in torch.load(tmp_path / "out" / "llm.pt", weights_only=True)
    assert not any("still the old one" in line for line in checked.lines())
    other = export(CosyVoiceLM(str(source), weights="llm.rl.pt"), tmp_path / "other")
    assert "llm.rl.pt in there is still the old one" in other.lines()[0]
