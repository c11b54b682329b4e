"""A CLIP of transformers (`CLIPModel`) -> a folder with a VillaClipModel and its VillaProcessor.

python -m modeling_villa.convert_transformers --checkpoint openai/clip-vit-base-patch32 --output clip-b32
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from .configuration_villa import VillaClipConfig
from .convert_common import check_output, check_tensors, read_tensors, run, write
from .modeling_villa_clip import VillaClipModel
from .processing_villa import VillaImageProcessor, VillaProcessor
from .towers_villa import load_tokenizer, settle_special_tokens, warn_of_activation

logger = logging.getLogger(__name__)

# timm's name for a patch size, and what its model has unless it is told otherwise.
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "img_size": 224}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0, "img_size": 224}
BACKBONES: dict[int, tuple[str, dict[str, Any]]] = {
    32: ("vit_base_patch32_clip_224", BASE),
    16: ("vit_base_patch16_clip_224", BASE),
    14: ("vit_large_patch14_clip_224", LARGE),
}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
VISION_NAMES = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.pre_layrnorm.weight": "norm_pre.weight",  # transformers' spelling
    "vision_model.pre_layrnorm.bias": "norm_pre.bias",
    "vision_model.post_layernorm.weight": "norm.weight",
    "vision_model.post_layernorm.bias": "norm.bias",
    "visual_projection.weight": "head.weight",
}
BLOCK_NAMES = {
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ATTENTION = re.compile(r"self_attn\.([qkv])_proj")


@dataclass
class Arguments:
    """What to convert, and where to."""

    checkpoint: str = field(metadata={"help": "a Hub id or a folder with a CLIPModel, its tokenizer and preprocessor"})
    output: str = field(metadata={"help": "folder to write; must not exist yet"})


def build_config(config: CLIPConfig) -> VillaClipConfig:
    """Our configuration of the same model.

    Raises:
        ValueError: the image tower is none that timm's CLIP ViTs can be made into, or cannot take its images' size.
    """
    vision, text = cast(Any, config.vision_config), cast(Any, config.text_config).to_dict()
    patch, size = vision.patch_size, vision.image_size
    if patch not in BACKBONES:
        raise ValueError(f"vision_config.patch_size is {patch}; known are {', '.join(map(str, BACKBONES))}.")
    if not isinstance(size, int) or size % patch:
        raise ValueError(f"vision_config.image_size is {size}, which is no multiple of the patch size {patch}.")
    for name, values in {"layer_norm_eps": (1e-5,), "num_channels": (3,), "hidden_act": ("quick_gelu", "gelu")}.items():
        if getattr(vision, name) not in values:
            raise ValueError(
                f"vision_config.{name} is {getattr(vision, name)}, expected {' or '.join(map(str, values))}."
            )
    backbone, defaults = BACKBONES[patch]
    own = {
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "img_size": size,
    }
    if vision.hidden_act == "quick_gelu":
        backbone = backbone.replace("_clip_", "_clip_quickgelu_")
    fields = {
        "backbone": backbone,
        "backbone_kwargs": {name: value for name, value in own.items() if value != defaults[name]},
        "region_head": "attention",
        "roi_size": size // patch,
        "projection_dim": config.projection_dim,
        "image_size": size,
    }
    result = VillaClipConfig(vision_config=fields, text_config={**text, "projection_dim": config.projection_dim})
    settle_special_tokens(result.text_config)
    return result


def convert_state_dict(state: dict[str, Tensor], model: VillaClipModel) -> dict[str, Tensor]:
    """Rename the tensors of a `CLIPModel` to ours.

    Args:
        state: transformers' names -> tensors.
        model: the model that they are for; it is not changed.

    Returns:
        `model.state_dict()`'s names -> tensors of the same shapes.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are named.
    """
    backbone = {"head.bias": torch.zeros(model.config.projection_dim)}  # CLIP has none
    found = {}
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if name in VISION_NAMES:  # timm's class token and positions have a batch dimension
            leading = {"cls_token": 2, "pos_embed": 1}.get(VISION_NAMES[name], 0)
            backbone[VISION_NAMES[name]] = tensor[(None,) * leading]
        elif match and match[2] in BLOCK_NAMES:
            backbone[f"blocks.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"] = tensor
        elif match and _ATTENTION.fullmatch(match[2]):
            part = name.replace(match[2], "self_attn.{}_proj")
            parts = [state[part.format(letter)] for letter in "qkv" if part.format(letter) in state]
            if len(parts) == 3:
                backbone[f"blocks.{match[1]}.attn.qkv.{match[3]}"] = torch.cat(parts)
            else:  # named below, as is what is missing
                found[name] = tensor
        elif not name.endswith("position_ids"):  # in older files, and not used
            is_text = name.startswith(("text_model.", "text_projection."))
            found[f"text_model.{name}" if is_text else name] = tensor
    found |= {f"vision_model.backbone.{name}": tensor for name, tensor in backbone.items()}
    check_tensors(found, model)
    return found


def build_processor(checkpoint: str, image_size: int) -> VillaProcessor:
    """The checkpoint's tokenizer, and the means and deviations of its preprocessor (CLIP's, if it has none)."""
    path = _find(checkpoint, "preprocessor_config.json")
    settings = json.loads(path.read_text(encoding="utf-8")) if path else {}
    image_processor = VillaImageProcessor(
        size={"height": image_size, "width": image_size},
        image_mean=settings.get("image_mean", OPENAI_CLIP_MEAN),
        image_std=settings.get("image_std", OPENAI_CLIP_STD),
    )
    return VillaProcessor(image_processor=image_processor, tokenizer=load_tokenizer(checkpoint))


def convert(args: Arguments) -> None:
    """Write the folder; it gets its name only when it is complete.

    Raises:
        ValueError: the folder exists, or the checkpoint cannot be found or reached, is no CLIPModel, or does not fit.
    """
    check_output(args.output)
    try:
        source = AutoConfig.from_pretrained(args.checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {args.checkpoint} must be a folder, or a Hub id that can be reached, with a CLIP ({error})."
        ) from error
    if source.model_type != "clip":
        raise ValueError(f'checkpoint: {args.checkpoint} is a {source.model_type!r}, expected a CLIPModel ("clip").')
    weights = next(filter(None, (_find(args.checkpoint, name) for name in WEIGHTS)), None)
    if weights is None:
        raise ValueError(f"checkpoint: {args.checkpoint} has none of {', '.join(WEIGHTS)}.")
    warn_of_activation(args.checkpoint, cast(CLIPVisionConfig, source.vision_config).hidden_act)
    config = build_config(source)
    processor = build_processor(args.checkpoint, config.vision_config.image_size)
    model = VillaClipModel(config)
    model.load_state_dict(convert_state_dict(read_tensors(weights, args.checkpoint), model))
    write(args.output, model, processor)
    logger.info("%s is now in %s", args.checkpoint, args.output)


def _find(checkpoint: str, name: str) -> Path | None:
    path = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def main() -> None:
    """Command line."""
    run(Arguments, convert)


if __name__ == "__main__":
    main()
