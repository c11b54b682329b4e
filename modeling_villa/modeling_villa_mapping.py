"""VillaMappingModel: Stage 1, which learns from image-text pairs alone which region shows which attribute."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_villa import VillaMappingConfig
from .losses_villa import mapping_contrastive_loss
from .modeling_villa_clip import VillaClipModel


@dataclass
class VillaMappingOutput(ModelOutput):
    """
    Args:
        loss: scalar, the paper's contrastive loss, with `labels`.
        scores: (B, R, A) cosines of P_k(e_ir) and h_k; only entries under the region mask mean anything. They
            carry no gradient: the loss's gradient runs through `maxima`.
        maxima: (B, A) the largest score over an image's regions, with gradient; with `labels` or
            `return_maxima`.
        region_embeds: (B, R, d) region embeddings e, not normalised.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None
    maxima: Tensor | None = None
    region_embeds: Tensor | None = None


class VillaProjectionHeads(nn.Module):
    """p heads of linear, ReLU, linear (d -> d -> d), one batched tensor per layer (ViLLA, section 5.1).

    Attribute k is scored by head `attribute_heads[k]`. Attributes that share a head are scored together.
    """

    attribute_heads: Tensor

    def __init__(self, num_heads: int, dim: int, num_attributes: int, residual: float) -> None:
        super().__init__()
        self.residual = residual
        self.weight_in = nn.Parameter(torch.empty(num_heads, dim, dim))
        self.bias_in = nn.Parameter(torch.empty(num_heads, 1, dim))
        self.weight_out = nn.Parameter(torch.empty(num_heads, dim, dim))
        self.bias_out = nn.Parameter(torch.empty(num_heads, 1, dim))
        self.register_buffer("attribute_heads", torch.empty(num_attributes, dtype=torch.long))

    def reset_parameters(self) -> None:
        """As `nn.Linear` does it, head by head: uniform in +-1/sqrt(d)."""
        num_heads, dim, _ = self.weight_in.shape
        for parameter in (self.weight_in, self.bias_in, self.weight_out, self.bias_out):
            init.uniform_(parameter, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        init.copy_(self.attribute_heads, torch.arange(len(self.attribute_heads)) % num_heads)

    def forward(self, embeds: Tensor) -> Tensor:
        """(p or 1, N, d) inputs, one slice per head or one for all -> (p, N, d) normalised outputs."""
        inputs = embeds.expand(len(self.weight_in), -1, -1)
        hidden = torch.baddbmm(self.bias_in, inputs, self.weight_in).relu()
        outputs = torch.baddbmm(self.bias_out, hidden, self.weight_out)
        if self.residual:
            outputs = torch.lerp(outputs, inputs.to(outputs.dtype), self.residual)
        return normalize(outputs, dim=-1)

    def slots(self) -> tuple[Tensor, Tensor]:
        """Where each attribute stands in a (p, G) table: its head, and its place among that head's attributes."""
        one_hot = nn.functional.one_hot(self.attribute_heads, len(self.weight_in))
        place = (one_hot.cumsum(0) - 1).gather(1, self.attribute_heads[:, None])[:, 0]
        return self.attribute_heads, place

    def score_all(self, embeds: Tensor, attribute_embeds: Tensor) -> Tensor:
        """Scores of every embedding with every attribute.

        Args:
            embeds: (N, d) region embeddings.
            attribute_embeds: (A, d) normalised.

        Returns:
            (N, A) cosines.
        """
        head, place = self.slots()
        table = attribute_embeds.new_zeros(len(self.weight_in), int(place.max()) + 1, embeds.shape[-1])
        table[head, place] = attribute_embeds
        return torch.bmm(self(embeds[None]), table.transpose(1, 2))[head, :, place].t()

    def score_each(self, embeds: Tensor, attribute_embeds: Tensor) -> Tensor:
        """Scores of one embedding per attribute: each head sees its own attributes' embeddings and no others.

        Args:
            embeds: (B, A, d), the embedding that attribute k is to be scored with at [:, k].
            attribute_embeds: (A, d) normalised.

        Returns:
            (B, A) cosines.
        """
        head, place = self.slots()
        batch, _, dim = embeds.shape
        size = int(place.max()) + 1
        table = embeds.new_zeros(len(self.weight_in), size, batch, dim).index_put((head, place), embeds.transpose(0, 1))
        outputs = self(table.flatten(1, 2)).view(-1, size, batch, dim)[head, place]
        return (outputs * attribute_embeds[:, None]).sum(-1).t()


class VillaMappingModel(PreTrainedModel):
    """Scores every region of an image against every attribute of the vocabulary (ViLLA, section 5.1).

    score(i, r, k) = cosine(P_k(e_ir), h_k). Encoders, heads, names and attribute embeddings are saved
    together, so that `from_pretrained` gives a model that takes pixels and boxes and returns scores.
    """

    config_class = VillaMappingConfig
    base_model_prefix = "villa_mapping"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    attribute_embeds: Tensor

    def __init__(self, config: VillaMappingConfig) -> None:
        super().__init__(config)
        self.vlm = VillaClipModel._from_config(config.vlm_config)
        dim, num_attributes = config.vlm_config.projection_dim, len(config.attributes)
        num_heads = config.num_heads or num_attributes
        self.projection_heads = VillaProjectionHeads(num_heads, dim, num_attributes, config.residual)
        self.register_buffer("attribute_embeds", torch.zeros(num_attributes, dim))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VillaProjectionHeads):
            module.reset_parameters()
        elif module is self:
            init.zeros_(self.attribute_embeds)

    def set_attribute_embeds(self, attributes: Sequence[str], embeds: Tensor) -> None:
        """Set h, the embeddings of the vocabulary; rows are normalised.

        Args:
            attributes: the A names, as in the config and in its order.
            embeds: (A, d).

        Raises:
            ValueError: names or shape do not match the config; both sides are named.
        """
        if list(attributes) != self.config.attributes:
            raise ValueError(
                f"The embeddings are of the vocabulary {_shorten(attributes)}, "
                f"the model's config has {_shorten(self.config.attributes)}."
            )
        if embeds.shape != self.attribute_embeds.shape:
            raise ValueError(
                f"Attribute embeddings have shape {tuple(embeds.shape)}, the config's vocabulary and width "
                f"want {tuple(self.attribute_embeds.shape)}."
            )
        with torch.no_grad():
            self.attribute_embeds.copy_(normalize(embeds, dim=-1))

    def attribute_indices(self, names: Sequence[str]) -> list[int]:
        """Columns of `scores` for the named attributes.

        Raises:
            ValueError: an unknown name, with the nearest known ones.
        """
        known = {name: i for i, name in enumerate(self.config.attributes)}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3) or self.config.attributes[:3]
                raise ValueError(f"Unknown attribute {name!r}: not in the vocabulary of {len(known)}; nearest: {near}.")
        return [known[name] for name in names]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        region_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_maxima: bool = False,
        **kwargs: Any,
    ) -> VillaMappingOutput:
        """
        The max of the loss lets the gradient through one region per image and attribute. So the winners are
        found without a graph, and only they go through the heads a second time, with one: the same gradients
        for less arithmetic and memory.

        Args:
            pixel_values: (B, C, H, W); not needed with `region_embeds`.
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of `pixel_values`, padded.
            region_mask: (B, R) bool; None if every region is real.
            region_embeds: (B, R, d) from a region store, instead of pixels and boxes.
            labels: (B, A) bool, the attributes that each image's text states; gives the loss.
            return_maxima: whether to compute `maxima` without labels.

        Raises:
            ValueError: inputs are missing, or shapes do not match each other, the vocabulary or the config.
        """
        if region_embeds is None:
            if pixel_values is None or boxes is None:
                raise ValueError("VillaMappingModel needs pixel_values and boxes, or region_embeds.")
            vision = self.vlm.vision_model(pixel_values, boxes, region_mask, embed_images=False)
            region_embeds = vision.region_embeds
        region_mask = self._check(region_embeds, region_mask, labels)
        with torch.no_grad():
            scores = self.score_regions(region_embeds, region_mask)
        output = VillaMappingOutput(scores=scores, region_embeds=region_embeds)
        if labels is not None or return_maxima:
            winners = scores.masked_fill(~region_mask[..., None], -torch.inf).argmax(1)
            chosen = region_embeds.gather(1, winners[..., None].expand(-1, -1, region_embeds.shape[-1]))
            maxima = self.projection_heads.score_each(chosen, self.attribute_embeds)
            output.maxima = maxima
            if labels is not None:
                has_region = region_mask.any(1, keepdim=True)
                output.loss = mapping_contrastive_loss(maxima[:, None], has_region, labels, self.config.temperature)
        return output

    def score_regions(self, region_embeds: Tensor, region_mask: Tensor) -> Tensor:
        """(B, R, d) embeddings and (B, R) mask -> (B, R, A) cosines, with a graph through every region.

        Padding is scored 0 and costs nothing.
        """
        valid = self.projection_heads.score_all(region_embeds[region_mask], self.attribute_embeds)
        scores = valid.new_zeros(*region_mask.shape, len(self.attribute_embeds))
        return scores.index_put(region_mask.nonzero(as_tuple=True), valid)

    def _check(self, region_embeds: Tensor, region_mask: Tensor | None, labels: Tensor | None) -> Tensor:
        dim = self.attribute_embeds.shape[1]
        if region_embeds.dim() != 3 or region_embeds.shape[2] != dim or region_embeds.shape[1] == 0:
            raise ValueError(f"region_embeds must be (B, R, {dim}) with R > 0, got {tuple(region_embeds.shape)}.")
        if region_mask is None:
            region_mask = torch.ones(region_embeds.shape[:2], dtype=torch.bool, device=region_embeds.device)
        if region_mask.shape != region_embeds.shape[:2] or region_mask.dtype != torch.bool:
            raise ValueError(
                f"region_mask must be {tuple(region_embeds.shape[:2])} bool, "
                f"got {tuple(region_mask.shape)} {region_mask.dtype}."
            )
        expected = (region_embeds.shape[0], len(self.attribute_embeds))
        if labels is not None and labels.shape != expected:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; {expected[0]} images and the config's vocabulary of "
                f"{expected[1]} attributes want {expected}."
            )
        return region_mask


def _shorten(names: Sequence[str]) -> str:
    return f"{len(names)} names ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
