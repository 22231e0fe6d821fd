"""An engine with PyTorch's FSDP2, which shards weights, gradients and optimizer states across ranks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from languagebind.model import DualEncoder

from ..optim import OptimConfig, build_optimizer
from .base import Engine, EngineConfig


class Fsdp(Engine):
    """FSDP2, with each block's weights gathered when the block runs."""

    def _distribute(self, optim: OptimConfig, config: EngineConfig) -> None:
        mesh = init_device_mesh(self.process.device.type, (self.process.world_size,))
        for block in self.model.vision_model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.side, mesh=mesh)
        self.optimizers.insert(0, build_optimizer(self.trained(), optim))

    def _parts(self) -> list[FSDPModule]:
        return [module for module in self.side.modules() if isinstance(module, FSDPModule)]

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        self._parts()[0].set_requires_gradient_sync(last)  # also sets the submodules
        return nullcontext()

    @contextmanager
    def whole_model(self) -> Iterator[DualEncoder]:
        parts = self._parts()
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
        groups = [[x for x in parameters if isinstance(x, DTensor) is sharded] for sharded in (True, False)]
        norms = [nn.utils.get_total_norm([x.grad for x in group if x.grad is not None]) for group in groups]
        unsharded = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = torch.linalg.vector_norm(torch.stack([x.to(self.process.device) for x in unsharded]))
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, self.max_norm, norm)
        return norm
