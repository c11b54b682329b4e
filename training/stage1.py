"""Stage 1: the mapping model, which learns from image-text pairs alone which region shows which attribute.

accelerate launch training/stage1.py --config training/configs/quickstart.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from arguments import read_arguments
from artifacts import check_made_for, fingerprint_of_model
from datasets_scripts.loading import Collator, multi_hot
from datasets_scripts.schema import attribute_groups, attribute_names, attribute_prompts
from gather import gather_with_gradient
from hub import local_folder, open_artifact
from loop import Objective, identity, make_accelerator, train
from lora import TRAINED, LoraArguments, add_adapter, import_peft, keep_statistics, save_adapter
from modeling_villa import VillaMappingConfig, VillaMappingModel
from modeling_villa.losses_villa import mapping_contrastive_loss
from stage import fingerprints, has_model, load_splits, open_vlm, save_model, send_model

STAGE = "stage1"


@dataclass
class Stage1Arguments(LoraArguments):
    """Stage 1: heads over the regions of a VLM."""

    stage = STAGE
    vlm: str | None = field(
        default=None, metadata={"help": "VillaClipModel to start from; default RUN_DIR/stage0/model"}
    )
    encoder: str = field(
        default="frozen",
        metadata={
            "help": "the image tower: frozen (the paper; reads the region store), lora or full",
            "choices": TRAINED,
        },
    )
    region_store: str | None = field(default=None, metadata={"help": "default RUN_DIR/embed_regions"})
    num_heads: int | None = field(default=None, metadata={"help": "projection heads p; default one per attribute"})
    residual: float = field(default=0.0, metadata={"help": "share of the input in a head's output"})
    temperature: float = field(default=0.07, metadata={"help": "tau of the contrastive loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder == "lora":
            import_peft()


class MappingObjective(Objective):
    """The paper's Stage-1 loss; across processes only the (images x attributes) maxima are exchanged."""

    def __init__(self, model: VillaMappingModel) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> "MappingObjective":
        """A frozen or adapted image tower's batch statistics stay as they are."""
        super().train(mode)
        keep_statistics(self.model.vlm.vision_model)
        return self

    def forward(self, batch: dict[str, Any]) -> Tensor:
        inputs = {key: batch.get(key) for key in ("pixel_values", "boxes", "region_embeds", "region_mask")}
        maxima = gather_with_gradient(self.model(**inputs, return_maxima=True).maxima)
        has_region = gather_with_gradient(batch["region_mask"].any(1, keepdim=True))
        labels = gather_with_gradient(batch["labels"])
        return mapping_contrastive_loss(maxima[:, None], has_region, labels, self.model.config.temperature)


class StoreCollator:
    """A batch from the region store: padded `region_embeds` (B, R, d), `region_mask`, `labels`, `image_id`."""

    def __init__(self, num_attributes: int) -> None:
        self.num_attributes = num_attributes

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        embeds = [torch.as_tensor(example["region_embeds"]) for example in examples]
        padded = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        lengths = torch.tensor([len(regions) for regions in embeds])
        return {
            "image_id": [example["image_id"] for example in examples],
            "region_embeds": padded,
            "region_mask": torch.arange(padded.shape[1]) < lengths[:, None],
            "labels": multi_hot([example["attributes"] for example in examples], self.num_attributes),
        }


def read_store(folder: str | Path, vlm: Path, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """The region store's splits beside the attributes of the same images.

    Raises:
        ValueError: there is no store, or it was made from another model, vocabulary or split.
    """
    stored, meta = open_artifact(folder, "embed_regions")
    check_made_for(meta, folder, model=fingerprint_of_model(vlm, "stage0"), **fingerprints(splits))
    store = stored.with_format("numpy", columns=["region_embeds"], output_all_columns=True)
    return {
        split: concatenate_datasets(
            [store[split].remove_columns("image_id"), data.select_columns(["image_id", "attributes"])], axis=1
        )
        for split, data in splits.items()
    }


def run(args: Stage1Arguments) -> Path:
    """Train the mapping model; returns the folder of the finished model."""
    output_dir = Path(args.output_dir or args.folder(STAGE))
    vlm_dir = local_folder(args.vlm or args.folder("stage0") / "model")
    accelerator = make_accelerator(args, output_dir)
    splits = load_splits(args)
    made_from = {**fingerprints(splits), "model": fingerprint_of_model(vlm_dir, "stage0")}
    meta = {"stage": STAGE, **identity(args), **made_from}
    if has_model(args, output_dir / "model", meta):
        return send_model(args, output_dir / "model", splits)
    names, prompts = attribute_names(splits["train"]), attribute_prompts(splits["train"])
    set_seed(args.seed)
    vlm, processor = open_vlm(vlm_dir)
    # Or the path of its folder on this machine would be saved, and pushed, in the new config.
    vlm.config.name_or_path = ""
    config = VillaMappingConfig(
        vlm_config=vlm.config,
        attributes=names,
        attribute_groups=attribute_groups(splits["train"]),
        num_heads=args.num_heads,
        residual=args.residual,
        temperature=args.temperature,
    )
    model = VillaMappingModel(config)
    model.vlm.load_state_dict(vlm.state_dict())
    model.set_attribute_embeds(names, vlm.eval().embed_prompts([prompts[name] for name in names], processor.tokenizer))
    model.vlm.requires_grad_(False)
    model.vlm.vision_model.requires_grad_(args.encoder == "full")
    if args.encoder == "lora":
        add_adapter(model, ["vlm.vision_model"], ["projection_heads"], args)
    collate: Any = Collator(processor, len(names))
    if args.encoder == "frozen":
        splits = read_store(args.region_store or args.folder("embed_regions"), vlm_dir, splits)
        collate = StoreCollator(len(names))
    model = train(accelerator, MappingObjective(model), splits, collate, args, output_dir, made_from)
    save_adapter(output_dir, model, processor)
    save_model(output_dir / "model", model, processor, meta)
    return send_model(args, output_dir / "model", splits)


if __name__ == "__main__":
    run(read_arguments(Stage1Arguments, STAGE))
