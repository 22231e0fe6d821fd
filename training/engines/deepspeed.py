"""DeepSpeed's ZeRO as an engine."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from languagebind.config import UserError, first_line
from languagebind.model import DualEncoder

from ..optim import OptimConfig, build_optimizer
from .base import Engine, EngineConfig, OptimizerState, State, kept_by_main, load_by_name, save_by_name

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "deepspeed"

# Of DeepSpeed's options, those that this library's own flags decide, or that it needs as they are.
DECIDED = {
    "optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip


class DeepSpeed(Engine):
    """ZeRO 1 to 3, with this library's optimizer, schedule and checkpoints. Clipping leaves the logit scale out."""

    def _spread(self, optim: OptimConfig, config: EngineConfig) -> None:
        if self.process.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            raise UserError("--engine deepspeed needs the package deepspeed: pip install deepspeed") from error
        options = read_options(config.deepspeed_config or CONFIGS / f"zero{config.zero_stage}.json")
        self.stage = options.get("zero_optimization", {}).get("stage", 0)
        if self.stage not in (1, 2, 3):
            raise UserError(f"{config.deepspeed_config}: zero_optimization.stage should be 1, 2 or 3, is {self.stage}")
        # Under ZeRO 3 all ranks have to call a module together, which evaluation does not promise.
        self.replica = _copy(self.model) if self.stage == 3 else None
        options |= {
            "train_micro_batch_size_per_gpu": 1,  # not used: the loader decides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.grad_clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        try:
            deepspeed.DeepSpeedConfig(options)
        except Exception as error:  # pydantic's and DeepSpeed's own
            raise UserError(f"DeepSpeed refuses {config.deepspeed_config or 'its config'}: {error}") from error
        optimizer = build_optimizer(self.trained(), optim)
        self.forward, zero, _, _ = deepspeed.initialize(model=self.side, optimizer=optimizer, config=options)
        self.optimizers.insert(0, zero)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.forward.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.forward.backward(loss)

    def update(self, check: Callable[[Tensor], None]) -> bool:
        """As in `Engine`, but the norm is known only after the step; a refused step ends the run unsaved."""
        self._average_scalars()
        for optimizer in self.optimizers[1:]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.forward.step()
        self.grad_norm = torch.as_tensor(self.forward.get_global_grad_norm(), device=self.process.device)
        check(self.grad_norm)
        return True

    def model_state(self) -> State:
        if self.stage < 3:
            return super().model_state()
        from deepspeed import zero

        state = {name: parameter.detach() for name, parameter in self.scalars.items()}
        for name, parameter in self.model.named_parameters():
            if name.startswith(("vision_model.", "visual_projection.")):
                with zero.GatheredParameters([parameter]):
                    state[name] = parameter.detach().cpu().clone()
        return {name: state.get(name, value) for name, value in self.model.encoder_state().items()}

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = self.optimizers[0]
        states = [zero.optimizer.state[flat] for flat in self._flat_parts() if flat in zero.optimizer.state]
        if not states:
            return {}
        self._link_states()
        averages = [key for key, value in states[0].items() if torch.is_tensor(value) and value.ndim]
        rest = {key: value for key, value in states[0].items() if key not in averages}
        own = {
            name: {key: kept_by_main(safe_get_full_optimizer_state(parameter, key)) for key in averages} | rest
            for name, parameter in self.trained().items()
        }
        return own | save_by_name(self.optimizers[1:], self.scalars)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for optimizer in self.optimizers[1:]:
            load_by_name(optimizer, self.scalars, saved)
        first = next((saved[name] for name in self.trained() if name in saved), None)
        if first is None:
            return
        for flat in self._flat_parts():
            self.optimizers[0].optimizer.state[flat] = {
                key: torch.zeros_like(flat) if torch.is_tensor(value) and value.ndim else _own(value, flat)
                for key, value in first.items()
            }
        self._link_states()
        for name, parameter in self.trained().items():
            for key, value in saved[name].items():
                if torch.is_tensor(value) and value.ndim:
                    safe_set_full_optimizer_state(parameter, value.to(self.process.device), key)

    @contextmanager
    def whole_model(self) -> Iterator[DualEncoder]:
        if self.replica is None:
            yield self.model
            return
        self.replica.load_state_dict(self.model_state(), strict=False)  # the text tower is the same one
        try:
            yield self.replica.to(self.process.device)
        finally:
            _put_aside(self.replica)

    def _flat_parts(self) -> list[Tensor]:
        """What this rank's optimizer steps: flat parts of the parameters, one a group."""
        zero = self.optimizers[0]
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _link_states(self) -> None:
        """DeepSpeed (0.19) finds the averages of the first group alone, as it looks when only those are made."""
        if self.stage < 3:
            self.optimizers[0]._hp_optimizer_states_linked = False
            self.optimizers[0]._lazy_init_hp_params_optimizer_state()


def read_options(path: Path) -> dict[str, Any]:
    """A DeepSpeed config.

    Raises:
        UserError: it cannot be read, or sets what this library's own options decide.
    """
    try:
        options = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read --deepspeed-config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--deepspeed-config {path} is no JSON: {first_line(error)}") from error
    if not isinstance(options, dict) or not isinstance(options.get("zero_optimization", {}), dict):
        raise UserError(f"--deepspeed-config {path} should be an object, and its zero_optimization another one")
    if twice := sorted(DECIDED & options.keys()):
        raise UserError(f"--deepspeed-config {path} sets {', '.join(twice)}: use this library's own flags for it")
    return options


def _copy(model: DualEncoder) -> DualEncoder:
    """A copy that shares the text tower, and takes no memory of the device until it is used."""
    shared = {id(module): module for module in (model.text_model, model.text_projection)}
    replica = copy.deepcopy(model, shared)
    _put_aside(replica)
    return replica


def _put_aside(model: DualEncoder) -> None:
    model.vision_model.cpu()
    model.visual_projection.cpu()


def _own(value: Any, like: Tensor) -> Any:
    """A copy; the fused optimizer counts its steps on the device."""
    return value.to(like.device, copy=True) if torch.is_tensor(value) else value
