"""Assigns attributes to regions with the mapping model: the pairs dataset that Stage 2 trains on.

accelerate launch training/map_regions.py --config training/configs/quickstart.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments import StageArguments, read_arguments
from artifacts import fingerprint_of_model, is_finished, write_folder, write_meta
from datasets_scripts.loading import Collator
from datasets_scripts.schema import attribute_names
from hub import local_folder, push_artifact
from modeling_villa import VillaMappingModel, VillaProcessor
from modeling_villa.assignment_villa import assign_attributes
from stage import fingerprints, load_splits, start

STAGE = "map_regions"


@dataclass
class MapRegionsArguments(StageArguments):
    """The assignment's arguments."""

    stage = STAGE
    mapping_model: str | None = field(default=None, metadata={"help": "default RUN_DIR/stage1/model"})
    epsilon: float = field(default=0.2, metadata={"help": "regions within epsilon of the best cosine are assigned"})
    mode: str = field(
        default="attributes_to_regions",
        metadata={
            "help": "or the inverted one",
            "choices": ["attributes_to_regions", "regions_to_attributes"],
        },
    )
    exclusive_groups: bool = field(
        default=True, metadata={"help": "a region keeps one attribute of each of the vocabulary's groups"}
    )
    batch_size: int = field(default=64, metadata={"help": "images at a time"})


def assign(model: VillaMappingModel, dataset: Dataset, collate: Collator, args: MapRegionsArguments) -> Dataset:
    """Map one split: `image_id` and `assigned_attributes`, per region a list of labels."""
    groups = torch.tensor(model.config.group_ids, device=model.device) if args.exclusive_groups else None
    rows: dict[str, list[Any]] = {"image_id": [], "assigned_attributes": []}
    loader: Any = DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate, num_workers=args.num_workers)
    for batch in tqdm(loader, desc=STAGE, mininterval=5):
        pixels, boxes, mask, labels = (
            batch[key].to(model.device) for key in ("pixel_values", "boxes", "region_mask", "labels")
        )
        with torch.no_grad():
            scores = model(pixels, boxes, mask).scores
        assigned = assign_attributes(scores, mask, labels, args.epsilon, args.mode, groups=groups).cpu()
        for image_id, regions, valid in zip(batch["image_id"], assigned, batch["region_mask"], strict=True):
            rows["image_id"].append(image_id)
            rows["assigned_attributes"].append([row.nonzero()[:, 0].tolist() for row in regions[valid]])
    names = ClassLabel(names=model.config.attributes)
    return Dataset.from_dict(rows, Features({"image_id": Value("string"), "assigned_attributes": List(List(names))}))


def build(
    args: MapRegionsArguments,
    output_dir: Path,
    model_dir: Path,
    splits: dict[str, Dataset],
    meta: dict[str, Any],
) -> None:
    """Map the splits and write the pairs."""
    model = VillaMappingModel.from_pretrained(model_dir).to(start().device).eval()
    names = attribute_names(splits["train"])
    if model.config.attributes != names:
        raise ValueError(
            f"{model_dir} maps the attributes {model.config.attributes}, the dataset {args.dataset} has {names}."
        )
    collate = Collator(VillaProcessor.from_pretrained(model_dir), len(names))

    def write(folder: Path) -> None:
        pairs = DatasetDict({split: assign(model, dataset, collate, args) for split, dataset in splits.items()})
        pairs.save_to_disk(folder)
        write_meta(folder, meta)

    write_folder(output_dir, write)


def run(args: MapRegionsArguments) -> Path:
    """Write the pairs of the train and validation splits, unless they are there; returns their folder."""
    output_dir = Path(args.output_dir or args.folder(STAGE))
    model_dir = local_folder(args.mapping_model or args.folder("stage1") / "model")
    splits = load_splits(args)
    meta = {
        "stage": STAGE,
        "model": fingerprint_of_model(model_dir, "stage1"),
        "epsilon": args.epsilon,
        "mode": args.mode,
        "exclusive_groups": args.exclusive_groups,
        **fingerprints(splits),
    }
    with start().main_process_first():
        if not is_finished(output_dir, meta, args.resume or not start().is_main_process):
            build(args, output_dir, model_dir, splits, meta)
    if args.push_artifacts and start().is_main_process:
        push_artifact(args, "pairs", output_dir)
    return output_dir


if __name__ == "__main__":
    run(read_arguments(MapRegionsArguments, STAGE))
