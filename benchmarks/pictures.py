# SPDX-License-Identifier: Apache-2.0
"""Keeps what README.md shows of a finished run: its table, one figure, one sentence before and after.

tts-align fit --config recipes/tkto.yaml && python benchmarks/pictures.py runs/tkto

The tests take the pictures of a run's report and of a listening test; Chromium needs a Japanese font. The saved picture
of the report is that of a run of ``recipes/diffro.yaml``:

TTS_ALIGN_PICTURES=runs/diffro pytest -k picture tests/evaluation
"""

from __future__ import annotations

import shutil
from pathlib import Path

from jsonargparse import auto_cli

from tts_align.utils.files import read_json_lines

SHOWN = Path(__file__).with_name("results") / "tkto"


def main(run: Path, out: Path = SHOWN) -> None:
    """Copy the table, the figure of the token weights, and the first sentence whose reading was mended.

    Args:
        run: directory of a finished run of ``recipes/tkto.yaml``.
        out: folder to write.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "token_weights.png"):
        shutil.copyfile(run / "test" / name, out / name)
    kept: dict[str, dict[str, str]] = {}
    for _, row in read_json_lines(run / "test" / "utterances.jsonl"):
        if row["audio"] and row["reading"] == {"base": "wrong", "aligned": "right"}[row["system"]]:
            kept.setdefault(row["id"], {})[row["system"]] = row["audio"]
    first = next(files for files in kept.values() if len(files) == 2)
    for system, name in (("base", "before.wav"), ("aligned", "after.wav")):
        shutil.copyfile(run / "test" / first[system], out / name)


if __name__ == "__main__":
    auto_cli(main)
