"""Engines hold the model and its optimizers, complete on every rank (DDP) or sharded across ranks (FSDP2, ZeRO).

Engines load and return unsharded state by parameter name, so a checkpoint of one engine resumes with any other.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from languagebind.config import UserError
from languagebind.distributed import Precision, Process, autocast, mean_over_ranks, rank
from languagebind.model import DualEncoder, project

from ..optim import OptimConfig, build_optimizer

# Some of timm's optimizers count steps per group, not per parameter.
GROUP_STEP = "group_step"

State = dict[str, Tensor]
OptimizerState = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EngineConfig:
    """Distribution of training across ranks."""

    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """unsharded weights on every rank (ddp), PyTorch's FSDP2 (fsdp), or DeepSpeed's ZeRO (deepspeed)"""
    zero_stage: Literal[1, 2, 3] = 2
    """ZeRO stage: shard the optimizer states (1), also the gradients (2), also the weights (3)"""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON file, or a name such as zero2_offload; overrides the stage; None: zero<stage>"""
    torchcompile: Literal["no", "encoder", "step"] = "no"
    """compile the encoder's blocks (encoder), or everything from inputs to features as one graph (step)"""

    def __post_init__(self):
        if self.deepspeed_config is not None and self.engine != "deepspeed":
            raise UserError("--deepspeed-config needs --engine deepspeed")


class TrainedSide(nn.Module):
    """The encoder and its projection: inputs (B, C, T, H, W) to unit-norm float32 features (B, D).

    If the text tower trains, captions follow in each row, (B, 2 * D). Parameters are named as in the model.
    """

    def __init__(self, model: DualEncoder, precision: Precision):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.temporal_head = model.temporal_head
        if model.trains_text:
            self.text_model, self.text_projection = model.text_model, model.text_projection
        self.precision = precision

    def forward(self, inputs: Tensor, text: dict[str, Tensor] | None = None) -> Tensor:
        with autocast(inputs.device, self.precision):
            x = F.normalize(project(self, inputs).float(), dim=-1)
            if text is None:
                return x
            captions = self.text_projection(self.text_model(text["input_ids"]))[text["caption"]]
        return torch.cat([x, F.normalize(captions.float(), dim=-1)], dim=1)


class Engine:
    """The engine for one process or DDP, and the base class of the others.

    FSDP2 and DeepSpeed cannot shard scalars such as the logit scale and bias. Therefore every rank keeps these scalars,
    the engine averages their gradients, and they have their own optimizer, which is the last of `optimizers`.
    """

    forward: Callable[..., Tensor]  # inputs (B, C, T, H, W), and tokens if the text trains -> features with gradients
    grad_norm: Tensor  # of the last step, before clipping

    def __init__(self, model: DualEncoder, optim: OptimConfig, process: Process, config: EngineConfig):
        self.model, self.process = model.to(process.device), process
        self.max_norm = math.inf if optim.grad_clip_norm is None else optim.grad_clip_norm
        if optim.precision == "auto":
            raise ValueError("the precision is still auto: settle_precision chooses one")
        self.side = TrainedSide(model, optim.precision)
        scalars = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
        self.scalars = {name: x for name, x in scalars.items() if x is not None and x.requires_grad}
        if config.torchcompile == "encoder":
            for block in model.vision_model.blocks:
                block.compile()
        elif config.torchcompile == "step":
            self.side.compile()
        self.optimizers = [build_optimizer(self.scalars, optim)] if self.scalars else []
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=optim.precision == "amp")
        self.forward = self.side
        self._distribute(optim, config)
        self.parameters = self.trained() | self.scalars  # all that train, by name

    def _distribute(self, optim: OptimConfig, config: EngineConfig) -> None:
        """Set `forward` if it is another, and insert the encoder's optimizer before the optimizer of the scalars."""
        if self.process.world_size > 1:
            devices = [self.process.device] if self.process.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.side, device_ids=devices, broadcast_buffers=False)
        self.optimizers.insert(0, build_optimizer(self.trained(), optim))

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters except the scalars, by name."""
        return {name: parameter for name, parameter in self.side.named_parameters() if parameter.requires_grad}

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients between ranks only if the enclosed micro-batch is the last one of its step."""
        ddp = self.forward
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss and accumulate them."""
        loss.backward()

    def average(self, values: Tensor) -> Tensor:
        """Average the scalars' gradients over ranks; return the means of `values` (N,), from the same exchange."""
        scalars = [parameter for parameter in self.scalars.values() if parameter.grad is not None]
        means = mean_over_ranks(torch.cat([values, *(cast(Tensor, x.grad).reshape(1) for x in scalars)]))
        for parameter, mean in zip(scalars, means[len(values) :], strict=True):
            parameter.grad = mean.reshape(parameter.shape).clone()
        return means[: len(values)]

    def update(self) -> bool:
        """Clip the gradients, step the optimizers, and clear the gradients.

        Return True if a step was taken; False if float16 gradients overflow, which only lowers the loss scale.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.grad_norm = self._clip(list(self.parameters.values()))
        # The scaler would skip only the optimizer whose gradients overflow, and step the other one with NaN.
        steps = not self.scaler.is_enabled() or bool(self.grad_norm.isfinite())
        for optimizer in self.optimizers:
            if steps:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return steps

    def model_state(self) -> State:
        """Return the unsharded weights of `encoder_state`, on the main rank. All ranks must call this method."""
        return {name: gather(value) for name, value in self.model.encoder_state().items()}

    def optimizer_state(self) -> OptimizerState:
        """Return the unsharded optimizer state by parameter name, on the main rank. All ranks must call this method."""
        return save_by_name(self.optimizers, self.parameters)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Load the state that `optimizer_state` returned; keep the run's own learning rates and weight decay."""
        load_by_name(self.optimizers, self.parameters, saved)

    @contextmanager
    def whole_model(self) -> Iterator[DualEncoder]:
        """Yield the unsharded model for evaluation. Ranks may call the model a different number of times."""
        yield self.model

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, self.max_norm)


# torch.distributed.checkpoint.state_dict creates states with a step of zero gradients. Such a step changes the weights
# with timm's madgrad, and later steps with most optimizers. It also cannot save the groups of timm's adafactorbv.
def save_by_name(optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """Return the unsharded state of each parameter by name, on the main rank. All ranks must call this function."""
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        names[parameter]: {key: gather(value) for key, value in optimizer.state[parameter].items()}
        | ({GROUP_STEP: group["step"]} if "step" in group else {})
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    }


def load_by_name(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter], saved: OptimizerState
) -> None:
    """Load the state that `save_by_name` returned into the optimizers."""
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        states: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                own = saved.get(names[parameter], {})
                states.append({key: divide(value, parameter) for key, value in own.items() if key != GROUP_STEP})
                if GROUP_STEP in own:
                    group["step"] = copy.deepcopy(own[GROUP_STEP])
        numbered = {number: state for number, state in enumerate(states) if state}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": numbered})


def gather(value: Any) -> Any:
    """Return a sharded tensor unsharded, on the CPU of the main rank because a GPU may lack memory."""
    return kept_by_main(value.full_tensor()) if isinstance(value, DTensor) else value


def kept_by_main(whole: Tensor) -> Tensor:
    """Return the tensor on the CPU of the main rank, and an empty one on other ranks to save host memory."""
    return whole.cpu() if rank() == 0 else whole.new_empty(0)


def divide(value: Any, parameter: Tensor) -> Any:
    """Return this rank's shard of a tensor if the parameter is sharded, otherwise the value itself."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
