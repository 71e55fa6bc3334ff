# SPDX-License-Identifier: Apache-2.0
"""Sharded training (FSDP2): a policy that trains whole is spread over all processes, everything else is replicated.

The rule, in full:

- The policy is sharded block by block while all its weights train: each process keeps a share of every weight, of its
  gradient and of the optimiser's state, and a block's weights are gathered only while it computes.
- Frozen models (reference, reward model, judge, vocoder) and a policy that trains adapters, or only in part, are
  replicated.
- Further parts that train (reward model, flow, tokenizer, an objective's own weights) are small: they are replicated,
  and their gradients averaged over the processes once per optimiser step.
- Outside of ``fit`` nothing is sharded.

Checkpoints hold whole weights and optimiser states in one file, as those of one process: a run resumes under any
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from tts_align.batch import Scored
from tts_align.models.base.policy import CodecLM
from tts_align.training.gradients import average_gradients, clip_gradients, mixed, one_by_one, weights
from tts_align.training.scoring import Scoring
from tts_align.utils.sharded import is_sharded, is_share, plain, shard, share_of, whole_tensor

pytree.register_dataclass(Scored)  # FSDP looks for the tensors in what a forward returns


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and optimiser state of the policy sharded over all processes of all machines (FSDP2).

    Args:
        process_group_backend: communication library; ``gloo`` on CPUs and ``nccl`` on GPUs by default.
        timeout_minutes: minutes that a process waits for the others before it gives up.
    """

    def __init__(self, process_group_backend: str | None = None, timeout_minutes: float = 30.0) -> None:
        if timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes must be above 0, got {timeout_minutes}")
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        """Use every process for data, none for splitting the tensors of a layer."""
        check_precision(self.precision_plugin)
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def shards(self) -> DeviceMesh:
        """All processes, in one row."""
        return self.device_mesh["data_parallel"]

    def setup(self, trainer: Trainer) -> None:
        """Prepare models and optimisers; a validation amid the training must leave tensors that can be trained on."""
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the optimisers of sharded and replicated weights."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for name in ("fused", "foreach"):
                if mixed(optimizer) and any(group.get(name) for group in optimizer.param_groups):
                    raise ValueError(
                        f"model.optimizer cannot be {name}: this objective trains other models beside the sharded "
                        f"policy, and {name} updates only one kind at a time; leave {name} out, or train without "
                        "sharding (recipes/strategy/ddp.yaml)"
                    )

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Update weights one by one where sharded and replicated ones meet."""
        with one_by_one(optimizer):
            try:
                return super().optimizer_step(optimizer, closure, model, **kwargs)
            except (RuntimeError, NotImplementedError) as error:
                if "DTensor" not in str(error):
                    raise
                raise ValueError(
                    f"model.optimizer {type(optimizer).__name__} cannot update weights that are spread over processes: "
                    "take AdamW or SGD, or train without sharding (recipes/strategy/ddp.yaml)"
                ) from error

    # --- checkpoints, as one process writes and reads them ---

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether weights are loaded late: no, the module is sharded by then."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the trainer restores the optimisers: yes, as with one process."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights of the module; empty but in the first process."""
        assert self.lightning_module is not None
        state = {name: self._on_first(value) for name, value in self.lightning_module.state_dict().items()}
        return state if self.is_global_zero else {}

    def _on_first(self, value: Any) -> Any:
        """A whole tensor in the memory of the first process's CPU, so that no GPU has to hold all of them."""
        one = whole_tensor(value)
        if not is_share(value):
            return one
        return one.cpu() if self.is_global_zero else None

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimiser as one process has it; of use in the first process only."""
        saved = getattr(optimizer, "optimizer", optimizer).state_dict()
        state = {
            number: {name: self._on_first(value) for name, value in one.items()}
            for number, one in saved["state"].items()
        }
        return {**saved, "state": state}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any number of processes."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = checkpoint["state_dict"]
        shares = {name: share_of(value, own[name]) if name in own else value for name, value in state.items()}
        self.lightning_module.load_state_dict(shares, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of the states."""
        shares = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            targets = list(weights(optimizer))
            state = {
                number: {name: share_of(value, targets[number]) for name, value in one.items()}
                for number, one in saved["state"].items()
            }
            shares.append({**saved, "state": state})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": shares})


class ShardedModule(LightningModule):
    """The hooks of a module whose policy may be sharded."""

    policy: CodecLM
    scoring: Scoring

    def configure_model(self) -> None:
        """Shard what is to be sharded, and let all processes begin with the weights of the first."""
        strategy, trained = self.trainer.strategy, [value for value in self.parameters() if value.requires_grad]
        check_strategy(strategy)
        if not isinstance(strategy, ShardedStrategy) or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.to(strategy.root_device)
        for value in trained:
            if not is_share(value):
                dist.broadcast(value.detach(), src=0)
        if not self.policy.adapted and all(value.requires_grad for value in self.policy.parameters()):
            shard(self.policy, self.policy.blocks, strategy.shards)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the gradients of replicated weights; those of sharded ones come averaged."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            average_gradients(self.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip sharded and replicated gradients by one norm."""
        if is_sharded(self.policy) and gradient_clip_val:
            clip_gradients(self.parameters(), gradient_clip_val, by_value=gradient_clip_algorithm == "value")
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_end(self) -> None:
        """Have the policy whole again: what comes after the training knows nothing of shards."""
        if is_sharded(self.policy):
            self.policy = self.scoring.policy = plain(self.policy)


def check_strategy(strategy: Strategy) -> None:
    """Raise ``ValueError`` for a strategy that cannot train what is called in parts, as models are here."""
    foreign = isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)
    if foreign and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            f"trainer.strategy must not be {type(strategy).__name__}: it would cut models that are called in parts; "
            "for sharded training use ShardedStrategy, as recipes/strategy/fsdp.yaml does"
        )


def check_precision(plugin: Precision) -> None:
    """Raise ``ValueError`` for a precision in which sharded weights would not be float32, or losses scaled."""
    autocast = isinstance(plugin, MixedPrecision) and plugin.scaler is None
    if not autocast and plugin.precision != "32-true":
        raise ValueError(
            f"sharded training keeps its weights in float32: trainer.precision must be 32-true or bf16-mixed, got "
            f"{plugin.precision}"
        )
