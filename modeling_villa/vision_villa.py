"""The image tower: trunk -> feature map -> RoIAlign -> region head, over any stage-wise convolutional backbone."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_villa import VillaVisionConfig

# Where timm's `forward_features` ends and its `forward_head` begins, by the name of the first child.
_HEAD_CHILDREN = ("global_pool", "head")


@dataclass
class VillaVisionOutput(ModelOutput):
    """
    Args:
        image_embeds: (B, d) embeddings of whole images, not normalised; None if they were not asked for.
        region_embeds: (B, R, d) embeddings of the regions, not normalised, zero where `region_mask` is
            False; None without boxes.
    """

    image_embeds: Tensor | None = None
    region_embeds: Tensor | None = None


def split_backbone(backbone: nn.Module, region_stage: int) -> tuple[list[str], list[str], int]:
    """Names of the submodules, in order, before and after the cut, and the cut's stride in pixels.

    Applying the first list, then the second, then `backbone.forward_head` is the backbone's own forward pass.

    Raises:
        ValueError: not a stage-wise convolutional backbone, or `region_stage` is no stage before its last.
    """
    info = list(getattr(backbone, "feature_info", []))
    strides = [stage["reduction"] for stage in info]
    children = dict(backbone.named_children())
    stage_wise = len(info) > 1 and strides == sorted(set(strides)) and getattr(backbone, "output_fmt", "NCHW") == "NCHW"
    not_stage_wise = ValueError(
        f"{type(backbone).__name__} is not a stage-wise convolutional backbone (feature strides {strides}); "
        "choose one such as resnet50_clip, resnet18, convnext_atto, regnetx_002 or efficientnet_b0."
    )
    if not stage_wise or not any(name in children for name in _HEAD_CHILDREN):
        raise not_stage_wise
    if not -len(info) <= region_stage < len(info) - 1 or region_stage == -1:
        raise ValueError(f"region_stage must be a stage before the last of {len(info)}, got {region_stage}.")
    cut = info[region_stage]["module"]
    steps: list[str] = []
    for name, child in children.items():
        if name in _HEAD_CHILDREN:
            break
        if isinstance(child, nn.ModuleList):  # not a chain: parallel branches
            raise not_stage_wise
        inside = cut.startswith(f"{name}.") and isinstance(child, nn.Sequential)
        steps += [f"{name}.{step}" for step, _ in child.named_children()] if inside else [name]
    at = next((i for i, step in enumerate(steps, 1) if step == cut or cut.startswith(f"{step}.")), None)
    if at is None:
        raise not_stage_wise
    return steps[:at], steps[at:], strides[region_stage]


def _make_projector(config: VillaVisionConfig) -> nn.Module:
    dim, width = config.projection_dim, config.projector_width
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))


class VillaVisionModel(PreTrainedModel):
    """timm backbone whose late stages run on whole images or, after RoIAlign, on boxes (ViLLA, section 5.1).

    One pass of the trunk serves the image and all of its regions.
    """

    config_class = VillaVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    backbone: Any  # timm's models have methods that nn.Module has not

    def __init__(self, config: VillaVisionConfig) -> None:
        super().__init__(config)
        self.backbone = timm.create_model(
            config.backbone,
            pretrained=False,
            in_chans=config.num_channels,
            num_classes=config.projection_dim,
            **(config.backbone_kwargs or {}),
        )
        module: Any
        for module in self.backbone.modules():
            module.initialised_by_timm = True
        self.projector = _make_projector(config) if config.projector_width else nn.Identity()
        self._trunk, self._region_head, self.stride = split_backbone(self.backbone, config.region_stage)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """timm has initialised its modules already; only what no checkpoint holds is filled in after loading."""
        if getattr(module, "initialised_by_timm", False):
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_feature_map(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> (B, C', H / stride, W / stride), the map that regions are cut from."""
        return self._run(self._trunk, pixel_values)

    def embed_images(self, feature_map: Tensor) -> Tensor:
        """Feature map of whole images -> (B, d): the backbone's own output, through the projector if there is one."""
        return self.projector(self.backbone.forward_head(self._run(self._region_head, feature_map)))

    def embed_regions(self, feature_map: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """RoIAlign (aligned, as many samples as cells) and region head.

        Args:
            feature_map: (B, C', H', W') of `get_feature_map`.
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of the `pixel_values` that made the map, padded.
            region_mask: (B, R) bool, False for padding.

        Returns:
            (B, R, d), zero where the mask is False.
        """
        image_index, region_index = region_mask.nonzero(as_tuple=True)
        embeds = feature_map.new_zeros(*region_mask.shape, self.config.projection_dim)
        if image_index.numel() == 0:
            return embeds
        # Half precision has no room for pixels, nor for image numbers, above 256 (bfloat16) or 2048 (float16).
        maps = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
        rois = torch.cat([image_index[:, None].to(maps), boxes[image_index, region_index].to(maps)], 1)
        crops = roi_align(maps, rois, self.config.roi_size, 1 / self.stride, sampling_ratio=0, aligned=True)
        crops = crops.to(feature_map.dtype)
        return embeds.index_put((image_index, region_index), self.embed_images(crops).to(embeds.dtype))

    def forward(
        self,
        pixel_values: Tensor,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        embed_images: bool = True,
    ) -> VillaVisionOutput:
        """
        Args:
            pixel_values: (B, C, H, W).
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of `pixel_values`; None for no regions.
            region_mask: (B, R) bool; None if every box is real.
            embed_images: whether whole images are embedded too.
        """
        feature_map = self.get_feature_map(pixel_values)
        region_embeds = None
        if boxes is not None:
            boxes, region_mask = check_boxes(pixel_values, boxes, region_mask)
            region_embeds = self.embed_regions(feature_map, boxes, region_mask)
        image_embeds = self.embed_images(feature_map) if embed_images else None
        return VillaVisionOutput(image_embeds=image_embeds, region_embeds=region_embeds)

    def _run(self, steps: list[str], x: Tensor) -> Tensor:
        for step in steps:
            x = self.backbone.get_submodule(step)(x)
        return x


def check_boxes(pixel_values: Tensor, boxes: Tensor, region_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check the shapes of boxes and mask against the images, and fill in a mask that is missing.

    Raises:
        ValueError: naming the argument, the shape expected and the one found.
    """
    if boxes.dim() != 3 or boxes.shape[0] != pixel_values.shape[0] or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be ({pixel_values.shape[0]}, R, 4), got {tuple(boxes.shape)}.")
    if region_mask is None:
        region_mask = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    if region_mask.shape != boxes.shape[:2] or region_mask.dtype != torch.bool:
        raise ValueError(
            f"region_mask must be {tuple(boxes.shape[:2])} bool, got {tuple(region_mask.shape)} {region_mask.dtype}."
        )
    return boxes, region_mask
