# SPDX-License-Identifier: Apache-2.0
"""What processes of one run tell each other."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")


def agreed(mine: Item) -> Item:
    """What the first process brings, in all of them; one's own where processes do not talk to each other yet.

    >>> agreed("mine")
    'mine'
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mine
    sent = [mine]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]


def gathered(mine: Item) -> list[Item]:
    """What every process brings, in the order of their ranks; one's own alone where there is only one process.

    Every process must call it. What is gathered is pickled; tensors should be on the CPU.

    >>> gathered("mine")
    ['mine']
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    return everything
