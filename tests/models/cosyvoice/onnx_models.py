# SPDX-License-Identifier: Apache-2.0
"""Tiny stand-ins for the ONNX files of a CosyVoice directory, and a directory around them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CODES = 300

# The parts of the published yamls that say something, with their tags.
YAML = """
__set_seed1: !apply:random.seed [1986]
sample_rate: 24000
llm_input_size: 896
qwen_pretrain_path: ''
token_frame_rate: 25
token_mel_ratio: 2
chunk_size: 25
llm: !new:cosyvoice.llm.llm.Qwen2LM
    llm_input_size: !ref <llm_input_size>
    speech_token_size: {codebook_size}
    mix_ratio: [5, 15]
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
parquet_opener: !name:cosyvoice.dataset.processor.parquet_opener
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: {fmax}
compute_fbank: !name:cosyvoice.dataset.processor.compute_fbank
    feat_extractor: !ref <feat_extractor>
data_pipeline: [
    !ref <parquet_opener>,
    !ref <compute_fbank>,
]
"""


def save_directory(path: Path, family: str = "cosyvoice2", codebook_size: int = CODES, batched: bool = True) -> Path:
    """A model directory with its yaml, tokenizer files and ONNX models, without weights."""
    path.mkdir(parents=True)
    fmax = {"cosyvoice2": "8000", "cosyvoice3": "null"}[family]
    (path / f"{family}.yaml").write_text(YAML.format(codebook_size=codebook_size, fmax=fmax), "utf-8")
    save_text_tokenizer(path / "CosyVoice-BlankEN")
    version = family[-1]
    save_speech_tokenizer(path / f"speech_tokenizer_v{version}.onnx", codebook_size)
    if batched:
        save_speech_tokenizer(path / f"speech_tokenizer_v{version}.batch.onnx", codebook_size)
    save_speaker_encoder(path / "campplus.onnx")
    return path


def save_text_tokenizer(path: Path, entries: int | None = None, merges: tuple[str, ...] = ("h e", "l l")) -> Path:
    """Config and tokenizer files of a byte-level BPE, filled up to ``entries`` if given."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path.mkdir(parents=True, exist_ok=True)
    words = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    words += [f"filling{i}" for i in range((entries or 0) - len(words))]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    own = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(len(words) + i): {"content": token} | flags for i, token in enumerate(own)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    config = {
        "model_type": "qwen2",
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "vocab_size": len(words) + 400,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.1,
    }
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def expected_codes(mel: np.ndarray, codebook_size: int = CODES) -> np.ndarray:
    """What `save_speech_tokenizer` computes for one utterance, (m, f): each four frames against the whole."""
    level = mel.astype(np.float64).mean(0)
    loudest = [level[start : start + 4].max() for start in range(0, len(level), 4)]
    return np.clip(np.floor((np.array(loudest) - level.mean()) * 100 + 100), 0, codebook_size - 1).astype(int)


def save_speech_tokenizer(path: Path, codebook_size: int = CODES) -> Path:
    """A model of mel (b, 128, f) and lengths (b): see `expected_codes`; padding is masked, as in the real one."""
    constants = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "time_axis": np.array([2], np.int64),
        "axis_one": np.array([1], np.int64),
        "hundred": np.float32(100),
        "low": np.float32(0),
        "high": np.float32(codebook_size - 1),
        "far": np.float32(1000),
    }
    nodes = [
        helper.make_node("ReduceMean", ["audio_features", "axis_one"], ["level"], keepdims=0),
        helper.make_node("Shape", ["audio_features"], ["shape"]),
        helper.make_node("Gather", ["shape", "time_axis"], ["frames_1"]),
        helper.make_node("Squeeze", ["frames_1"], ["frames"]),
        helper.make_node("Range", ["zero", "frames", "one"], ["positions"]),
        helper.make_node("Cast", ["how_long"], ["lengths"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["lengths", "axis_one"], ["lengths_1"]),
        helper.make_node("Less", ["positions", "lengths_1"], ["counts"]),
        helper.make_node("Cast", ["counts"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["level", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis_one"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["mask", "axis_one"], ["number"], keepdims=1),
        helper.make_node("Div", ["sum", "number"], ["mean"]),
        # Far below everything where the mask is false, so that padding is never the loudest.
        helper.make_node("Where", ["counts", "level", "negative"], ["audible"]),
        helper.make_node("Unsqueeze", ["audible", "axis_one"], ["channel"]),
        helper.make_node("MaxPool", ["channel"], ["pooled"], kernel_shape=[4], strides=[4], ceil_mode=1),
        helper.make_node("Squeeze", ["pooled", "axis_one"], ["loudest"]),
        helper.make_node("Sub", ["loudest", "mean"], ["above"]),
        helper.make_node("Mul", ["above", "hundred"], ["scaled"]),
        helper.make_node("Add", ["scaled", "hundred"], ["shifted"]),
        helper.make_node("Floor", ["shifted"], ["whole"]),
        helper.make_node("Clip", ["whole", "low", "high"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], ["ids"], to=TensorProto.INT32),
    ]
    nodes.insert(0, helper.make_node("Neg", ["far"], ["negative"]))
    inputs = [
        helper.make_tensor_value_info("audio_features", TensorProto.FLOAT, ["b", 128, "f"]),
        helper.make_tensor_value_info("how_long", TensorProto.INT32, ["b"]),
    ]
    return _save(path, nodes, constants, inputs, helper.make_tensor_value_info("ids", TensorProto.INT32, ["b", "t"]))


def speaker_weights(size: int = 192) -> np.ndarray:
    """The matrix inside `save_speaker_encoder`."""
    return np.random.default_rng(7).normal(size=(80, size)).astype(np.float32)


def save_speaker_encoder(path: Path, size: int = 192) -> Path:
    """A model of features (b, f, 80): mean of their squares, times a matrix."""
    nodes = [
        helper.make_node("Mul", ["fbank", "fbank"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axis_one"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["vector"]),
    ]
    constants = {"axis_one": np.array([1], np.int64), "weights": speaker_weights(size)}
    inputs = [helper.make_tensor_value_info("fbank", TensorProto.FLOAT, ["b", "f", 80])]
    output = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["b", size])
    return _save(path, nodes, constants, inputs, output)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: list[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
) -> Path:
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, [output], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path
