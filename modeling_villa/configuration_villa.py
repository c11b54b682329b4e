"""Configurations of the towers, the mapping model (Stage 1) and the one-to-one VLM (Stages 0 and 2)."""

import os
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, CLIPTextConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

# What goes into a model's repository beside the file of its class; each brings along what it imports.
_CODE = ("processing_villa", "pipeline_villa", "handler")
REGION_SOURCES = ("roi", "crop")
# Encoders whose first token stands at position pad_token_id + 1.
_POSITIONS_AFTER_PADDING = ("camembert", "longformer", "mpnet", "roberta", "xlm-roberta")


class VillaPreTrainedConfig(PreTrainedConfig):
    """What the configurations share: a saved model brings along the code that loads it where this package is not.

    `auto_classes` names, for each Auto class, our class in its file; `pipelines` the same for pipeline tasks.
    """

    auto_classes: ClassVar[dict[str, str]] = {}
    pipelines: ClassVar[dict[str, Any]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        if not type(self).__module__.startswith("transformers_modules."):
            # The package has registered its pipelines; seeing this entry, pipeline() would ask for trust_remote_code.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `config.json` and, beside it, the few flat files of code that `trust_remote_code=True` needs."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        here = Path(__file__).parent
        names = {name.split(".")[0] for name in self.auto_classes.values()}
        if self.pipelines:
            names.update(_CODE)
        for path in {here / f"{name}.py" for name in names}:
            if path.exists():  # where transformers has fetched this class from the Hub, only what it needed is there
                for file in {str(path), *get_relative_import_files(path)}:
                    shutil.copyfile(file, Path(save_directory) / Path(file).name)
        self.auto_map = dict(self.auto_classes)
        self.custom_pipelines = dict(self.pipelines)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        del self.custom_pipelines


class VillaVisionConfig(VillaPreTrainedConfig):
    """The image tower: a timm backbone, its feature map cut by RoIAlign, and a region head.

    Args:
        backbone: name of a timm model, without weights tag (`resnet50_clip`): stage-wise convolutional, Swin-like
            (its maps NHWC) or a ViT, RoPE ViTs included.
        backbone_kwargs: further arguments of `timm.create_model`, JSON values only.
        region_source: where a region's pixels come from. "roi" (ViLLA): RoIAlign cuts the region's cells out of the
            image's feature map, so that one pass of the trunk serves all regions and each sees its surroundings.
            "crop": the region is cut out of the image, stretched to the image's height and width and embedded as
            an image of its own, by the whole tower: no surroundings, full resolution, one pass per region.
        region_head: what turns the cells that RoIAlign cuts out into one embedding. "stages": the backbone's later
            stages and its pooling, as in ViLLA (section 5.1); convolutional backbones only. "mean": the cells of
            the backbone's last map are averaged and go through what follows the pooling there (norm, projection).
            "attention": pooled as the backbone pools images, by attention, but to those cells only. ViTs with
            global_pool "map": the cells go through the attention pool, without class and register tokens. ViTs that
            pool by their class token (CLIP's): the cells are cut from the map that enters the last block, which runs
            on the class and register tokens and these cells, so that in it the class token sees nothing else of the
            image; the whole image cut to as many cells as the map has (roi_size = its side) is the image's own
            embedding, and fewer or more cells shift the balance between them and the class token. It is not there
            for class tokens with rotary positions. None (the default): "stages" where the backbone has stages, else
            "mean". With "mean" a ViT that pools by its class token embeds images by that token, but regions by the
            mean of their patch tokens, which nothing aligns with it before training.
        region_stage: for the region head "stages" only: index into the backbone's `feature_info` of the stage whose
            output is cut into regions; -2 (the default, and what CLIP RN50 wants) leaves exactly the last stage and
            the pooling to the region head. A lower stage gives sharper regions and a larger region head.
        roi_size: side of the square that RoIAlign makes of every box, in cells of the feature map, > 0. The
            paper's 14 on the stride-16 map of RN50. With the region head "mean" it is the fineness of the samples
            that are averaged: 1 takes about one per cell of the map, and is the cheapest for large boxes.
        projection_dim: width d of the image and region embeddings, > 0.
        projector_width: width of the hidden layer of an MLP (LayerNorm, linear, ReLU, linear) behind the backbone's
            own projection; 0, as in CLIP, for none. A small backbone needs it to bring a region near all of its
            attributes at once.
        projector_norm: False makes the MLP ConVIRT's and SimCLR's (linear, ReLU, linear): no LayerNorm, and the
            backbone's own projection, `projector_width` wide, is its first layer.
        image_size: side in pixels to which the processor brings the images. The backbone does not read it: one
            with an attention pool (resnet50_clip) resamples the position embeddings of its 7 x 7 cells for other
            sizes, or gets others from the start with `backbone_kwargs={"img_size": ...}`; ViTs and Swins want that,
            or `{"dynamic_img_size": true}`, for any size but their own.
        num_channels: channels of the images.

    Raises:
        ValueError: a size that is not positive, an unknown region source or head, or no backbone.
    """

    model_type = "villa_vision"
    base_config_key = "vision_config"
    auto_classes = {
        "AutoConfig": "configuration_villa.VillaVisionConfig",
        "AutoModel": "vision_villa.VillaVisionModel",
    }

    backbone: str = "resnet50_clip"
    backbone_kwargs: dict[str, Any] | None = None
    region_source: str = "roi"
    region_head: str | None = None
    region_stage: int = -2
    roi_size: int = 14
    projection_dim: int = 1024
    projector_width: int = 0
    projector_norm: bool = True
    image_size: int = 224
    num_channels: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("roi_size", "projection_dim", "image_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.projector_width < 0:
            raise ValueError(f"projector_width must not be negative, got {self.projector_width}.")
        if not self.backbone:
            raise ValueError("backbone must name a timm model, got an empty string.")
        if self.region_source not in REGION_SOURCES:
            raise ValueError(f'region_source must be "roi" or "crop", got {self.region_source!r}.')
        if self.region_head not in (None, "stages", "mean", "attention"):
            raise ValueError(f'region_head must be "stages", "mean", "attention" or None, got {self.region_head!r}.')
        self.backbone_kwargs = dict(self.backbone_kwargs or {})
        super().__post_init__(**kwargs)


class VillaTextConfig(VillaPreTrainedConfig):
    """A text tower around an encoder of transformers: its tokens are pooled, then projected (SBERT, ConVIRT).

    Args:
        encoder_config: the encoder (`bert`, `roberta`, `mpnet`, ...), as its configuration or as a dictionary with
            `model_type`.
        pooling: "mean", over the tokens that the attention mask keeps, as SBERT does it; or "pooler", the encoder's
            own pooler over its first token.
        projection: False for none, as in SBERT: the embeddings are the pooled tokens.
        projector_width: width of the hidden layer of an MLP (linear, ReLU, linear), as in ConVIRT; 0 for one linear
            layer.
        projection_dim: width d of the embeddings, > 0; None for the encoder's width, which it has to be without
            projection.

    Raises:
        ValueError: an unknown pooling, or widths that do not fit each other.
    """

    model_type = "villa_text"
    base_config_key = "text_config"
    auto_classes = {"AutoConfig": "configuration_villa.VillaTextConfig", "AutoModel": "text_villa.VillaTextModel"}

    encoder_config: Any = None
    pooling: str = "mean"
    projection: bool = True
    projector_width: int = 0
    projection_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = AutoConfig.for_model(**{"model_type": "bert", **(self.encoder_config or {})})
        width = self.encoder_config.hidden_size
        if self.projection_dim is None:
            self.projection_dim = width
        if self.pooling not in ("mean", "pooler"):
            raise ValueError(f'pooling must be "mean" or "pooler", got {self.pooling!r}.')
        if self.projection_dim < 1 or self.projector_width < 0:
            raise ValueError(
                "projection_dim must be at least 1 and projector_width not negative, got "
                f"{self.projection_dim} and {self.projector_width}."
            )
        if not self.projection and (self.projection_dim != width or self.projector_width):
            raise ValueError(
                f"Without projection the embeddings are as wide as the encoder, {width}; got projection_dim "
                f"{self.projection_dim} and projector_width {self.projector_width}."
            )
        super().__post_init__(**kwargs)

    @property
    def max_text_length(self) -> int | None:
        """The tokens of a text that the encoder has positions for; None if it does not say."""
        positions = getattr(self.encoder_config, "max_position_embeddings", None)
        if positions is not None and self.encoder_config.model_type in _POSITIONS_AFTER_PADDING:
            positions -= self.encoder_config.pad_token_id + 1
        return positions


class VillaClipConfig(VillaPreTrainedConfig):
    """A one-to-one VLM: image tower, text tower, one learnable temperature.

    Args:
        vision_config: the image tower, as a `VillaVisionConfig` or its dictionary.
        text_config: the text tower: a `CLIPTextConfig` or, for any other encoder, a `VillaTextConfig`; as a dictionary
            it is the former unless its `model_type` is "villa_text". Its `projection_dim` must be the image tower's.
        temperature: initial tau of the contrastive loss, > 0; the model learns `logit_scale = log(1 / tau)`
            where the trainer lets it. The paper and its code use 0.07.

    Raises:
        ValueError: towers of different widths, or a temperature that is not positive.
    """

    model_type = "villa_clip"
    auto_classes = {
        "AutoConfig": "configuration_villa.VillaClipConfig",
        "AutoModel": "modeling_villa_clip.VillaClipModel",
        "AutoModelForZeroShotImageClassification": "modeling_villa_clip.VillaClipModel",
        "AutoModelForZeroShotObjectDetection": "modeling_villa_clip.VillaClipModel",
        "AutoProcessor": "processing_villa.VillaProcessor",
    }
    pipelines = {
        "zero-shot-object-detection": {
            "impl": "pipeline_villa.VillaZeroShotObjectDetectionPipeline",
            "pt": ["AutoModelForZeroShotObjectDetection"],
            "type": "multimodal",
        }
    }
    sub_configs = {"vision_config": VillaVisionConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    temperature: float = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = VillaVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            given = {"projection_dim": self.vision_config.projection_dim, **(self.text_config or {})}
            text_class = VillaTextConfig if given.get("model_type") == VillaTextConfig.model_type else CLIPTextConfig
            self.text_config = text_class(**given)
        if self.vision_config.projection_dim != self.text_config.projection_dim:
            raise ValueError(
                "The towers' embeddings differ in width: vision_config.projection_dim is "
                f"{self.vision_config.projection_dim}, text_config.projection_dim is "
                f"{self.text_config.projection_dim}."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        super().__post_init__(**kwargs)

    @property
    def projection_dim(self) -> int:
        """Width d of the shared embedding space."""
        return self.vision_config.projection_dim


class VillaMappingConfig(VillaPreTrainedConfig):
    """The mapping model: a one-to-one VLM and p projection heads over its region embeddings.

    Args:
        vlm_config: the VLM whose towers embed regions and attributes, as a `VillaClipConfig` or dictionary.
        attributes: the vocabulary A, distinct names, in the order of the label columns.
        attribute_groups: group name -> its attributes; attributes of one group exclude each other within a
            region when the mapping is assigned. Attributes outside every group exclude nothing.
        num_heads: p, from 1 to |A|; attribute k uses head k mod p. None for p = |A|, one head per attribute.
        residual: share of the region embedding that is mixed into its head's output, in [0, 1); the paper's
            code offers 0.8, its default is 0.
        temperature: tau of the contrastive loss, > 0.

    Raises:
        ValueError: names that repeat, a group that names an unknown attribute or shares one with another
            group, or a number out of its range.
    """

    model_type = "villa_mapping"
    auto_classes = {
        "AutoConfig": "configuration_villa.VillaMappingConfig",
        "AutoModel": "modeling_villa_mapping.VillaMappingModel",
        "AutoProcessor": "processing_villa.VillaProcessor",
    }
    pipelines = {
        "region-attribute-mapping": {
            "impl": "pipeline_villa.RegionAttributeMappingPipeline",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }
    sub_configs = {"vlm_config": VillaClipConfig}

    vlm_config: Any = None
    attributes: list[str] = field(default_factory=lambda: ["attribute"])
    attribute_groups: dict[str, list[str]] = field(default_factory=dict)
    num_heads: int | None = None
    residual: float = 0.0
    temperature: float = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vlm_config, PreTrainedConfig):
            self.vlm_config = VillaClipConfig(**(self.vlm_config or {}))
        given: Any = self.attributes
        if isinstance(given, str):
            raise ValueError(f"attributes must be a list of names, got the string {given!r}.")
        self.attributes = ["attribute"] if given is None else list(given)
        self.attribute_groups = {name: list(group) for name, group in (self.attribute_groups or {}).items()}
        if self.num_heads is None:
            self.num_heads = len(self.attributes)
        self._check(self.num_heads)
        super().__post_init__(**kwargs)

    def _check(self, num_heads: int) -> None:
        if not self.attributes or len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"attributes must be distinct names, at least one; got {self.attributes}.")
        if not 1 <= num_heads <= len(self.attributes):
            raise ValueError(
                f"num_heads must be from 1 to the number of attributes, {len(self.attributes)}; got {num_heads}."
            )
        grouped = [name for group in self.attribute_groups.values() for name in group]
        if unknown := sorted(set(grouped) - set(self.attributes)):
            raise ValueError(f"attribute_groups names {unknown}, which are not among the attributes.")
        if len(set(grouped)) != len(grouped):
            raise ValueError(f"An attribute belongs to one group at most; attribute_groups is {self.attribute_groups}.")
        if not 0 <= self.residual < 1:
            raise ValueError(f"residual must be in [0, 1), got {self.residual}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    @property
    def group_ids(self) -> list[int]:
        """For each attribute the number of its group, or -1: what `assign_attributes(groups=)` takes."""
        numbers = {name: i for i, group in enumerate(self.attribute_groups.values()) for name in group}
        return [numbers.get(name, -1) for name in self.attributes]
