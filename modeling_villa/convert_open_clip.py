"""An open_clip or OpenAI checkpoint of CLIP RN50 -> a folder with a VillaClipModel and its VillaProcessor.

python -m modeling_villa.convert_open_clip --checkpoint timm/resnet50_clip.openai --output clip-rn50
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.models.byobnet import checkpoint_filter_fn
from torch import Tensor
from transformers import CLIPTokenizer, HfArgumentParser
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration_villa import VillaClipConfig
from .modeling_villa_clip import VillaClipModel
from .processing_villa import VillaImageProcessor, VillaProcessor

logger = logging.getLogger(__name__)

START_TOKEN, END_TOKEN = 49406, 49407
IMAGE_SIZE = 224
VISION = {
    "backbone": "resnet50_clip",
    "region_stage": -2,
    "roi_size": 14,
    "projection_dim": 1024,
    "image_size": IMAGE_SIZE,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "projection_dim": 1024,
    "max_position_embeddings": 77,
    "bos_token_id": START_TOKEN,
    "eos_token_id": END_TOKEN,
    "pad_token_id": END_TOKEN,
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
BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
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
    model: Literal["RN50"] = field(default="RN50", metadata={"help": "open_clip's name of the architecture"})
    activation: Literal["quick_gelu", "gelu"] = field(
        default="quick_gelu", metadata={"help": "of the text tower: quick_gelu for OpenAI's weights, else mostly gelu"}
    )


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
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets that is no tensor
        raise ValueError(
            f"{checkpoint} cannot be read as plain tensors (weights_only=True), as OpenAI's TorchScript archives "
            "cannot; give the same weights as .safetensors."
        ) from error
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
    expected = model.state_dict()
    # The steps counted by BatchNorm are not in every file, and are not used.
    found = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")}
    visual = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    # timm tells by this one name whether it has to rename; should it be missing, it is named below like any other.
    marker = {"visual.conv1.weight": torch.empty(0)}
    renamed = checkpoint_filter_fn({**marker, **visual}, model.vision_model.backbone)
    if not marker.keys() <= visual.keys():
        renamed.pop("stem.conv1.conv.weight")
    found |= {f"vision_model.backbone.{name}": tensor for name, tensor in renamed.items()}
    for name, tensor in state.items():
        if name not in visual and name not in NOT_WEIGHTS:
            found.update(_rename_text(name, tensor))
    problems = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"The checkpoint is not one of this model. Tensors {listed}.")
    return found


def _rename_text(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors for one of open_clip's outside the image tower; an unknown name stays as it is."""
    if name in TEXT_NAMES:
        yield f"text_model.{TEXT_NAMES[name]}", tensor
    elif name == "text_projection":
        yield "text_model.text_projection.weight", tensor.T
    elif (match := _BLOCK.fullmatch(name)) and match[2] == "attn.in_proj":
        for part, chunk in zip("qkv", tensor.chunk(3), strict=False):
            yield f"text_model.text_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[3]}", chunk
    elif match and match[2] in BLOCK_NAMES:
        yield f"text_model.text_model.encoder.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}", tensor
    else:
        yield name, tensor


def build_processor() -> VillaProcessor:
    """CLIP's tokenizer, made from the vocabulary inside open_clip, and CLIP's means and deviations.

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
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )
    return VillaProcessor(image_processor=image_processor, tokenizer=tokenizer)


def convert(args: Arguments) -> None:
    """Write the folder; it gets its name only when it is complete."""
    output = Path(args.output)
    if output.exists():
        raise ValueError(f"output: {output} exists already.")
    processor, state = build_processor(), load_checkpoint(args.checkpoint)
    config = VillaClipConfig(vision_config=dict(VISION), text_config={**TEXT, "hidden_act": args.activation})
    model = VillaClipModel(config)
    model.load_state_dict(convert_state_dict(state, model))
    partial = output.with_name(f"{output.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    os.replace(partial, output)
    logger.info("%s of %s is now in %s", args.model, args.checkpoint, output)


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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (args,) = HfArgumentParser(cast(Any, Arguments), allow_abbrev=False).parse_args_into_dataclasses()
    convert(args)


if __name__ == "__main__":
    main()
