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
from transformers.utils import ModelOutput, logging

from .configuration_villa import VillaClipConfig, VillaVisionConfig
from .losses_villa import clip_contrastive_loss
from .processing_villa import check_tokenizer
from .text_villa import VillaTextModel
from .towers_villa import fill, load_image_tower, load_text_tower
from .vision_villa import VillaVisionModel, check_image_size

logger = logging.get_logger(__name__)


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
    """Image tower with regions, CLIP's text tower or another, one temperature (ViLLA, section 5.2)."""

    config_class = VillaClipConfig
    base_model_prefix = "villa_clip"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    _supports_sdpa = True

    def __init__(self, config: VillaClipConfig) -> None:
        super().__init__(config)
        self.vision_model = VillaVisionModel._from_config(config.vision_config)
        text_class = VillaTextModel if config.text_config.model_type == "villa_text" else CLIPTextModelWithProjection
        self.text_model = text_class._from_config(config.text_config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.constant_(self.logit_scale, math.log(1 / self.config.temperature))

    @classmethod
    def from_towers(
        cls,
        vision: str,
        text: str,
        projection_dim: int | None = None,
        image_size: int | None = None,
        **vision_fields: Any,
    ) -> "VillaClipModel":
        """A model of two pretrained towers that were not trained together; `VillaProcessor.from_towers` goes with it.

            VillaClipModel.from_towers("timm/resnet50_clip.openai", "openai/clip-vit-base-patch32")

        The width d of the embeddings is the text tower's, or `projection_dim`. A tower of another width gets a new
        projection with random weights, which is logged as a warning; so does an image classifier, unless it happens to
        have d classes. With d the encoder's width a BERT-like text tower gets no projection and stays the encoder (a
        Sentence-BERT) that it was.

        Args:
            vision: a timm model: its name with a tag of weights (`vit_base_patch32_clip_quickgelu_224.openai`), its Hub
                id (`timm/resnet50_clip.openai`), or a folder with its config.json and weights.
            text: a Hub id or folder of transformers: a CLIP (its text tower is taken), or an encoder such as BERT or
                MPNet, also as sentence-transformers saves it, whose tokens are averaged.
            projection_dim: d; None for the text tower's width.
            image_size: side in pixels of the images; None for the size that the image tower was trained with.
            vision_fields: other fields of `VillaVisionConfig`, such as `region_head`. By default a ViT with a class
                token has "attention", with as many cells as its map.

        Raises:
            ValueError: a tower cannot be found or reached, is of another kind, lacks tensors, or cannot take images of
                `image_size`.
        """
        backbone, fields = load_image_tower(vision, image_size)
        check_image_size(backbone, fields["image_size"], fields["image_size"])
        text_config, text_state = load_text_tower(text)
        if projection_dim not in (None, text_config.projection_dim):
            text_config.projection, text_config.projection_dim = True, projection_dim
        fields = {**fields, "projection_dim": text_config.projection_dim, **vision_fields}
        model = cls(VillaClipConfig(vision_config=VillaVisionConfig(**fields), text_config=text_config))
        head = backbone.pretrained_cfg["classifier"]
        fresh = fill(model.vision_model.backbone, backbone.state_dict(), [head] if isinstance(head, str) else head)
        fresh += fill(model.text_model, text_state, ["projection", "text_projection"])
        if fresh:
            width = model.config.projection_dim
            logger.warning("Not in %s or %s, or not %d wide, so new: %s", vision, text, width, ", ".join(fresh))
        return model

    def check_processor(self, processor: Any) -> None:
        """Check that a `VillaProcessor` is this model's: its tokenizer and the size of its images.

        Raises:
            ValueError: see `check_tokenizer` and `check_image_size`.
        """
        check_tokenizer(processor.tokenizer, self.config.text_config)
        size = processor.image_processor.size
        check_image_size(self.vision_model.backbone, size["height"], size["width"])

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
