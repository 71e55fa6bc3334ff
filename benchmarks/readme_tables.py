# SPDX-License-Identifier: Apache-2.0
"""Writes the result tables of README.md from ``results/``: ``python benchmarks/readme_tables.py``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
METRICS = ("accuracy", "cer", "nearest_cer", "bad_case_ratio")


def mean(values: Sequence[float]) -> str:
    """Per cent, mean ± standard error."""
    percent = 100 * np.asarray(values)
    error = percent.std(ddof=1) / np.sqrt(len(percent)) if len(percent) > 1 else 0.0
    return f"{percent.mean():.1f} ± {error:.1f}"


def table1(found: dict[str, Any]) -> str:
    """The methods on both corpora, the clamp sweep, and what the pair separates."""
    lines = ["| corpus | method | steps | accuracy % | CER % | nearest CER % | bad % |"]
    lines += ["|---|---|---|---|---|---|---|"]
    rows = found["rows"] + found["step_matched"]
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["corpus"] == corpus):
            mine = [row for row in rows if (row["corpus"], row["method"]) == (corpus, method)]
            cells = " | ".join(mean([row[metric] for row in mine]) for metric in METRICS)
            steps = f"{np.mean([row['steps'] for row in mine]):.0f}" if "steps" in mine[0] else ""
            lines.append(f"| {corpus} | `{method}` | {steps} | {cells} |")
    lines += ["", "Paired differences of `tkto_unpaired`, same sentences, voices and seeds, with 95 % intervals:", ""]
    lines += ["| corpus | against | seed | accuracy, points | nearest CER, points |", "|---|---|---|---|---|"]
    for one in found["comparisons"]:
        if one["second"] in ("kto_unpaired", "kto_same_anchor", "tkto_unpaired_w1"):
            cells = " | ".join(points(one[metric]) for metric in ("accuracy", "nearest_cer"))
            lines.append(f"| {one['corpus']} | `{one['second']}` | {one['seed']} | {cells} |")
    lines += ["", "Clamp and μ of `tkto_unpaired`, seed 0 (the paper uses μ 1 and ±2 at 0.5B parameters):", ""]
    lines += ["| corpus | μ | L, U | accuracy % | nearest CER % |", "|---|---|---|---|---|"]
    for one in found["clamp_sweep"]:
        cells = f"{100 * one['accuracy']:.1f} | {100 * one['nearest_cer']:.1f}"
        lines.append(f"| {one['corpus']} | {one['mu']:g} | ∓{one['upper']:g} | {cells} |")
    lines += ["", "Token rewards log π⁺ − log π⁻ in nats, at the token that decides the reading and elsewhere:", ""]
    lines += ["| corpus | seed | desirable | undesirable | elsewhere, sd | |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one['corpus']} | {one['seed']} | {one['desirable_target_mean']:+.2f}"
        f" | {one['undesirable_target_mean']:+.2f} | {one['undesirable_elsewhere_sd']:.2f}"
        f" | {one['separation_in_sd']:.1f} sd |"
        for one in found["token_rewards"]
    ]
    return "\n".join(lines)


def points(one: dict[str, float]) -> str:
    """A difference with its interval, in percentage points."""
    return f"{100 * one['value']:+.1f} ({100 * one['low']:+.1f} to {100 * one['high']:+.1f})"


def replaced(text: str, block: str, table: str) -> str:
    """The text with another table between the block's marks."""
    pattern = re.compile(rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no block {block!r}")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def written(text: str) -> str:
    """README.md as the saved results say it must be."""
    blocks = {
        "table1": ("demo_table1", table1),
        "cost": ("step", cost),
        "size": ("cosyvoice_size", size),
        "batched": ("sampling", batched),
    }
    for block, (name, make) in blocks.items():
        path = RESULTS / f"{name}.json"
        text = replaced(text, block, make(json.loads(path.read_text("utf-8"))))
    return text


def cost(found: dict[str, Any]) -> str:
    """Ratios of CPU time per objective, packed and padded, median and range over the rounds."""
    lines = ["| objective | forward passes F | packed | padded, length-bucketed |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["objective"] for row in found["rows"]):
        mine = {row["packed"]: row for row in found["rows"] if row["objective"] == name}
        ratios = [mine[packed]["ratio_to_bare_packed"][mine[packed]["measure"]] for packed in (True, False)]
        cells = " | ".join(f"{one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})" for one in ratios)
        lines.append(f"| `{name}` | {mine[True]['passes']} | {cells} |")
    return "\n".join(lines)


CASES = {
    "full": "TKTO step, all weights, float32",
    "lora": "TKTO step, LoRA of rank 16 on float32",
    "lora_bfloat16": "TKTO step, LoRA of rank 16 on bfloat16",
    "decoding": "speaking, float32",
}


def size(found: dict[str, Any]) -> str:
    """Largest memory of a process, and processor time, at CosyVoice's full size."""
    lines = ["| | trained parameters | memory at most | CPU time |", "|---|---|---|---|"]
    for row in found["rows"]:
        trained = f"{row['trained_parameters'] / 1e6:.1f} M" if "trained_parameters" in row else ""
        gigabytes, seconds = f"{row['peak_bytes'] / 1e9:.1f} GB", f"{row['seconds']['cpu']:.0f} s"
        lines.append(f"| {CASES[row['case']]} | {trained} | {gigabytes} | {seconds} |")
    return "\n".join(lines)


def batched(found: dict[str, Any]) -> str:
    """Tokens a second in one batch and one by one."""
    lines = ["| model | one by one, tokens/s | in one batch, tokens/s | |", "|---|---|---|---|"]
    for row in found["rows"]:
        speed, kind = row["tokens_per_second"], row["measure"]
        gain = row["one_by_one_to_batched"][kind]["median"]
        cells = f"{speed['one_by_one'][kind]:.0f} | {speed['batched'][kind]:.0f} | {gain:.1f}×"
        lines.append(f"| {row['model']} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8")), "utf-8")
