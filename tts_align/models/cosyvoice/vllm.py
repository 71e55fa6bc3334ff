# SPDX-License-Identifier: Apache-2.0
"""vLLM as the engine that speaks: a process of its own, with the weights that the policy has now.

vLLM fixes the version of PyTorch to the digit, so it lives in another environment than this package:
``pip install vllm`` there, and ``TTS_ALIGN_VLLM_PYTHON`` names its interpreter. A recipe cannot name it, because a
recipe starts no program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from tts_align.models.base.generation import Prompt, Sampling, Spoken
from tts_align.models.base.layout import Layout
from tts_align.models.cosyvoice.directory import ModelDirectory
from tts_align.models.cosyvoice.export import vllm_names, write_vllm
from tts_align.utils.sharded import is_sharded

PYTHON = "TTS_ALIGN_VLLM_PYTHON"
"""Environment variable with the interpreter of the environment that vLLM is installed in."""
_SCRIPT = Path(__file__).with_name("vllm_process.py")
_SHORTEST_ROOM = 2048
"""Tokens of the shortest sequences that room is made for: prompt and speech."""
_OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which vLLM would take itself for a process of the training."""


@dataclass(frozen=True)
class VLLM:
    """Speaking by vLLM, in ``sample``, ``test`` and roll-outs.

    Needs ``model.sampling.repetition_window: 0``: vLLM has no repetition-aware sampling. Its draws follow the seed of
    each utterance, but are others than those of the own engine; the most probable tokens (temperature 0) are the same.

    Args:
        memory_gib: memory of the key-value cache, in GiB; more lets more utterances be spoken at once.
    """

    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        """Refuse what cannot hold anything."""
        if not 0 < self.memory_gib < 2**20:
            raise ValueError(f"vllm.memory_gib must be a number of GiB above 0, got {self.memory_gib}")


@runtime_checkable
class Publishing(Protocol):
    """What of a policy the engine uses."""

    layout: Layout
    source: ModelDirectory
    llm_decoder: nn.Linear

    def embed(self, token: Int[Tensor, " l"], table: Int[Tensor, " l"]) -> Float[Tensor, "l h"]:
        """Input vectors of ids, each from the embedding table that ``table`` names."""

    def published(self) -> dict[str, Tensor]:
        """Weights under the published names, adapters merged."""

    def fingerprint(self) -> Float[Tensor, " n"]:
        """Numbers that change with the weights, and with the adapters' being on; quickly made."""


class VLLMEngine:
    """Speaks with vLLM; the process starts when it is needed and ends with this one.

    Args:
        settings: of the recipe.
    """

    def __init__(self, settings: VLLM) -> None:
        self.settings = settings
        self._process: _Process | None = None
        self._room, self._format, self._weights = 0, "", torch.zeros(0)

    def __deepcopy__(self, memo: object) -> VLLMEngine:
        """A copy of a policy speaks by a process of its own."""
        return VLLMEngine(self.settings)

    def __reduce__(self) -> tuple[type[VLLMEngine], tuple[VLLM]]:
        """So does one in another process."""
        return VLLMEngine, (self.settings,)

    @torch.no_grad()
    def generate(
        self,
        policy: Publishing,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> list[Spoken]:
        """Speak all prompts; see :meth:`tts_align.models.base.policy.CodecLM.generate`.

        Raises:
            ValueError: vLLM cannot draw so, or is not there, or the policy's weights are sharded.
            RuntimeError: vLLM has failed; the message has what it said last.
        """
        _check(sampling, policy)
        requests = [_request(prompt, sampling, policy.layout) for prompt in prompts]
        arranged = [policy.layout.prompt(prompt.text, prompt.speech) for prompt in prompts]
        longest = max(len(token) + one["max_tokens"] for (token, _), one in zip(arranged, requests, strict=True))
        number_format = "bfloat16" if sampling.weights == "bfloat16" else "float32"
        with tempfile.TemporaryDirectory(prefix="tts-align-vllm-") as folder:
            process = self._ready(policy, longest, number_format, Path(folder))
            device, dtype = policy.llm_decoder.weight.device, getattr(torch, number_format)
            vectors = {
                str(number): policy.embed(*(torch.tensor(ids, device=device) for ids in pair)).detach().to("cpu", dtype)
                for number, pair in enumerate(arranged)
            }
            save_file(vectors, file := Path(folder, "vectors.safetensors"))
            allowed = [*range(policy.layout.codebook_size), policy.layout.end]
            found = process.ask("speak", vectors=str(file), requests=requests, allowed=allowed)
        if progress is not None:
            progress(len(prompts))
        pairs = zip(found["tokens"], found["finished"], strict=True)
        return [Spoken(torch.tensor(tokens, dtype=torch.long), finished) for tokens, finished in pairs]

    def _ready(self, policy: Publishing, longest: int, number_format: str, folder: Path) -> _Process:
        """The process with room for this many tokens and with the policy's weights."""
        weights = policy.fingerprint()
        if self._process is None or longest > self._room or number_format != self._format:
            self.close()
            room = max(_SHORTEST_ROOM, 1 << (longest - 1).bit_length())
            dtype = getattr(torch, number_format)
            write_vllm(policy.source, policy.published(), folder / "model", dtype=dtype)
            process = _Process(policy.llm_decoder.weight.device, self.settings.memory_gib)
            options = {"dtype": number_format, "max_model_len": room, "enforce_eager": True}
            process.ask("load", directory=str(folder / "model"), options=options, memory_gib=self.settings.memory_gib)
            self._process, self._room, self._format = process, room, number_format
        elif not torch.equal(weights, self._weights):
            named = vllm_names(policy.published(), getattr(torch, number_format))
            save_file(named, folder / "model.safetensors")
            self._process.ask("weights", directory=str(folder))
        self._weights = weights
        return self._process

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.close()
        self._process = None


class _Process:
    """The other interpreter, asked a line at a time."""

    def __init__(self, device: torch.device, memory_gib: float) -> None:
        python = interpreter()
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_GROUP}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(memory_gib))), "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        if device.type == "cuda" and device.index is not None and "CUDA_VISIBLE_DEVICES" not in environment:
            environment["CUDA_VISIBLE_DEVICES"] = str(device.index)
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # open till the end
        self.process = subprocess.Popen(
            [python, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
            start_new_session=True,  # what interrupts a command lets it finish its batch first
        )
        # Also when the policy is no longer used, and when this process ends.
        self.close = weakref.finalize(self, _end, self.process, self.said)

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """What it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"vLLM ended with status {self.process.wait()}; its last lines:\n{self._tail()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"vLLM cannot {do}: {found['error']}\n{self._tail()}")
        return found

    def _tail(self) -> str:
        self.said.seek(0)
        return "".join(self.said.readlines()[-8:]).rstrip()


def _end(process: subprocess.Popen[str], said: IO[str]) -> None:
    """End it."""
    process.kill()
    process.communicate()
    said.close()


def interpreter() -> str:
    """The interpreter that vLLM is installed in.

    Raises:
        ValueError: there is none.
    """
    named = os.environ.get(PYTHON)
    if named:
        if not Path(named).is_file():
            raise ValueError(
                f"{PYTHON} names {named}, and there is no such file: expected the python of an environment"
            )
        return named
    if find_spec("vllm") is None:
        raise ValueError(
            "model.policy.vllm: vLLM is not installed here. It fixes the version of PyTorch, so give it an environment "
            f"of its own (python -m venv VLLM, VLLM/bin/pip install vllm) and set {PYTHON}=VLLM/bin/python"
        )
    return sys.executable


def _check(sampling: Sampling, policy: Publishing) -> None:
    if sampling.repetition_window:
        raise ValueError(
            "model.policy.vllm: vLLM has no repetition-aware sampling: set model.sampling.repetition_window to 0, or "
            "leave out vllm"
        )
    if sampling.weights == "int8" or sampling.cuda_graphs:
        raise ValueError("model.policy.vllm goes neither with model.sampling.weights int8 nor with cuda_graphs")
    if isinstance(policy, nn.Module) and is_sharded(policy):
        raise ValueError("model.policy.vllm does not speak for sharded weights: leave it out, or use the strategy ddp")


def _request(prompt: Prompt, sampling: Sampling, layout: Layout) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams``: the same limits."""
    words = len(prompt.text) - prompt.prefix
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature else 1.0,
        "top_k": sampling.top_k if sampling.temperature else 0,
        "seed": prompt.seed % 2**63,
        "min_tokens": int(sampling.min_ratio * words),
        "max_tokens": max(int(sampling.max_ratio * words), 1),
        "stop_token_ids": [layout.end],
    }
