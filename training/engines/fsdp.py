"""PyTorch's FSDP2: weights, gradients and moments in parts over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from languagebind.model import DualEncoder

from ..optim import OptimConfig, build_optimizer
from .base import Engine, EngineConfig, _whole


class Fsdp(Engine):
    """FSDP2: each block's weights come together when they are needed."""

    def _spread(self, optim: OptimConfig, config: EngineConfig) -> None:

        mesh = init_device_mesh(self.process.device.type, (self.process.world_size,))
        for block in self.model.vision_model.encoder.layers:
            fully_shard(block, mesh=mesh)
        self.forward = fully_shard(self.side, mesh=mesh)
        self.optimizers.insert(0, build_optimizer(self.trained(), optim))

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.forward.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def whole_model(self) -> Iterator[DualEncoder]:

        parts = [module for module in self.side.modules() if isinstance(module, FSDPModule)]
        for module in parts:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield self.model
        finally:
            for module in parts:
                module.set_reshard_after_forward(module is not self.side, recurse=False)
                module.reshard()

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        kinds = [[x for x in parameters if isinstance(x, DTensor) is divided] for divided in (True, False)]
        norms = [nn.utils.get_total_norm([x.grad for x in kind if x.grad is not None]) for kind in kinds]
        norm = torch.linalg.vector_norm(torch.stack([_whole(x).to(self.process.device) for x in norms]))
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, self.max_norm, norm)
        return norm
