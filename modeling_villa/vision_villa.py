"""The image tower: trunk -> feature map -> RoIAlign -> region head, over convolutional, Swin-like and ViT backbones."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent, PatchEmbed, RotAttentionPool2d
from timm.models import VisionTransformer
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


class VillaTokens(NamedTuple):
    """What a ViT has instead of a feature map.

    Args:
        tokens: (B, P + H' W', C), the P prefix tokens (class, registers), then the cells of the map row by row.
        grid: H' and W'.
        before: the same tokens as they enter the last block, where regions are cut from those.
    """

    tokens: Tensor
    grid: tuple[int, int]
    before: Tensor | None = None


def choose_region_head(backbone: Any, region_head: str | None) -> str:
    """The region head of a backbone: the one asked for or, for None, "stages" if it can have that, else "mean".

    Raises:
        ValueError: the backbone cannot have that region head, or has no map that regions could be cut from.
    """
    possible = []
    if _has_stages(backbone):
        attends = any(isinstance(module, AttentionPool2d | RotAttentionPool2d) for module in backbone.modules())
        possible = ["stages"] if attends else ["stages", "mean"]
    elif getattr(backbone, "output_fmt", None) == "NHWC":
        possible = ["mean"]
    elif hasattr(backbone, "num_prefix_tokens") and hasattr(
        getattr(backbone, "patch_embed", None), "dynamic_feat_size"
    ):
        attends = isinstance(getattr(backbone, "attn_pool", None), AttentionPoolLatent) or has_class_token(backbone)
        possible = ["mean", "attention"] if attends else ["mean"]
    chosen = possible[0] if region_head is None and possible else region_head
    if chosen not in possible:
        asked = "a region head" if region_head is None else f"region_head {region_head!r}"
        raise ValueError(
            f"{type(backbone).__name__} cannot have {asked}; possible: {', '.join(possible) or 'none'}. Regions are "
            "cut from the maps of stage-wise convolutional, Swin-like (NHWC) and ViT backbones."
        )
    return chosen


def has_class_token(backbone: Any) -> bool:
    """Whether the backbone pools by a class token whose last block can be run on other cells.

    Not where that block wants to know the cells' positions (timm's Eva, which has the ViTs with RoPE).
    """
    pools = isinstance(backbone, VisionTransformer) and backbone.global_pool == "token"
    return pools and backbone.attn_pool is None and len(backbone.blocks) > 1


def _has_stages(backbone: nn.Module) -> bool:
    try:
        split_backbone(backbone, 0)
    except ValueError:
        return False
    return True


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


def _make_projector(config: VillaVisionConfig) -> tuple[int, nn.Module]:
    """The width of the backbone's own projection, and what follows it."""
    dim, width = config.projection_dim, config.projector_width
    if not width:
        return dim, nn.Identity()
    if not config.projector_norm:
        return width, nn.Sequential(nn.ReLU(), nn.Linear(width, dim))
    return dim, nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))


class VillaVisionModel(PreTrainedModel):
    """timm backbone with a region head: whole images, or boxes cut from the same feature map by RoIAlign.

    One pass of the trunk serves the image and all of its regions, unless `region_source` is "crop". `region_head`
    names the head in use: the late stages of the backbone (ViLLA, section 5.1), or pooling over the cells of its last
    map.
    """

    config_class = VillaVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _no_split_modules = ["VillaVisionModel"]
    backbone: Any  # timm's models have methods that nn.Module has not

    def __init__(self, config: VillaVisionConfig) -> None:
        super().__init__(config)
        width, projector = _make_projector(config)
        self.backbone = timm.create_model(
            config.backbone,
            pretrained=False,
            in_chans=config.num_channels,
            num_classes=width,
            **(config.backbone_kwargs or {}),
        )
        module: Any
        for module in self.backbone.modules():
            module.initialised_by_timm = True
        self._built_on_meta = any(parameter.is_meta for parameter in self.backbone.parameters())
        self.projector = projector
        self.region_head = choose_region_head(self.backbone, config.region_head)
        self._repeats_last_block = self.region_head == "attention" and has_class_token(self.backbone)
        self._channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        if self.region_head == "stages":
            self._trunk, self._late_stages, self.stride = split_backbone(self.backbone, config.region_stage)
        else:
            self.stride = self.backbone.feature_info[-1]["reduction"]
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """timm has initialised its modules already; only what the checkpoint lacks is filled in after loading."""
        if getattr(module, "initialised_by_timm", False):
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
            elif module._non_persistent_buffers_set:
                raise ValueError(
                    f"{type(module).__name__} has buffers that no checkpoint holds, and timm {timm.__version__} cannot "
                    "fill them in after loading: install a newer timm."
                )
            if self._built_on_meta:  # transformers.initialization leaves alone what was loaded
                for parameter in module.parameters(recurse=False):
                    init.normal_(parameter, std=0.02)
                super()._init_weights(module)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_feature_map(self, pixel_values: Tensor) -> Tensor | VillaTokens:
        """(B, C, H, W) pixels -> (B, C', H / stride, W / stride), the map that regions are cut from, or a ViT's tokens.

        Raises:
            ValueError: the backbone has an image size or patch size, which `pixel_values` do not fit, or what it
                makes of them is no map.
        """
        check_image_size(self.backbone, *pixel_values.shape[-2:])
        if self.region_head == "stages":
            return self._run(self._trunk, pixel_values)
        before = None
        if self._repeats_last_block:
            # The output of the last block but one, its cells and its prefix tokens.
            features, ((cells, prefix_tokens),) = self.backbone.forward_intermediates(
                pixel_values, [len(self.backbone.blocks) - 2], return_prefix_tokens=True, output_fmt="NLC"
            )
            before = torch.cat([prefix_tokens, cells], 1)
        else:
            features = self.backbone.forward_features(pixel_values)
        if features.dim() == 4:
            return features.permute(0, 3, 1, 2) if self._channels_last else features
        name, prefix = type(self.backbone).__name__, getattr(self.backbone, "num_prefix_tokens", None)
        if prefix is None:
            raise ValueError(f"{name} ends in features of shape {tuple(features.shape)}, which are no map.")
        grid = self.backbone.patch_embed.dynamic_feat_size(tuple(pixel_values.shape[-2:]))
        if features.shape[1] != prefix + grid[0] * grid[1]:
            raise ValueError(
                f"{name} gives {features.shape[1]} tokens where {grid[0]} x {grid[1]} cells and {prefix} prefix tokens "
                "are expected; regions need them all (no patch_drop_rate)."
            )
        return VillaTokens(features, grid, before)

    def embed_images(self, feature_map: Tensor | VillaTokens) -> Tensor:
        """Feature map of whole images -> (B, d): the backbone's own output, through the projector if there is one."""
        if isinstance(feature_map, VillaTokens):
            features = feature_map.tokens
        elif self.region_head == "stages":
            features = self._run(self._late_stages, feature_map)
        else:
            features = feature_map.permute(0, 2, 3, 1) if self._channels_last else feature_map
        return self.projector(self.backbone.forward_head(features))

    def embed_regions(self, feature_map: Tensor | VillaTokens, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """RoIAlign (aligned, as many samples as cells) and region head.

        Args:
            feature_map: of `get_feature_map`, for B images.
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of the `pixel_values` that made the map, padded.
            region_mask: (B, R) bool, False for padding.

        Returns:
            (B, R, d), zero where the mask is False.
        """
        image_index, region_index = region_mask.nonzero(as_tuple=True)
        if isinstance(feature_map, VillaTokens):
            tokens = feature_map.tokens if feature_map.before is None else feature_map.before
            prefix, cells = tokens.tensor_split([self.backbone.num_prefix_tokens], 1)
            dense_map = cells.transpose(1, 2).unflatten(2, feature_map.grid)
        else:
            dense_map = feature_map
        embeds = dense_map.new_zeros(*region_mask.shape, self.config.projection_dim)
        if image_index.numel() == 0:
            return embeds
        # Half precision has no room for pixels, nor for image numbers, above 256 (bfloat16) or 2048 (float16).
        maps = dense_map.to(torch.promote_types(dense_map.dtype, torch.float32))
        rois = torch.cat([image_index[:, None].to(maps), boxes[image_index, region_index].to(maps)], 1)
        crops = roi_align(maps, rois, self.config.roi_size, 1 / self.stride, sampling_ratio=0, aligned=True)
        if self.region_head == "mean":
            crops = crops.mean((2, 3), keepdim=True)
        crops = crops.to(dense_map.dtype)
        if self._repeats_last_block:
            crops = self._run_last_block(prefix[image_index], crops)
        elif isinstance(feature_map, VillaTokens):
            crops = self._as_tokens(crops)
        return embeds.index_put((image_index, region_index), self.embed_images(crops).to(embeds.dtype))

    def embed_crops(self, pixel_values: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """Cut regions out of the image, stretch each to the image's size (bilinear) and embed it as an image.

        Args:
            pixel_values: (B, C, H, W).
            boxes: (B, R, 4) x0, y0, x1, y1 in pixels of `pixel_values`, padded.
            region_mask: (B, R) bool, False for padding.

        Returns:
            (B, R, d), zero where the mask is False.
        """
        image_index, region_index = region_mask.nonzero(as_tuple=True)
        embeds = pixel_values.new_zeros(*region_mask.shape, self.config.projection_dim)
        if image_index.numel() == 0:
            return embeds
        pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        rois = torch.cat([image_index[:, None].to(pixels), boxes[image_index, region_index].to(pixels)], 1)
        # At stride 1 RoIAlign is nothing but crop and resize; boxes that are shrunk are averaged, not sampled.
        crops = roi_align(pixels, rois, pixel_values.shape[-2:], sampling_ratio=0, aligned=True)
        found = self.embed_images(self.get_feature_map(crops.to(pixel_values.dtype)))
        return embeds.to(found.dtype).index_put((image_index, region_index), found)

    def _as_tokens(self, crops: Tensor) -> VillaTokens:
        """(K, C, h, w) crops, such that the backbone pools nothing but their cells.

        A mean stands for every token: whichever of them the backbone pools, what it pools is the mean.
        """
        tokens = crops.flatten(2).transpose(1, 2)
        prefix = self.backbone.num_prefix_tokens
        if self.region_head == "mean":
            tokens = tokens.expand(-1, prefix + 1, -1)
        elif not getattr(self.backbone, "pool_include_prefix", True):  # the backbone will cut the prefix off
            tokens = nn.functional.pad(tokens, (0, 0, prefix, 0))
        return VillaTokens(tokens, (crops.shape[2], crops.shape[3]))

    def _run_last_block(self, prefix: Tensor, crops: Tensor) -> VillaTokens:
        """(K, P, C) prefix tokens and (K, C, h, w) crops, as they enter the last block -> what comes out of it."""
        tokens = torch.cat([prefix, crops.flatten(2).transpose(1, 2)], 1)
        tokens = self.backbone.norm(self.backbone.blocks[-1](tokens))
        return VillaTokens(tokens, (crops.shape[2], crops.shape[3]))

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
        image_embeds = region_embeds = None
        regions = None if boxes is None else check_boxes(pixel_values, boxes, region_mask)
        if regions and self.config.region_source == "crop":
            region_embeds = self.embed_crops(pixel_values, *regions)
            regions = None
        if embed_images or regions:
            feature_map = self.get_feature_map(pixel_values)
            if embed_images:
                image_embeds = self.embed_images(feature_map)
            if regions:
                region_embeds = self.embed_regions(feature_map, *regions)
        return VillaVisionOutput(image_embeds=image_embeds, region_embeds=region_embeds)

    def _run(self, steps: list[str], x: Tensor) -> Tensor:
        for step in steps:
            x = self.backbone.get_submodule(step)(x)
        return x


def check_image_size(backbone: Any, height: int, width: int) -> None:
    """Check that a timm backbone takes images of this size, in pixels.

    Raises:
        ValueError: what timm says in an assertion, and what can be done about it.
    """
    embed = getattr(backbone, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.img_size is None:
        return
    rows, columns = embed.patch_size
    name = type(backbone).__name__
    if embed.strict_img_size and (height, width) != tuple(embed.img_size):
        raise ValueError(
            f"pixel_values are {height} x {width} pixels, {name} takes {embed.img_size[0]} x {embed.img_size[1]}; "
            'set backbone_kwargs={"img_size": ...} or {"dynamic_img_size": true}.'
        )
    if not embed.dynamic_img_pad and (height % rows or width % columns):
        raise ValueError(f"pixel_values are {height} x {width} pixels, {name} takes multiples of {rows} x {columns}.")


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
