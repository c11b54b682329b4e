"""Negatives across processes, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Concatenates equal-sized tensors of all processes; the gradient of each part is summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate a tensor's rows over all processes, in rank order; rows may differ in number.

    Args:
        tensor: (N, ...) on each process, N its own.

    Returns:
        (sum of N, ...). Every process computes the same loss on it, and DistributedDataParallel's mean over
        processes then gives the gradient of that one loss.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=tensor.device)
    sizes[dist.get_rank()] = len(tensor)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    rows = _AllGather.apply(padded.byte()).bool() if tensor.dtype == torch.bool else _AllGather.apply(padded)
    kept = [part[:size] for part, size in zip(rows.split(longest), sizes.tolist(), strict=True)]
    return torch.cat(kept)
