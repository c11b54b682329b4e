"""Towers from elsewhere for `VillaClipModel.from_towers`: timm's image towers, transformers' text towers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection
from transformers.image_utils import PILImageResampling
from transformers.utils import cached_file, logging

from .configuration_villa import VillaTextConfig
from .vision_villa import has_class_token

logger = logging.get_logger(__name__)

# Checkpoints known to be trained with QuickGELU, by what timm, open_clip and transformers call them.
_QUICK_GELU = re.compile(
    r"openai/clip-vit|_clip(_\d+)?\.openai$|resnet\d+_clip\.(yfcc15m|cc12m)"
    r"|vit_base_patch32_clip_224\.laion400m_e3[12]|metaclip_(400m|2pt5b)|vit_huge_patch14_clip_224\.metaclip2_worldwide"
    r"|DFN2B-CLIP-ViT-[BL]-1[46]$|DFN5B-CLIP|clip_\d+\.(dfn2b|dfn5b)$|facebook/metaclip-",
)
# Those known to be trained with GELU by their data; the names above win.
_GELU = re.compile("laion2b|datacomp|commonpool", re.IGNORECASE)
# What a sentence-transformers folder may do with the encoder's tokens; the last is done by the model itself.
_SBERT_MODULES = ("Transformer", "Pooling", "Normalize")


def warn_of_activation(name: str, activation: str) -> None:
    """Warn if weights that are known to be trained with QuickGELU get a GELU, or the reverse: it costs accuracy.

    Args:
        name: Hub id or file name of the weights; what it says is all that is known of them.
        activation: of the model, "quick_gelu" or "gelu".
    """
    name = name.strip("/").removesuffix(".safetensors")
    is_quick = bool(_QUICK_GELU.search(name)) or "quickgelu" in name
    if activation == "gelu" and is_quick:
        logger.warning("%s was trained with QuickGELU, and the model has GELU: its embeddings will differ.", name)
    elif activation == "quick_gelu" and not is_quick and _GELU.search(name):
        logger.warning("%s was trained with GELU, and the model has QuickGELU: its embeddings will differ.", name)


def load_image_tower(vision: str, image_size: int | None = None) -> tuple[Any, dict[str, Any]]:
    """A timm model with its weights.

    Args:
        vision: see `VillaClipModel.from_towers`.
        image_size: side in pixels of the images; None for the size that the weights were trained with.

    Returns:
        The model, and the fields of `VillaVisionConfig` that make one like it.

    Raises:
        ValueError: there is no such model or it cannot be reached.
    """
    backbone = _create(vision, pretrained=True)
    source, own_size = backbone.pretrained_cfg, backbone.pretrained_cfg["input_size"][-1]
    kwargs = {k: v for k, v in backbone.pretrained_model_args.items() if k not in ("num_classes", "in_chans")}
    size = image_size or own_size
    if size != own_size and hasattr(backbone, "set_input_size"):
        backbone.set_input_size(img_size=(size, size))
        kwargs["img_size"] = size
    if "vit_" in source["architecture"]:
        warn_of_activation(vision, "quick_gelu" if "quickgelu" in source["architecture"] else "gelu")
    fields = {"backbone": source["architecture"], "backbone_kwargs": kwargs, "image_size": size}
    if has_class_token(backbone):
        fields |= {"region_head": "attention", "roi_size": backbone.patch_embed.grid_size[0]}
    return backbone, {**fields, "num_channels": source["input_size"][0]}


def load_image_settings(vision: str, image_size: int | None = None) -> dict[str, Any]:
    """The arguments of a `VillaImageProcessor` for a timm model: its size, means, deviations and interpolation."""
    with torch.device("meta"):
        source = _create(vision, pretrained=False).pretrained_cfg
    height, width = (image_size, image_size) if image_size else source["input_size"][-2:]
    return {
        "size": {"height": height, "width": width},
        "image_mean": list(source["mean"]),
        "image_std": list(source["std"]),
        "resample": getattr(PILImageResampling, source["interpolation"].upper()),
    }


def _create(vision: str, pretrained: bool) -> Any:
    name = vision.removeprefix("timm/")
    if Path(vision).is_dir():
        name = f"local-dir:{vision}"
    elif not timm.is_model(name):
        name = f"hf-hub:{vision}"
    try:
        return timm.create_model(name, pretrained=pretrained)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"vision: {vision} cannot be loaded: it must be a folder with timm's config.json and weights, the name of "
            f"a timm model with weights, or a Hub id that can be reached and has both ({error})."
        ) from error


def load_text_tower(text: str) -> tuple[Any, dict[str, Tensor]]:
    """A text tower with its weights.

    Args:
        text: see `VillaClipModel.from_towers`.

    Returns:
        Its configuration, a `CLIPTextConfig` or a `VillaTextConfig` without projection, and the tensors of the
        `CLIPTextModelWithProjection` or `VillaTextModel` that it makes.

    Raises:
        ValueError: there is no such model, it cannot be reached, is no text encoder, lacks tensors, or is a
            sentence-transformers model that does something else than mean pooling.
    """
    try:
        config = AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text: {text} cannot be loaded: it must be a folder or a Hub id that can be reached, with the "
            f"configuration of a model of transformers ({error})."
        ) from error
    is_clip = config.model_type in ("clip", "clip_text_model")
    if not is_clip and (not hasattr(config, "vocab_size") or config.is_encoder_decoder):
        raise ValueError(f"text: {text} is a {config.model_type}, which is no text encoder.")
    if not is_clip:
        _check_sentence_transformer(text)
    loader: Any = CLIPTextModelWithProjection if is_clip else AutoModel
    tower, info = loader.from_pretrained(text, dtype=torch.float32, output_loading_info=True)
    # Mean pooling has no use for a pooler, which many checkpoints do not have.
    problems = {name for name in info["missing_keys"] if is_clip or not name.startswith("pooler.")}
    problems |= {str(entry) for entry in info["mismatched_keys"]}
    if problems:
        raise ValueError(f"text: {text} is not whole; tensors missing or of another shape: {', '.join(problems)}.")
    state = tower.state_dict()
    tower.config.name_or_path = ""  # or a saved model would tell of this machine's folders
    if is_clip:
        settle_special_tokens(tower.config)
        return tower.config, state
    encoder = {f"encoder.{name}": tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    return VillaTextConfig(encoder_config=tower.config, projection=False), encoder


def load_tokenizer(text: str) -> Any:
    """The tokenizer of a text tower; it cuts texts at the tower's last position, if not before.

    Raises:
        ValueError: there is none beside the tower.
    """
    try:
        # Of a single text the token types say nothing, and the model takes none.
        tokenizer = AutoTokenizer.from_pretrained(text, model_input_names=["input_ids", "attention_mask"])
        config = AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"text: no tokenizer can be loaded from {text} ({error}).") from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # made from the configuration, without any file
        raise ValueError(f"text: no tokenizer can be loaded from {text}: there are no files of one.")
    config = getattr(config, "text_config", config)
    is_clip = config.model_type == "clip_text_model"
    limit = config.max_position_embeddings if is_clip else VillaTextConfig(encoder_config=config).max_text_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    return tokenizer


def settle_special_tokens(config: CLIPTextConfig) -> None:
    """Write CLIP's own start, end and padding ids where a configuration still has transformers' old placeholders.

    The old ones (0, 2, 1) make CLIP's text tower pool at the highest id, which is that of the end token: the same
    pooling. What stands after the end token changes nothing, so that the padding is CLIP's tokenizer's.
    """
    if config.eos_token_id == 2:
        config.bos_token_id, config.eos_token_id = config.vocab_size - 2, config.vocab_size - 1
        config.pad_token_id = config.eos_token_id
    elif config.eos_token_id == config.vocab_size - 1:
        config.pad_token_id = config.eos_token_id


def _check_sentence_transformer(text: str) -> None:
    """See `load_text_tower`; a model without the files of sentence-transformers is taken as it is."""

    def read(name: str) -> Any:
        path = cached_file(
            text,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))

    kinds = [module["type"].rpartition(".")[2] for module in read("modules.json") or []]
    if unknown := [kind for kind in kinds if kind not in _SBERT_MODULES]:
        raise ValueError(f"text: {text} has modules {unknown} behind its encoder; only mean pooling can be taken over.")
    modes = [
        mode for mode, used in (read("1_Pooling/config.json") or {}).items() if mode.startswith("pooling") and used
    ]
    if modes not in ([], ["pooling_mode_mean_tokens"]):
        raise ValueError(f"text: {text} pools by {modes}; only mean pooling can be taken over.")


def fill(module: nn.Module, state: dict[str, Tensor], heads: Sequence[str]) -> list[str]:
    """Load a tower's tensors; only those of its heads, the first parts of names, may be lacking or of another shape.

    Returns:
        The names of the tensors that stay as they were initialised.

    Raises:
        ValueError: other tensors are missing, left over or of another shape; all of them are named.
    """
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    fresh = [name for name in own if name not in fitting]
    odd = {*fresh, *(name for name in state if name not in fitting)}
    if wrong := sorted(name for name in odd if not name.startswith(tuple(heads))):
        raise ValueError(f"Tensors missing, left over or of another shape: {', '.join(wrong)}.")
    module.load_state_dict(fitting, strict=False)
    return fresh
