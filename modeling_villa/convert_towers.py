"""Two pretrained towers -> a folder with a VillaClipModel and its VillaProcessor.

python -m modeling_villa.convert_towers --vision timm/resnet50_clip.openai --text openai/clip-vit-base-patch32 \
    --output mixed
"""

import logging
from dataclasses import dataclass, field

from .convert_common import check_output, run, write
from .modeling_villa_clip import VillaClipModel
from .processing_villa import VillaProcessor

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """Which towers, and where to; see `VillaClipModel.from_towers`."""

    vision: str = field(metadata={"help": "a timm model: name with a tag of weights, Hub id or folder"})
    text: str = field(metadata={"help": "a CLIP or an encoder (BERT, MPNet, SBERT) of transformers: Hub id or folder"})
    output: str = field(metadata={"help": "folder to write; must not exist yet"})
    projection_dim: int | None = field(
        default=None, metadata={"help": "width of the embeddings; the text tower's by default"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of the images in pixels; what the image tower was trained with by default"},
    )


def convert(args: Arguments) -> None:
    """Write the folder; it gets its name only when it is complete."""
    check_output(args.output)
    processor = VillaProcessor.from_towers(args.vision, args.text, args.image_size)
    model = VillaClipModel.from_towers(args.vision, args.text, args.projection_dim, args.image_size)
    write(args.output, model, processor)
    logger.info("%s and %s are now in %s", args.vision, args.text, args.output)


def main() -> None:
    """Command line."""
    run(Arguments, convert)


if __name__ == "__main__":
    main()
