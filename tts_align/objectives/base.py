# SPDX-License-Identifier: Apache-2.0
"""What an objective is: a name, what it needs, and a loss over one scored step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from tts_align.batch import Batch, Mean, Reads, Recordings, RowsWanted, Scored, Utterances
from tts_align.logprobs import full_kl

if TYPE_CHECKING:
    from tts_align.models.base.flow import FlowHead
    from tts_align.models.base.policy import CodecLM
    from tts_align.models.base.reward import RewardHead
    from tts_align.models.base.tokenizer import TokenizerHead


class Part(StrEnum):
    """A model besides the policy; the value is its key under ``model:`` in a recipe."""

    REFERENCE = "reference"
    CONTRAST = "contrast"
    REWARD = "reward"
    FLOW = "flow"
    TOKENIZER = "tokenizer"


class Parts(nn.ModuleDict):
    """The models besides the policy, each of a type of its own: ``parts.reward``, ``parts.flow``.

    ``Part.REWARD in parts`` says whether a model is there; one that is not raises ``AttributeError``.
    """

    reference: CodecLM
    reward: RewardHead
    flow: FlowHead
    tokenizer: TokenizerHead


@dataclass(frozen=True)
class Step:
    """Everything an objective may look at in one step.

    Args:
        batch: the rows, their labels, and the counts of the whole optimiser step.
        policy: what the policy says, with gradient; of no rows when the objective does not ask it.
        reference: what the frozen reference says, if the objective needs it.
        contrast: log π⁺ − log π⁻ of each target, shape (r, t), if the objective needs it.
        mismatched: mean over all ranks of the log-ratio log π − log π_ref of speech under another sentence's text, if
            the objective asks for mismatched rows.
        parts: further models the objective needs.
        number: of the optimiser step, counted from 0.
    """

    batch: Batch
    policy: Scored
    reference: Scored | None = None
    contrast: Float[Tensor, "r t"] | None = None
    mismatched: Mean | None = None
    parts: Parts = field(default_factory=Parts)
    number: int = 0

    @property
    def utterances(self) -> Utterances:
        """Speech tokens, words and attributes of the rows."""
        if self.batch.utterances is None:
            raise ValueError("there are no utterances in this batch: the objective must say `wants_utterances = True`")
        return self.batch.utterances

    @property
    def recordings(self) -> Recordings:
        """The rows as sound."""
        if self.batch.recordings is None:
            raise ValueError("there is no sound in this batch: the objective must say `wants_sound = True`")
        return self.batch.recordings

    @property
    def log_ratio(self) -> Float[Tensor, "r t"]:
        """Token reward log π − log π_ref; 0 at padding."""
        if self.reference is None:
            raise ValueError("the log-ratio needs the reference: add Part.REFERENCE to the objective's `needs`")
        return self.policy.logp - self.reference.logp

    def exact_kl(self) -> Float[Tensor, " m"]:
        """KL(policy || reference) over the whole vocabulary at each real target; gradients reach the policy only."""
        if self.policy.logits is None or self.reference is None or self.reference.logits is None:
            raise ValueError(
                "the exact KL needs the distributions of policy and reference: the objective must say "
                "`wants_logits = True`, with Part.REFERENCE in `needs`"
            )
        normalisers = self.policy.normaliser, self.reference.normaliser
        return full_kl(self.policy.logits, self.reference.logits.detach(), *normalisers)

    def mean(self, values: Tensor, count: int | None = None) -> Float[Tensor, ""]:
        """This micro-batch's share of a mean over the whole optimiser step.

        The shares of all micro-batches and ranks add up to the mean, so the gradient does not depend on the cut.

        Args:
            values: one number per item that this micro-batch holds; with 0 at what does not count.
            count: how many items the whole step holds, from ``step.batch.totals``; by default its rows, or its pairs
                when ``values`` has one number for each two rows.
        """
        if count is None:
            rows = self.batch.rows.count
            paired = values.numel() != rows and 2 * values.numel() == rows
            count = self.batch.totals.rows // (2 if paired else 1)
        return values.sum() / max(count, 1)

    def cross_entropy(self) -> Float[Tensor, ""]:
        """This micro-batch's share of the mean token cross-entropy on desirable rows: the SFT anchor."""
        good = self.policy.logp * self.batch.desirable[:, None]
        return -self.mean(good, self.batch.totals.desirable_tokens)

    def anchored(self, loss: Float[Tensor, ""], sft_weight: float) -> Float[Tensor, ""]:
        """The loss plus ``sft_weight`` times the SFT anchor; the loss itself with a weight of 0."""
        return loss + sft_weight * self.cross_entropy() if sft_weight else loss

    def sides(self, name: str, values: Float[Tensor, "r t"]) -> dict[str, Mean]:
        """Means over the desirable and over the undesirable tokens, to be logged under ``<side>_<name>``."""
        mask, desirable = self.policy.mask, self.batch.desirable[:, None]
        return {
            f"desirable_{name}": Mean.of(values, mask & desirable),
            f"undesirable_{name}": Mean.of(values, mask & ~desirable),
        }


@dataclass(frozen=True)
class Outcome:
    """What an objective returns.

    Args:
        loss: this micro-batch's share of the step's loss, made with :meth:`Step.mean`.
        metrics: numbers to log as sums and counts, reduced once per log.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Mean] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no step could be made of, while the objective that made it is still at work."""
        loss = self.loss
        if not isinstance(loss, Tensor) or loss.ndim > 0 or not loss.is_floating_point():
            raise ValueError(
                f"the loss of an Outcome must be one number, a floating-point tensor without axes; got {_kind(loss)}: "
                "sum its rows up with step.mean(values)"
            )
        for name, one in self.metrics.items():
            if not isinstance(name, str) or name == "loss":
                raise ValueError(
                    f"a metric of an Outcome must have a name of its own, a string other than 'loss'; got {name!r}: "
                    "the loss is logged by itself"
                )
            parts = (one.total, one.count) if isinstance(one, Mean) else ()
            if not parts or any(not isinstance(part, Tensor) or part.ndim for part in parts):
                raise ValueError(
                    f"the metric {name!r} of an Outcome must be a Mean of two numbers, tensors without axes; got "
                    f"{_kind(one)}: write Mean.of(values)"
                )


def _kind(value: object) -> str:
    """What something is, for a message: its type, and for a tensor its kind of number and its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    if isinstance(value, Mean):
        return f"a Mean of {_kind(value.total)} and {_kind(value.count)}"
    return f"{type(value).__name__} {value!r:.60}"


class Objective(nn.Module, ABC):
    """Base of every alignment objective; ``class Mine(Objective, name="mine")`` registers it.

    Class attributes state facts, or properties where a knob decides; constructor arguments are knobs and become flags:

    ``needs``
        parts that must be there besides the policy.
    ``trains``
        those of them that receive gradients.
    ``reads``
        which rows it can use.
    ``wants_logits``
        whether policy and reference keep their full distributions.
    ``wants_mismatched``
        whether the step brings :attr:`Step.mismatched`, at the price of one more forward without gradient.
    ``wants_utterances``
        whether the step brings :attr:`Step.utterances`, the rows as speech tokens and words.
    ``wants_sound``
        whether the step brings :attr:`Step.recordings`, the rows as sound; their speech tokens are placeholders, which
        :meth:`prepare` replaces.
    ``voices``
        names of speakers, if each one's vector is a one at the place of the name.
    ``scores``
        whether the policy scores the rows and trains; without it the policy is only there for its speech tokens.
    ``unfreeze_after``
        optimiser steps for which a part that trains waits, by its name.
    """

    registry: ClassVar[dict[str, type[Objective]]] = {}
    needs: ClassVar[frozenset[Part]] = frozenset()
    trains: ClassVar[frozenset[Part]] = frozenset()
    reads: ClassVar[Reads] = Reads.SPEECH
    wants_logits: ClassVar[bool] = False
    wants_mismatched: ClassVar[bool] = False
    wants_utterances: ClassVar[bool] = False
    wants_sound: ClassVar[bool] = False
    scores: ClassVar[bool] = True
    voices: tuple[str, ...] = ()
    unfreeze_after: Mapping[str, int] = MappingProxyType({})

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Check the class facts and register the class under ``name``."""
        super().__init_subclass__(**kwargs)
        # Properties where they depend on the knobs: those are not looked at.
        for fact in ("needs", "trains"):
            if not isinstance(parts := getattr(cls, fact), property):
                setattr(cls, fact, _parts(cls.__name__, fact, parts))
        if not isinstance(cls.reads, property):
            cls.reads = _reads(cls.__name__, cls.reads)
        facts = cls.trains, cls.needs
        if all(isinstance(fact, frozenset) for fact in facts) and not cls.trains <= cls.needs:
            extra = ", ".join(sorted(cls.trains - cls.needs))
            raise TypeError(f"{cls.__name__} trains {extra}, which it does not list in `needs`")
        if name is None:
            return
        holder = Objective.registry.get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"objective name {name!r} is taken by {holder.__module__}.{holder.__qualname__}")
        Objective.registry[name] = cls

    @property
    def rows_wanted(self) -> RowsWanted:
        """What the data must bring; a data module that is attached to the module follows it."""
        readers: dict[Reads, tuple[str, ...]] = {}
        for name, kind in sorted(Objective.registry.items()):
            readers[kind.reads] = (*readers.get(kind.reads, ()), name)
        return RowsWanted(self.reads, self.wants_mismatched, self.wants_utterances, self.wants_sound, readers)

    @property
    def trainable(self) -> frozenset[str]:
        """Names of what trains."""
        policy = frozenset({"policy"}) if self.scores else frozenset()
        return policy | {str(part) for part in self.trains}

    @property
    def trains_reward_only(self) -> bool:
        """Whether what is to be tested is a reward model."""
        return not self.scores and self.trains == frozenset({Part.REWARD})

    def bind(self, policy: CodecLM, parts: Parts) -> None:
        """Look at the models, before anything is trained; what is to be learnt between them can be made here.

        Args:
            policy: the model that is trained.
            parts: the others.
        """

    def prepare(self, batch: Batch, policy: CodecLM, parts: Parts) -> Batch:
        """The batch as the policy shall score it; by default as it is."""
        return batch

    def encode(self, batch: Batch, parts: Parts) -> Batch:
        """The batch with what only the CPU knows how to make of it, before it moves to the device; by default as it is.

        What is made later, from texts and names, would let the device wait.
        """
        return batch

    def merged(self, policy: CodecLM, parts: Parts) -> AbstractContextManager[None]:
        """Within the block the models work without this objective: what it learnt besides is in their weights."""
        return nullcontext()

    def initial_policy(self, policy: CodecLM) -> CodecLM | None:
        """The policy before it was trained, for ``test``; ``None`` when there was none worth hearing."""
        return policy.rebuild()

    @abstractmethod
    def forward(self, step: Step) -> Outcome:
        """Turn one scored step into a loss; pure arithmetic."""


def checked_outcome(objective: Objective, outcome: object, learns: bool) -> Outcome:
    """What an objective returned; raises ``ValueError`` for what one of the user's returns by mistake.

    Args:
        objective: that returned it.
        outcome: what its ``forward`` returned.
        learns: whether weights are to learn from it.
    """
    name = type(objective).__name__
    if not isinstance(outcome, Outcome):
        raise ValueError(f"{name}.forward must return an Outcome(loss, metrics), got {_kind(outcome)}")
    if learns and not outcome.loss.requires_grad:
        raise ValueError(
            f"the loss of {name} depends on no weight that trains: it must be made of step.policy, or of another model "
            "that the objective trains, without .detach(), .item() or torch.no_grad()"
        )
    return outcome


def _parts(name: str, fact: str, parts: object) -> frozenset[Part]:
    """Parts that an objective lists; a single one or a list of them is meant well, a name that is none is not."""
    listed: Any = (parts,) if isinstance(parts, str) else parts
    try:
        return frozenset(Part(one) for one in listed)
    except (TypeError, ValueError):
        known = ", ".join(f"Part.{part.name}" for part in Part)
        raise TypeError(f"{name}: `{fact}` must be a frozenset of {known}; got {parts!r}") from None


def _reads(name: str, reads: Any) -> Reads:
    """Kind of rows that an objective reads."""
    try:
        return Reads(reads)
    except ValueError:
        known = ", ".join(f"Reads.{kind.name}" for kind in Reads)
        raise TypeError(f"{name}: `reads` must be one of {known}; got {reads!r}") from None


def check_codebook(policy: CodecLM, reward: RewardHead) -> None:
    """Raise ``ValueError`` unless the reward model reads the speech tokens that the policy speaks."""
    if reward.codebook_size != policy.layout.codebook_size:
        raise ValueError(
            f"model.reward must read the {policy.layout.codebook_size} speech tokens of model.policy, got "
            f"{reward.codebook_size} of them"
        )


def check_positive(**knobs: float) -> None:
    """Raise ``ValueError`` for the knobs that are not above zero, all in one message."""
    wrong = [f"{name} must be above 0, got {value}" for name, value in knobs.items() if not value > 0]
    if wrong:
        raise ValueError("; ".join(wrong))


def check_not_negative(**knobs: float) -> None:
    """Raise ``ValueError`` for the knobs below zero, all in one message."""
    wrong = [f"{name} must not be negative, got {value}" for name, value in knobs.items() if not value >= 0]
    if wrong:
        raise ValueError("; ".join(wrong))
