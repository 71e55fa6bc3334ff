# SPDX-License-Identifier: Apache-2.0
"""Complete CosyVoice2 and Fun-CosyVoice3 directories as they are downloaded, of random weights and of tiny size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx_models import save_speaker_encoder, save_speech_tokenizer, save_text_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

from tts_align.models.cosyvoice.flow.model import UNetFlow, UNetFlowSizes
from tts_align.models.cosyvoice.hift.config import HiFTSizes
from tts_align.models.cosyvoice.hift.model import HiFT
from tts_align.models.cosyvoice.text import TextTokenizer
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes

BACKBONE = "CosyVoice-BlankEN"
TRANSCRIPT = "Hello."
"""What is said in the recording of the voice ``cloned``."""
MERGES = ("h e", "l l")
BASE = 256 + len(MERGES)
"""Ids of the text tokenizer before its special tokens."""
FAMILIES = ("cosyvoice2", "cosyvoice3")
SPECIALS = {"cosyvoice2": (3, 17), "cosyvoice3": (200, 278)}
"""Speech ids behind the speech tokens, and text tokens that a family adds."""
STALE = ("vllm/config.json", "flow.decoder.estimator.fp32.mygpu.plan", "flow.encoder.fp16.zip", "flow.encoder.fp32.zip")

YAML = """\
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:torch.manual_seed [1986]

sample_rate: 24000
llm_input_size: {hidden}
llm_output_size: {hidden}
spk_embed_dim: 192
qwen_pretrain_path: ''
token_frame_rate: 25
token_mel_ratio: 2
chunk_size: 25
num_decoding_left_chunks: -1

llm: !new:{llm}
    llm_input_size: !ref <llm_input_size>
    llm_output_size: !ref <llm_output_size>
    speech_token_size: {codebook_size}
    length_normalized_loss: True
    lsm_weight: 0
    mix_ratio: [5, 15]
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: 0.8
        top_k: 25
        win_size: 10
        tau_r: 0.1

flow: {flow}
hift: !new:{hift}
    in_channels: {mel}
    base_channels: {base_channels}
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 5, 3]
    upsample_kernel_sizes: [16, 11, 7]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: {mel}
        cond_channels: {f0_channels}

get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <qwen_pretrain_path>
    skip_special_tokens: True
allowed_special: 'all'
parquet_opener: !name:cosyvoice.dataset.processor.parquet_opener
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: {mel}
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: {fmax}
    center: False
compute_fbank: !name:cosyvoice.dataset.processor.compute_fbank
    feat_extractor: !ref <feat_extractor>
data_pipeline: [
    !ref <parquet_opener>,
    !ref <compute_fbank>,
]
"""
"""What matters of the published files, in their structure."""

_CFM = """\
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        spk_emb_dim: {mel}
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
"""
FLOW = {
    "cosyvoice2": """\
!new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: {flow_width}
    output_size: {mel}
    spk_embed_dim: !ref <spk_embed_dim>
    vocab_size: {codebook_size}
    input_frame_rate: !ref <token_frame_rate>
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        input_size: {flow_width}
        output_size: {flow_width}
        attention_heads: 2
        linear_units: {flow_hidden}
        num_blocks: 1
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
"""
    + _CFM
    + """\
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            in_channels: 320
            out_channels: {mel}
            channels: [{flow_width}]
            dropout: 0.0
            attention_head_dim: 4
            n_blocks: 1
            num_mid_blocks: 1
            num_heads: 2
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>
""",
    "cosyvoice3": """\
!new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT
    input_size: {mel}
    output_size: {mel}
    spk_embed_dim: !ref <spk_embed_dim>
    vocab_size: {codebook_size}
    input_frame_rate: !ref <token_frame_rate>
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    pre_lookahead_layer: !new:cosyvoice.transformer.upsample_encoder.PreLookaheadLayer
        in_channels: {mel}
        channels: {flow_hidden}
        pre_lookahead_len: 3
"""
    + _CFM
    + """\
        estimator: !new:cosyvoice.flow.DiT.dit.DiT
            dim: {flow_width}
            depth: 1
            heads: 2
            dim_head: 8
            ff_mult: 2
            mel_dim: {mel}
            mu_dim: {mel}
            spk_dim: {mel}
            out_channels: {mel}
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>
""",
}


@dataclass(frozen=True)
class Tiny:
    """Sizes of what is made; see :func:`make_directory`."""

    codebook_size: int = 40
    hidden: int = 16
    layers: int = 2
    heads: int = 2
    key_value_heads: int = 1
    intermediate: int = 24
    spare_rows: int = 5
    """Rows of the text embedding that no token has; the published files have 12 or more."""
    f0_channels: int = 8
    base_channels: int = 8
    flow_width: int = 16
    flow_hidden: int = 24
    mel: int = 80


def make_directory(
    path: Path, family: str = "cosyvoice2", seed: int = 0, stale: bool = False, voices: bool = False, **sizes: int
) -> Path:
    """Write a directory.

    Args:
        path: where to.
        family: which of the two.
        seed: of all weights.
        stale: also put there what the runtime derives from weights and never makes anew, and what training leaves.
        voices: also ``spk2info.pt``, with a voice ``known`` that has a vector only and one, ``cloned``, of a recording.
        sizes: see :class:`Tiny`.
    """
    tiny = Tiny(**sizes)
    torch.manual_seed(seed)
    save_hub_files(path)
    rows = save_text_model(path / BACKBONE, family, tiny)
    torch.save(llm_state(family, tiny, rows), path / "llm.pt")
    if family == "cosyvoice3":
        torch.save(llm_state(family, tiny, rows), path / "llm.rl.pt")
    torch.save(randomised(tiny_flow(family, tiny)), path / "flow.pt")
    torch.save(randomised(tiny_hift(family, tiny)), path / "hift.pt")
    (path / f"{family}.yaml").write_text(yaml_text(family, tiny), "utf-8")
    save_speaker_encoder(path / "campplus.onnx")
    version = family[-1]
    for name in (f"speech_tokenizer_v{version}.onnx", f"speech_tokenizer_v{version}.batch.onnx"):
        save_speech_tokenizer(path / name, tiny.codebook_size)
    (path / "flow.decoder.estimator.fp32.onnx").write_bytes(b"the velocity field once more, as it was published")
    if stale:
        for name in STALE:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(b"made of the old weights")
    if voices:
        torch.save(voice_table(path, family, tiny), path / "spk2info.pt")
    return path


def save_hub_files(path: Path) -> None:
    """What a hub wants to find."""
    (path / "asset").mkdir(parents=True)
    (path / "asset" / "picture.png").write_bytes(b"a picture")
    (path / "config.json").write_text("{}")
    (path / "configuration.json").write_text('{"framework":"Pytorch","task":"text-to-speech"}')
    (path / "README.md").write_text("A tiny model.\n")
    (path / ".gitattributes").write_text("*.pt filter=lfs\n")


def save_text_model(path: Path, family: str, tiny: Tiny) -> int:
    """Write the text model's directory, and give the rows of its embedding."""
    save_text_tokenizer(path, merges=MERGES)
    rows = BASE + 3 + SPECIALS[family][1] + tiny.spare_rows
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": BASE,
        "eos_token_id": BASE + 2,
        "hidden_act": "silu",
        "hidden_size": tiny.hidden,
        "initializer_range": 0.02,
        "intermediate_size": tiny.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.key_value_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": rows,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generation = {
        "bos_token_id": BASE,
        "do_sample": True,
        "eos_token_id": [BASE + 2, BASE],
        "pad_token_id": BASE,
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.40.1",
    }
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
    state = {key.removeprefix("llm."): value.bfloat16() for key, value in qwen2_state(tiny, rows).items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return rows


def qwen2_state(tiny: Tiny, rows: int) -> dict[str, Tensor]:
    """Random weights of a Qwen2 text model under the published names, without its tied head."""
    narrow = tiny.hidden // tiny.heads * tiny.key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (rows, tiny.hidden), "norm.weight": (tiny.hidden,)}
    for layer in range(tiny.layers):
        block = f"layers.{layer}."
        for name, width in (("q", tiny.hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (width, tiny.hidden)
            shapes[f"{block}self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{block}self_attn.o_proj.weight"] = (tiny.hidden, tiny.hidden)
        shapes[f"{block}mlp.gate_proj.weight"] = shapes[f"{block}mlp.up_proj.weight"] = (tiny.intermediate, tiny.hidden)
        shapes[f"{block}mlp.down_proj.weight"] = (tiny.hidden, tiny.intermediate)
        shapes[f"{block}input_layernorm.weight"] = shapes[f"{block}post_attention_layernorm.weight"] = (tiny.hidden,)
    return {f"llm.model.{name}": torch.randn(shape) * 0.3 for name, shape in with_model(shapes).items()}


def with_model(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"model.{name}": shape for name, shape in shapes.items()}


def llm_state(family: str, tiny: Tiny, rows: int) -> dict[str, Tensor]:
    """Random weights of a language model, as ``llm.pt`` holds them: the text head is the text embedding itself."""
    state: dict[str, Tensor] = {}
    vocabulary = tiny.codebook_size + SPECIALS[family][0]
    if family == "cosyvoice2":
        state["llm_embedding.weight"] = torch.randn(2, tiny.hidden) * 0.3
    state |= qwen2_state(tiny, rows)
    state["llm.model.lm_head.weight"] = state["llm.model.model.embed_tokens.weight"]
    state["llm_decoder.weight"] = torch.randn(vocabulary, tiny.hidden) * 0.3
    if family == "cosyvoice2":
        state["llm_decoder.bias"] = torch.randn(vocabulary) * 0.3
    state["speech_embedding.weight"] = torch.randn(vocabulary, tiny.hidden) * 0.3
    return state


def tiny_flow(family: str, tiny: Tiny) -> nn.Module:
    """A flow of the family's kind."""
    width, hidden = tiny.flow_width, tiny.flow_hidden
    if family == "cosyvoice3":
        inside = {"dim": width, "depth": 1, "heads": 2, "head_dim": 8, "ff_mult": 2}
        groups = {"position_groups": 4, "lookahead_channels": hidden}
        return DiTFlow(DiTFlowSizes(codebook_size=tiny.codebook_size, mel_channels=tiny.mel, **inside, **groups))
    encoder = {"token_channels": width, "width": width, "heads": 2, "feed_forward": hidden, "blocks": 1, "up_blocks": 1}
    unet = {"width": width, "time_width": hidden, "blocks": 1, "mid_levels": 1, "heads": 2, "head_channels": 4}
    inside = encoder | {f"unet_{name}": size for name, size in unet.items()}
    return UNetFlow(
        UNetFlowSizes(codebook_size=tiny.codebook_size, mel_channels=tiny.mel, unet_feed_forward=hidden, **inside)
    )


def tiny_hift(family: str, tiny: Tiny) -> HiFT:
    """A vocoder of the family's kind."""
    return HiFT(HiFTSizes(family=family, base_channels=tiny.base_channels, f0_channels=tiny.f0_channels))


def randomised(module: nn.Module) -> dict[str, Tensor]:
    """The module's weights, none of them left at a round number."""
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def voice_table(path: Path, family: str, tiny: Tiny) -> dict[str, dict[str, Any]]:
    """What ``spk2info.pt`` holds: a vector, and all that a recording of ten speech tokens gives."""
    assistant = "You are a helpful assistant.<|endofprompt|>" if family == "cosyvoice3" else ""
    text = torch.tensor([TextTokenizer(path / BACKBONE, family).encode(assistant + TRANSCRIPT)])
    codebook_size, mel, vector = (
        torch.arange(10)[None] % tiny.codebook_size,
        torch.randn(1, 20, 80),
        torch.randn(1, 192),
    )
    cloned = {"prompt_text": text, "prompt_text_len": torch.tensor([text.shape[1]])}
    for part in ("llm", "flow"):
        cloned |= {f"{part}_prompt_speech_token": codebook_size, f"{part}_prompt_speech_token_len": torch.tensor([10])}
        cloned |= {f"{part}_embedding": vector}
    cloned |= {"prompt_speech_feat": mel, "prompt_speech_feat_len": torch.tensor([20])}
    return {"known": {"embedding": torch.randn(1, 192)}, "cloned": cloned}


def yaml_text(family: str, tiny: Tiny) -> str:
    """What the published files say, with the tags of theirs, in the sizes of ours."""
    parts = {
        "cosyvoice2": ("8000", "cosyvoice.llm.llm.Qwen2LM", "cosyvoice.hifigan.generator.HiFTGenerator"),
        "cosyvoice3": ("null", "cosyvoice.llm.llm.CosyVoice3LM", "cosyvoice.hifigan.generator.CausalHiFTGenerator"),
    }
    fmax, llm, hift = parts[family]
    flow = FLOW[family].format(**vars(tiny))
    return YAML.format(**vars(tiny), fmax=fmax, llm=llm, hift=hift, flow=flow)
