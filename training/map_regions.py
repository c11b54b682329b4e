"""Assigns attributes to regions with the mapping model: the pairs dataset that Stage 2 trains on.

accelerate launch training/map_regions.py --config training/configs/quickstart.yaml

With `--scores vlm` a VLM's own cosines of regions and prompts take the mapping model's place (CLIP-ZS-Map).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments import StageArguments, read_arguments
from artifacts import fingerprint_of_model, is_finished, write_folder, write_meta
from datasets_scripts.loading import Collator
from datasets_scripts.schema import attribute_groups, attribute_names, attribute_prompts
from hub import local_folder, push_artifact
from modeling_villa import VillaMappingConfig, VillaMappingModel, VillaProcessor
from modeling_villa.assignment_villa import assign_attributes
from stage import fingerprints, load_splits, open_vlm, start

STAGE = "map_regions"


@dataclass
class MapRegionsArguments(StageArguments):
    """The assignment's arguments."""

    stage = STAGE
    scores: str = field(
        default="mapping_model",
        metadata={
            "help": "by which pairs are found: the mapping_model's, or the vlm's own cosines of regions and prompts",
            "choices": ["mapping_model", "vlm"],
        },
    )
    mapping_model: str | None = field(default=None, metadata={"help": "default RUN_DIR/stage1/model"})
    vlm: str | None = field(
        default=None, metadata={"help": "VillaClipModel, for --scores vlm; default RUN_DIR/stage0/model"}
    )
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


class Scorer:
    """Cosines of regions and attributes, by a mapping model or by a VLM, and the vocabulary's groups.

    Args:
        scores: "mapping_model" or "vlm".
        folder: of that model.
        dataset: whose vocabulary and prompts are scored.

    Raises:
        ValueError: the mapping model has another vocabulary.
    """

    def __init__(self, scores: str, folder: Path, dataset: Dataset) -> None:
        names, prompts = attribute_names(dataset), attribute_prompts(dataset)
        self.queries = None
        if scores == "vlm":
            self.model, self.processor = open_vlm(folder)
            self.model.to(start().device).eval()
            self.queries = self.model.embed_prompts([prompts[name] for name in names], self.processor.tokenizer)
            self.config: Any = VillaMappingConfig(attributes=names, attribute_groups=attribute_groups(dataset))
            return
        self.processor = VillaProcessor.from_pretrained(folder)
        self.model = VillaMappingModel.from_pretrained(folder).to(start().device).eval()
        self.config = self.model.config
        if self.config.attributes != names:
            raise ValueError(f"{folder} maps the attributes {self.config.attributes}, the dataset has {names}.")

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """(B, 3, H, W), (B, R, 4) in pixels and (B, R) bool -> (B, R, A)."""
        if self.queries is None:
            return self.model(pixel_values, boxes, region_mask).scores
        return self.model.get_region_features(pixel_values, boxes, region_mask) @ self.queries.t()


def assign(scorer: Scorer, dataset: Dataset, args: MapRegionsArguments) -> Dataset:
    """Map one split: `image_id` and `assigned_attributes`, per region a list of labels."""
    device, config = start().device, scorer.config
    groups = torch.tensor(config.group_ids, device=device) if args.exclusive_groups else None
    rows: dict[str, list[Any]] = {"image_id": [], "assigned_attributes": []}
    collate = Collator(scorer.processor, len(config.attributes))
    loader: Any = DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate, num_workers=args.num_workers)
    for batch in tqdm(loader, desc=STAGE, mininterval=5):
        pixels, boxes, mask, labels = (
            batch[key].to(device) for key in ("pixel_values", "boxes", "region_mask", "labels")
        )
        scores = scorer(pixels, boxes, mask)
        assigned = assign_attributes(scores, mask, labels, args.epsilon, args.mode, groups=groups).cpu()
        for image_id, regions, valid in zip(batch["image_id"], assigned, batch["region_mask"], strict=True):
            rows["image_id"].append(image_id)
            rows["assigned_attributes"].append([row.nonzero()[:, 0].tolist() for row in regions[valid]])
    names = ClassLabel(names=config.attributes)
    return Dataset.from_dict(rows, Features({"image_id": Value("string"), "assigned_attributes": List(List(names))}))


def build(
    args: MapRegionsArguments, output_dir: Path, model_dir: Path, splits: dict[str, Dataset], meta: dict[str, Any]
) -> None:
    """Map the splits and write the pairs."""
    scorer = Scorer(args.scores, model_dir, splits["train"])

    def write(folder: Path) -> None:
        pairs = DatasetDict({split: assign(scorer, dataset, args) for split, dataset in splits.items()})
        pairs.save_to_disk(folder)
        write_meta(folder, meta)

    write_folder(output_dir, write)


def run(args: MapRegionsArguments) -> Path:
    """Write the pairs of the train and validation splits, unless they are there; returns their folder."""
    output_dir = Path(args.output_dir or args.folder(STAGE))
    made_by, name = ("stage0", args.vlm) if args.scores == "vlm" else ("stage1", args.mapping_model)
    model_dir = local_folder(name or args.folder(made_by) / "model")
    splits = load_splits(args)
    meta = {
        "stage": STAGE,
        "model": fingerprint_of_model(model_dir, made_by),
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
