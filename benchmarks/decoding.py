# SPDX-License-Identifier: Apache-2.0
"""What a token of speech costs in decoding, against ``generate`` of transformers and against the bare matrix products.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py    # some minutes of one core; writes results/decoding.json

One batch of random texts is spoken to the same length by all: ours in each number format of the weights, transformers'
``generate`` with the same sizes, a dynamic cache, and top-k and nucleus sampling (no repetition rule: less work), and
the matrix products that any decoder of these sizes must do, with nothing between them. All take turns in one process,
in CPU time. Coarser weights are also spoken greedily, and the share of tokens that differ from those of the stored
weights is counted, over whole utterances (once one differs, most of what follows does) and for the next token alone.
``--profile true`` also says where the time of ours goes, by PyTorch's profiler: which part of it reads the prompts,
multiplies matrices, attends to the cache, normalises and rotates, draws tokens, or is Python between all that.
``--device cuda`` runs the same on a GPU in wall time; untested so far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from machine import Clock, machine, ratio, save
from sampling import BIG, COSYVOICE, random_model, random_prompts
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GenerationConfig, Qwen2ForCausalLM

from tts_align.models.base.generation import Prompt, Sampling
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.policy.decoding import Decoding
from tts_align.models.policy.matrices import matrix
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes

Name = Literal["small", "larger"]
SIZES: dict[Name, Sizes] = {"small": BIG, "larger": COSYVOICE}
FORMATS = ("own", "bfloat16", "int8")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("aten::_scaled_dot_product", "aten::index_copy_", "aten::index_fill_")
PARTS = {"prefill": "prompts", "feed": "step", "draw_token": "drawing", "poll": "polling"}
"""Methods of a decoding, and what their share is called."""


def theirs(sizes: Sizes, prompts: list[Prompt], tokens: int, device: str) -> Callable[[], None]:
    """``generate`` with a head over the speech vocabulary, for exactly so many tokens."""
    config = sizes.backbone()
    config.vocab_size = sizes.codebook_size + 3
    model = Qwen2ForCausalLM(config).to(device).eval()
    length = max(len(prompt.text) for prompt in prompts) + 2
    ids = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        mask[row, length - len(prompt.text) - 2 :] = 1
    how = GenerationConfig(
        do_sample=True,
        top_k=25,
        top_p=0.8,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=sizes.codebook_size,
        pad_token_id=0,
    )
    return lambda: model.generate(ids, attention_mask=mask, generation_config=how)


def products(model: Qwen2CodecLM, rows: int, tokens: int) -> Callable[[], None]:
    """The matrix products of so many steps, each on inputs of its width, and nothing else."""
    weights = [
        weight
        for block in model.backbone.blocks
        for weight in (
            torch.cat([block.self_attn.q_proj.weight, block.self_attn.k_proj.weight, block.self_attn.v_proj.weight]),
            block.self_attn.o_proj.weight,
            block.mlp.gate_proj.weight,
            block.mlp.up_proj.weight,
            block.mlp.down_proj.weight,
        )
    ]
    weights.append(model.llm_decoder.weight)
    inputs = {width: torch.randn(rows, width, device=weights[0].device) for width in {one.shape[1] for one in weights}}

    def run() -> None:
        for _ in range(tokens):
            for weight in weights:
                functional.linear(inputs[weight.shape[1]], weight)

    return run


def prompt_products(model: Qwen2CodecLM, rows: int, length: int) -> Callable[[], None]:
    """The matrix products of reading prompts of one length, which no decoder is spared, either."""
    blocks = [one.weight for name, one in model.backbone.named_modules() if name.endswith("_proj")]
    inputs = {width: torch.randn(rows * length, width) for width in {one.shape[1] for one in blocks}}
    last = torch.randn(rows, model.llm_decoder.weight.shape[1])

    def run() -> None:
        for weight in blocks:
            functional.linear(inputs[weight.shape[1]], weight)
        functional.linear(last, model.llm_decoder.weight)

    return run


def profiled(speak: Callable[[], Any]) -> dict[str, float]:
    """Share of the time of each part of a decoding, in percent; Python is what lies between the operations of a part.

    The profiler itself takes time at every operation, most of which counts as Python here.
    """
    before = {name: getattr(Decoding, name) for name in PARTS}

    def named(name: str) -> Callable[..., Any]:
        def method(*given: Any, **named: Any) -> Any:
            with record_function(f"part {name}"):
                return before[name](*given, **named)

        return method

    with contextlib.ExitStack() as patches:
        for name in PARTS:
            patches.callback(setattr, Decoding, name, before[name])
            setattr(Decoding, name, named(name))
        with profile(activities=[ProfilerActivity.CPU]) as found, record_function("part whole"):
            speak()
    times: dict[str, float] = {}
    for event in found.events():
        part: Any = event
        while part is not None and not part.name.startswith("part "):
            part = part.cpu_parent
        if part is not None:
            where = PARTS.get(part.name.removeprefix("part "), "rest")
            name = f"{where}: {_kind(event.name, where)}"
            times[name] = times.get(name, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return {name: round(100 * one / total, 1) for name, one in sorted(times.items())}


def _kind(operation: str, where: str) -> str:
    if operation.startswith("part "):
        return "Python"
    if operation in PRODUCTS:
        return "products"
    if where == "step":
        return "attention" if operation.startswith(ATTENTION) else "norms, rotary, activation, copies"
    return "operations"


@torch.no_grad()
def changed(model: Qwen2CodecLM, prompts: list[Prompt], sampling: Sampling, kind: str) -> dict[str, float]:
    """Share of greedy tokens that coarser weights change, over utterances and for the next token alone."""
    greedy = replace(sampling, temperature=0.0)
    exact = model.generate(prompts, greedy)
    coarse = model.generate(prompts, replace(greedy, weights=kind))
    pairs = [(one.speech, other.speech[: len(one.speech)]) for one, other in zip(exact, coarse, strict=True)]
    differing = sum(int((a[: len(b)] != b).sum()) + len(a) - len(b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
    rows = [TokenRow(prompt.text, tuple(one.speech.tolist())) for prompt, one in zip(prompts, exact, strict=True)]
    states: list[torch.Tensor] = []
    hook = model.backbone.register_forward_hook(lambda *given: states.append(given[-1]))
    model(collate(rows, model.layout).to(model.llm_decoder.weight.device))
    hook.remove()
    best = [matrix([model.llm_decoder], name)(states[0]).argmax(-1) for name in ("own", kind)]
    return {"utterances": round(differing, 4), "head_alone": round(float((best[0] != best[1]).float().mean()), 4)}


@torch.no_grad()
def compare(
    size: Name, rows: int, tokens: int, rounds: int, device: str = "cpu", profiles: bool = False
) -> dict[str, Any]:
    """Speak one batch by all ways, turn by turn; the first round warms up."""
    sizes = SIZES[size]
    model = random_model(sizes).to(device).eval()
    prompts = [replace(prompt, text=prompt.text[:10] * 2) for prompt in random_prompts(rows, sizes, (10, 20))]
    length = len(prompts[0].text)
    # Random weights would not end by themselves: every utterance is as long as it may be, as in `generate`.
    sampling = Sampling(min_ratio=tokens / length - 0.01, max_ratio=tokens / length + 1e-6)
    ways: dict[str, Callable[[], Any]] = {
        kind: (lambda kind=kind: model.generate(prompts, replace(sampling, weights=kind)))
        for kind in FORMATS
        if kind != "int8" or device == "cpu"
    }
    ways |= {"generate": theirs(sizes, prompts, tokens, device), "products": products(model, rows, tokens)}
    if device == "cpu":
        ways["prompt_products"] = prompt_products(model, rows, length + 2)
    clock, measure = Clock(device), "wall" if device.startswith("cuda") else "cpu"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, speak in ways.items():
            clock.start()
            speak()
            times[name].append(clock.read()[measure])
    counted = {name: found[1:] for name, found in times.items()}
    prompts_read = counted.pop("prompt_products", None)
    more: dict[str, Any] = {}
    if prompts_read is not None:
        both = [one + other for one, other in zip(counted["products"], prompts_read, strict=True)]
        more["products_of_prompts_too_to_ours"] = ratio(both, counted["own"])
    if profiles:
        more["profile_percent"] = profiled(lambda: model.generate(prompts, sampling))
    return more | {
        "size": size,
        "utterances": rows,
        "tokens": tokens,
        "measure": measure,
        "tokens_per_second": {name: round(rows * tokens / median(found)) for name, found in counted.items()},
        "generate_to_ours": ratio(counted["generate"], counted["own"]),
        "products_to_ours": ratio(counted["products"], counted["own"]),
        "own_to_coarser": {
            kind: ratio(counted["own"], counted[kind]) for kind in FORMATS if kind in counted and kind != "own"
        },
        "changed": {kind: changed(model, prompts, sampling, kind) for kind in FORMATS[1:] if kind in counted},
    }


def main(
    sizes: tuple[Name, ...] = ("small", "larger"),
    rows: tuple[int, ...] = (64, 8),
    tokens: int = 100,
    rounds: int = 5,
    device: str = "cpu",
    profile: bool = False,
    out: str = "decoding",
) -> None:
    """Measure, print and save.

    Args:
        sizes: of the model.
        rows: utterances in the batch.
        tokens: of each.
        rounds: of turns that count.
        device: cpu or cuda.
        profile: also say where the time of ours goes.
        out: name of the results.
    """
    found: list[dict[str, Any]] = []
    for size in sizes:
        for count in rows:
            one = compare(size, count, tokens, rounds, device, profile)
            found.append(one)
            print(
                f"{size} {count:3} utterances: {one['tokens_per_second']['own']} tokens/s, "
                f"{one['generate_to_ours']['median']:.2f} x generate, {one['products_to_ours']['median']:.2f} of the "
                f"products; {one['own_to_coarser']} {one['changed']}",
                flush=True,
            )
            path = save(out, {"machine": machine(device), "rounds": rounds, "rows": found})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
