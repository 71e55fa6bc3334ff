# SPDX-License-Identifier: Apache-2.0
"""Writes the result tables of every README from ``results/``: ``python benchmarks/readme_tables.py``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tts_align.evaluation.table import print_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
METRICS = ("accuracy", "cer", "nearest_cer", "bad_case_ratio")


def mean(values: Sequence[float]) -> str:
    """Per cent, mean ± standard error; of one value that value alone."""
    percent = 100 * np.asarray(values)
    error = f" ± {percent.std(ddof=1) / np.sqrt(len(percent)):.1f}" if len(percent) > 1 else ""
    return f"{percent.mean():.1f}{error}"


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


def points(one: dict[str, float], digits: int = 1) -> str:
    """A difference with its interval, in percentage points."""
    value, low, high = (f"{100 * one[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def replaced(text: str, block: str, table: str) -> str:
    """The text with another table between the block's marks."""
    pattern = re.compile(rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"expected the marks <!-- {block} --> and <!-- /{block} -->")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def diffro(found: dict[str, Any]) -> str:
    """DiffRO's recipe on test sentences, its differences from the base, and what was tried on dev sentences."""
    names = METRICS[:3]
    lines = ["| test sentences | utterances | accuracy % | CER % | nearest CER % |", "|---|---|---|---|---|"]
    for row in found.get("rows", []):
        cells = " | ".join(whole(interval(row, name), 2) for name in names)
        lines.append(f"| {row['method']}, seed {row['seed']} | {row['n']} | {cells} |")
    summary = found["recipe"]["summary"]
    for system, words in (("base", "base, as the recipe tests it"), ("aligned", "the recipe itself")):
        cells = " | ".join(whole(summary[system][name], 2) for name in names)
        lines.append(f"| {words} | {summary[system]['accuracy']['n']} | {cells} |")
    lines += ["", "Differences from the base on the same sentences, voices and draws, with 95 % intervals:", ""]
    lines += ["| | accuracy, points | CER, points | nearest CER, points |", "|---|---|---|---|"]
    differences = {
        f"seed {row['seed']}": row["difference_from_base"]
        for row in found.get("rows", [])
        if "difference_from_base" in row
    }
    if "pooled" in found:
        differences["all seeds"] = found["pooled"]
    for words, one in (differences | {"the recipe itself": summary["difference"]}).items():
        lines.append(f"| {words} | {' | '.join(points(one[name], 2) for name in names)} |")
    lines += ["", "What was tried, on dev sentences, a number for each seed:", ""]
    lines += ["| setting | seeds | updates | CPU s | accuracy % | CER % | nearest CER, points above the base |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for words in dict.fromkeys(trial["words"] for trial in found["dev"]):
        mine = [trial for trial in found["dev"] if trial["words"] == words]
        costs = " | ".join(f"{np.mean([one[name] for one in mine]):.0f}" for name in ("steps", "cpu_seconds"))
        shown = (("accuracy", ".1f"), ("cer", ".2f"), ("nearest_cer_added", "+.2f"))
        cells = " | ".join("; ".join(format(100 * one[name], how) for one in mine) for name, how in shown)
        lines.append(f"| {words} | {', '.join(str(one['seed']) for one in mine)} | {costs} | {cells} |")
    return "\n".join(lines)


def interval(row: dict[str, Any], name: str) -> dict[str, float]:
    """A metric of a row of results with its interval."""
    return {"value": row[name], "low": row["intervals"][name][0], "high": row["intervals"][name][1]}


def diffro_cost(found: dict[str, Any]) -> str:
    """CPU time of a step as a multiple of another's, and memory as a multiple of the logits."""
    names = {
        "diffro_to_sft": "DiffRO to SFT",
        "diffro_free_to_sft": "DiffRO with free roll-outs to SFT",
        "policy_gradient_to_sft": "policy gradient with sound and transcription to SFT",
        "policy_gradient_to_diffro": "policy gradient to DiffRO",
    }
    lines = ["| one step, CPU time | ratio |", "|---|---|"]
    for key, name in names.items():
        one = found["ratios"][key]
        lines.append(f"| {name} | {one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f}) |")
    held = found["memory"]["straight_through"]
    lines.append(f"| held for the backward pass beside the logits, in sizes of the logits | {held['ratio']:.2f} |")
    return "\n".join(lines)


def diffro_manner(found: dict[str, Any]) -> str:
    """Share of what is wanted by both measures, and errors, before and after; what was tried on dev sentences."""
    names = ("wanted_by_rule", "wanted_by_listener", "accuracy", "cer", "nearest_cer")
    head = "wanted, by rule % | wanted, by listener % | accuracy % | CER % | nearest CER %"
    lines = [f"| wanted | policy | seeds | {head} |", "|---" * 8 + "|"]
    for attribute, wanted in found["wanted"].items():
        rows = [row for row in found["rows"] if row["attribute"] == attribute]
        for system in dict.fromkeys(row["system"] for row in rows):
            mine = [row for row in rows if row["system"] == system]
            cells = " | ".join(f"{100 * np.mean([row[name] for row in mine]):.2f}" for name in names)
            lines.append(f"| {attribute}: {wanted} | `{system}` | {len(mine)} | {cells} |")
        for one in (one for one in found["pooled"] if one["attribute"] == attribute):
            cells = " | ".join(points(one["difference"][name], 2) for name in names)
            change = f"`{one['system']}` - `base`, points"
            lines.append(f"| {attribute}: {wanted} | {change} | {len(one['seeds'])} | {cells} |")
    lines += ["", "What was tried on dev sentences, seed 0; the settings chosen are marked:", ""]
    lines += [f"| wanted | setting | {head} |", "|---" * 7 + "|"]
    for row in found["dev"]:
        settings = [one for name, one in found["chosen"].items() if f"_{row['attribute']}" in name]
        mark = ", **chosen**" * any(all(row[name] == value for name, value in one.items()) for one in settings)
        cells = " | ".join(f"{100 * row[name]:.2f}" for name in names)
        lines.append(f"| {row['attribute']} | {row['words']}{mark} | {cells} |")
    return "\n".join(lines)


def written(path: Path) -> str:
    """A README as the saved results say it must be.

    Args:
        path: one of :data:`BLOCKS`, from the root of the checkout.
    """
    text = (ROOT / path).read_text("utf-8")
    for block, (name, make) in BLOCKS[path].items():
        text = replaced(text, block, make(json.loads((RESULTS / name).read_text("utf-8"))))
    return text


def cost(found: dict[str, Any]) -> str:
    """Ratios of CPU time to the lean loop, median and range over the rounds."""
    lines = ["| model | objective | forward passes F | rows of similar length | rows in any order |"]
    lines += ["|---|---|---|---|---|"]
    for size, name in dict.fromkeys((row["size"], row["objective"]) for row in found["rows"]):
        mine = {row["bucketed"]: row for row in found["rows"] if (row["size"], row["objective"]) == (size, name)}
        ratios = [mine[kind]["ratio_to_lean"][mine[kind]["measure"]] for kind in (True, False)]
        cells = " | ".join(f"{one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})" for one in ratios)
        lines.append(f"| {size} | `{name}` | {mine[True]['passes']} | {cells} |")
    return "\n".join(lines)


def cost_rewards(found: dict[str, Any]) -> str:
    """The same of objectives with a reward model, by the lengths of the rows that meet; empty where not measured."""
    lines = [
        "| model | objective | rows of similar length | rows in any order | rows of one length |",
        "|---|---|---|---|---|",
    ]
    for size, name in dict.fromkeys((row["size"], row["objective"]) for row in found["rows"]):
        cells = []
        for kind in ("similar", "any", "equal"):
            mine = [
                row for row in found["rows"] if (row["size"], row["objective"], row["lengths"]) == (size, name, kind)
            ]
            ratios = [row["ratio_to_lean"][row["measure"]] for row in mine]
            cells += [f"{one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})" for one in ratios] or [""]
        lines.append(f"| {size} | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def trl(found: dict[str, Any]) -> str:
    """CPU time of a step as a share of TRL's."""
    lines = ["| model | objective | reference in TRL | ours, s | TRL, s | ours to TRL, all steps | step by step |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        seconds, ratios = row["seconds_per_step"], row["ratio_to_trl"]
        lines.append(
            f"| {row['size']} | `{row['objective']}` | {row['reference']}"
            f" | {seconds['ours']:.2f} | {seconds['trl']:.2f}"
            f" | {row['ratio_of_sums']:.2f} | {ratios['median']:.2f} ({ratios['low']:.2f}–{ratios['high']:.2f}) |"
        )
    return "\n".join(lines)


def trl_profile(found: dict[str, Any]) -> str:
    """Where the seconds of a step go, here and in TRL."""
    lines = ["| model | objective | side | step, s | products, s | attention, s | the rest, s | products, GFLOP |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        seconds = row["seconds"]
        whole, products, attention = (seconds[key] for key in ("whole", "matrix products", "attention"))
        side = "ours" if row["side"] == "ours" else "TRL"
        lines.append(
            f"| {row['size']} | `{row['objective']}` | {side} | {whole:.2f} | {products:.2f} | {attention:.2f}"
            f" | {whole - products - attention:.2f} | {seconds['matrix_gflop']:.0f} |"
        )
    return "\n".join(lines)


def memory(found: dict[str, Any]) -> str:
    """Memory of a step beside the weights, with layers kept and computed again."""
    lines = ["| model | layers | tensors, MB | process, MB | estimate, MB | CPU time |", "|---|---|---|---|---|---|"]
    for row in found["found"]:
        for name, what in (("kept", "kept"), ("recomputed", "computed again")):
            case = row[name]
            sizes = " | ".join(f"{case[f'{key}_bytes'] / 1e6:.0f}" for key in ("counted", "measured", "estimated"))
            time = case["cpu_seconds"] / row["kept"]["cpu_seconds"]
            lines.append(f"| {row['size']} | {what} | {sizes} | {time:.2f} |")
    return "\n".join(lines)


def decoding(found: dict[str, Any]) -> str:
    """Tokens a second against ``generate`` and the bare products, and what coarser weights change."""
    lines = ["| model | weights | tokens/s | to `generate` | bare products to it | greedy tokens that change |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in found["rows"]:
        speed = row["tokens_per_second"]
        for kind in ("own", "bfloat16", "int8"):
            own = kind == "own"
            gain = f"{speed[kind] / speed['generate']:.2f}×"
            share = f"{row['products_to_ours']['median']:.2f}" if own else ""
            changed = "" if own else f"{100 * row['changed'][kind]['utterances']:.0f} %"
            lines.append(f"| {row['size']} | {kind} | {speed[kind]} | {gain} | {share} | {changed} |")
    return "\n".join(lines)


PARTS = {
    "matrix products of the tokens": ("step: products",),
    "attention to the cache": ("step: attention",),
    "norms, rotation, activation, copies": ("step: norms, rotary, activation, copies",),
    "drawing from 6,561 tokens": ("drawing: operations",),
    "Python between these": ("step: Python", "drawing: Python", "polling: Python", "polling: operations"),
    "matrix products of the prompts": ("prompts: products",),
    "the rest of reading them": ("prompts: operations", "prompts: Python", "rest: operations", "rest: Python"),
}


def profile(found: dict[str, Any]) -> str:
    """Where the time of speaking a batch goes."""
    rows = found["rows"]
    lines = ["| part of the time, % | " + " | ".join(row["size"] for row in rows) + " |", "|---|" + "---|" * len(rows)]
    for name, parts in PARTS.items():
        shares = (f"{sum(row['profile_percent'].get(part, 0.0) for part in parts):.0f}" for row in rows)
        lines.append(f"| {name} | {' | '.join(shares)} |")
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


def demo(found: dict[str, Any]) -> str:
    """The table that the first command of README.md ends with."""
    console = Console(width=100, record=True, file=StringIO(), color_system=None)
    print_table(found, console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    return "\n".join(["```", *lines, "```"])


BUDGETS = {
    "none": "",
    "updates": "as many updates",
    "seconds": "as many CPU seconds",
    "epochs": "as many epochs",
}


def recipe(found: dict[str, Any], corpus: str = "audio", fewest: int = 1) -> str:
    """TKTO and other methods beside it, at budgets that are named; those of fewer seeds are left out."""
    lines = ["| method | budget | moving average | seeds | updates | CPU s | accuracy % | CER % | nearest CER % |"]
    lines += ["|---" * 9 + "|"]
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["corpus"] == corpus:
            # TKTO is the same run at every budget: the others are matched to it.
            budget = "" if row["method"] == "tkto" else BUDGETS[row["budget"]]
            groups.setdefault((row["method"], budget, row.get("average", 0.0)), []).append(row)
    for method, budget, average in sorted(groups, key=lambda one: (ORDER.index(one[0]), -one[2])):
        mine = list({row["seed"]: row for row in groups[method, budget, average]}.values())
        if len(mine) < fewest:
            continue
        cells = " | ".join(mean([row[metric] for row in mine]) for metric in METRICS[:3])
        updates = f"{np.mean([row['updates'] for row in mine]):.0f}" if "updates" in mine[0] else ""
        timed = [row["cpu_seconds"] for row in mine if "cpu_seconds" in row]
        seconds = f"{np.mean(timed):.0f}" if timed else ""
        kept = f"{average:g}" if average else ""
        lines.append(f"| `{method}` | {budget} | {kept} | {len(mine)} | {updates} | {seconds} | {cells} |")
    return "\n".join(lines)


def headline(found: dict[str, Any]) -> str:
    """The same on the audio corpus, with the moving average where there is one."""
    averaged = {(row["method"], row["budget"]) for row in found["rows"] if row.get("average")}
    kept = [row for row in found["rows"] if row.get("average") or (row["method"], row["budget"]) not in averaged]
    kept = [row for row in kept if row["method"] != "tkto" or row.get("average")]
    elsewhere = (("dpo", "updates"), ("dpo", "seconds"), ("sft", "updates"))  # in the long table
    kept = [row for row in kept if (row["method"], row["budget"]) not in elsewhere]
    return recipe({"rows": kept}, fewest=5)


def symbolic(found: dict[str, Any]) -> str:
    """The same on the symbolic corpus."""
    return recipe(found, "symbolic")


ORDER = ("base", "tkto", "kto", "dpo", "sft")


def against(found: dict[str, Any]) -> str:
    """Paired differences of TKTO at equal compute, seed by seed."""
    lines = ["| corpus | against | budget | average | seed | accuracy, points | CER, points | nearest CER, points |"]
    lines += ["|---" * 8 + "|"]
    for one in sorted(found["comparisons"], key=lambda one: (one["corpus"], -one.get("average", 0.0))):
        cells = " | ".join(points(one[metric]) for metric in ("accuracy", "cer", "nearest_cer"))
        average = f"{one['average']:g}" if one.get("average") else ""
        other, budget = one["second"], BUDGETS[one["budget"]]
        lines.append(f"| {one['corpus']} | `{other}` | {budget} | {average} | {one['seed']} | {cells} |")
    return "\n".join(lines)


def sweep(found: dict[str, Any]) -> str:
    """Strength and bounds of TKTO's token weights around the best of the grid, on dev sentences of one seed."""
    lines = ["| corpus | rate | SFT anchor | μ | L, U | accuracy % | nearest CER beside the base's, points |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for corpus in ("audio", "symbolic"):
        trials = [one for one in found["dev"] if (one["corpus"], one["method"], one["seed"]) == (corpus, "tkto", 0)]
        tried = [one for one in trials if (one["mu"], one["clamp"]) != (1.0, 3.0)]
        for one in sorted(trials, key=lambda one: (one["mu"], one["clamp"])):
            like = {key: value for key, value in one.items() if key in ("rate", "anchor", "pair_rate")}
            if not one.get("average") and any(like.items() <= other.items() for other in tried):
                cells = f"{one['rate']:g} | {one['anchor']:g} | {one['mu']:g} | ∓{one['clamp']:g}"
                heard = f"{100 * one['accuracy']:.1f} | {100 * one['nearest_cer_added']:+.2f}"
                lines.append(f"| {corpus} | {cells} | {heard} |")
    return "\n".join(lines)


E2E_SYSTEMS = {
    "base": "as it ships",
    "rm": "RM, then stage 2",
    "cascaded": "RM, stage 2, then as much of it again as `stage2`",
    "rm_fm": "RM + FM, then stage 2",
    "rm_fm_lm": "RM + FM + LM, then stage 2",
    "stage2": "RM + FM + LM, stage 2, then one epoch more of it",
    "stage2_as_long": "RM + FM + LM, stage 2, then as many seconds of it as stage 3 takes",
    "stage3": "RM + FM + LM, stage 2, then one epoch of stage 3",
    "recipe": "likewise, at the recipe's own rate",
}


def e2e(found: dict[str, Any]) -> str:
    """Systems of the end-to-end benchmark in the mean of their seeds, and paired differences over all of them."""
    lines = ["| system | seeds | H, bits | I, bits | used % | tokens kept % | LM nats | reconstruction CER % "]
    lines[0] += "| mel distance | accuracy % | CER % | nearest CER % |"
    lines += ["|---" * 12 + "|"]
    pooled = {one["system"]: one for one in found["pooled"]}
    for system, what in E2E_SYSTEMS.items():
        mine = [row for row in found["rows"] if row["system"] == system]
        if not mine:
            continue
        tokens = [f"{np.mean([row[name] for row in mine]):.2f}" for name in ("entropy_bits", "information_bits")]
        shares = [f"{100 * np.mean([row[name] for row in mine]):.0f}" for name in ("used_share", "tokens_unchanged")]
        nats = [row["validation"]["val/lm"] for row in mine if "val/lm" in row.get("validation", {})]
        error = f"{100 * np.mean([row['reconstruction_cer'] for row in mine]):.2f}"
        distance = f"{np.mean([row['mel_distance'] for row in mine]):.3f}"
        heard = [
            whole(pooled[system][name], digits) for name, digits in (("accuracy", 1), ("cer", 2), ("nearest_cer", 2))
        ]
        cells = [*tokens, *shares, f"{np.mean(nats):.2f}" if nats else "", error, distance, *heard]
        lines.append(f"| `{system}`: {what} | {len(mine)} | {' | '.join(cells)} |")
    lines += [
        "",
        "| paired difference | seeds | CER, points | nearest CER, points | accuracy, points | reconstruction |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for one in found["comparisons"]:
        cells = " | ".join(points(one[name]) for name in ("cer", "nearest_cer", "accuracy", "reconstruction_cer"))
        lines.append(f"| `{one['second']}` against `{one['first']}` | {one['seeds']} | {cells} |")
    return "\n".join(lines)


E2E_TOKENS = {"manifest": "as the base was taught", "codec": "of the rows' mel, embedded codec", "run": "after stage 1"}


def e2e_rates(found: dict[str, Any]) -> str:
    """What a policy makes of frozen speech tokens at each learning rate; dev sentences."""
    lines = ["| speech tokens | starts from | peak rate | epochs | moving average | LM nats, held out | training rows "]
    lines[0] += "| utterances | accuracy % | CER % | nearest CER % |"
    lines += ["|---" * 11 + "|"]
    for row in found["rows"]:
        start = "base" if row["start"] == "base" else "stage 1"
        nats = f"{row['nats_before']:.2f} → {row['nats']:.2f} | {row['nats_of_training_rows']:.2f}"
        heard = f"{100 * row['accuracy']:.1f} | {100 * row['cer']:.2f} | {100 * row['nearest_cer']:.2f}"
        trained = f"{start} | {row['rate']:g} | {row['epochs']} | {row.get('average') or ''}"
        lines.append(f"| {E2E_TOKENS[row['tokens']]} | {trained} | {nats} | {row['n']} | {heard} |")
    return "\n".join(lines)


def whole(one: dict[str, float], digits: int) -> str:
    """A mean with its interval, in per cent."""
    value, low, high = (100 * one[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def scaling(found: dict[str, Any]) -> str:
    """Seconds and memory until the first step, by size, and the growth of the seconds."""
    lines = ["| rows | objective | call | CPU s | resident MB | its own | in files | most |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in found["sizes"]:
        for name in ("first", "again"):
            memory = " | ".join(f"{one[name]['memory_mb'][key]:.0f}" for key in ("resident", "own", "files", "most"))
            seconds = f"{one[name]['cpu_seconds']:.1f}"
            lines.append(f"| {one['rows']:,} | `{one['objective']}` | {name} | {seconds} | {memory} |")
    lines += ["", "| call | CPU s of no rows | CPU s per million rows | R² of the line |", "|---|---|---|---|"]
    for name, one in found["growth"].items():
        cells = f"{one['seconds_of_no_rows']:.1f} | {one['seconds_per_million_rows']:.1f} | {one['r_squared']:.3f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


START = {
    "python": "Python alone",
    "torch": "and PyTorch",
    "lightning": "and Lightning",
    "command": "and the command",
    "models": "and the models",
}


def start(found: dict[str, Any]) -> str:
    """CPU seconds of imports, each part with those before it, and whose modules they are."""
    lines = ["| imported | CPU s | range |", "|---|---|---|"]
    for name, what in START.items():
        each = found["rounds"][name]
        lines.append(f"| {what} | {found['cpu_seconds'][name]:.2f} | {min(each):.2f} to {max(each):.2f} |")
    largest = ", ".join(f"{name} {seconds:.2f}" for name, seconds in list(found["modules_of"].items())[:7])
    return "\n".join([*lines, "", f"Seconds in the modules of: {largest}."])


BLOCKS: dict[Path, dict[str, tuple[str, Callable[[dict[str, Any]], str]]]] = {
    Path("README.md"): {"demo": ("tkto/summary.json", demo), "recipe": ("equal_compute.json", headline)},
    Path("benchmarks/README.md"): {
        "recipe": ("equal_compute.json", recipe),
        "symbolic": ("equal_compute.json", symbolic),
        "against": ("equal_compute.json", against),
        "sweep": ("equal_compute.json", sweep),
        "table1": ("demo_table1.json", table1),
        "cost": ("step.json", cost),
        "cost_rewards": ("step_rewards.json", cost_rewards),
        "trl": ("trl_step.json", trl),
        "trl_profile": ("trl_profile.json", trl_profile),
        "memory": ("memory.json", memory),
        "decoding": ("decoding.json", decoding),
        "profile": ("decoding.json", profile),
        "batched": ("sampling.json", batched),
        "diffro": ("diffro_recipe.json", diffro),
        "diffro_cost": ("diffro_cost.json", diffro_cost),
        "diffro_manner": ("diffro_manner.json", diffro_manner),
        "e2e": ("e2e.json", e2e),
        "e2e_rates": ("e2e_rates.json", e2e_rates),
        "scaling": ("scaling.json", scaling),
        "start": ("start.json", start),
    },
    Path("tts_align/models/cosyvoice/README.md"): {"size": ("cosyvoice_size.json", size)},
}
"""README -> its blocks -> the file of results and what makes a table of it."""


if __name__ == "__main__":
    for readme in BLOCKS:
        (ROOT / readme).write_text(written(readme), "utf-8")
