# SPDX-License-Identifier: Apache-2.0
"""``export``: a trained policy as a model directory, proven to be the same model by reading it back from the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.data.parse import Rules, parse
from tts_align.data.places import locate
from tts_align.data.sources import read_rows
from tts_align.models.base.generation import Context
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.base.policy import CodecLM
from tts_align.models.cosyvoice.directory import load_state
from tts_align.models.cosyvoice.export import (
    CACHES,
    EMBEDDING,
    FLOW_COPIES,
    HEAD,
    LLM,
    check_target,
    published_from_vllm,
    vllm_names,
    write_vllm,
)
from tts_align.models.cosyvoice.lm import CosyVoiceLM, backbone_names
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.files import directory_written_atomically
from tts_align.utils.model_directory import check_nothing_lost

Format = Literal["cosyvoice", "vllm"]
TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32; merging an adapter changes the order of sums, nothing else."""
ROWS = 10


class ExportError(ValueError):
    """What was written is not the model that was trained."""


@dataclass(frozen=True)
class Checked:
    """What was written, and how it compares with the model in memory.

    Args:
        directory: what was written.
        format: how: ``cosyvoice``, ``vllm`` or, for other policies than CosyVoice, ``own``.
        source: file whose names and shapes the new weights have.
        tensors: how many there are.
        rows: rows that both models scored.
        tokens: their targets.
        of: where the rows come from.
        difference: largest difference between the two log-probabilities of a target, in float32.
        tolerance: what it had to stay below; ``None`` in bfloat16, where the weights themselves were compared.
    """

    directory: str
    format: str
    source: str
    tensors: int
    rows: int
    tokens: int
    of: str
    difference: float
    tolerance: float | None

    def lines(self) -> list[str]:
        """What a person is told."""
        limit = (
            f"below the limit of {self.tolerance:g}"
            if self.tolerance is not None
            else "from rounding to bfloat16; every weight is the trained one, rounded"
        )
        name = Path(self.source).name
        note = [f"note:         these are llm.pt now; {name} in there is still the old one"]
        return [
            *(note if self.format == "cosyvoice" and name.startswith("llm.") and name != LLM else []),
            f"exported:     {self.directory} ({self.format})",
            f"weights:      {self.tensors} tensors, names and shapes as in {self.source}",
            f"read back:    {self.rows} rows, {self.tokens} tokens of {self.of}",
            f"difference:   {self.difference:.1e} at most in a log-probability, {limit}",
        ]


def export(
    policy: CodecLM, to: Path, format: Format | None = None, overwrite: bool = False, manifest: str | None = None
) -> Checked:
    """Write a policy as a model directory, and check what was written; nothing is left if it is wrong.

    The policy is brought to the CPU and to float32 for it, which changes no weight: an adapter on a bfloat16 base is
    merged, and checked, without rounding.

    Args:
        policy: with the weights to export.
        to: what is written.
        format: ``cosyvoice`` for a whole directory, ``vllm`` for its language model alone; by default the policy's own.
        overwrite: replace an earlier export.
        manifest: rows to compare on; drawn at random without.

    Raises:
        ExportError: what was written is not the same model.
        ValueError: the policy has no such format, or ``to`` is not free.
    """
    if format is not None and not isinstance(policy, CosyVoiceLM):
        raise ValueError(
            f"only a CosyVoiceLM can be exported as {format}, and this policy is a {type(policy).__name__}: leave "
            "--format out to write its own directory"
        )
    check_target(getattr(policy, "directory", None), to, overwrite)
    policy = policy.to("cpu", torch.float32).eval()
    rows, of = choose_rows(policy, manifest)
    trained = score(policy, rows)
    with directory_written_atomically(to, overwrite) as scratch:
        again, source, tensors = (_write_vllm if format == "vllm" else _write_model)(policy, scratch)
        read = score(again, rows)
        difference = max(float((one - other).abs().max()) for one, other in zip(trained, read, strict=True))
        tolerance = None if format == "vllm" else TOLERANCE
        if not difference < (tolerance or float("inf")):  # nor is it when it is no number
            raise ExportError(
                f"the model read back from the disk is not the trained one: a log-probability differs by "
                f"{difference:.3g}, allowed is {tolerance or 'any number'}; nothing is kept at {to}"
            )
        check_nothing_lost(to, scratch, CACHES + FLOW_COPIES)
    written = format or ("cosyvoice" if isinstance(policy, CosyVoiceLM) else "own")
    tokens = sum(len(one) for one in trained)
    return Checked(str(to), written, source, tensors, len(rows), tokens, of, difference, tolerance)


def _write_model(policy: CodecLM, directory: Path) -> tuple[CodecLM, str, int]:
    """Write the policy's own directory; returns the model in it, what its weights are named after, and how many."""
    policy.save(directory)
    again = type(policy)(str(directory))  # a final class is built from its directory
    if isinstance(policy, CosyVoiceLM):
        source = policy.weights_path
        given, expected = shapes(load_state(directory / LLM)), shapes(load_state(source))
        expected.setdefault(HEAD, expected.get(EMBEDDING, ()))  # the runtime wants it, even where the source lacks it
    else:
        source = Path(str(getattr(policy, "directory", None) or "the recipe's policy"))
        plain = {key: value for key, value in policy.state_dict().items() if ".lora_" not in key}
        expected = {key.replace(".base_layer", ""): shape for key, shape in shapes(plain).items()}
        given = shapes(again.state_dict())
    if given != expected:
        wrong = sorted(key for key in given.keys() | expected.keys() if given.get(key) != expected.get(key))
        raise ExportError(f"{len(wrong)} names or shapes of weights are not those of {source}, {wrong[0]} first")
    return again.eval(), str(source), len(given)


def _write_vllm(policy: CodecLM, directory: Path) -> tuple[CodecLM, str, int]:
    """The same for vLLM; the model that is returned computes in float32 with the weights that were rounded."""
    assert isinstance(policy, CosyVoiceLM)
    published = policy.published()
    write_vllm(policy.source, published, directory)
    weights, expected = load_state(directory / "model.safetensors"), vllm_names(published)
    wrong = sorted(key for key in weights.keys() | expected.keys() if not _equal(weights.get(key), expected.get(key)))
    if wrong:
        raise ExportError(f"{len(wrong)} weights read back are not those that were written, {wrong[0]} first")
    rounded = {key: value.bfloat16() for key, value in published.items()} | published_from_vllm(weights)
    again = policy.rebuild().float()
    again.load_state_dict(backbone_names(rounded))
    return again.eval(), f"{policy.weights_path}, as far as vLLM has them", len(weights)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight."""
    return {key: tuple(value.shape) for key, value in state.items()}


@torch.no_grad()
def score(policy: CodecLM, rows: Sequence[TokenRow]) -> list[Float[Tensor, " t"]]:
    """Log-probability of every target of each row, one row at a time."""
    return [policy(collate([row], policy.layout)).logp[0] for row in rows]


def choose_rows(policy: CodecLM, manifest: str | None, count: int = ROWS) -> tuple[list[TokenRow], str]:
    """Rows to compare two models on, and where they come from.

    Args:
        policy: knows how text becomes tokens.
        manifest: its first rows that have speech tokens; without it, or if none has, rows are drawn at random.
        count: how many.
    """
    if manifest is not None:
        rows = list(islice(_manifest_rows(policy, manifest), count))
        if rows:
            return rows, manifest
    if not isinstance(policy, Qwen2CodecLM):
        raise ValueError("there is nothing to compare the models on: set data.manifest to rows with speech tokens")
    random = np.random.default_rng(0)

    def draw(high: int, shortest: int) -> tuple[int, ...]:
        return tuple(random.integers(0, high, random.integers(shortest, 5 * shortest)).tolist())

    text, codebook_size = policy.sizes.text_vocabulary, policy.layout.codebook_size
    return [TokenRow(draw(text, 5), draw(codebook_size, 25)) for _ in range(count)], "random rows"


def _manifest_rows(policy: CodecLM, manifest: str) -> Iterator[TokenRow]:
    """Usable rows one by one: a manifest may be large."""
    rules = Rules(policy.layout.codebook_size)
    for _, raw, broken in read_rows(locate(manifest)):
        row = None if broken else parse(raw, "row", rules)[0]
        speech = () if row is None else next((sound.speech for sound in row.sounds if sound.speech), ())
        if row is not None and speech:
            context = Context(row.speaker, row.instruct, row.prompt_text, row.prompt_speech)
            yield policy.encode_text(row.text, context).row(speech)
