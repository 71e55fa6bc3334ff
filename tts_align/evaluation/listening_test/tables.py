# SPDX-License-Identifier: Apache-2.0
"""Tables that ``listen score`` ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tts_align.evaluation.listening_test.screening import Screened
from tts_align.utils.progress import above_bars

_TITLES = {
    "nmos": "naturalness, 1 to 5",
    "cmos": "the second against the first, -3 to 3",
    "ab": "which is better: share of the first",
    "abx": "which is the third: share of right answers",
    "reading": "reading that was heard: share of right ones",
}
_COUNTS = ("first", "same", "second", "right", "wrong", "other", "unclear", "mended", "broken")


def print_tables(summary: Mapping[str, Any], screened: Sequence[Screened], console: Console | None = None) -> None:
    """Show who counts, and the tables of every kind of question.

    Args:
        summary: what :func:`tts_align.evaluation.listening_test.results.summarise` gives.
        screened: every listener.
        console: where to; standard output by default.
    """
    console = console or Console()
    out = [one for one in screened if one.reason]
    with above_bars():
        console.print(f"{len(screened) - len(out)} of {len(screened)} listeners count", highlight=False)
        for one in out:
            console.print(f"  {one.listener} does not: {one.reason}", style="yellow", highlight=False, markup=False)
        for kind, tables in summary.items():
            shown = [name for name in ("systems", "pairs") if tables.get(name)]
            for name in shown:
                console.print(_table(f"{kind}: {_TITLES[kind]}" if name == shown[0] else "", tables[name]))
            if judged := tables.get("judge", {}).get("n"):
                share, low, high = (100 * tables["judge"][part] for part in ("value", "low", "high"))
                what = f"{share:.1f} % ({low:.1f}–{high:.1f}) of {judged} recordings"
                console.print(f"the judge heard what most listeners heard in {what}", highlight=False)


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    first = next(iter(rows.values()))
    counts = [name for name in _COUNTS if name in first]
    numbers = [name for name in ("difference", "p_votes", "p_value", "p_holm") if name in first]
    headings = ["", *counts, *(["mean (95 % interval)"] if "low" in first else []), *numbers]
    for place, heading in enumerate([*headings, *(["listeners"] if "listeners" in first else []), "sentences"]):
        table.add_column(heading.replace("_", " "), justify="right" if place else "left", no_wrap=True)
    for name, row in rows.items():
        cells = [str(row[one]) for one in counts]
        if "low" in row:
            numbers_of = [row[one] for one in ("value", "low", "high")]
            cells.append("-" if None in numbers_of else "{:.2f} ({:.2f} to {:.2f})".format(*numbers_of))
        cells += ["-" if row[one] is None else f"{row[one]:.3g}" for one in numbers]
        cells += [str(row["listeners"])] if "listeners" in row else []
        table.add_row(name, *cells, str(row["sentences"]))
    return table
