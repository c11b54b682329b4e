"""Stage 1's heads, winners first, against the plain way: time and memory of a forward and a backward pass.

    python benchmarks/routed_gradient.py

Both run in this process in alternation; the figures are the medians' ratios.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling_villa import VillaMappingConfig, VillaMappingModel
from modeling_villa.losses_villa import mapping_contrastive_loss


def make_model(attributes: int, dim: int) -> VillaMappingModel:
    """A mapping model whose towers are as small as they get: only its heads are measured."""
    tower = {"backbone": "resnet18", "backbone_kwargs": {"layers": [1, 1], "channels": [8, 16]}, "projection_dim": dim}
    text = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": 3}
    vlm = {"vision_config": tower, "text_config": text}
    model = VillaMappingModel(VillaMappingConfig(vlm_config=vlm, attributes=[str(k) for k in range(attributes)]))
    model.set_attribute_embeds(model.config.attributes, torch.randn(attributes, dim))
    return model


def plain(model: VillaMappingModel, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """All regions through all heads with a graph."""
    return mapping_contrastive_loss(model.score_regions(embeds, mask), mask, labels)


def routed(model: VillaMappingModel, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The model's own way."""
    return model(region_embeds=embeds, region_mask=mask, labels=labels).loss


def kept_for_backward(way: Callable[..., Tensor], *inputs: Any) -> float:
    """MiB of distinct tensors that the forward pass keeps for the backward pass, parameters left out."""
    model = inputs[0]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = way(*inputs)
    size = sum(size for address, size in kept.items() if address not in parameters)
    loss.backward()
    return size / 2**20


def main() -> None:
    """Measure at each number of regions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regions", type=int, nargs="+", default=[9, 300])
    parser.add_argument("--attributes", type=int, default=20)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(args.attributes, args.dim)
    for regions in args.regions:
        embeds = torch.randn(args.batch_size, regions, args.dim, requires_grad=True)
        mask = torch.ones(args.batch_size, regions, dtype=torch.bool)
        labels = torch.rand(args.batch_size, args.attributes) < 0.5
        inputs = model, embeds, mask, labels
        ways = {"plain": plain, "routed": routed}
        memory = {name: kept_for_backward(way, *inputs) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                way(*inputs).backward()
                seconds[name].append(time.perf_counter() - began)
        faster = statistics.median(seconds["plain"]) / statistics.median(seconds["routed"])
        smaller = memory["plain"] / memory["routed"]
        sys.stdout.write(f"{regions} regions: plain / routed = {faster:.2f} in time, {smaller:.1f} in memory kept\n")


if __name__ == "__main__":
    main()
