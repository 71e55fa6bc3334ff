# SPDX-License-Identifier: Apache-2.0
"""One DiffRO step against an SFT step, and against a policy-gradient step that makes sound and transcribes it.

    python benchmarks/diffro_cost.py

The same sixteen rows of the embedded audio corpus, one process, turn by turn, CPU seconds of each turn. The
policy-gradient step is REINFORCE with the mean reward as baseline and the same divergence: speak, vocode, transcribe
with the labelling recogniser, score what was spoken under policy and reference, step. Memory: what autograd holds after
the objective's forward beside the logits, at 6,561 speech tokens. Writes ``results/diffro_cost.json``.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpora import DRAWN, Corpus, Fit
from jsonargparse import auto_cli
from torch import Tensor

from tts_align.batch import Batch, Scored, Totals, Utterances
from tts_align.data.collate import MicroBatches, PlanSampler
from tts_align.evaluation.judges.base import Expected, SpeechSample
from tts_align.logprobs import full_kl
from tts_align.models.base.code_places import code_places
from tts_align.models.base.layout import Layout, TokenRow, collate
from tts_align.models.base.rollouts import roll_out
from tts_align.models.reward.config import RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import SFT, DiffRO, Objective, Part, Parts
from tts_align.objectives.base import Step
from tts_align.training.module import AlignModule
from tts_align.utils.files import write_json

RESULTS = Path(__file__).with_name("results") / "diffro_cost.json"
BETA = 0.1


def first_batch(corpus: Corpus, rows: int) -> Batch:
    """Rows of the corpus, as DiffRO reads them."""
    corpus.rows_per_step = rows
    data = corpus.data(Fit(DiffRO(), 1e-3), 0)
    data.prepare(corpus.base)
    split = data._splits["train"]
    micro = next(iter(PlanSampler(split.plan, split.examples)))
    return MicroBatches(split.examples, split.layout)[micro]


def trained_step(objective: Objective, corpus: Corpus, batch: Batch) -> Callable[[], None]:
    """Score, loss, backward, AdamW: what the trainer does in a step, without the trainer."""
    reward = RewardModel(str(corpus.reward(0))) if Part.REWARD in objective.needs else None
    module = AlignModule(objective, corpus.policy(), reward=reward)
    optimizer = torch.optim.AdamW([value for value in module.parameters() if value.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        module.objective(module.score(batch)).loss.backward()
        optimizer.step()

    return step


def policy_gradient_step(corpus: Corpus, batch: Batch) -> Callable[[], None]:
    """REINFORCE on the transcript of the sound, with the same divergence from the reference."""
    policy, reference, listener, vocoder = corpus.policy(), corpus.base, corpus.listener("labeller"), corpus.vocoder
    assert vocoder is not None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        spoken = roll_out(batch, policy, DRAWN)
        said = spoken.utterances
        assert said is not None
        codebook_size = [row[real] for row, real in zip(said.speech, said.mask, strict=True)]
        sounds = vocoder.speak(codebook_size, said.speakers)
        heard = [SpeechSample(*each, vocoder.sample_rate) for each in zip(codebook_size, sounds, strict=True)]
        verdicts = listener.judge(heard, [Expected(text, {"": text}) for text in said.target_texts])
        rewards = -torch.tensor([verdict.cer for verdict in verdicts])
        scored = policy(spoken.rows, logits=True)
        with torch.no_grad():
            frozen = reference(spoken.rows, logits=True).logits
        loss = -((rewards - rewards.mean()) * scored.sums()).mean() + BETA * full_kl(scored.logits, frozen).mean()
        loss.backward()
        optimizer.step()

    return step


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held(estimator: Any, rows: int = 8, tokens: int = 250, codebook_size: int = 6561) -> dict[str, float]:
    """Bytes that autograd keeps after the objective's forward, as multiples of the logits."""
    layout = Layout("cosyvoice2", codebook_size)
    random = torch.Generator().manual_seed(0)
    speech = torch.randint(codebook_size, (rows, tokens), generator=random)
    token_rows = [TokenRow((1, 2), tuple(row.tolist())) for row in speech]
    collated = collate(token_rows, layout)
    logits = torch.randn(len(collated.target), layout.vocabulary, generator=random)
    frozen = logits + torch.randn(logits.shape, generator=random)
    logits.requires_grad_()
    nothing: tuple[Any, ...] = ("",) * rows
    said = Utterances(
        **code_places(token_rows, layout),
        rows=tuple(token_rows),
        seeds=tuple(range(rows)),
        transcripts=nothing,
        target_texts=("あ" * 40,) * rows,
        speakers=nothing,
        attributes=({},) * rows,
    )
    reward = RewardModel(sizes=RewardSizes(codebook_size, "あ", width=64, layers=1, feed_forward=64, decoder_layers=1))
    batch = Batch(
        collated, torch.ones(rows, dtype=torch.bool), Totals(rows, len(logits), rows, len(logits)), utterances=said
    )
    empty = torch.zeros(collated.mask.shape)
    step = Step(
        batch,
        Scored(empty, collated.mask, logits),
        Scored(empty, collated.mask, frozen),
        parts=Parts({Part.REWARD: reward.requires_grad_(False).eval()}),
    )
    kept: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        one = _Held(tensor)
        kept.append(weakref.ref(one))
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        outcome = DiffRO(estimator=estimator)(step)
    gc.collect()
    alive = {one.tensor.untyped_storage().data_ptr(): one.tensor.nbytes for ref in kept if (one := ref()) is not None}
    alive.pop(logits.untyped_storage().data_ptr(), None)
    large = [size for size in alive.values() if size >= len(logits) * codebook_size * 4]
    assert outcome.loss.requires_grad
    return {
        "large_tensors": len(large),
        "bytes": sum(alive.values()),
        "logits_bytes": logits.nbytes,
        "ratio": round(sum(alive.values()) / logits.nbytes, 3),
    }


def main(
    work: Path = Path("runs/demo_table1"), results: Path = RESULTS, rounds: int = 12, rows: int = 16, threads: int = 1
) -> None:
    """Measure and write.

    Args:
        work: candidates and reward models lie in its folder ``audio``; what is not there is made.
        results: JSON file.
        rounds: turns; two more warm up.
        rows: in the batch.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    corpus = Corpus("audio", work / "audio")
    batch = first_batch(corpus, rows)
    steps = {
        "sft": trained_step(SFT(), corpus, batch),
        "diffro": trained_step(DiffRO(beta=BETA, resample=False), corpus, batch),
        "diffro_free": trained_step(DiffRO(beta=BETA, resample=False, rollout="free"), corpus, batch),
        "policy_gradient": policy_gradient_step(corpus, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            if turn >= 2:
                seconds[name].append(time.process_time() - begun)
    found = {name: summary(values) for name, values in seconds.items()}
    ratios = {f"{name}_to_sft": summary(np.divide(seconds[name], seconds["sft"])) for name in steps if name != "sft"}
    ratios["policy_gradient_to_diffro"] = summary(np.divide(seconds["policy_gradient"], seconds["diffro"]))
    memory = {estimator: held(estimator) for estimator in ("straight_through", "soft")}
    write_json(results, {"rows": rows, "rounds": rounds, "cpu_seconds": found, "ratios": ratios, "memory": memory})
    print(found, ratios, memory, sep="\n")


def summary(values: Any) -> dict[str, float]:
    """Median and range."""
    return {"median": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
