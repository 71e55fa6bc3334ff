# SPDX-License-Identifier: Apache-2.0
"""The multi-task reward model over speech tokens of DiffRO (arXiv 2507.05911).

A transformer encoder reads speech tokens, as ids or as soft one-hots, through an embedding table where a recogniser has
its front end. An attention decoder says how probable a text is, and optionally CTC; one attention pooling per
utterance-level task says the same of emotion, speaker, audio events or a mean opinion score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tts_align.models.base.reward import RewardHead
from tts_align.models.base.reward_records import Regularisers, RewardLabels, RewardScores, TaskLoss, TaskRows
from tts_align.models.reward import layers as heads
from tts_align.models.reward.config import ASR, CTC, END, Alphabet, RewardSizes
from tts_align.models.reward.losses import regularised_losses
from tts_align.utils.model_directory import CONFIG, find_model, load_weights_of, write_model
from tts_align.utils.weights import weights_digest


class RewardModel(RewardHead):
    """Multi-task reward model over speech tokens.

    Args:
        directory: model directory with ``config.json`` and ``model.safetensors``. Without it a model of random weights
            is made from ``sizes``.
        sizes: sizes and tasks of a new model; not together with ``directory``.
    """

    looks_up = True

    def __init__(self, directory: str | None = None, sizes: RewardSizes | None = None) -> None:
        super().__init__()
        if (directory is None) == (sizes is None):
            raise ValueError("model.reward needs exactly one of `directory` (a trained model) and `sizes` (a new one)")
        path = None if directory is None else find_model(directory, "model.reward")
        if path is not None:
            sizes = RewardSizes.read(path / CONFIG)
        assert sizes is not None
        self.directory, self.sizes, self.codebook_size, self.tasks = path, sizes, sizes.codebook_size, sizes.tasks
        self.attribute_tasks = sizes.attributes
        self.alphabet = Alphabet(sizes.characters)
        shape = (sizes.width, sizes.heads, sizes.feed_forward)
        self.embedding = nn.Embedding(sizes.codebook_size, sizes.width)
        self.blocks = nn.ModuleList(heads.Block(*shape, sizes.dropout) for _ in range(sizes.layers))
        self.norm, self.dropout = nn.LayerNorm(sizes.width), nn.Dropout(sizes.dropout)
        self.decoder: heads.TextDecoder | None = None
        if sizes.decoder_layers:
            self.decoder = heads.TextDecoder(self.alphabet.size, *shape, sizes.decoder_layers, sizes.dropout)
        self.ctc_head = nn.Linear(sizes.width, self.alphabet.size) if sizes.ctc else None
        # Numbered, because an attribute's name need not be a name that a module can have.
        self.pooled = nn.ModuleList(heads.PooledHead(sizes.width, one.outputs) for one in sizes.attributes)
        if path is not None:
            load_weights_of(self, path)

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all speech tokens."""
        return self.embedding

    # --- texts and labels ---

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of the characters; an unknown one has an id of its own."""
        return self.alphabet.encode(text)

    def encode_labels(
        self, texts: Sequence[str | None], attributes: Sequence[Mapping[str, str | int | float | Sequence[str]]]
    ) -> RewardLabels:
        """Labels on the CPU; properties of which this model knows nothing are left out."""
        if len(texts) != len(attributes):
            raise ValueError(f"expected as many texts as attributes, got {len(texts)} and {len(attributes)}")
        rows = [() if text is None else self.encode_text(text) for text in texts]
        longest = max([1, *map(len, rows)])
        padded = [[*row, *[END] * (longest - len(row))] for row in rows]
        text = torch.tensor(padded, dtype=torch.long).view(-1, longest)  # :: (r, l); (0) -> (0, l)
        text_mask = torch.arange(longest) < torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
        has_text = torch.tensor([one is not None for one in texts], dtype=torch.bool)
        known = tuple(one.encode([row.get(one.name) for row in attributes]) for one in self.sizes.attributes)
        return RewardLabels(text, text_mask, has_text, known, tuple(map(len, rows)))

    # --- the network ---

    def embed(self, tokens: Int[Tensor, "*r"] | Float[Tensor, "*r c"]) -> Float[Tensor, "*r h"]:
        """Vectors of speech tokens (..., h), given as ids (...) or as soft one-hots (..., c).

        Exact one-hots give the ids' vectors bit for bit.
        """
        if not tokens.is_floating_point():
            return self.embedding(tokens)
        if tokens.shape[-1] != self.codebook_size:
            raise ValueError(f"expected soft tokens over {self.codebook_size} speech tokens, got {tokens.shape[-1]}")
        return heads.soft_lookup(tokens, self.embedding.weight)

    def encode(self, embedded: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"]) -> Float[Tensor, "r s h"]:
        """States of right-padded rows; padding changes nothing, and what stands at padding means nothing."""
        hidden = torch.where(mask[..., None], embedded, 0.0) + heads.sinusoids(mask.shape[1], embedded)
        hidden, seen = self.dropout(hidden), heads.visible(mask)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, seen)
        return self.norm(hidden)

    def asr(
        self,
        hidden: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        text: Int[Tensor, "r n"],
        text_mask: Bool[Tensor, "r n"],
        smoothing: float = 0.0,
    ) -> Float[Tensor, "r n_plus_1"]:
        """Log-probability of each text token given those before it, end-of-text last; 0 at padding."""
        if self.decoder is None:
            raise ValueError("this reward model has no text decoder: its sizes say `decoder_layers: 0`")
        text = text.where(text_mask, END)
        target = nn.functional.pad(text, (0, 1), value=END)
        counted = nn.functional.pad(text_mask, (1, 0), value=True)
        logp = heads.target_logp(self.decoder(hidden, mask, text), target, smoothing)
        return torch.where(counted, logp, 0.0)

    def ctc(self, hidden: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"]) -> Float[Tensor, "r s k"]:
        """Log-probabilities of blank (0), unknown (1) or a character at each position; 0 at padding."""
        if self.ctc_head is None:
            raise ValueError("this reward model has no CTC head: its sizes say `ctc: false`")
        return torch.where(mask[..., None], heads.log_softmax(self.ctc_head(hidden)), 0.0)

    def attributes(self, hidden: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"]) -> dict[str, Float[Tensor, "r e"]]:
        """Logits of every attribute; :meth:`Attribute.predict` says what they mean."""
        return {name: self._logits(name, hidden, mask) for name in self.tasks if name not in (ASR, CTC)}

    @torch.no_grad()
    def predict(self, tokens: Int[Tensor, "r s"], mask: Bool[Tensor, "r s"]) -> dict[str, list[Any]]:
        """What the model says of each row, by name of the attribute."""
        logits = self.attributes(self.encode(self.embed(tokens), mask), mask)
        return {one.name: one.predict(logits[one.name]).tolist() for one in self.sizes.attributes}

    def _logits(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        index = [one.name for one in self.sizes.attributes].index(name)
        return self.pooled[index](hidden, mask)

    # --- what it is for ---

    def task_rows(
        self,
        hidden: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        task: str,
        smoothing: float = 0.0,
    ) -> TaskRows | None:
        """Log-probability of each row's label for one task; ``None`` when the labels do not speak of the task."""
        if task in (ASR, CTC):
            text, text_mask, counted = labels.text, labels.text_mask & labels.has_text[:, None], labels.has_text
            if task == ASR:
                total, count = self.asr(hidden, mask, text, text_mask, smoothing).sum(-1), text_mask.sum(-1) + 1
            else:
                lengths = (labels.speech_lengths, labels.text_lengths) if labels.speech_lengths else None
                total, possible = heads.ctc_logp(self.ctc(hidden, mask), mask, text, text_mask, lengths)
                count, counted = text_mask.sum(-1).clamp(min=1), counted & possible
        else:
            known = labels.attribute(task)
            if known is None:
                return None
            attribute = next(one for one in self.sizes.attributes if one.name == task)
            counted, target = known.mask, known.target
            # :: (r) -> (r, 1, ...), as many axes as the target
            target = target.where(counted.view(-1, *[1] * (target.ndim - 1)), target.new_ones(()))
            total = heads.attribute_logp(attribute, self._logits(task, hidden, mask), target, smoothing)
            count = torch.full_like(total, attribute.outputs if attribute.kind == "events" else 1.0)
        return TaskRows(task, torch.where(counted, total, 0.0), torch.where(counted, count, 0).to(total))

    def score_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """As :meth:`score`, of vectors made with :meth:`embed`."""
        if self.training and self.sizes.dropout:
            raise RuntimeError("a reward must not depend on dropout: put the reward model into evaluation mode")
        numbers = {one.name for one in self.sizes.attributes if one.kind == "regression"}
        if wrong := [name for name in tasks or () if name not in self.tasks or name in numbers]:
            possible = ", ".join(name for name in self.tasks if name not in numbers)
            raise ValueError(f"expected reward tasks among {possible}, got {', '.join(wrong)}: check `tasks`")
        chosen = [name for name in self.tasks if name not in numbers] if tasks is None else tasks
        if not chosen:
            raise ValueError("there is nothing to score: expected at least one task that has a log-probability")
        hidden = self.encode(embedded, mask)
        scored = {name: self.task_rows(hidden, mask, labels, name) for name in chosen}
        if tasks is not None and (lacking := [name for name, rows in scored.items() if rows is None]):
            raise ValueError(f"the labels say nothing of {', '.join(lacking)}: expected them from `encode_labels`")
        return RewardScores(tuple(rows for rows in scored.values() if rows is not None))

    def losses(
        self,
        tokens: Int[Tensor, "r s"] | Float[Tensor, "r s c"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        regularisers: Regularisers | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, TaskLoss]:
        """Loss of every task for the model's own training, as sums and counts.

        Args:
            tokens: speech tokens, as ids or soft one-hots.
            mask: which are real.
            labels: what is known.
            regularisers: for training; none by default.
            generator: on the CPU, of the mixup's draws.
        """
        return self.losses_embedded(self.embed(tokens), mask, labels, regularisers, generator)

    def losses_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        regularisers: Regularisers | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, TaskLoss]:
        """As :meth:`losses`, of vectors in the place of those that :meth:`embed` makes."""
        return regularised_losses(self, embedded, mask, labels, regularisers or Regularisers(), generator)

    @torch.no_grad()
    def transcribe(
        self, tokens: Int[Tensor, "r s"] | Float[Tensor, "r s c"], mask: Bool[Tensor, "r s"], max_length: int = 200
    ) -> list[str]:
        """Greedy transcripts, by the text decoder if there is one, else by CTC.

        Args:
            tokens: speech tokens, as ids or soft one-hots.
            mask: which are real.
            max_length: largest number of characters; a longer transcript is cut.
        """
        was_training = self.training
        self.eval()
        try:
            hidden = self.encode(self.embed(tokens), mask)
            if self.decoder is None:
                return self._collapsed(hidden, mask, max_length)
            text = torch.zeros(len(mask), 0, dtype=torch.long, device=mask.device)
            ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
            while text.shape[1] < max_length and not ended.all():
                best = self.decoder(hidden, mask, text)[:, -1].argmax(-1).masked_fill(ended, END)
                text, ended = torch.cat([text, best[:, None]], 1), ended | (best == END)
            return [self.alphabet.decode(row) for row in text.tolist()]
        finally:
            self.train(was_training)

    def _collapsed(self, hidden: Tensor, mask: Tensor, max_length: int) -> list[str]:
        best = self.ctc(hidden, mask).argmax(-1)
        rows = [row[real].unique_consecutive().tolist() for row, real in zip(best, mask, strict=True)]
        return [self.alphabet.decode([token for token in row if token != END][:max_length]) for row in rows]

    # --- files ---

    def rebuild(self) -> RewardModel:
        """The model as its directory holds it."""
        if self.directory is None:
            raise ValueError("a reward model made from `sizes` cannot be rebuilt: save it and name its directory")
        return RewardModel(str(self.directory))

    def digest(self) -> str:
        """Digest of all weights as they are now, and of what they stand for."""
        return hashlib.blake2b(f"{self.sizes} {weights_digest(self.state_dict())}".encode(), digest_size=16).hexdigest()

    def save(self, directory: Path) -> None:
        """Write config, alphabet and weights; the directory appears whole or not at all."""
        write_model(directory, self.sizes, self.state_dict())
