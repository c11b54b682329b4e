"""Stage 0: a one-to-one VLM of the corpus, image against whole text. Its result is the baseline CLIP-FT-Img.

accelerate launch training/stage0.py --config training/configs/quickstart.yaml

With `--align regions` every region is held against the whole text instead (CLIP-FT-Reg), and `--num_epochs 0` keeps the
VLM as it starts (CLIP-ZS).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor

from arguments import read_arguments
from artifacts import fingerprint_of_model
from contrast import ContrastArguments, contrastive_loss, ids_of_texts
from datasets_scripts.loading import Collator
from datasets_scripts.schema import attribute_names
from hub import local_folder
from loop import Objective, identity, make_accelerator, train
from modeling_villa import VillaClipConfig, VillaClipModel, VillaImageProcessor, VillaProcessor
from modeling_villa.configuration_villa import REGION_SOURCES
from stage import fingerprints, has_model, load_splits, open_vlm, save_model, send_model
from texts import tokenize, train_tokenizer

STAGE = "stage0"


@dataclass
class Stage0Arguments(ContrastArguments):
    """Stage 0: start from a VLM (`--vlm`), or make one from scratch with the fields below it."""

    stage = STAGE
    vlm: str | None = field(default=None, metadata={"help": "folder or Hub id of a VillaClipModel to start from"})
    backbone: str = field(default="resnet18", metadata={"help": "timm model"})
    backbone_kwargs: str = field(default="{}", metadata={"help": "JSON: further arguments of timm.create_model"})
    region_head: str | None = field(
        default=None, metadata={"help": "stages, mean or attention; default: what the backbone is made for"}
    )
    region_stage: int = field(
        default=-2, metadata={"help": "stage whose feature map regions are cut from, with the head stages"}
    )
    roi_size: int = field(default=14, metadata={"help": "side of RoIAlign's output in cells of that map"})
    image_size: int = field(default=224, metadata={"help": "side of the resized images in pixels"})
    projection_dim: int = field(default=256, metadata={"help": "width of the embeddings"})
    text_width: int = field(default=128, metadata={"help": "width of the text tower"})
    text_layers: int = field(default=2, metadata={"help": "layers of the text tower"})
    vocab_size: int = field(default=1000, metadata={"help": "tokens of the tokenizer made from the corpus, at most"})
    max_text_length: int = field(default=192, metadata={"help": "tokens to which texts are cut"})
    temperature: float = field(default=0.07, metadata={"help": "tau of the contrastive loss"})
    text: str = field(
        default="full", metadata={"help": "the text tower: frozen (the paper) or full", "choices": ["frozen", "full"]}
    )
    align: str = field(
        default="images",
        metadata={
            "help": "what is held against a whole text: images (CLIP-FT-Img), or every region (CLIP-FT-Reg)",
            "choices": ["images", "regions"],
        },
    )
    region_source: str | None = field(
        default=None,
        metadata={"help": "regions by roi (RoIAlign) or crop; default: the VLM's, else roi", "choices": REGION_SOURCES},
    )


class ImageTextObjective(Objective):
    """Whole images, or every region, against whole texts."""

    def __init__(self, model: VillaClipModel, args: Stage0Arguments) -> None:
        super().__init__()
        self.model, self.args = model, args

    def forward(self, batch: dict[str, Any]) -> Tensor:
        texts = self.model.get_text_features(batch["input_ids"], batch["attention_mask"])
        text_ids, mask = batch["text_ids"], batch["region_mask"]
        if self.args.align == "regions":
            regions = self.model.vision_model(batch["pixel_values"], batch["boxes"], mask, embed_images=False)
            visual, image = regions.region_embeds[mask], mask.nonzero()[:, 0]
            texts, text_ids = texts[image], text_ids[image]
        else:
            visual = self.model.vision_model(batch["pixel_values"]).image_embeds
        return contrastive_loss(visual, texts, text_ids, self.model.logit_scale.exp(), self.args)


class ImageTextCollator(Collator):
    """Adds the tokens of the whole texts."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        batch["text_ids"] = ids_of_texts(batch["text"], torch.eye(len(examples)))
        return {**batch, **tokenize(self.processor.tokenizer, batch["text"])}


def build_vlm(args: Stage0Arguments, dataset: Dataset) -> tuple[VillaClipModel, VillaProcessor]:
    """The VLM that Stage 0 starts from, with its processor."""
    if args.vlm:
        model, processor = open_vlm(local_folder(args.vlm))
        model.config.vision_config.region_source = args.region_source or model.config.vision_config.region_source
        return model, processor
    tokenizer = train_tokenizer(dataset["text"], args.vocab_size, args.max_text_length)
    config = VillaClipConfig(
        vision_config={
            "backbone": args.backbone,
            "backbone_kwargs": json.loads(args.backbone_kwargs),
            "region_source": args.region_source or "roi",
            "region_head": args.region_head,
            "region_stage": args.region_stage,
            "roi_size": args.roi_size,
            "image_size": args.image_size,
            "projection_dim": args.projection_dim,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": args.text_width,
            "intermediate_size": 4 * args.text_width,
            "num_hidden_layers": args.text_layers,
            "num_attention_heads": max(1, args.text_width // 64),
            "max_position_embeddings": args.max_text_length,
            "hidden_act": "gelu",
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        temperature=args.temperature,
    )
    image_processor = VillaImageProcessor(size={"height": args.image_size, "width": args.image_size})
    return VillaClipModel(config), VillaProcessor(image_processor=image_processor, tokenizer=tokenizer)


def run(args: Stage0Arguments) -> Path:
    """Train the VLM; returns the folder of the finished model."""
    output_dir = Path(args.output_dir or args.folder(STAGE))
    accelerator = make_accelerator(args, output_dir)
    splits = load_splits(args)
    made_from = fingerprints(splits)
    if args.vlm:
        made_from["model"] = fingerprint_of_model(Path(args.vlm), STAGE) if Path(args.vlm).is_dir() else args.vlm
    meta = {"stage": STAGE, **identity(args), **made_from}
    if has_model(args, output_dir / "model", meta):
        return send_model(args, output_dir / "model", splits)
    set_seed(args.seed)
    model, processor = build_vlm(args, splits["train"])
    model.text_model.requires_grad_(args.text == "full")
    model.logit_scale.requires_grad_(args.learn_temperature)
    collate = ImageTextCollator(processor, len(attribute_names(splits["train"])))
    model = train(accelerator, ImageTextObjective(model, args), splits, collate, args, output_dir, made_from)
    save_model(output_dir / "model", model, processor, meta)
    return send_model(args, output_dir / "model", splits)


if __name__ == "__main__":
    run(read_arguments(Stage0Arguments, STAGE))
