# SPDX-License-Identifier: Apache-2.0
"""Directories that the CosyVoice runtime loads, made of the one a model came from and of new weights.

The runtime is strict: names and shapes must be those of the published files, and nothing may stand beside the weights.
It also keeps what it once derived from a model, and keeps using it: such caches are left behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tts_align.models.cosyvoice.directory import BACKBONE, ModelDirectory, load_state
from tts_align.utils.files import directory_written_atomically, occupied
from tts_align.utils.model_directory import check_nothing_lost
from tts_align.utils.readers import read_json_object

BODY = "llm.model.model."
"""Where the published files keep the Qwen2 model."""
EMBEDDING, HEAD = f"{BODY}embed_tokens.weight", "llm.model.lm_head.weight"
"""The text embedding, and the head of the text vocabulary, which is the same tensor once more."""
LLM, FLOW = "llm.pt", "flow.pt"

CACHES = ("vllm", "*.plan")
"""What the runtime makes beside a model and never makes anew: its language model for vLLM, engines of TensorRT."""
FLOW_COPIES = ("flow.decoder.estimator.*", "flow.encoder.*.zip", "flow.cache.pt")
"""The flow once more, for other runtimes: wrong as soon as ``flow.pt`` is another one."""
_COPIED_BYTES = 2**20
_GENERATION, _CONFIG, _SAFETENSORS = "generation_config.json", "config.json", "model.safetensors"
_OF_A_MODEL = (f"{BACKBONE}/{_CONFIG}", _SAFETENSORS)


def write_directory(
    source: ModelDirectory,
    state: Mapping[str, Tensor],
    directory: Path,
    flow: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a complete model directory with new weights; it appears whole or not at all.

    Everything else is the source's. Large files are hard links, which take no room: they are the source's files, so
    replace them in the new directory, if you have to, but do not write into them. Small ones, and those that are
    symbolic links in the source, are copies. Left behind are the runtime's caches, files whose names begin with a point
    (a download's bookkeeping) and, with a new flow, what was made from the old one.

    Args:
        source: where the model came from; it is not changed.
        state: weights of the language model, under the published names.
        directory: what is written.
        flow: weights of the flow, if they are new as well.
        overwrite: replace an earlier model directory.

    Raises:
        ValueError: names or shapes are not those of the source; or there is something already that is not to be
            overwritten: something else than a model, or the source.
    """
    check_target(source.path, directory, overwrite)
    weights = {LLM: _tied(state)}
    if flow is not None:
        weights[FLOW] = _plain(flow)
    weights = {name: _as_in(source, name, tensors) for name, tensors in weights.items()}
    stale = CACHES if flow is None else CACHES + FLOW_COPIES
    with directory_written_atomically(directory, overwrite) as scratch:
        for file, name in _files(source.path, stale):
            if name not in weights:
                _bring(file, scratch / name)
        for name, tensors in weights.items():
            torch.save(tensors, scratch / name)
        check_nothing_lost(directory, scratch, CACHES + FLOW_COPIES)


def write_vllm(
    source: ModelDirectory,
    state: Mapping[str, Tensor],
    directory: Path,
    overwrite: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the language model alone as vLLM reads it: what the runtime makes as ``vllm/`` in a directory.

    The text embedding and, in CosyVoice2, the rows that begin a sequence and turn it to speech are not part of it: the
    runtime looks them up in the ``llm.pt`` of the directory around and hands prompts over as vectors. Training changes
    these, too, so put it as ``vllm`` into a directory that :func:`write_directory` wrote with the same weights.

    Args:
        source: where the model came from.
        state: weights of the language model, under the published names.
        directory: what is written.
        overwrite: replace what is there.
        dtype: of the weights; the runtime's is bfloat16.

    Raises:
        ValueError: as :func:`write_directory`.
    """
    from safetensors.torch import save_file

    check_target(source.path, directory, overwrite)
    weights = vllm_names(_as_in(source, LLM, _tied(state)), dtype)
    config = _read_json(source.backbone / _CONFIG)
    generation = _read_json(source.file(f"{BACKBONE}/{_GENERATION}"))
    generation.pop("eos_token_id", None)
    with directory_written_atomically(directory, overwrite) as scratch:
        save_file(weights, scratch / _SAFETENSORS, {"format": "pt"})
        kind = str(dtype).removeprefix("torch.")
        _write_json(scratch / _CONFIG, _vllm_config(config, weights) | {"torch_dtype": kind})
        _write_json(scratch / _GENERATION, generation)
        check_nothing_lost(directory, scratch)


def vllm_names(state: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights as vLLM reads them: an ordinary Qwen2 whose vocabulary is that of speech.

    Args:
        state: of the language model, under the published names.
        dtype: of the weights; the runtime's is bfloat16.
    """
    named = {
        "model.embed_tokens.weight": state["speech_embedding.weight"],
        **{f"model.{key.removeprefix(BODY)}": state[key] for key in state if key.startswith(BODY) and key != EMBEDDING},
        **{key.replace("llm_decoder", "lm_head"): state[key] for key in state if key.startswith("llm_decoder.")},
    }
    return {key: value.to(dtype).contiguous() for key, value in named.items()}


def published_from_vllm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of :func:`vllm_names`: weights under the published names, as far as vLLM has them."""
    named = {key.replace("lm_head", "llm_decoder"): value for key, value in weights.items()}
    named["speech_embedding.weight"] = named.pop("model.embed_tokens.weight")
    return {f"{BODY}{key[6:]}" if key.startswith("model.") else key: value for key, value in named.items()}


def _vllm_config(config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of the text model with what is different in a model of speech."""
    has_bias = "lm_head.bias" in weights
    kept = {key: value for key, value in config.items() if key not in ("bos_token_id", "eos_token_id", "dtype")}
    if "rope_parameters" not in kept:
        kept.setdefault("rope_scaling", None)
    return kept | {
        # vLLM's Qwen2 has no bias in its head; the runtime registers a class that has.
        "architectures": ["CosyVoice2ForCausalLM" if has_bias else "Qwen2ForCausalLM"],
        "tie_word_embeddings": False,
        "use_bias": has_bias,
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
    }


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 on the CPU, none of them part of something larger, which would be written as well."""
    plain = {}
    for name, value in state.items():
        kind = torch.float32 if value.is_floating_point() else value.dtype
        value = value.detach().to("cpu", kind).contiguous()
        plain[name] = value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return plain


def _tied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, and the text head the very tensor of the text embedding: it is written once."""
    plain = _plain({name: value for name, value in state.items() if name != HEAD})
    if EMBEDDING in plain:
        plain[HEAD] = plain[EMBEDDING]
    return plain


def _as_in(source: ModelDirectory, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the order of the source's file, which has the same names and shapes."""
    if not (source.path / name).is_file():
        return state  # it was given other weights than its own
    expected = {key: tuple(value.shape) for key, value in load_state(source.path / name).items()}
    if name == LLM:
        expected.setdefault(HEAD, expected.get(EMBEDDING, ()))  # the runtime wants it, even where the source lacks it
    given = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
    if wrong:
        some = ", ".join(f"{key} (there {expected.get(key)}, here {given.get(key)})" for key in wrong[:3])
        raise ValueError(
            f"the weights differ from those of {source.path / name} in {len(wrong)} of {len(expected)} names or "
            f"shapes: {some}{', ...' if len(wrong) > 3 else ''}"
        )
    return {key: state[key] for key in expected}


def check_target(source: Path | None, directory: Path, overwrite: bool) -> None:
    """Refuse to write a model where it would destroy something.

    Args:
        source: directory of the model that is written, which must stay as it is; ``None`` if it has none.
        directory: what is to be written.
        overwrite: it may hold a model.

    Raises:
        ValueError: ``directory`` is, holds or lies in the source; or something is there that may not be overwritten.
    """
    target, own = Path(directory).resolve(), None if source is None else Path(source).resolve()
    if own is not None and (target in (own, *own.parents) or own in target.parents):
        raise ValueError(f"cannot write to {directory}: {source}, which the model came from, must stay as it is")
    if not occupied(target):
        return
    if not overwrite:
        raise ValueError(f"{directory} is there already: choose another directory, or pass --overwrite true")
    if not any((target / file).is_file() for file in _OF_A_MODEL):
        raise ValueError(f"{directory} holds something else than a model: it is not overwritten")


def _files(
    root: Path, stale: tuple[str, ...], folder: str = "", above: tuple[Path, ...] = ()
) -> Iterator[tuple[Path, str]]:
    """Files to take over, and their names relative to the root."""
    here = (root / folder).resolve()
    if here in above:
        raise ValueError(f"{root / folder} is a link to a folder around it: remove it")
    for file in sorted((root / folder).iterdir()):
        name = f"{folder}/{file.name}" if folder else file.name
        if file.name.startswith(".") or any(fnmatchcase(name, pattern) for pattern in stale):
            continue
        if file.is_dir():
            yield from _files(root, stale, name, (*above, here))
        else:
            yield file, name


def _bring(file: Path, target: Path) -> None:
    """Put a file into the new directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_symlink() and file.stat().st_size > _COPIED_BYTES:
        try:
            os.link(file, target)
            return
        except OSError:  # another device, or a file system without links
            pass
    shutil.copy2(file, target)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
