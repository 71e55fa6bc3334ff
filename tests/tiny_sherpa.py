"""A tiny Paraformer and a tiny SenseVoice as ONNX graphs with the metadata that sherpa-onnx reads; made offline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TOKENS = ("<blank>", "<s>", "</s>", "他", "长", "大", "了", "<unk>")
_STACKED = 7
_MEL = 80 * _STACKED


def save_sherpa(folder: Path, kind: str) -> Path:
    """Write ``model.onnx`` and ``tokens.txt``: quiet frames say 他, loud ones 长."""
    folder.mkdir(parents=True)
    (folder / "tokens.txt").write_text("".join(f"{one} {i}\n" for i, one in enumerate(TOKENS)), "utf-8")
    weights = np.zeros((_MEL, len(TOKENS)), np.float32)
    # The mean of the log-mel says how loud it is; padding is exactly 0.
    weights[:, 4], weights[:, 2] = 1 / _MEL, -1 / _MEL
    bias = np.full(len(TOKENS), -99, np.float32)
    bias[2], bias[3], bias[4] = 3, 0, -12
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")]
    common = {"vocab_size": len(TOKENS), "lfr_window_size": _STACKED, "lfr_window_shift": 6}
    common |= {"neg_mean": ",".join(["0"] * _MEL), "inv_stddev": ",".join(["1"] * _MEL)}
    made = _paraformer(constants) if kind == "paraformer" else _sense_voice(constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if kind == "sense_voice":
        languages = {f"lang_{name}": i for i, name in enumerate(("auto", "zh", "en", "yue", "ja", "ko"))}
        common |= {"normalize_samples": 0, "with_itn": 14, "without_itn": 15, **languages}
    for name, value in common.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, str(value)
    onnx.save(model, folder / "model.onnx")
    return folder


def _logits(frames: str, out: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", [frames, "weights"], ["scored"]),
        helper.make_node("Add", ["scored", "bias"], [out]),
    ]


def _paraformer(constants: list[onnx.TensorProto]) -> onnx.GraphProto:
    """One token a stacked frame."""
    return helper.make_graph(
        [*_logits("speech", "logits"), helper.make_node("Identity", ["speech_lengths"], ["token_num"])],
        "paraformer",
        [
            helper.make_tensor_value_info("speech", TensorProto.FLOAT, ["n", "t", _MEL]),
            helper.make_tensor_value_info("speech_lengths", TensorProto.INT32, ["n"]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "t", len(TOKENS)]),
            helper.make_tensor_value_info("token_num", TensorProto.INT32, ["n"]),
        ],
        constants,
    )


def _sense_voice(constants: list[onnx.TensorProto]) -> onnx.GraphProto:
    """CTC after four frames that say language, mood, event and normalisation."""
    four = np.zeros((1, 4, len(TOKENS)), np.float32)
    four[0, [0, 1, 2, 3], [7, 1, 7, 1]] = 9
    constants = [
        *constants,
        numpy_helper.from_array(four, "four"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
    ]
    return helper.make_graph(
        [
            *_logits("x", "spoken"),
            helper.make_node("Shape", ["x_length"], ["rows"]),
            helper.make_node("Concat", ["rows", "one", "one"], ["repeats"], axis=0),
            helper.make_node("Tile", ["four", "repeats"], ["before"]),
            helper.make_node("Concat", ["before", "spoken"], ["logits"], axis=1),
        ],
        "sense_voice",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", _MEL]),
            helper.make_tensor_value_info("x_length", TensorProto.INT32, ["n"]),
            helper.make_tensor_value_info("language", TensorProto.INT32, ["n"]),
            helper.make_tensor_value_info("text_norm", TensorProto.INT32, ["n"]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "u", len(TOKENS)])],
        constants,
    )
