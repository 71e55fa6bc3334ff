# SPDX-License-Identifier: Apache-2.0
"""A comparison in the terminal: the headline, one line per number, what got worse."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tts_align.evaluation.comparison.records import Comparison, NumberComparison, Pair, change
from tts_align.evaluation.statistics.intervals import Interval

_COLOURS = {"better": "green", "worse": "red", "changed": "yellow"}


def print_comparison(comparison: Comparison, shown: int = 10, console: Console | None = None) -> None:
    """Show a comparison.

    Args:
        comparison: of two systems.
        shown: regressions that are listed.
        console: where to; standard output by default.
    """
    console = console or Console()
    one, two = names(comparison)
    console.print(f"[bold]{escape(headline(comparison))}[/]")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = "95 % intervals; p by Holm over all rows"
    table.add_column("", no_wrap=True)
    for title in (one, two, "difference", "p", "verdict"):
        table.add_column(title, justify="left" if title == "verdict" else "right")
    for number in comparison.numbers:
        colour = _COLOURS.get(number.verdict, "default")
        cells = [plain(number.first, number), plain(number.second, number), change(number)]
        p_value = p_text(number.adjusted_p_value)
        table.add_row(number.title, *cells, p_value, f"[{colour}]{number.verdict}[/]")
    console.print(table)
    for line in comparison.call_outs:
        console.print(escape(line), style="bold yellow")
    for line in comparison.warnings:
        console.print(f"warning: {escape(line)}", style="yellow")
    regressions = comparison.regressions
    if regressions:
        console.print(f"{len(regressions)} utterances got worse, the worst first:")
    for pair in regressions[:shown]:
        console.print(f"  {escape(regression(pair))}", soft_wrap=True)
    if len(regressions) > shown:
        console.print(f"  and {len(regressions) - shown} more, in comparison.json")


def names(comparison: Comparison) -> tuple[str, str]:
    """What the two systems are called: by system within one folder, by folder otherwise."""
    one, two = comparison.first, comparison.second
    if one.folder == two.folder:
        return one.name, two.name
    found = [side.folder.parent.name if side.folder.name == "test" else side.folder.name for side in (one, two)]
    if found[0] == found[1]:
        found = [str(side.folder) for side in (one, two)]
    return found[0], found[1]


def headline(comparison: Comparison) -> str:
    """Mended and broken readings in one line; of utterances without marked words their number."""
    readings = comparison.readings
    if not any(pair.first.right is not None for pair in comparison.pairs):
        return f"{len(comparison.pairs)} utterances, no marked words"
    return (
        f"readings: {readings.mended} mended, {readings.broken} broken "
        f"(exact McNemar {p_words(readings.p_value)}; {len(comparison.pairs)} utterances)"
    )


def regression(pair: Pair) -> str:
    """What got worse, in one line."""
    said = "broken" if pair.broken else pair.second.at_fault if pair.fails_anew else f"{pair.rate} {pair.worse_by:+.2f}"
    heard = pair.second.text("transcript")
    audio = pair.second.audio
    parts = [f"{pair.first.id}: {said}", pair.first.text("text"), f"heard {heard}" if heard else ""]
    return "  ".join(filter(None, [*parts, str(audio) if audio else ""]))


def plain(interval: Interval, number: NumberComparison) -> str:
    """A value as tables show it."""
    return "-" if math.isnan(interval.value) else f"{interval.value * number.factor:.{number.decimals}f}"


def p_words(p_value: float) -> str:
    """A p-value in a sentence.

    >>> p_words(0.03456), p_words(0.00001)
    ('p = 0.035', 'p < 0.001')
    """
    return f"p {p_text(p_value)}".replace("<", "< ") if p_value < 0.001 else f"p = {p_text(p_value)}"


def p_text(p_value: float) -> str:
    """A p-value with two digits.

    >>> p_text(0.03456), p_text(0.00001), p_text(1.0)
    ('0.035', '<0.001', '1.0')
    """
    if math.isnan(p_value):
        return "-"
    return "<0.001" if p_value < 0.001 else f"{p_value:.2g}" if p_value < 0.995 else "1.0"
