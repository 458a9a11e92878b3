# SPDX-License-Identifier: MIT
"""BatchNorm of the whole batch of several processes, on any device; a test's nn.SyncBatchNorm."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce


class WholeBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In training, normalises by the rows of all processes, through which gradients flow too."""

    def forward(self, x):
        if not self.training:
            raise NotImplementedError("the test only trains")
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum(dims)) / n
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


def convert(network):
    """Turn a network's BatchNorms into those of the whole batch, in place."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = WholeBatchNorm
    return network
