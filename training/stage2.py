"""Stage 2: the one-to-one VLM, trained on image-text pairs and region-attribute pairs together.

accelerate launch training/stage2.py --config training/configs/quickstart.yaml
"""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from arguments import read_arguments
from artifacts import check_made_for, fingerprint_of_model, fingerprint_of_strings
from contrast import ContrastArguments, contrastive_loss, ids_of_texts
from datasets_scripts.loading import Collator
from datasets_scripts.schema import attribute_names, attribute_prompts
from hub import local_folder, open_artifact
from loop import Objective, identity, make_accelerator, train
from lora import TRAINED, LoraArguments, add_adapter, import_peft, keep_statistics, save_adapter
from modeling_villa import VillaClipModel, VillaMappingModel, VillaProcessor
from stage import fingerprints, has_model, load_splits, open_vlm, save_model, send_model
from texts import FrozenTexts, RegionTexts, tokenize

STAGE = "stage2"
PAIRS = "assigned_attributes"


@dataclass
class Stage2Arguments(LoraArguments, ContrastArguments):
    """Stage 2: a VLM, the pairs, and how a region's text is made."""

    stage = STAGE
    vlm: str | None = field(
        default=None, metadata={"help": "VillaClipModel to start from; default RUN_DIR/stage0/model"}
    )
    image_tower: str = field(
        default="vlm",
        metadata={"help": "the VLM's, or the mapping model's, which was trained", "choices": ["vlm", "mapping_model"]},
    )
    mapping_model: str | None = field(default=None, metadata={"help": "default RUN_DIR/stage1/model"})
    projector_width: int | None = field(
        default=None, metadata={"help": "width of a new MLP behind the image tower; default: the tower as it is"}
    )
    supervision: str = field(
        default="pairs",
        metadata={"help": "pairs, or labels: the true pairs, the ceiling", "choices": ["pairs", "labels"]},
    )
    pairs: str | None = field(default=None, metadata={"help": "pairs dataset; default RUN_DIR/map_regions"})
    region_text: str = field(
        default="sentences", metadata={"help": "sentences or prompts", "choices": ["sentences", "prompts"]}
    )
    vision: str = field(
        default="full",
        metadata={
            "help": "the image tower: frozen, lora or full; its projector is trained in any case",
            "choices": TRAINED,
        },
    )
    text: str = field(
        default="full", metadata={"help": "the text tower: frozen (the paper), lora or full", "choices": TRAINED}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "tau of the contrastive loss; default: the VLM's (the paper: 0.07)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if "lora" in (self.vision, self.text):
            import_peft()
            if self.learn_temperature:
                raise ValueError("learn_temperature does not go with lora: an adapter can't hold the temperature.")


class RegionTextObjective(Objective):
    """Regions against the texts of their attributes, and whole images, one more region each, against whole texts."""

    def __init__(self, model: VillaClipModel, frozen_texts: FrozenTexts | None, args: Stage2Arguments) -> None:
        super().__init__()
        self.model, self.args = model, args
        self.frozen_texts = frozen_texts

    def train(self, mode: bool = True) -> "RegionTextObjective":
        """A frozen or adapted backbone's batch statistics stay as they are."""
        super().train(mode)
        keep_statistics(self.model.vision_model.backbone)
        return self

    def embed_texts(self, batch: dict[str, Any], name: str) -> Tensor:
        """(T, d) normalised embeddings of a list of texts in the batch."""
        if self.frozen_texts is not None:
            return self.frozen_texts(batch[name])
        return self.model.get_text_features(**batch[f"{name}_tokens"])

    def forward(self, batch: dict[str, Any]) -> Tensor:
        boxes, mask = append_whole_image(batch["pixel_values"], batch["boxes"], batch["region_mask"])
        regions = self.model.vision_model(batch["pixel_values"], boxes, mask, embed_images=False).region_embeds
        image, region = batch["paired_regions"].unbind(1)
        visual = torch.cat([regions[image, region], regions[:, -1]])
        texts = self.embed_texts(batch, "text")
        if len(image):
            texts = torch.cat([batch["sentence_weights"] @ self.embed_texts(batch, "region_sentences"), texts])
        return contrastive_loss(visual, texts, batch["text_ids"], self.model.logit_scale.exp(), self.args)


def append_whole_image(pixel_values: Tensor, boxes: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The whole image as one more region, the last, so that batch normalisation sees all that is compared at once.

    Args:
        pixel_values: (B, C, H, W).
        boxes: (B, R, 4) in pixels of `pixel_values`.
        region_mask: (B, R) bool.

    Returns:
        (B, R + 1, 4) and (B, R + 1).
    """
    height, width = pixel_values.shape[-2:]
    whole = boxes.new_tensor([0, 0, width, height]).expand(len(boxes), 1, 4)
    return torch.cat([boxes, whole], 1), torch.cat([region_mask, region_mask.new_ones(len(boxes), 1)], 1)


class RegionTextCollator(Collator):
    """Adds the regions' texts, and the tokens of all texts where the text tower is trained."""

    def __init__(self, processor: Any, num_attributes: int, column: str, texts: RegionTexts, tokens: bool) -> None:
        super().__init__(processor, num_attributes)
        self.column, self.texts, self.tokens = column, texts, tokens

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        sentences, weights, where = self.texts(examples, batch.pop(self.column))
        batch |= {"region_sentences": sentences, "sentence_weights": weights, "paired_regions": where}
        whole = ids_of_texts(batch["text"], torch.eye(len(examples)))
        batch["text_ids"] = torch.cat([ids_of_texts(sentences, weights), whole])
        if self.tokens:
            tokenizer = self.processor.tokenizer
            batch["text_tokens"] = dict(tokenize(tokenizer, batch["text"]))
            if sentences:
                batch["region_sentences_tokens"] = dict(tokenize(tokenizer, sentences))
        return batch


def read_pairs(folder: str | Path, splits: dict[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The splits with the column of assigned attributes, and what the pairs were made from.

    Raises:
        ValueError: there are no pairs, they were made from another vocabulary or split, or no region has an
            attribute.
    """
    pairs, meta = open_artifact(folder, "map_regions")
    check_made_for(meta, folder, **fingerprints(splits))
    if not any(attributes for regions in pairs["train"][PAIRS] for attributes in regions):
        raise ValueError(f"{folder} assigns no attribute to any region of the train split.")
    joined = {
        split: concatenate_datasets([data, pairs[split].remove_columns("image_id")], axis=1)
        for split, data in splits.items()
    }
    return joined, meta


def build_vlm(args: Stage2Arguments, vlm_dir: Path, mapping_dir: Path) -> tuple[VillaClipModel, VillaProcessor]:
    """The VLM that Stage 2 starts from: its text tower, an image tower, and a fresh projector if one is asked for.

    Raises:
        ValueError: the VLM's processor is not its own, or its image tower can't have another projector.
    """
    vlm, processor = open_vlm(vlm_dir)
    if args.temperature is not None:
        vlm.config.temperature = args.temperature
        torch.nn.init.constant_(vlm.logit_scale, -math.log(args.temperature))
    if args.image_tower == "mapping_model":
        vlm.vision_model = VillaMappingModel.from_pretrained(mapping_dir).vlm.vision_model
        vlm.config.vision_config = vlm.vision_model.config
    if args.projector_width is None:
        return vlm, processor
    config: Any = copy.deepcopy(vlm.config)
    if not config.vision_config.projector_norm:
        raise ValueError("--projector_width: the image tower ends in an MLP of ConVIRT's kind already; leave it out.")
    config.vision_config.projector_width = args.projector_width
    model = VillaClipModel(config)
    kept = {name: tensor for name, tensor in vlm.state_dict().items() if ".projector." not in name}
    model.load_state_dict({**model.state_dict(), **kept})
    return model, processor


def split_towers(args: Stage2Arguments, model: VillaClipModel) -> tuple[list[str], list[str]]:
    """Names of the model's parts that are adapted, and of those that are trained in full."""
    adapted, trained = [], []
    if args.vision == "lora":
        adapted.append("vision_model.backbone")
    if args.vision == "full":
        trained.append("vision_model")
    elif model.config.vision_config.projector_width:
        trained.append("vision_model.projector")
    if args.text == "lora":
        adapted.append("text_model")
    elif args.text == "full":
        # Not "text_model": the name of what is inside CLIP's ends like that, too.
        parts = model.text_model.named_children()
        trained += [f"text_model.{name}" for name, part in parts if any(True for _ in part.parameters())]
    return adapted, trained


def run(args: Stage2Arguments) -> Path:
    """Train the VLM; returns the folder of the finished model."""
    output_dir = Path(args.output_dir or args.folder(STAGE))
    vlm_dir = local_folder(args.vlm or args.folder("stage0") / "model")
    accelerator = make_accelerator(args, output_dir)
    splits = load_splits(args)
    made_from = {**fingerprints(splits), "model": fingerprint_of_model(vlm_dir, "stage0")}
    column = "region_attributes"
    if args.supervision == "pairs":
        folder, column = args.pairs or args.folder("map_regions"), PAIRS
        splits, pairs_meta = read_pairs(folder, splits)
        made_from["pairs"] = fingerprint_of_strings([json.dumps(pairs_meta, sort_keys=True)])
    elif column not in splits["train"].column_names:
        raise ValueError(
            f"--supervision labels needs the true pairs, but {args.dataset} has no column {column!r}; "
            "use --supervision pairs, after training/map_regions.py."
        )
    mapping_dir = local_folder(args.mapping_model or args.folder("stage1") / "model")
    if args.image_tower == "mapping_model":
        made_from["image_tower"] = fingerprint_of_model(mapping_dir, "stage1")
        if args.supervision == "pairs":
            check_made_for(pairs_meta, folder, model=made_from["image_tower"])
    meta = {"stage": STAGE, **identity(args), **made_from}
    if has_model(args, output_dir / "model", meta):
        return send_model(args, output_dir / "model", splits)
    names, prompts = attribute_names(splits["train"]), attribute_prompts(splits["train"])
    set_seed(args.seed)
    model, processor = build_vlm(args, vlm_dir, mapping_dir)
    model.vision_model.backbone.requires_grad_(args.vision == "full")
    model.text_model.requires_grad_(args.text == "full")
    model.logit_scale.requires_grad_(args.learn_temperature)
    frozen = None
    if args.text == "frozen":
        model.to(accelerator.device).eval()
        corpus = [text for split in splits.values() for text in split["text"]]
        corpus += [sentence for split in splits.values() for sentences in split["sentences"] for sentence in sentences]
        frozen = FrozenTexts(model, processor.tokenizer, corpus + [s for name in names for s in prompts[name]])
    if "lora" in (args.vision, args.text):
        add_adapter(model, *split_towers(args, model), args)
    texts = RegionTexts([prompts[name] for name in names], args.region_text)
    collate = RegionTextCollator(processor, len(names), column, texts, tokens=frozen is None)
    model = train(accelerator, RegionTextObjective(model, frozen, args), splits, collate, args, output_dir, made_from)
    save_adapter(output_dir, model, processor)
    save_model(output_dir / "model", model, processor, meta)
    return send_model(args, output_dir / "model", splits)


if __name__ == "__main__":
    run(read_arguments(Stage2Arguments, STAGE))
