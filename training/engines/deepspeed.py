"""An engine with DeepSpeed's ZeRO."""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from languagebind.config import UserError, first_line, package
from languagebind.configs import FOLDER, find
from languagebind.model import DualEncoder

from ..optim import OptimConfig, build_optimizer
from .base import Engine, EngineConfig, OptimizerState, State, TrainedSide, kept_by_main, load_by_name, save_by_name

# DeepSpeed options that our flags set or that must keep their value.
RESERVED = {
    "optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip


class DeepSpeed(Engine):
    """ZeRO stages 1 to 3 with our optimizer, schedule and checkpoints. Clipping excludes the logit scale and bias."""

    def _distribute(self, optim: OptimConfig, config: EngineConfig) -> None:
        if self.process.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = package("deepspeed", "--engine deepspeed", "deepspeed")
        path = find(config.deepspeed_config or FOLDER / f"deepspeed/zero{config.zero_stage}.json", "deepspeed")
        options = read_options(path)
        self.stage = options["zero_optimization"]["stage"]
        self.replica = None
        if self.stage == 3:  # all ranks must call a sharded module together, but evaluation does not
            text = [] if self.model.trains_text else [self.model.text_model, self.model.text_projection]
            self.replica = copy.deepcopy(self.model, {id(module): module for module in text})
            TrainedSide(self.replica, self.side.precision).cpu()  # uses no device memory before evaluation
        options |= {
            "train_micro_batch_size_per_gpu": 1,  # required but unused: the loader decides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.grad_clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        try:
            deepspeed.DeepSpeedConfig(options)
        except Exception as error:  # errors of pydantic and DeepSpeed
            raise UserError(f"--deepspeed-config {path} is invalid: {error}") from error
        optimizer = build_optimizer(self.trained(), optim)
        self.zero_engine, self.zero, _, _ = deepspeed.initialize(model=self.side, optimizer=optimizer, config=options)
        self.forward = self.zero_engine
        self.optimizers.insert(0, self.zero)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        self.zero_engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.zero_engine.backward(loss)

    def update(self) -> bool:
        for optimizer in self.optimizers[1:]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.zero_engine.step()
        self.grad_norm = torch.as_tensor(self.zero_engine.get_global_grad_norm(), device=self.process.device)
        return True

    def model_state(self) -> State:
        if self.stage < 3:
            return super().model_state()
        from deepspeed import zero

        state = {name: parameter.detach() for name, parameter in self.scalars.items()}
        for name, parameter in self.side.named_parameters():
            with zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().cpu().clone()
        return {name: state.get(name, value) for name, value in self.model.encoder_state().items()}

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self.zero.optimizer.state[flat] for flat in self._flat_parts() if flat in self.zero.optimizer.state]
        if not states:
            return {}
        self._link_states()
        averages = [key for key, value in states[0].items() if value.ndim > 0]
        rest = {key: value for key, value in states[0].items() if key not in averages}
        own = {
            name: {key: kept_by_main(safe_get_full_optimizer_state(parameter, key)) for key in averages} | rest
            for name, parameter in self.trained().items()
        }
        return own | save_by_name(self.optimizers[1:], self.scalars)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        load_by_name(self.optimizers[1:], self.scalars, saved)
        first = next((saved[name] for name in self.trained() if name in saved), None)
        if first is None:
            return
        for flat in self._flat_parts():
            self.zero.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if value.ndim > 0 else value.to(flat.device, copy=True)
                for key, value in first.items()
            }
        self._link_states()
        for name, parameter in self.trained().items():
            for key, value in saved[name].items():
                if value.ndim > 0:
                    safe_set_full_optimizer_state(parameter, value.to(self.process.device), key)

    @contextmanager
    def whole_model(self) -> Iterator[DualEncoder]:
        if self.replica is None:
            yield self.model
            return
        self.replica.load_state_dict(self.model_state(), strict=False)  # it shares a frozen text tower
        try:
            yield self.replica.to(self.process.device)
        finally:
            TrainedSide(self.replica, self.side.precision).cpu()

    def _flat_parts(self) -> list[Tensor]:
        """Return the flat shards that this rank's optimizer updates, one per parameter group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _link_states(self) -> None:
        """Link the states of all groups: DeepSpeed 0.19 links them when only the first group has states."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def read_options(path: Path) -> dict[str, Any]:
    """Return the options of a DeepSpeed config."""
    try:
        options = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --deepspeed-config {path}: {first_line(error)}") from error
    if options.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise UserError(f"--deepspeed-config {path}: zero_optimization.stage should be 1, 2 or 3")
    if reserved := sorted(RESERVED & options.keys()):
        raise UserError(f"--deepspeed-config {path} sets {', '.join(reserved)}: use the flags of training.main instead")
    return options
