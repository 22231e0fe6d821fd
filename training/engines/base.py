"""Where the weights, gradients and averages of a training lie: whole on every rank (DDP), or in parts (FSDP2, ZeRO).

An engine holds the model and its optimizers. State goes in and out of it whole and by parameter name, so that a
checkpoint of one engine goes on in any other, and in one process.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from languagebind.config import UserError
from languagebind.distributed import Precision, Process, autocast, rank
from languagebind.model import DualEncoder

from ..optim import OptimConfig, build_optimizer, grad_scaler

# Some of timm's optimizers count their steps in the group rather than with each parameter.
GROUP_STEP = "group_step"

State = dict[str, Tensor]
OptimizerState = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EngineConfig:
    """How a training is spread over ranks."""

    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """whole weights on every rank; PyTorch's FSDP2; or DeepSpeed's ZeRO"""
    zero_stage: Literal[1, 2, 3] = 2
    """what DeepSpeed keeps in parts: averages (1), gradients too (2), weights too (3)"""
    deepspeed_config: Path | None = None
    """DeepSpeed's JSON, with a stage of its own; by default configs/deepspeed/zero<stage>.json"""
    torchcompile: Literal["no", "encoder", "step"] = "no"
    """compile the encoder's blocks, or all that a step calls from inputs to features as one graph"""

    def __post_init__(self):
        if self.deepspeed_config is not None and self.engine != "deepspeed":
            raise UserError("--deepspeed-config is for --engine deepspeed")


class TrainedSide(nn.Module):
    """All that trains but the logit scale, as one module: inputs (B, C, T, H, W) to unit-norm float32 features (B, D).

    Parameters are named as in the model.
    """

    def __init__(self, model: DualEncoder, precision: Precision):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.precision = precision

    def forward(self, inputs: Tensor) -> Tensor:
        with autocast(inputs.device, self.precision):
            x = self.visual_projection(self.vision_model(inputs))
        return F.normalize(x.float(), dim=-1)


class Engine:
    """One process, or DDP.

    The logit scale (and bias) are apart from the rest: they are scalars, which neither FSDP2 nor DeepSpeed can divide.
    Every rank has them whole, their gradients are averaged here, and they have an optimizer of their own.

    Attributes:
        forward: inputs (B, C, T, H, W) to unit-norm features (B, D), with gradient.
        parameters: all that train, by name.
        optimizers: whose `param_groups` hold the learning rates.
        grad_norm: of the last step, before it was clipped.
    """

    def __init__(self, model: DualEncoder, optim: OptimConfig, process: Process, config: EngineConfig):
        self.model, self.process = model.to(process.device), process
        self.max_norm = math.inf if optim.grad_clip_norm is None else optim.grad_clip_norm
        self.side = TrainedSide(model, optim.precision)
        self.scalars = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name in ("logit_scale", "logit_bias") and parameter.requires_grad
        }
        if config.torchcompile == "encoder":
            for block in model.vision_model.encoder.layers:
                block.compile()
        elif config.torchcompile == "step":
            self.side.compile()
        self.optimizers = [build_optimizer(self.scalars, optim)] if self.scalars else []
        self.scaler = grad_scaler(process.device, optim.precision)
        self._spread(optim, config)
        self.parameters = self.trained() | self.scalars

    def _spread(self, optim: OptimConfig, config: EngineConfig) -> None:
        """Set `forward`, and put the optimizer of the trained side in front of the other."""
        self.forward: Callable[[Tensor], Tensor] = self.side
        if self.process.world_size > 1:
            devices = [self.process.device] if self.process.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.side, device_ids=devices, broadcast_buffers=False)
        self.optimizers.insert(0, build_optimizer(self.trained(), optim))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the trained side that train, by name."""
        return {name: parameter for name, parameter in self.side.named_parameters() if parameter.requires_grad}

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward: gradients of all but the `last` are summed before ranks exchange them."""
        with nullcontext() if last or self.process.world_size == 1 else self.forward.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, check: Callable[[Tensor], None]) -> bool:
        """Clip the gradients, take the optimizers' step, and drop the gradients.

        Args:
            check: is given the gradients' norm, and refuses the step by raising.

        Returns:
            Whether the step was taken: float16 gradients may overflow, which lowers the scale of the loss instead.
        """
        self._average_scalars()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.grad_norm = norm = self._clip(list(self.parameters.values()))
        if not self.scaler.is_enabled():
            check(norm)
        # The scaler alone would skip the optimizer that overflowed, and step the other with gradients clipped to NaN.
        steps = bool(norm.isfinite())
        for optimizer in self.optimizers:
            if steps:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return steps

    def model_state(self) -> State:
        """All but the text tower, whole on the main rank. Every rank has to ask."""
        return {name: _whole_on_cpu(value) for name, value in self.model.encoder_state().items()}

    def optimizer_state(self) -> OptimizerState:
        """The averages by parameter name, whole on the main rank. Every rank has to ask."""
        return save_by_name(self.optimizers, self.parameters)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Averages as `optimizer_state` gives them; learning rates and decay stay those of this run."""
        for optimizer in self.optimizers:
            load_by_name(optimizer, self.parameters, saved)

    @contextmanager
    def whole_model(self) -> Iterator[DualEncoder]:
        """The model for evaluation, which each rank may call as often as it likes."""
        yield self.model

    def _average_scalars(self) -> None:
        if self.process.world_size == 1:
            return
        for parameter in self.scalars.values():
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.process.world_size

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, self.max_norm)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _whole_on_cpu(value: Any) -> Any:
    """A GPU that holds a part of each tensor may have no room for all of them whole; the main rank alone keeps them."""
    return kept_by_main(value.full_tensor()) if isinstance(value, DTensor) else value


def kept_by_main(whole: Tensor) -> Tensor:
    """A whole tensor on the CPU of the main rank, and an empty one elsewhere: a node has no memory for one a rank."""
    return whole.cpu() if rank() == 0 else whole.new_empty(0)


def save_by_name(optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """What optimizers keep of each parameter, whole."""
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        names[parameter]: {key: _whole_on_cpu(value) for key, value in optimizer.state[parameter].items()}
        | ({GROUP_STEP: group["step"]} if "step" in group else {})
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    }


def load_by_name(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: OptimizerState
) -> None:
    """What `save_by_name` gave, into an optimizer of some of the parameters."""
    names = {parameter: name for name, parameter in parameters.items()}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            key: divided_like(parameter, value) for key, value in saved[names[parameter]].items() if key != GROUP_STEP
        }
        for number, parameter in enumerate(own)
        if names[parameter] in saved
    }
    for group in optimizer.param_groups:
        first = saved.get(names[group["params"][0]], {})
        if GROUP_STEP in first:
            group["step"] = copy.deepcopy(first[GROUP_STEP])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def divided_like(parameter: Tensor, value: Any) -> Any:
    """A whole tensor as this rank's part of it, where the parameter that it is of is divided."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
