# SPDX-License-Identifier: Apache-2.0
"""DiffRO with an attribute: the voice is asked to be the other one, and its pitch is measured on the sound.

    python benchmarks/diffro_attribute.py

The reward model of seed 0 learns the voice beside the text. Then the policy trains towards the text alone, and towards
the text and the voice ``takumi`` in every row; the dev sentences are spoken in the voice ``sakura``, and the sound, not
the tokens, says whether it moved: its median pitch, between the pitches of the two voices under the base. Speaking rate
cannot be had this way: a forced prefix has the length it has. Writes ``results/diffro_attribute.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpora import SPEAKERS, TESTED, Corpus, Fit
from jsonargparse import auto_cli
from torchaudio.functional import detect_pitch_frequency

from tts_align.evaluation.listening import speak_and_judge
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import utterance_requests, waveforms_of
from tts_align.evaluation.statistics.intervals import paired_difference
from tts_align.models.base.policy import CodecLM
from tts_align.models.reward.config import Attribute
from tts_align.objectives import DiffRO
from tts_align.utils.files import write_json

RESULTS = Path(__file__).with_name("results") / "diffro_attribute.json"
VOICE = Attribute("speaker", "classes", SPEAKERS)
RATE, ANCHOR = 1e-3, 0.3
"""An epoch with a weak anchor, which leaves the reward the most room."""


def heard(corpus: Corpus, policy: CodecLM, voice: str, sentences: int) -> dict[str, dict[str, float]]:
    """Pitch, error rate and reading of each dev sentence in one voice."""
    policy.eval()
    items = utterance_requests(read_prompts("demo:audio/sentences/dev.jsonl")[:sentences], [voice], 1, 1000)
    parts = Parts(policy, corpus.judge, TESTED, corpus.vocoder)
    judged = [one for one in speak_and_judge(policy, parts, items, 256) if one.speech]
    assert corpus.vocoder is not None
    found = {}
    for one, sound in zip(judged, waveforms_of(corpus.vocoder, judged), strict=True):
        if (verdict := one.verdict) is None:
            continue
        pitch = detect_pitch_frequency(sound[None], corpus.vocoder.sample_rate, freq_low=70, freq_high=400)
        found[one.prompt.id] = {
            "pitch_hz": float(pitch.median()),
            "cer": verdict.cer,
            "nearest_cer": verdict.nearest_cer,
        }
    return found


def means(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Over the sentences."""
    return {name: float(np.mean([one[name] for one in found.values()])) for name in ("pitch_hz", "cer", "nearest_cer")}


def differences(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Second minus first on the same sentences and seeds, with 95 % intervals."""
    names = sorted(one.keys() & other.keys())
    return {
        key: vars(paired_difference([one[n][key] for n in names], [other[n][key] for n in names], names))
        for key in ("pitch_hz", "cer", "nearest_cer")
    }


def main(
    work: Path = Path("runs/demo_table1"), results: Path = RESULTS, sentences: int = 192, threads: int = 1
) -> None:
    """Run and write.

    Args:
        work: candidates and reward models lie in its folder ``audio``; what is not there is made.
        results: JSON file.
        sentences: of the dev sentences.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    corpus = Corpus("audio", work / "audio")
    reward = corpus.reward(0, attributes=(VOICE,))
    base = {voice: heard(corpus, corpus.base, voice, sentences) for voice in SPEAKERS}
    found: dict[str, Any] = {"sentences": sentences, "base": {voice: means(one) for voice, one in base.items()}}
    print(found, flush=True)
    for name, knobs in {
        "text": {"tasks": ("asr",)},
        "text_and_voice": {"tasks": ("asr", "speaker"), "targets": {"speaker": "takumi"}},
        "text_and_voice_without_anchor": {
            "tasks": ("asr", "speaker"),
            "targets": {"speaker": "takumi"},
            "sft_weight": 0.0,
        },
    }.items():
        objective = DiffRO(**({"resample": False, "sft_weight": ANCHOR} | knobs))  # type: ignore[arg-type]
        module, cost = corpus.fit(Fit(objective, RATE, reward=reward), 0)
        said = heard(corpus, module.policy, "sakura", sentences)
        last = {
            k.removeprefix("train/"): float(v) for k, v in module.trainer.callback_metrics.items() if "reward_" in k
        }
        found[name] = means(said) | {"difference_from_base": differences(base["sakura"], said), "last": last, **cost}
        print(name, found[name], flush=True)
        write_json(results, found)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
