"""VillaClipModel: the one-to-one VLM of Stages 0 and 2, with features for images, regions and texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPTextModelWithProjection, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_villa import VillaClipConfig
from .losses_villa import clip_contrastive_loss
from .vision_villa import VillaVisionModel


@dataclass
class VillaClipOutput(ModelOutput):
    """
    Args:
        loss: scalar, the bidirectional contrastive loss of images against texts, with `return_loss=True`.
        logits_per_image: (B, T) cosine of image and text over the temperature.
        logits_per_text: (T, B), its transpose.
        logits_per_region: (B, R, T), the same of regions, with boxes; only entries under the region mask mean
            anything.
        image_embeds: (B, d), normalised.
        text_embeds: (T, d), normalised.
        region_embeds: (B, R, d), normalised, with boxes.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    logits_per_region: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    region_embeds: Tensor | None = None


class VillaClipModel(PreTrainedModel):
    """Image tower with regions, CLIP's text tower, one temperature (ViLLA, section 5.2)."""

    config_class = VillaClipConfig
    base_model_prefix = "villa_clip"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    _supports_sdpa = True

    def __init__(self, config: VillaClipConfig) -> None:
        super().__init__(config)
        self.vision_model = VillaVisionModel._from_config(config.vision_config)
        self.text_model = CLIPTextModelWithProjection._from_config(config.text_config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.constant_(self.logit_scale, math.log(1 / self.config.temperature))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> (B, d) normalised embeddings of whole images."""
        return normalize(self.vision_model(pixel_values).image_embeds, dim=-1)

    def get_region_features(self, pixel_values: Tensor, boxes: Tensor, region_mask: Tensor | None = None) -> Tensor:
        """Embed regions.

        Args:
            pixel_values: (B, C, H, W).
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of `pixel_values`, padded.
            region_mask: (B, R) bool; None if every box is real.

        Returns:
            (B, R, d) normalised; zero where the mask is False.
        """
        output = self.vision_model(pixel_values, boxes, region_mask, embed_images=False)
        return normalize(output.region_embeds, dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(T, L) token ids and mask -> (T, d) normalised embeddings of texts."""
        return normalize(self.text_model(input_ids=input_ids, attention_mask=attention_mask).text_embeds, dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[Sequence[str]], tokenizer: Any) -> Tensor:
        """Embed attributes as the mean of their prompts' normalised embeddings (prompt ensembling, as CLIP's).

        Args:
            prompts: per attribute its sentences, at least one.
            tokenizer: the text tower's, as the processor holds it.

        Returns:
            (A, d) normalised.
        """
        rows = []
        for sentences in prompts:
            tokens = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt").to(self.device)
            rows.append(self.get_text_features(tokens["input_ids"], tokens["attention_mask"]).mean(0))
        return normalize(torch.stack(rows), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> VillaClipOutput:
        """
        Args:
            input_ids: (T, L) token ids.
            attention_mask: (T, L), 1 for tokens, 0 for padding.
            pixel_values: (B, C, H, W).
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of `pixel_values`, padded; None for no regions.
            region_mask: (B, R) bool; None if every box is real.
            return_loss: whether to compute the contrastive loss of image i against text i; needs B = T.

        Raises:
            ValueError: no images or no texts, or shapes that do not fit.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("VillaClipModel needs input_ids and pixel_values; for one of them use get_*_features.")
        vision = self.vision_model(pixel_values, boxes, region_mask)
        image_embeds = normalize(vision.image_embeds, dim=-1)
        text_embeds = self.get_text_features(input_ids, attention_mask)
        scale = self.logit_scale.exp()
        logits_per_image = scale * image_embeds @ text_embeds.t()
        output = VillaClipOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )
        if return_loss:
            output.loss = clip_contrastive_loss(image_embeds, text_embeds, scale)
        if vision.region_embeds is not None:
            output.region_embeds = normalize(vision.region_embeds, dim=-1)
            output.logits_per_region = scale * output.region_embeds @ text_embeds.t()
        return output
