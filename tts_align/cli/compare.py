# SPDX-License-Identifier: Apache-2.0
"""Compare two runs or scored folders, or the two systems of one: what got better, what got worse."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tts_align.evaluation.comparison.compare import compare_systems
from tts_align.evaluation.comparison.records import Comparison
from tts_align.evaluation.comparison.scored import read_systems, scored_folder, system_of
from tts_align.evaluation.comparison.table import names, print_comparison
from tts_align.evaluation.html.report import REPORT, write_html_report
from tts_align.evaluation.statistics.intervals import RESAMPLES
from tts_align.utils.files import check_not_source, file_name, write_json

COMPARISON = "comparison.json"


def compare(
    first: Path,
    second: Path | None = None,
    first_system: str = "",
    second_system: str = "",
    out: Path | None = None,
    resamples: int = RESAMPLES,
    shown: int = 10,
    fail_on_regression: bool = False,
) -> Comparison:
    """Compare two runs or scored folders utterance by utterance, or one run before and after its training.

    Prints mended and broken readings with the exact McNemar test, every number with its paired difference, 95 %
    interval and verdict, and what got worse; writes comparison.json and report.html.

    Args:
        first: run that was tested, or folder that score wrote; alone, its systems base and aligned are compared.
        second: run or folder to compare with it.
        first_system: system of the first; by default the trained one, or the only one.
        second_system: system of the second; by default the trained one, or the only one.
        out: folder for comparison.json and report.html; by default comparison, or comparison-with-NAME-of-the-first,
            in the scored folder of the last.
        resamples: resamples of the bootstrap.
        shown: regressions to print.
        fail_on_regression: whether to exit with status 1 if a number got worse beyond chance, more readings broke than
            were mended beyond chance, or fewer errors may have been bought with something else.

    Raises:
        ValueError: there is nothing to compare.
        SystemExit: with status 1, because something got worse and ``fail_on_regression`` is set.
    """
    if second is None:
        known = list(read_systems(first))
        if len(known) < 2 and not (first_system and second_system):
            raise ValueError(f"{first} holds one system, {known[0]}: name a second run or folder to compare with")
        before, after = system_of(first, first_system or "base"), system_of(first, second_system)
    else:
        before, after = system_of(first, first_system), system_of(second, second_system)
    comparison = compare_systems(before, after, resamples)
    print_comparison(comparison, shown)
    default = "comparison" if second is None else f"comparison-with-{file_name(names(comparison)[0])}"
    folder = out or scored_folder(second or first) / default
    check_not_source(folder, *map(scored_folder, (first, second or first)), inside=True)
    write_json(folder / COMPARISON, comparison.to_json())
    print(f"report:       {write_html_report(folder / REPORT, comparison)}", flush=True)
    if fail_on_regression and (found := regressions(comparison)):
        sys.stderr.write("".join(f"tts-align: regression: {line}\n" for line in found))
        raise SystemExit(1)
    return comparison


def regressions(comparison: Comparison) -> Sequence[str]:
    """Why a comparison is no improvement, in words; empty if nothing speaks against it."""
    found = [f"{number.title} got worse" for number in comparison.numbers if number.verdict == "worse"]
    readings = comparison.readings
    if readings.broken > readings.mended and readings.p_value < 0.05:
        found.append(f"{readings.broken} readings broke and {readings.mended} were mended")
    return [*found, *comparison.call_outs]
