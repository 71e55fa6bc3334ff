# SPDX-License-Identifier: Apache-2.0
"""Parts of a model that do not belong together are refused, instead of taken for the published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import FOLDER, parity
from safetensors.torch import load_file
from tiny_directory import make_directory

from tts_align.models.base.layout import collate
from tts_align.models.cosyvoice.directory import ModelDirectory, load_state
from tts_align.models.cosyvoice.flow.model import load_flow
from tts_align.models.cosyvoice.hift.model import load_hift
from tts_align.models.cosyvoice.lm import CosyVoiceLM, load_lm

FAMILIES = ["cosyvoice2", "cosyvoice3"]
BOTH = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_directory(folder / family, family, codebook_size=40) for family in FAMILIES}


def without(config: Any, *path: str) -> dict[str, Any]:
    """The same without one entry."""
    first, *rest = path
    kept = {key: value for key, value in config.items() if rest or key != first}
    return kept | ({first: without(config[first], *rest)} if rest else {})


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["flow"], "no part flow: expected the whole yaml"),
        (lambda config: without(config, "flow"), "no part flow:"),
        (lambda config: without(config, "flow", "decoder"), r"no part flow\.decoder:"),
        (lambda config: {"flow": config["flow"]["decoder"]}, r"no "),
        (
            lambda config: without(config, "flow", "decoder", "estimator", "static_chunk_size"),
            r"no flow\.decoder\.estimator\.static_chunk_size, which the weights do not tell",
        ),
    ],
)
def test_a_flow_s_yaml_must_be_whole(family, change, message, directories):
    """A chunk of 50 frames was taken instead of 8 where the part was not found."""
    source = ModelDirectory.find(directories[family])
    state = load_state(source.file("flow.pt"))
    load_flow(family, state, source.config)
    with pytest.raises(ValueError, match=message):
        load_flow(family, state, change(source.config))


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["hift"], "no part hift:"),
        (lambda config: without(config, "hift"), "no part hift:"),
        (lambda config: without(config, "hift", "upsample_rates"), r"no hift\.upsample_rates"),
    ],
)
def test_a_vocoder_s_yaml_must_be_whole(family, change, message, directories):
    source = ModelDirectory.find(directories[family])
    with pytest.raises(ValueError, match=message):
        load_hift(family, load_state(source.file("hift.pt")), change(source.config))


@BOTH
def test_a_text_tokenizer_with_more_ids_than_rows_is_refused(family, tmp_path):
    directory = make_directory(tmp_path / "model", family, codebook_size=40)
    length = CosyVoiceLM(str(directory)).text.length
    state = torch.load(directory / "llm.pt", weights_only=True)
    for name in ("llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight"):
        state[name] = state[name][: length - 1].clone()
    torch.save(state, directory / "llm.pt")
    with pytest.raises(ValueError, match=rf"has {length} ids, but the text embedding in .* only {length - 1} rows"):
        CosyVoiceLM(str(directory)).encode_text("Hello.")


@BOTH
def test_a_codebook_that_is_not_the_yaml_s_is_refused(family, tmp_path):
    directory = make_directory(tmp_path / "model", family, codebook_size=40)
    yaml = directory / f"{family}.yaml"
    assert "speech_token_size: 40" in yaml.read_text("utf-8")
    yaml.write_text(yaml.read_text("utf-8").replace("speech_token_size: 40", "speech_token_size: 41"), "utf-8")
    with pytest.raises(ValueError, match="codebook of 40 speech tokens, the yaml says 41"):
        CosyVoiceLM(str(directory))


@BOTH
def test_the_other_family_s_overlay_is_refused(family, directories):
    CosyVoiceLM(str(directories[family]), family=family)
    other = FAMILIES[1 - FAMILIES.index(family)]
    with pytest.raises(ValueError, match=rf"holds a {family} model, .* is {other}: use .*models/{family}\.yaml"):
        CosyVoiceLM(str(directories[family]), family=other)


@pytest.mark.parametrize("name", ["llm_v2", "llm_v3"])
def test_a_language_model_is_loaded_beside_flow_and_vocoder(name):
    dump = parity(name)
    state = load_file(FOLDER / name / "state_dict.safetensors")
    config = json.loads((FOLDER / name / "config.json").read_text())["qwen2_config"]
    model = load_lm(dump.layout.family, state, config)
    assert not model.training
    rows = collate(dump.rows(), dump.layout)
    with torch.no_grad():
        found = model(rows, logits=True)
    expected = dump.io["uni.logits"][dump.io["uni.lm_target"] != -1]
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-4)
    before = state["llm_decoder.weight"].clone()
    with torch.no_grad():
        model.llm_decoder.weight.add_(1)
    assert torch.equal(state["llm_decoder.weight"], before)
    with pytest.raises(ValueError, match="lacks num_attention_heads"):
        load_lm(dump.layout.family, state, without(config, "num_attention_heads"))
    with pytest.raises(ValueError, match=r"no speech_embedding\.weight"):
        load_lm(dump.layout.family, {}, config)
