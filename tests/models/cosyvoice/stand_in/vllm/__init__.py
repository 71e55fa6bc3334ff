# SPDX-License-Identifier: Apache-2.0
"""As much of vLLM's interface as ``vllm_process.py`` uses, and Qwen2 typed anew: a prompt at a time, no cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file


@dataclass
class SamplingParams:
    """How tokens are drawn."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_tokens: int
    max_tokens: int
    stop_token_ids: list[int]
    allowed_token_ids: list[int]
    detokenize: bool


KNOWN = {}
"""Classes by the names in a config."""


class ModelRegistry:
    """Where classes are named."""

    @staticmethod
    def register_model(name, model):
        KNOWN[name] = model


class LLM:
    """A model and its prompts."""

    def __init__(self, model, skip_tokenizer_init, enable_prompt_embeds, dtype, max_model_len, **_):
        assert skip_tokenizer_init
        assert enable_prompt_embeds
        self.config = json.loads(Path(model, "config.json").read_text())
        assert self.config["torch_dtype"] == dtype
        assert (self.config["architectures"][0] in KNOWN) is self.config["use_bias"]
        self.dtype, self.room, self.weights = getattr(torch, dtype), max_model_len, {}
        self._load(load_file(Path(model, "model.safetensors")).items())

    def _load(self, pairs):
        weights = dict(pairs)
        assert not self.weights or weights.keys() == self.weights.keys()
        self.weights = {name: value.to(self.dtype) for name, value in weights.items()}

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self._load(load_file(Path(kwargs["weights_path"], "model.safetensors")).items())

    def generate(self, prompts, sampling, use_tqdm):
        return [
            SimpleNamespace(outputs=[self._one(prompt["prompt_embeds"], one)])
            for prompt, one in zip(prompts, sampling, strict=True)
        ]

    def _one(self, vectors, sampling):
        assert len(vectors) + sampling.max_tokens <= self.room
        noise, said = torch.Generator().manual_seed(sampling.seed), []
        inputs = vectors.to(self.dtype)
        while len(said) < sampling.max_tokens:
            logits = self._logits(inputs).float()
            allowed = set(sampling.allowed_token_ids)
            if len(said) < sampling.min_tokens:
                allowed -= set(sampling.stop_token_ids)
            masked = torch.full_like(logits, -torch.inf)
            masked[sorted(allowed)] = logits[sorted(allowed)]
            token = int(masked.argmax() if sampling.temperature == 0 else _draw(masked, sampling, noise))
            said.append(token)
            if token in sampling.stop_token_ids:
                return SimpleNamespace(token_ids=said, finish_reason="stop")
            inputs = torch.cat([inputs, self.weights["model.embed_tokens.weight"][token][None]])
        return SimpleNamespace(token_ids=said, finish_reason="length")

    def _logits(self, hidden):
        """Of what follows, the whole sequence anew."""
        w, config = self.weights, self.config
        for number in range(config["num_hidden_layers"]):
            block = f"model.layers.{number}."
            normed = self._norm(hidden, block + "input_layernorm")
            query, key, value = (
                torch.nn.functional.linear(
                    normed, w[f"{block}self_attn.{name}_proj.weight"], w[f"{block}self_attn.{name}_proj.bias"]
                ).unflatten(-1, (heads, -1))
                for name, heads in zip(
                    "qkv", (config["num_attention_heads"], *[config["num_key_value_heads"]] * 2), strict=True
                )
            )
            mixed = torch.nn.functional.scaled_dot_product_attention(
                *(self._turned(one).transpose(0, 1) for one in (query, key)),
                value.transpose(0, 1),
                is_causal=True,
                enable_gqa=True,
            )
            hidden = hidden + mixed.transpose(0, 1).flatten(1) @ w[f"{block}self_attn.o_proj.weight"].T
            normed = self._norm(hidden, block + "post_attention_layernorm")
            gate, up, down = (w[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
            hidden = hidden + (torch.nn.functional.silu(normed @ gate) * (normed @ up)) @ down
        last = self._norm(hidden, "model.norm")[-1]
        return last @ w["lm_head.weight"].T + w.get("lm_head.bias", 0)

    def _norm(self, hidden, name):
        wide = hidden.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return self.weights[f"{name}.weight"] * wide.to(hidden.dtype)

    def _turned(self, heads):
        half = heads.shape[-1] // 2
        angle = torch.arange(len(heads))[:, None] * self.config["rope_theta"] ** (-torch.arange(half) / half)
        cosine, sine = angle.cos()[:, None].to(heads.dtype), angle.sin()[:, None].to(heads.dtype)
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def _draw(logits, sampling, noise):
    best, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    kept = best.cumsum(-1) - best < sampling.top_p
    if sampling.top_k:
        kept[sampling.top_k :] = False
    return order[torch.multinomial(best * kept, 1, generator=noise)]
