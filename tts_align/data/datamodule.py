# SPDX-License-Identifier: Apache-2.0
"""The Lightning data module: a manifest in, micro-batches out, the same ones however often training is interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from numpy.typing import NDArray

from tts_align.batch import RowsWanted
from tts_align.data.choice import Choice
from tts_align.data.collate import PlanSampler
from tts_align.data.encode import encode_audio
from tts_align.data.keyed import Keyed
from tts_align.data.manifest import read_manifest
from tts_align.data.plan import Plan
from tts_align.data.select import LabelledUtterance
from tts_align.data.sound import AcousticMel, FeatureExtractor
from tts_align.data.split import AlignLoader, Split, TrainerProgress, check_not_replaced, cut_by_tokens, limited_steps
from tts_align.data.unlabelled import Unlabelled
from tts_align.data.wants import wants_rows
from tts_align.models.base.layout import TokenRow
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.tokenizer import SpeechTokenizer, TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.seeds import part_seed, run_seed


class AlignData(LightningDataModule):
    """Utterances marked good or bad, as the objective of the trained module reads them.

    Exactly one of ``rows_per_step`` and ``tokens_per_step`` is given; both count one optimiser step over all devices
    and accumulated micro-batches together, so the result does not depend on how many there are.

    Args:
        manifest: training rows: a .jsonl or .parquet file, a directory of Parquet shards, CosyVoice shards or their
            data.list, or a demo: name.
        validation: held-out rows on which the loss is watched; the same kinds of file.
        rows_per_step: rows in one optimiser step; a pair is two rows.
        tokens_per_step: text and speech tokens in one optimiser step, about; instead of rows_per_step.
        tokens_per_micro_batch: most text and speech tokens scored at once; instead of trainer.accumulate_grad_batches.
        bucket_steps: optimiser steps within which rows are sorted by length, a quarter of an epoch at most; 1 for none.
        seed: seed of shuffling, pairing and every other draw of rows; that of the run (seed_everything) by default.
        on_bad_row: reaction to a fault in the manifest: stop, or drop the row and say so.
        paired_only: whether to use only those labelled rows that stand in pairs.
        unlabelled: treatment of rows without a label where others have one: stop, desirable (they count as such), or
            drop.
        desirable_stars: number of stars from which on a row is desirable, for labels that are 1 to 5 stars.
        bistream_share: share of long rows whose text and speech are interleaved.
        flip_labels: whether to train on the opposite labels.
        max_rows: number of manifest rows to use, drawn by the seed, for trials; all by default.
        tokenizer: tokenizer of recordings, for rows that have no speech tokens.
        vocoder: vocoder of rows without a recording, for objectives that want sound.
        acoustic: mel frames that model.flow makes; what model.tokenizer reads by default.
        num_workers: processes that prepare batches; 0 for the training process itself.
        wants: rows that the objective wants, if they are read without a module.
    """

    def __init__(
        self,
        manifest: str | None = None,
        validation: str | None = None,
        rows_per_step: int | None = None,
        tokens_per_step: int | None = None,
        tokens_per_micro_batch: int | None = None,
        bucket_steps: int = 8,
        seed: int | None = None,
        on_bad_row: Literal["stop", "drop"] = "stop",
        paired_only: bool = False,
        unlabelled: Unlabelled = "stop",
        desirable_stars: float | None = None,
        bistream_share: float = 0.0,
        flip_labels: bool = False,
        max_rows: int | None = None,
        tokenizer: SpeechTokenizer | None = None,
        vocoder: Vocoder | None = None,
        acoustic: AcousticMel | None = None,
        num_workers: int = 0,
        wants: RowsWanted | None = None,
    ) -> None:
        super().__init__()
        faults = []
        if manifest is not None and (rows_per_step is None) == (tokens_per_step is None):
            faults.append("give exactly one of data.rows_per_step and data.tokens_per_step")
        if not 0 <= bistream_share <= 1:
            faults.append(f"data.bistream_share must lie in 0..1, got {bistream_share}")
        if max_rows is not None and max_rows < 1:
            faults.append(f"data.max_rows must be at least 1, got {max_rows}")
        if faults:
            raise ValueError("; ".join(faults))
        self.manifest, self.validation, self.tokens_per_micro_batch = manifest, validation, tokens_per_micro_batch
        self.rows_per_step, self.tokens_per_step, self.bucket_steps = rows_per_step, tokens_per_step, bucket_steps
        self.own_seed, self.on_bad_row, self.paired_only = seed, on_bad_row, paired_only
        self.bistream_share, self.flip_labels, self.max_rows = bistream_share, flip_labels, max_rows
        self.unlabelled, self.desirable_stars, self.num_workers = unlabelled, desirable_stars, num_workers
        self.tokenizer, self.vocoder, self.acoustic = tokenizer, vocoder, acoustic
        self._wants: RowsWanted | None = None
        self._trained_tokenizer: TokenizerHead | None = None
        self._splits: dict[str, Split] = {}
        self.folder: Path | None = None
        self._restored: dict[str, Any] = {}
        if wants is not None:
            self.follow(wants)

    @property
    def wants(self) -> RowsWanted:
        """What the objective wants of the rows."""
        if self._wants is None:
            raise ValueError(
                "nothing says which rows to read: attach the data to the trainer of an AlignModule, or give wants, "
                "such as DPO().rows_wanted"
            )
        return self._wants

    def follow(self, wants: RowsWanted) -> None:
        """Bring what an objective wants; a trainer calls it for the module that it trains.

        Args:
            wants: what the objective wants.

        Raises:
            ValueError: it contradicts what was wanted before, or an argument of this data module has no effect.
        """
        if self._wants not in (None, wants):
            raise ValueError(f"the data were made for {self._wants}, but the objective wants {wants}: leave wants out")
        given = {"data.vocoder": self.vocoder, "data.acoustic": self.acoustic}
        if not wants.sound and (idle := [name for name, one in given.items() if one]):
            raise ValueError("; ".join(f"{name} has no effect: the objective wants no sound" for name in idle))
        if wants.sound and self.tokenizer is not None:
            raise ValueError("data.tokenizer has no effect: model.tokenizer makes the speech tokens; leave it out")
        self._wants = wants

    @property
    def seed(self) -> int:
        """Seed of every draw of rows."""
        return part_seed(self.own_seed)

    def setup(self, stage: str) -> None:
        """Read the manifests for the policy being trained."""
        if stage in ("fit", "validate"):
            assert self.trainer is not None
            module: Any = self.trainer.lightning_module
            if wants_rows(module):
                self.prepare(module.policy, module.rows_wanted, module.trained_tokenizer)
            else:
                self.prepare(module.policy)
            if stage == "fit" and self.tokens_per_micro_batch is not None:
                cut_by_tokens(self.trainer, self._splits["train"].plan, self.tokens_per_micro_batch)

    def prepare(
        self, policy: CodecLM, wants: RowsWanted | None = None, trained_tokenizer: TokenizerHead | None = None
    ) -> None:
        """Read, check, select and tokenise; does nothing the second time.

        Args:
            policy: knows how text becomes tokens, and how rows are arranged.
            wants: what the objective wants of the rows, if the data do not know it yet.
            trained_tokenizer: makes the speech tokens during the training, for objectives that want sound.

        Raises:
            ValueError: a manifest cannot be used, or the data were made for what another objective wants.
        """
        if wants is not None:
            self.follow(wants)
        self._trained_tokenizer = trained_tokenizer or self._trained_tokenizer
        if self.manifest is None:
            raise ValueError("nothing to train on: the recipe must set data.manifest")
        if "train" not in self._splits:
            self._splits["train"] = self._split(self.manifest, policy, training=True)
        if self.validation is not None and "validation" not in self._splits:
            self._splits["validation"] = self._split(self.validation, policy, training=False)

    def _split(self, path: str, policy: CodecLM, training: bool) -> Split:
        codebook = None if self.wants.sound else policy.layout.codebook_size
        manifest = read_manifest(
            path, self.on_bad_row, codebook, self.wants.sound or "needed", False, self.desirable_stars, self._folder
        )
        most = self.max_rows if training else None
        settled = self.unlabelled, self.paired_only, self.flip_labels, most, self.bistream_share, self.seed
        choice = Choice(self.wants, *settled)
        rows = manifest.rows if self.wants.sound else encode_audio(manifest, self.tokenizer)
        try:
            if self.wants.sound:
                examples, counts = choice.heard(rows, policy, self._extractor, manifest)
            else:
                examples, counts = choice.examples(rows, policy)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        examples = replace(examples, noise_seed=run_seed())
        plan = Plan(
            tokens=examples.tokens(policy.layout),
            rows_per_item=examples.items.shape[1],
            rows_per_step=self.rows_per_step,
            tokens_per_step=self.tokens_per_step,
            bucket_steps=self.bucket_steps,
            seed=self.seed,
            shuffle=training,
        )
        _say_once(f"{path}\n{counts}\nused here: {len(examples.rows)} rows as {self.wants.reads}")
        return Split(examples, plan, policy.layout)

    @property
    def _folder(self) -> Path | None:
        """Where large manifests are stored as tables: with the numbers of frozen models, if a run says where."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if self.folder is None and wants_rows(module):
            assert self.trainer is not None
            return Path(getattr(module, "cache_folder", None) or Path(self.trainer.default_root_dir, "cache"))
        return self.folder

    @property
    def _extractor(self) -> FeatureExtractor:
        if self._trained_tokenizer is None:
            raise ValueError("no tokenizer for recordings: the recipe must set model.tokenizer")
        return FeatureExtractor(self._trained_tokenizer, self.vocoder, self.acoustic)

    def train_dataloader(self) -> AlignLoader:
        """This rank's micro-batches, from where training stands."""
        split = self._splits["train"]
        assert self.trainer is not None
        world, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        check_not_replaced(self.trainer)
        split.plan.check(world, accumulate)
        steps = limited_steps(split.plan.steps_per_epoch, accumulate, self.trainer.limit_train_batches)
        rank_zero_info(f"{steps} optimiser steps per epoch")
        sampler = PlanSampler(
            plan=split.plan,
            examples=split.examples,
            rank=self.trainer.global_rank,
            world=world,
            accumulate=accumulate,
            steps=steps,
            progress=TrainerProgress(self.trainer, self._check_restored),
        )
        return split.loader(sampler, self.num_workers, self._pin_memory)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Every validation row once, in an order that never changes."""
        split = self._splits.get("validation")
        if split is None:
            # Lightning asks whether this was the intention: it was.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        assert self.trainer is not None
        split.plan.check(self.trainer.world_size, 1)
        sampler = PlanSampler(split.plan, split.examples, rank=self.trainer.global_rank, world=self.trainer.world_size)
        return split.loader(sampler, self.num_workers, self._pin_memory)

    def held_out(self, policy: CodecLM, wants: RowsWanted) -> EVAL_DATALOADERS:
        """Batches of the validation rows, for the test of a reward model.

        Raises:
            ValueError: there are no validation rows.
        """
        if self.validation is None:
            raise ValueError("nothing to test the reward model on: the recipe must set data.validation")
        self.prepare(policy, wants)
        return self.val_dataloader()

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Test sentences are the module's: what is spoken does not come from the manifest."""
        assert self.trainer is not None
        return self.trainer.lightning_module.test_dataloader()

    @property
    def _pin_memory(self) -> bool:
        assert self.trainer is not None
        return self.trainer.strategy.root_device.type == "cuda"

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Labels of the training rows, as they are used: flipped if they are to be flipped."""
        return self._splits["train"].examples.desirable

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a whole training epoch."""
        return self._splits["train"].plan.steps_per_epoch

    def rows(self, split: Literal["train", "validation", "all"] = "all") -> Keyed[TokenRow]:
        """Every distinct row that will be scored, mismatched ones included, by its key: what a cache must hold."""
        parts: list[tuple[Any, Sequence[TokenRow]]] = []
        for one in self._chosen(split):
            parts.append((one.examples.keys, one.examples.rows))
            if len(one.examples.mismatched):
                parts.append((one.examples.mismatched_keys, one.examples.mismatched))
        return Keyed(parts)

    def sources(self, split: Literal["train", "validation", "all"] = "all") -> Mapping[str, LabelledUtterance]:
        """By key, the utterance and manifest row (spans, scores) behind each row; mismatched ones have none."""
        return Keyed([(one.examples.keys, one.examples.sources) for one in self._chosen(split)], last=True)

    def _chosen(self, split: str) -> list[Split]:
        return [one for name, one in self._splits.items() if split in (name, "all")]

    def state_dict(self) -> dict[str, Any]:
        """What the position in the data depends on; the number of devices is not part of it."""
        split = self._splits.get("train")
        if split is None or self.trainer is None:
            return {}
        knobs = ("rows_per_step", "tokens_per_step", "bucket_steps", "seed", "flip_labels")
        return {f"data.{name}": getattr(self, name) for name in knobs} | {
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "trainer.limit_train_batches": self.trainer.limit_train_batches,
            "data.reads": str(self.wants.reads),
            "rows and their layout": split.digest,
            "labels of the rows": split.labels_digest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until training continues."""
        self._restored = dict(state_dict)

    def _check_restored(self) -> None:
        now = self.state_dict()
        changed = [f"{name} was {old}, is {now[name]}" for name, old in self._restored.items() if old != now.get(name)]
        if changed:
            raise ValueError(
                "the checkpoint was made with other data, training cannot continue where it was: "
                f"{'; '.join(changed)}. Set it back, or begin anew from the saved weights (model.policy)"
            )


@cache
def _say_once(text: str) -> None:
    """Print what is the same for the fits of a pair and of the policy only the first time."""
    rank_zero_info(text)
