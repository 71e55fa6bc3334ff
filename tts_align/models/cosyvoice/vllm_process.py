# SPDX-License-Identifier: Apache-2.0
"""The process in which vLLM speaks: a script for the interpreter that vLLM is installed in, without this package.

One JSON object a line comes in, one goes out. Vectors and weights lie in safetensors files whose names are given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def head_with_bias() -> Any:
    """A Qwen2 for vLLM with the bias that CosyVoice2's head has."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    class BiasedQwen2(Qwen2ForCausalLM):
        """An ordinary Qwen2, its head apart."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            sizes = vllm_config.model_config.hf_config
            self.lm_head = ParallelLMHead(sizes.vocab_size, sizes.hidden_size, bias=True, prefix=f"{prefix}lm_head")

        def compute_logits(self, hidden_states: Any, *given: Any) -> Any:
            return self.logits_processor(self.lm_head, hidden_states, *given, embedding_bias=self.lm_head.bias)

    return BiasedQwen2


class Speaking:
    """vLLM with one model.

    Args:
        directory: as ``tts-align export --format vllm`` writes it.
        options: of ``vllm.LLM``.
        memory_gib: of the key-value cache; on a CPU the environment says it.
    """

    def __init__(self, directory: str, options: dict[str, Any], memory_gib: float) -> None:
        from vllm import LLM, ModelRegistry
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            options = {**options, "kv_cache_memory_bytes": int(memory_gib * 2**30)}

        ModelRegistry.register_model("CosyVoice2ForCausalLM", head_with_bias())
        self.llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            enable_prompt_embeds=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )

    def weights(self, directory: str) -> dict[str, Any]:
        """Take other weights of the same model, from a folder with a file of them."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        return {}

    def speak(self, vectors: str, requests: list[dict[str, Any]], allowed: list[int]) -> dict[str, Any]:
        """Speech tokens of each request, and whether it ended by itself.

        Args:
            vectors: file with the inputs of each prompt, by its number.
            requests: how tokens are drawn: arguments of ``vllm.SamplingParams``.
            allowed: tokens that may be drawn: speech tokens and end-of-speech, the same for all.
        """
        from safetensors.torch import load_file
        from vllm import SamplingParams

        inputs = load_file(vectors)
        prompts = [{"prompt_embeds": inputs[str(number)]} for number in range(len(requests))]
        drawn = [SamplingParams(detokenize=False, allowed_token_ids=allowed, **one) for one in requests]
        outputs = [one.outputs[0] for one in self.llm.generate(prompts, drawn, use_tqdm=False)]
        finished = [one.finish_reason == "stop" for one in outputs]
        tokens = [list(one.token_ids) for one in outputs]
        tokens = [ids[:-1] if end else ids for ids, end in zip(tokens, finished, strict=True)]
        return {"tokens": tokens, "finished": finished}


def main() -> None:
    """Answer until the input ends; what libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: it ends with this one
    speaking: Speaking | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        do = asked.pop("do")
        try:
            if do == "load":
                speaking, found = Speaking(**asked), {}
            else:
                call: Callable[..., dict[str, Any]] = getattr(speaking, do)
                found = call(**asked)
        except Exception as error:  # told to the process that asked
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
