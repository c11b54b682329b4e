"""An open_clip or OpenAI checkpoint of CLIP -> a folder with a VillaClipModel and its VillaProcessor.

python -m modeling_villa.convert_open_clip --checkpoint timm/resnet50_clip.openai --output clip-rn50
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from timm.models.byobnet import checkpoint_filter_fn
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration_villa import VillaClipConfig
from .convert_common import check_output, check_tensors, counters, read_tensors, run, write
from .modeling_villa_clip import VillaClipModel
from .processing_villa import VillaImageProcessor, VillaProcessor
from .towers_villa import warn_of_activation

logger = logging.getLogger(__name__)

START_TOKEN, END_TOKEN = 49406, 49407


class Architecture(NamedTuple):
    """What tells one CLIP from another.

    Args:
        backbone: timm's name of the image tower with GELU (that of the ResNets has ReLU).
        image_size: side in pixels.
        roi_size: cells along the side of the map that regions are cut from.
        projection_dim: width of the embeddings.
        text_width: width of the text tower, 64 per head.
    """

    backbone: str
    image_size: int
    roi_size: int
    projection_dim: int
    text_width: int


# By open_clip's names.
ARCHITECTURES = {
    "RN50": Architecture("resnet50_clip", 224, 14, 1024, 512),
    "RN101": Architecture("resnet101_clip", 224, 14, 512, 512),
    "RN50x4": Architecture("resnet50x4_clip", 288, 18, 640, 640),
    "ViT-B-32": Architecture("vit_base_patch32_clip_224", 224, 7, 512, 512),
    "ViT-B-16": Architecture("vit_base_patch16_clip_224", 224, 14, 512, 512),
    "ViT-L-14": Architecture("vit_large_patch14_clip_224", 224, 16, 768, 768),
}
HUB_FILE = "open_clip_model.safetensors"
# Numbers beside the weights in OpenAI's own files.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
TEXT_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TEXT_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VIT_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
    "proj": "head.weight",
}
VIT_BLOCK_NAMES = {
    "attn.in_proj": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


@dataclass
class Arguments:
    """What to convert, and where to."""

    checkpoint: str = field(
        metadata={"help": f"a .safetensors or .pt file, or a Hub id whose repository has {HUB_FILE}"}
    )
    output: str = field(metadata={"help": "folder to write; must not exist yet"})
    model: Literal["RN50", "RN101", "RN50x4", "ViT-B-32", "ViT-B-16", "ViT-L-14"] = field(
        default="RN50", metadata={"help": "open_clip's name of the architecture"}
    )
    activation: Literal["quick_gelu", "gelu"] = field(
        default="quick_gelu",
        metadata={"help": "of the transformers: quick_gelu for OpenAI's weights, else mostly gelu"},
    )


def build_config(model: str, activation: str) -> VillaClipConfig:
    """The configuration of one of the `ARCHITECTURES`.

    Args:
        model: its name.
        activation: "quick_gelu" or "gelu"; of the text tower, and of the image tower if it is a ViT.
    """
    backbone, image_size, roi_size, projection_dim, width = ARCHITECTURES[model]
    if activation == "quick_gelu":
        backbone = backbone.replace("_clip_", "_clip_quickgelu_")
    vision = {
        "backbone": backbone,
        "region_head": "attention" if backbone.startswith("vit_") else "stages",
        "roi_size": roi_size,
        "projection_dim": projection_dim,
        "image_size": image_size,
    }
    text = {
        "vocab_size": END_TOKEN + 1,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 12,
        "num_attention_heads": width // 64,
        "projection_dim": projection_dim,
        "max_position_embeddings": 77,
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
        "hidden_act": activation,
    }
    return VillaClipConfig(vision_config=vision, text_config=text)


def load_checkpoint(checkpoint: str) -> dict[str, Tensor]:
    """Read the tensors of a local file or of a Hub repository; nothing is unpickled but tensors.

    Raises:
        ValueError: there is no such file or repository, no network, or no plain tensors in the file.
    """
    path = Path(checkpoint)
    if not path.is_file():
        if path.suffix in (".safetensors", ".pt", ".bin", ".pth"):
            raise ValueError(f"checkpoint: there is no file {checkpoint}.")
        path = _download(checkpoint)
    state = read_tensors(path, checkpoint)
    state = state.get("state_dict", state)  # open_clip's training checkpoints hold more than the model
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def convert_state_dict(state: dict[str, Tensor], model: VillaClipModel) -> dict[str, Tensor]:
    """Rename open_clip's tensors to ours.

    Args:
        state: open_clip's names -> tensors.
        model: the model that they are for; it is not changed.

    Returns:
        `model.state_dict()`'s names -> tensors of the same shapes.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are named.
    """
    found = counters(model)
    visual = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    rename = _rename_vit if model.config.vision_config.backbone.startswith("vit_") else _rename_resnet
    found |= {f"vision_model.backbone.{name}": tensor for name, tensor in rename(visual, model).items()}
    for name, tensor in state.items():
        if not name.startswith("visual.") and name not in NOT_WEIGHTS:
            found.update(_rename_text(name, tensor))
    check_tensors(found, model)
    return found


def _rename_resnet(visual: dict[str, Tensor], model: VillaClipModel) -> dict[str, Tensor]:
    # timm tells by this one name whether it has to rename; should it be missing, that is found out like any other.
    marker = {"conv1.weight": torch.empty(0)}
    named = {f"visual.{name}": tensor for name, tensor in {**marker, **visual}.items()}
    renamed = checkpoint_filter_fn(named, model.vision_model.backbone)
    if not marker.keys() <= visual.keys():
        renamed.pop("stem.conv1.conv.weight")
    return renamed


def _rename_vit(visual: dict[str, Tensor], model: VillaClipModel) -> dict[str, Tensor]:
    # timm's own renaming would silently resample positions and patches of another size.
    renamed = {"head.bias": torch.zeros(model.config.projection_dim)}  # CLIP has none
    for name, tensor in visual.items():
        match = _BLOCK.fullmatch(name)
        if match and match[2] in VIT_BLOCK_NAMES:
            renamed[f"blocks.{match[1]}.{VIT_BLOCK_NAMES[match[2]]}.{match[3]}"] = tensor
        elif name == "proj":
            renamed[VIT_NAMES[name]] = tensor.T
        else:  # timm's class token and positions have a batch dimension
            leading = {"class_embedding": 2, "positional_embedding": 1}.get(name, 0)
            renamed[VIT_NAMES.get(name, f"visual.{name}")] = tensor[(None,) * leading]
    return renamed


def _rename_text(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors for one of open_clip's outside the image tower; an unknown name stays as it is."""
    if name in TEXT_NAMES:
        yield f"text_model.{TEXT_NAMES[name]}", tensor
    elif name == "text_projection":
        yield "text_model.text_projection.weight", tensor.T
    elif (match := _BLOCK.fullmatch(name)) and match[2] == "attn.in_proj":
        for part, chunk in zip("qkv", tensor.chunk(3), strict=False):
            yield f"text_model.text_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[3]}", chunk
    elif match and match[2] in TEXT_BLOCK_NAMES:
        yield f"text_model.text_model.encoder.layers.{match[1]}.{TEXT_BLOCK_NAMES[match[2]]}.{match[3]}", tensor
    else:
        yield name, tensor


def build_processor(image_size: int = 224) -> VillaProcessor:
    """CLIP's tokenizer, made from the vocabulary inside open_clip, and CLIP's means and deviations.

    Args:
        image_size: side in pixels.

    Raises:
        ImportError: open_clip is not installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError("CLIP's vocabulary comes with open_clip: pip install 'open_clip_torch>=3,<4'") from error
    source = SimpleTokenizer()
    vocabulary = {token: number for token, number in source.encoder.items() if number < START_TOKEN}
    vocabulary |= {"<|startoftext|>": START_TOKEN, "<|endoftext|>": END_TOKEN}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks), model_max_length=77)
    image_processor = VillaImageProcessor(
        size={"height": image_size, "width": image_size}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )
    return VillaProcessor(image_processor=image_processor, tokenizer=tokenizer)


def convert(args: Arguments) -> None:
    """Write the folder; it gets its name only when it is complete."""
    check_output(args.output)
    config = build_config(args.model, args.activation)
    processor, state = build_processor(config.vision_config.image_size), load_checkpoint(args.checkpoint)
    warn_of_activation(args.checkpoint, args.activation)
    model = VillaClipModel(config)
    model.load_state_dict(convert_state_dict(state, model))
    write(args.output, model, processor)
    logger.info("%s of %s is now in %s", args.model, args.checkpoint, args.output)


def _download(hub_id: str) -> Path:
    try:
        return Path(hf_hub_download(hub_id, HUB_FILE))
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"checkpoint: {hub_id} is no local file, and the Hub cannot be reached; without network give a local "
            "file (.safetensors)."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"checkpoint: {hub_id} is neither a local file nor a Hub id with {HUB_FILE}.") from error


def main() -> None:
    """Command line."""
    run(Arguments, convert)


if __name__ == "__main__":
    main()
