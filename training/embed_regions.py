"""Embeds the regions of a corpus once, into the region store that a frozen-encoder Stage 1 trains from.

accelerate launch training/embed_regions.py --config training/configs/docmnist_rn50.yaml
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments import StageArguments, read_arguments
from artifacts import fingerprint_of_model, is_finished, write_folder, write_meta
from datasets_scripts.loading import Collator
from datasets_scripts.schema import attribute_names
from hub import local_folder, push_artifact
from modeling_villa import VillaClipModel
from stage import fingerprints, load_splits, open_vlm, start

STAGE = "embed_regions"


@dataclass
class EmbedRegionsArguments(StageArguments):
    """The region store's arguments."""

    stage = STAGE
    vlm: str | None = field(default=None, metadata={"help": "VillaClipModel; default RUN_DIR/stage0/model"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})


def embed(model: VillaClipModel, dataset: Dataset, collate: Collator, batch_size: int, workers: int) -> Iterator[Any]:
    """Rows of the store: an image's id and its (R, d) float32 region embeddings, not normalised."""
    loader: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    for batch in tqdm(loader, desc=STAGE, mininterval=5):
        inputs = [batch[key].to(model.device) for key in ("pixel_values", "boxes", "region_mask")]
        with torch.no_grad():
            embeds = model.vision_model(*inputs, embed_images=False).region_embeds.float().cpu().numpy()
        for image_id, rows, mask in zip(batch["image_id"], embeds, batch["region_mask"].numpy(), strict=True):
            yield {"image_id": image_id, "region_embeds": rows[mask]}


def build(
    args: EmbedRegionsArguments,
    output_dir: Path,
    vlm_dir: Path,
    splits: dict[str, Dataset],
    meta: dict[str, Any],
) -> None:
    """Embed the splits and write the store."""
    model, processor = open_vlm(vlm_dir)
    model.to(start().device).eval()
    collate = Collator(processor, len(attribute_names(splits["train"])))
    width = model.config.projection_dim
    features = Features({"image_id": Value("string"), "region_embeds": Array2D((None, width), "float32")})

    def write(folder: Path) -> None:
        store = DatasetDict()
        for split, dataset in splits.items():
            store[split] = Dataset.from_generator(
                embed,
                features=features,
                gen_kwargs={
                    "model": model,
                    "dataset": dataset,
                    "collate": collate,
                    "batch_size": args.batch_size,
                    "workers": args.num_workers,
                },
                cache_dir=str(folder / ".cache"),
                fingerprint=f"{split}-{meta['model']}-{meta[f'{split}_split']}",
            )
        store.save_to_disk(folder)
        shutil.rmtree(folder / ".cache")
        write_meta(folder, meta)

    write_folder(output_dir, write)


def run(args: EmbedRegionsArguments) -> Path:
    """Write the store, unless it is there; returns its folder."""
    output_dir = Path(args.output_dir or args.folder(STAGE))
    vlm_dir = local_folder(args.vlm or args.folder("stage0") / "model")
    splits = load_splits(args)
    meta = {"stage": STAGE, "model": fingerprint_of_model(vlm_dir, "stage0"), **fingerprints(splits)}
    with start().main_process_first():
        if not is_finished(output_dir, meta, args.resume or not start().is_main_process):
            build(args, output_dir, vlm_dir, splits, meta)
    if args.push_artifacts and start().is_main_process:
        push_artifact(args, "regions", output_dir)
    return output_dir


if __name__ == "__main__":
    run(read_arguments(EmbedRegionsArguments, STAGE))
