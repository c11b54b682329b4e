"""A ConVIRT checkpoint (Zhang et al., 2020) -> a folder with a VillaClipModel and its VillaProcessor.

python -m modeling_villa.convert_convirt --checkpoint convirt.pth --text emilyalsentzer/Bio_ClinicalBERT \
    --output convirt

Two public layouts are known, by the names of their tensors:

| | ResNet-50 | its MLP | BERT | its MLP | pooling of tokens |
|---|---|---|---|---|---|
| ConVIRT-pytorch | res_features | res_l1, res_l2 | bert_model | bert_l1, bert_l2 | mean |
| ViLMedic (ViLLA's) | visual.model, visual.cnn | vis_proj.0, .2 | linguistic.encoder | lin_proj.0, .2 | BERT's pooler |

The ResNet is torchvision's, its parts by name (layer1.0.conv1) or by their place in it (4.0.conv1); BERT is
transformers'. Our image tower has the image's MLP (linear, ReLU, linear) as `fc` of timm's ResNet-50 and a projector
without norm.
"""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers import AutoConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_villa import VillaClipConfig, VillaTextConfig
from .convert_common import check_output, check_tensors, counters, read_tensors, run, write
from .modeling_villa_clip import VillaClipModel
from .processing_villa import VillaImageProcessor, VillaProcessor
from .towers_villa import load_tokenizer

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Where a code base keeps the parts of the model: the first parts of its tensors' names -> ours."""

    names: dict[str, str]
    hidden: tuple[str, str]
    pooling: Literal["mean", "pooler"]


LAYOUTS = {
    "ConVIRT-pytorch": Layout(
        {
            "res_features.": "vision_model.backbone.",
            "res_l1.": "vision_model.backbone.fc.",
            "res_l2.": "vision_model.projector.1.",
            "bert_model.": "text_model.encoder.",
            "bert_l1.": "text_model.projection.0.",
            "bert_l2.": "text_model.projection.2.",
        },
        ("res_l2.weight", "bert_l2.weight"),
        "mean",
    ),
    "ViLMedic": Layout(
        {
            "visual.model.": "vision_model.backbone.",
            "visual.cnn.": "vision_model.backbone.",
            "vis_proj.0.": "vision_model.backbone.fc.",
            "vis_proj.2.": "vision_model.projector.1.",
            "linguistic.encoder.": "text_model.encoder.",
            "linguistic.pooler.": "text_model.encoder.pooler.",
            "lin_proj.0.": "text_model.projection.0.",
            "lin_proj.2.": "text_model.projection.2.",
        },
        ("vis_proj.2.weight", "lin_proj.2.weight"),
        "pooler",
    ),
}
# torchvision's children in their order; those between have no tensors.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_PLACE = re.compile(r"(vision_model\.backbone\.)(\d)(\..+)")


@dataclass
class Arguments:
    """What to convert, and where to."""

    checkpoint: str = field(metadata={"help": "a .safetensors file, or one of torch.save that holds plain tensors"})
    text: str = field(
        metadata={"help": "Hub id or folder of the BERT it started from: its configuration and tokenizer"}
    )
    output: str = field(metadata={"help": "folder to write; must not exist yet"})
    pooling: Literal["mean", "pooler"] | None = field(
        default=None, metadata={"help": "of the text tower's tokens; what the checkpoint's code base does by default"}
    )
    image_size: int = field(default=224, metadata={"help": "side of the images in pixels"})
    temperature: float = field(default=0.1, metadata={"help": "of the contrastive loss, which no checkpoint holds"})


def find_layout(state: dict[str, Tensor]) -> Layout:
    """The layout whose two MLPs are in a checkpoint.

    Raises:
        ValueError: none of them.
    """
    for layout in LAYOUTS.values():
        if all(name in state and state[name].dim() == 2 for name in layout.hidden):
            return layout
    wanted = "; ".join(f"{name}: {', '.join(layout.hidden)}" for name, layout in LAYOUTS.items())
    raise ValueError(
        f"checkpoint: no known ConVIRT. One of these must be there: {wanted}; found {list(state)[:5]}, ..."
    )


def build_config(state: dict[str, Tensor], layout: Layout, encoder: Any, args: Arguments) -> VillaClipConfig:
    """The configuration of a checkpoint, its MLPs' widths read from it.

    Args:
        state: the checkpoint's names -> tensors.
        layout: of `find_layout`.
        encoder: the configuration of BERT.
        args: as given.
    """
    encoder.name_or_path = ""  # or the saved model would tell of this machine's folders
    image, text = (state[name].shape for name in layout.hidden)  # (d, width of the hidden layer)
    vision = {
        "backbone": "resnet50",
        "projection_dim": image[0],
        "projector_width": image[1],
        "projector_norm": False,
        "image_size": args.image_size,
    }
    text_config = VillaTextConfig(
        encoder_config=encoder,
        pooling=args.pooling or layout.pooling,
        projection_dim=text[0],
        projector_width=text[1],
    )
    return VillaClipConfig(vision_config=vision, text_config=text_config, temperature=args.temperature)


def convert_state_dict(state: dict[str, Tensor], layout: Layout, model: VillaClipModel) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to ours.

    Args:
        state: the checkpoint's names -> tensors.
        layout: of `find_layout`.
        model: the model that they are for; it is not changed.

    Returns:
        `model.state_dict()`'s names -> tensors of the same shapes.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are named.
    """
    found = {**counters(model), "logit_scale": model.logit_scale.detach()}
    for name, tensor in state.items():
        start = next((start for start in layout.names if name.startswith(start)), "")
        renamed = layout.names.get(start, "") + name.removeprefix(start)
        if (match := _PLACE.fullmatch(renamed)) and match[2] in _CHILDREN:
            renamed = f"{match[1]}{_CHILDREN[match[2]]}{match[3]}"
        # BERT has a pooler even where nothing uses it, and older files hold the numbers of its positions.
        unused = ".encoder.pooler." in renamed and model.config.text_config.pooling == "mean"
        if not unused and not renamed.endswith("position_ids"):
            found[renamed] = tensor
    check_tensors(found, model)
    return found


def convert(args: Arguments) -> None:
    """Write the folder; it gets its name only when it is complete.

    Raises:
        ValueError: the folder exists, the checkpoint or BERT cannot be read, or they do not fit each other.
    """
    check_output(args.output)
    path = Path(args.checkpoint)
    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {path}.")
    state = read_tensors(path, args.checkpoint)
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    layout = find_layout(state)
    tokenizer = load_tokenizer(args.text)
    model = VillaClipModel(build_config(state, layout, AutoConfig.from_pretrained(args.text), args))
    model.load_state_dict(convert_state_dict(state, layout, model))
    image_processor = VillaImageProcessor(
        size={"height": args.image_size, "width": args.image_size},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    write(args.output, model, VillaProcessor(image_processor=image_processor, tokenizer=tokenizer))
    logger.info("%s is now in %s", args.checkpoint, args.output)


def main() -> None:
    """Command line."""
    run(Arguments, convert)


if __name__ == "__main__":
    main()
