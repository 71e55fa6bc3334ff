# SPDX-License-Identifier: Apache-2.0
"""What decoding many utterances in one batch saves, against one at a time with the same weights.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py    # some ten minutes; writes results/sampling.json

Three models: the embedded audio base on its own test sentences, the larger random one of ``step.py``, and a random one
that draws from CosyVoice2's vocabulary as CosyVoice2 does. The ways take turns in one process. Every utterance has a
seed of its own, so both ways must say the same, which is checked.
``--device cuda`` runs the same on a GPU and takes ratios of the wall clock around a synchronisation; untested so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import Clock, machine, ratio, save

from tts_align.evaluation.prompts import read_prompts
from tts_align.models.base.generation import Context, Prompt, Sampling, Spoken
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes

BIG = Sizes(
    codebook_size=6561,
    text_vocabulary=500,
    hidden_size=256,
    layers=4,
    heads=4,
    key_value_heads=2,
    intermediate_size=1024,
)
COSYVOICE = Sizes(
    codebook_size=6561,
    text_vocabulary=500,
    hidden_size=384,
    layers=6,
    heads=6,
    key_value_heads=2,
    intermediate_size=2048,
)
"""CosyVoice2's vocabulary behind fewer and narrower layers, so that one by one ends in minutes."""
SPEAKERS = ("sakura", "takumi")
SAME = 0.95
"""Least share of utterances that must be the same to the last token; rounding may turn a draw that lies on the edge."""


def random_model(sizes: Sizes = BIG) -> Qwen2CodecLM:
    """A model of random weights."""
    torch.manual_seed(0)
    return Qwen2CodecLM(sizes=sizes)


def random_prompts(count: int, sizes: Sizes = BIG, text: tuple[int, int] = (10, 40)) -> list[Prompt]:
    """Texts of random ids."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(text[0], text[1] + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(sizes.text_vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(tuple(one), seed) for seed, one in enumerate(ids)]


def demo_prompts(model: Qwen2CodecLM, count: int, sentences: str = "demo:audio/sentences/test.jsonl") -> list[Prompt]:
    """Test sentences of the demo, voices in turn."""
    pairs = zip(itertools.cycle(read_prompts(sentences)), itertools.cycle(SPEAKERS), range(count), strict=False)
    return [model.encode_text(sentence.text, Context(speaker)).prompt(seed) for sentence, speaker, seed in pairs]


def compare(
    model: Qwen2CodecLM, prompts: Sequence[Prompt], sampling: Sampling, rounds: int = 3, device: str = "cpu"
) -> dict[str, Any]:
    """Speak all prompts at once and one by one, turn by turn; one more round, of a few prompts, is for warming up.

    Raises:
        AssertionError: the two ways do not say the same.
    """
    model.to(device).eval()
    clock, measure = Clock(device), "wall" if device.startswith("cuda") else "cpu"
    for few in (prompts[:4], prompts[:1]):
        model.generate(few, sampling)
    batched, single = [], []
    spoken: list[list[Spoken]] = []
    for _ in range(rounds):
        clock.start()
        spoken.append(model.generate(prompts, sampling))
        batched.append(clock.read())
        clock.start()
        spoken.append([model.generate([prompt], sampling)[0] for prompt in prompts])
        single.append(clock.read())
    together, alone = spoken[0], spoken[1]
    same = [a.finished == b.finished and torch.equal(a.speech, b.speech) for a, b in zip(together, alone, strict=True)]
    share = sum(same) / len(same)
    assert share >= SAME, f"only {share:.0%} of the utterances are the same in a batch and alone"
    tokens = sum(len(one.speech) + one.finished for one in together)
    return {
        "utterances": len(prompts),
        "tokens": tokens,
        "same_alone": share,
        "measure": measure,
        "tokens_per_second": {
            name: {kind: round(tokens / median(one[kind] for one in times), 1) for kind in ("cpu", "wall")}
            for name, times in (("batched", batched), ("one_by_one", single))
        },
        "one_by_one_to_batched": {
            kind: ratio([one[kind] for one in single], [one[kind] for one in batched]) for kind in ("cpu", "wall")
        },
    }


def main(utterances: int = 64, rounds: int = 3, device: str = "cpu", out: str = "sampling") -> None:
    """Measure, print and save.

    Args:
        utterances: in the batch.
        rounds: of turns.
        device: cpu or cuda.
        out: name of the results.
    """
    base = Qwen2CodecLM("demo:audio/base")
    demo = Sampling(top_p=0.9, top_k=0, repetition_window=0, min_ratio=1.0, max_ratio=15.0)
    # Random weights hardly ever end by themselves: the length limit does.
    settings = {
        "demo:audio/base": (base, demo_prompts(base, utterances), demo),
        "random, 7 M parameters": (random_model(), random_prompts(utterances), Sampling(min_ratio=1.0, max_ratio=6.0)),
        # The published settings, cut where speech usually ends.
        "random, 22 M parameters, drawn as CosyVoice2": (
            random_model(COSYVOICE),
            random_prompts(utterances, COSYVOICE, (10, 20)),
            Sampling(max_ratio=8.0),
        ),
    }
    rows = []
    for name, (model, prompts, sampling) in settings.items():
        rows.append({"model": name, **compare(model, prompts, sampling, rounds, device)})
        gain, speed = rows[-1]["one_by_one_to_batched"], rows[-1]["tokens_per_second"]
        kind = rows[-1]["measure"]
        print(
            f"{name:45} {speed['batched'][kind]:8.0f} against {speed['one_by_one'][kind]:6.0f} tokens/s:"
            f" {gain[kind]['median']:.1f} times [{gain[kind]['low']:.1f}-{gain[kind]['high']:.1f}]",
            flush=True,
        )
    print(save(out, {"machine": machine(device), "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
