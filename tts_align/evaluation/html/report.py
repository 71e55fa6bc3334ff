# SPDX-License-Identifier: Apache-2.0
"""``report.html``: tables, intervals, figures, and mended and broken words to hear before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tts_align.evaluation.comparison.compare import compare_systems
from tts_align.evaluation.comparison.numbers import compared_numbers
from tts_align.evaluation.comparison.records import Comparison, NumberComparison, Pair, change
from tts_align.evaluation.comparison.remarks import described_measures, named
from tts_align.evaluation.comparison.scored import ScoredSystem, ScoredUtterance, read_systems, system_of
from tts_align.evaluation.comparison.table import headline, names, p_text, plain
from tts_align.evaluation.html.page import box, interval_svg, page, picture, player, section, table, tile
from tts_align.evaluation.statistics.intervals import RESAMPLES, Interval, cluster_bootstrap
from tts_align.utils.files import written_atomically

REPORT = "report.html"
MOST_CASES = 24
"""Utterances of a kind that a page shows with their sound: half a megabyte of a page is three or four of them."""
FIGURES = {
    "likelihood.png": "Likelihood of desirable and undesirable speech tokens over training",
    "token_rewards.png": "Where the contrastive pair sees the difference",
    "token_weights.png": "Token weights along one utterance",
}
_KINDS = {"better": "better", "worse": "worse"}


def write_folder_report(folder: Path, resamples: int = RESAMPLES) -> Path:
    """Write ``report.html`` of a scored folder into it: before and after if it has both systems, one system otherwise.

    Args:
        folder: of a run, or one that was scored.
        resamples: of the bootstrap.
    """
    systems = read_systems(folder)
    if {"base", "aligned"} <= systems.keys():
        compared = compare_systems(systems["base"], systems["aligned"], resamples)
        return write_html_report(compared.second.folder / REPORT, compared)
    system = system_of(folder, "" if len(systems) == 1 else next(iter(systems)))
    return write_single_report(system.folder / REPORT, system, resamples)


def write_html_report(path: Path, comparison: Comparison) -> Path:
    """Write the page of a comparison, whole or not at all.

    Args:
        path: of the page.
        comparison: of two systems.
    """
    one, two = names(comparison)
    title = f"{one} → {two}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(headline(comparison))}</p>',
        _tiles(comparison),
        *map(box, (*comparison.call_outs, *comparison.warnings)),
        section("Numbers", _numbers(comparison, one, two), _CAPTION),
        _cases("Mended words", comparison.mended, one, two),
        _cases("Broken words", [pair for pair in comparison.regressions if pair.broken], one, two),
        _cases("Other utterances that got worse", [p for p in comparison.regressions if not p.broken], one, two),
        _failures({one: comparison.first, two: comparison.second}),
        _forgetting(comparison.second.summary.get("forgetting")),
        _figures(comparison.second.folder),
        _provenance(comparison.second.summary),
    ]
    return _write(path, page(title, parts))


def write_single_report(path: Path, system: ScoredSystem, resamples: int = RESAMPLES) -> Path:
    """Write the page of one system, whole or not at all.

    Args:
        path: of the page.
        system: that was scored.
        resamples: of the bootstrap.
    """
    rows = list(system.utterances.values())
    found = []
    for number in compared_numbers(rows, described_measures(system.summary)):
        known = [(value, one.sentence) for one in rows if (value := number.of(one)) == value]
        if known:
            interval = cluster_bootstrap([value for value, _ in known], [name for _, name in known], resamples)
            found.append([escape(number.title), *_ends(interval, number.factor, number.decimals), str(len(known))])
    worst = sorted(rows, key=lambda one: -_rate(one))[:MOST_CASES]
    parts = [
        f"<h1>{escape(system.name)}</h1>",
        f'<p class="soft">{len(rows)} utterances</p>',
        section("Numbers", table(("", "value", "low", "high", "utterances"), found, "numbers"), _CAPTION),
        section("Worst utterances", _single_cases([one for one in worst if _rate(one) > 0])),
        _failures({system.name: system}),
        _figures(system.folder),
        _provenance(system.summary),
    ]
    return _write(path, page(system.name, parts))


_CAPTION = (
    '<p class="soft">95 % intervals, whole sentences resampled; p-values by Holm over all rows; a verdict needs '
    "p &lt; 0.05 after that.</p>"
)


def _write(path: Path, content: str) -> Path:
    with written_atomically(path) as scratch:
        scratch.write_text(content, "utf-8")
    return Path(path)


def _ends(interval: Interval, factor: float, decimals: int) -> list[str]:
    return [f"{number * factor:.{decimals}f}" for number in (interval.value, interval.low, interval.high)]


def _tiles(comparison: Comparison) -> str:
    readings = comparison.readings
    found = [tile(str(len(comparison.pairs)), "utterances of both")]
    if any(pair.first.right is not None for pair in comparison.pairs):
        found = [
            tile(str(readings.mended), "readings mended", "good"),
            tile(str(readings.broken), "readings broken", "bad" if readings.broken else ""),
            tile(p_text(readings.p_value), "p, exact McNemar"),
            *found,
        ]
    for number in comparison.numbers:
        if number.name in ("accuracy", "error_rate", "cer") and len(found) < 6:
            before, after = plain(number.first, number), plain(number.second, number)
            found.append(tile(f"{before} → {after}", number.title, _colour(number)))
    return f'<div class="tiles">{"".join(found)}</div>'


def _colour(number: NumberComparison) -> str:
    return {"better": "good", "worse": "bad", "changed": "note"}.get(number.verdict, "")


def _numbers(comparison: Comparison, one: str, two: str) -> str:
    rows = []
    for number in comparison.numbers:
        low, high = number.difference.low, number.difference.high
        reach = max(abs(low), abs(high))
        rows.append(
            [
                f"<td>{escape(number.title)}</td>",
                _with_interval(number.first, number),
                _with_interval(number.second, number),
                escape(change(number)),
                interval_svg(number.difference.value, low, high, reach, _KINDS.get(number.verdict, "plain")),
                escape(p_text(number.adjusted_p_value)),
                f'<td class="left {_colour(number)}">{escape(number.verdict)}</td>',
                str(number.difference.n),
            ]
        )
    return table(("", one, two, "difference", "", "p", "verdict", "n"), rows, "numbers of both systems")


def _with_interval(interval: Interval, number: NumberComparison) -> str:
    value, low, high = _ends(interval, number.factor, number.decimals)
    return f'{value} <span class="soft">({low}–{high})</span>'


def _cases(title: str, pairs: Sequence[Pair], one: str, two: str) -> str:
    """Utterances before and after side by side; those that can be heard first, the rest counted."""
    heard = sorted(pairs, key=lambda pair: pair.first.audio is None and pair.second.audio is None)
    shown = "".join(_case(pair, one, two) for pair in heard[:MOST_CASES])
    left = len(pairs) - MOST_CASES
    more = f'<p class="soft">and {left} more in utterances.jsonl</p>' if left > 0 else ""
    return section(f"{title} ({len(pairs)})", f'<div class="cases">{shown}</div>', more) if pairs else ""


def _case(pair: Pair, one: str, two: str) -> str:
    sides = "".join(_side(side, name, pair.rate) for side, name in ((pair.first, one), (pair.second, two)))
    return _article(pair.first, f'<div class="sides">{sides}</div>')


def _single_cases(utterances: Sequence[ScoredUtterance]) -> str:
    shown = "".join(_article(one, _side(one, "", _rate_name(one))) for one in utterances)
    return f'<div class="cases">{shown}</div>' if shown else ""


def _article(one: ScoredUtterance, inside: str) -> str:
    language = escape(one.text("language"))
    words = f'<h3 lang="{language}">{escape(one.text("text") or one.id)}</h3>'
    about = " · ".join(filter(None, (one.id, one.text("speaker"))))
    return f'<article class="case">{words}{inside}<p class="soft">{escape(about)}</p></article>'


def _side(one: ScoredUtterance, name: str, rate: str) -> str:
    reading, colour = one.text("reading"), {True: "good", False: "bad", None: ""}[one.right]
    value = one.number(rate)
    facts = [reading if one.right is not None else "", one.at_fault, f"{rate} {value:.2f}" if value == value else ""]
    heard = one.text("transcript") or one.text("error")
    return (
        f'<div><b>{escape(name)}</b> <span class="{colour}">{escape(" · ".join(filter(None, facts)))}</span>'
        f'<p lang="{escape(one.text("language"))}">{escape(heard)}</p>{player(one.audio, f"{one.id} {name}")}</div>'
    )


def _rate_name(one: ScoredUtterance) -> str:
    return "error_rate" if "error_rate" in one.row else "cer"


def _rate(one: ScoredUtterance) -> float:
    value = one.number(_rate_name(one))
    return value if value == value else float(bool(one.at_fault))


def _failures(systems: Mapping[str, ScoredSystem]) -> str:
    """What could not be heard or judged, counted by its name."""
    counts = {name: Counter(_faults(system.utterances.values())) for name, system in systems.items()}
    kinds = sorted({kind for found in counts.values() for kind in found})
    rows = [[f"<td>{escape(kind)}</td>", *(str(counts[name][kind]) for name in systems)] for kind in kinds]
    return section("Failures", table(("", *systems), rows, "failures by name"))


def _faults(utterances: Iterable[ScoredUtterance]) -> list[str]:
    found = [one.at_fault or ("not judged" if one.text("error") else "") for one in utterances]
    return [one for one in found if one]


def _forgetting(found: Mapping[str, Any] | None) -> str:
    """Error rates of general sentences without marked words, by language."""
    if not found:
        return ""
    rows = []
    for language, numbers in found.items():
        sides = [numbers.get(side) or {} for side in ("base", "aligned", "difference")]
        cells = [_percent(side.get("value")) for side in sides]
        rows.append([f"<td>{escape(language)}</td>", *cells, escape(p_text(sides[2].get("p_value") or 1.0))])
    words = (
        '<p class="soft">Error rates of general sentences without marked words: what the training may have cost.</p>'
    )
    return section("Forgetting", table(("CER, %", "base", "aligned", "difference", "p"), rows, "forgetting"), words)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _figures(folder: Path) -> str:
    found = {folder / name: words for name, words in FIGURES.items()}
    return section("Figures", *(picture(path, words) for path, words in found.items() if path.is_file()))


def _provenance(summary: Mapping[str, Any]) -> str:
    """Protocol, test set and what listened, with its digest."""
    facts = {key: named(summary[key]) for key in ("protocol", "suite", "judge_accuracy") if summary.get(key)}
    found = {**(summary.get("models") or {}), **(summary.get("measures") or {})}
    facts |= {name: named(one) for name, one in found.items()}
    rows = [[f"<td>{escape(key)}</td>", f'<td class="words">{escape(value)}</td>'] for key, value in facts.items()]
    return section("Made with", table(("", ""), rows, "what the numbers were made with"))
