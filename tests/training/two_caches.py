# SPDX-License-Identifier: Apache-2.0
"""One of two processes that fill a cache together, for ``test_cache_processes``; says what it did as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from tts_align.batch import Rows
from tts_align.models.base.layout import Layout, TokenRow
from tts_align.training import cache
from tts_align.training.cache import TokenCache
from tts_align.utils import agreement, signals

LAYOUT = Layout("cosyvoice2", codebook_size=10)
ROWS = {LAYOUT.key(row): row for row in (TokenRow((1, 2), (*range(1 + i % 5), i % 7)) for i in range(24))}


def main(folder: str, dies_after: int, stopped: int) -> None:
    """Fill the cache in a folder.

    Args:
        folder: where it lies.
        dies_after: so many batches, if that is not 0.
        stopped: rank of the process that is asked to end, in its second batch; the first one is slow then.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    asked: list[int] = []

    def score(rows: Rows) -> torch.Tensor:
        if dies_after and len(asked) == dies_after:
            os._exit(9)
        asked.append(len(rows.keys))
        if len(asked) == 2 and rank == stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        if stopped >= 0 and rank == 0:
            time.sleep(0.2)
        return rows.scatter(-rows.target.float())

    cache.KEPT_EVERY_SECONDS = 0.0
    cache.BATCH_TOKENS = 40
    found = TokenCache(Path(folder), "reference", {"weights": "a"})
    with signals.handled(), agreement.ending_together() if stopped >= 0 else nullcontext():
        found.ensure(ROWS, score, LAYOUT, "reference", rank=rank, world=world)
    again = TokenCache.read(Path(folder) / found.path.name, ROWS, everywhere=True)
    right = all(
        one.numbers[key].tolist() == [-float(target) for target in LAYOUT.arrange(row).target]
        for one in (found, again)
        for key, row in ROWS.items()
    )
    print(json.dumps({"rank": rank, "rows": len(found.numbers), "right": right, "asked": sum(asked)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
