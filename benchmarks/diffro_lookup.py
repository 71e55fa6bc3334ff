# SPDX-License-Identifier: Apache-2.0
"""What a DiffRO step costs when sampled tokens are looked up, against one-hots times the table of vectors.

    OMP_NUM_THREADS=1 python benchmarks/diffro_lookup.py    # about two minutes; writes results/diffro_lookup.json

One policy of CosyVoice's vocabulary, one reward model, one batch; forward, reward and backward of both ways by turns in
one process, in CPU time, drawn anew and as the recipe has it (``resample: false``). Both draw the same tokens; the
losses and gradients are compared. ``objective`` is the part behind the policy's own forward and before its backward.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import machine, ratio, save
from sampling import BIG, random_model

from tts_align.batch import Batch, Totals, Utterances
from tts_align.models.base.code_places import code_places
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.reward.config import RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import DiffRO, Part, Parts
from tts_align.objectives.base import Step


def made(rows: int, tokens: int) -> tuple[Any, Batch, RewardModel]:
    """A policy, a batch of random speech and a reward model."""
    policy = random_model(BIG).train()
    random = torch.Generator().manual_seed(0)
    speech = torch.randint(BIG.codebook_size, (rows, tokens), generator=random)
    token_rows = [TokenRow((1, 2, 3, 4), tuple(row.tolist())) for row in speech]
    collated = collate(token_rows, policy.layout)
    nothing: tuple[Any, ...] = ("",) * rows
    said = Utterances(
        **code_places(token_rows, policy.layout),
        rows=tuple(token_rows),
        seeds=tuple(range(rows)),
        transcripts=nothing,
        target_texts=("あ" * 20,) * rows,
        speakers=nothing,
        attributes=({},) * rows,
    )
    sizes = RewardSizes(BIG.codebook_size, "あ", width=256, layers=3, feed_forward=768, decoder_layers=1)
    reward = RewardModel(sizes=sizes).requires_grad_(False).eval()
    count = len(collated.target)
    return policy, Batch(collated, torch.ones(rows).bool(), Totals(rows, count, rows, count), utterances=said), reward


def main(rows: int = 16, tokens: int = 120, rounds: int = 7, out: str = "diffro_lookup") -> None:
    """Measure, print and save.

    Args:
        rows: in the batch.
        tokens: of each.
        rounds: turns that count; one more warms up.
        out: name of the results.
    """
    policy, batch, reward = made(rows, tokens)
    with torch.no_grad():
        frozen = policy(batch.rows, logits=True)
        frozen = replace(frozen, logits=frozen.logits + torch.randn(frozen.logits.shape) * 0.1)
    parts = Parts({Part.REWARD: reward})
    found = []
    for resample in (True, False):
        objective = DiffRO(resample=resample)
        times: dict[str, list[tuple[float, float]]] = {"one_hot": [], "looked_up": []}
        gradients = {}
        for _ in range(rounds + 1):
            for way in times:
                reward.looks_up = way == "looked_up"
                policy.zero_grad(set_to_none=True)
                begun = time.process_time()
                scored = policy(batch.rows, logits=True)
                forward = time.process_time()
                logits = scored.logits.detach().requires_grad_()
                outcome = objective(Step(batch, replace(scored, logits=logits), frozen, parts=parts))
                (pull,) = torch.autograd.grad(outcome.loss, logits)
                behind = time.process_time()
                scored.logits.backward(pull)
                times[way].append((time.process_time() - begun, behind - forward))
                gradients[way] = (float(outcome.loss.detach()), pull)
        assert gradients["one_hot"][0] == gradients["looked_up"][0]
        torch.testing.assert_close(gradients["looked_up"][1], gradients["one_hot"][1], rtol=1e-3, atol=1e-8)
        steps, behind = ({way: [one[i] for one in all_[1:]] for way, all_ in times.items()} for i in (0, 1))
        found.append(
            {
                "resample": resample,
                "step": ratio(steps["looked_up"], steps["one_hot"]),
                "objective": ratio(behind["looked_up"], behind["one_hot"]),
                "seconds": {way: round(sorted(values)[len(values) // 2], 4) for way, values in steps.items()},
            }
        )
        print(found[-1], flush=True)
        path = save(out, {"machine": machine("cpu"), "rows": rows, "tokens": tokens, "rounds": rounds, "found": found})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
