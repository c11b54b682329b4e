"""Pictures of a run: its learning curves, and test images with the attributes given to each region.

    python eval/figures.py --run_dir runs/x --mapping_model runs/x/stage1/model --epsilon 0.5 \
        --dataset docmnist --dataset_kwargs '{"complexity": 29.4}'
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from datasets_scripts.loading import Collator
from datasets_scripts.schema import attribute_names
from mapping import MappingArguments
from modeling_villa import VillaMappingModel, VillaProcessor
from modeling_villa.assignment_villa import assign_attributes
from report import load_model, read_arguments

mpl.use("Agg")
CURVES: dict[str, dict[str, Any]] = {"loss": {"alpha": 0.5, "lw": 0.8}, "validation/loss": {"marker": "o", "ms": 3}}
RIGHT, WRONG, MISSED = "#1a7f37", "#cf222e", "#8c959f"


@dataclass
class FigureArguments(MappingArguments):
    """Which run, and how many images."""

    run_dir: str = field(default="runs/run", metadata={"help": "folder of the run; the pictures are put there"})
    num_images: int = field(default=6, metadata={"help": "test images in the picture"})


def draw_curves(run_dir: Path) -> None:
    """`curves.png`: training and validation loss of each stage that left a log."""
    paths = sorted([*run_dir.glob("stage?/log.jsonl"), *run_dir.glob("ceiling/stage2/log.jsonl")])
    logs = {str(path.parent.relative_to(run_dir)): path for path in paths}
    if not logs:
        raise ValueError(f"{run_dir} holds no stage's log.jsonl; run training/pipeline.py first.")
    figure, axes = plt.subplots(1, len(logs), figsize=(4 * len(logs), 3), squeeze=False, layout="constrained")
    for axis, (stage, path) in zip(axes[0], logs.items(), strict=True):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for key, style in CURVES.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), label=key.replace("/", " "), **style)
        axis.set(title=stage, xlabel="update", ylabel="loss")
        axis.legend(frameon=False)
    figure.savefig(run_dir / "curves.png", dpi=120)
    plt.close(figure)


def draw_regions(examples: list[dict[str, Any]], assigned: torch.Tensor, names: list[str], path: Path) -> None:
    """Images with their boxes and, beside each, its attributes: right, wrong, missed.

    Args:
        examples: of the schema.
        assigned: (B, R, A) bool.
        names: the A attributes.
        path: of the PNG file.
    """
    columns = min(3, len(examples))
    rows = -(-len(examples) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, example, labels in zip(axes.flat, examples, assigned, strict=False):
        width, height = example["image"].size
        axis.imshow(example["image"], interpolation="nearest", extent=(0, width, height, 0))
        for box, truth, given in zip(example["regions"], example["region_attributes"], labels, strict=False):
            draw_region(axis, box, set(truth), set(given.nonzero()[:, 0].tolist()), names)
    legend = {"right": RIGHT, "wrong": WRONG, "missed": MISSED}
    handles = [Rectangle((0, 0), 1, 1, color=color, label=label) for label, color in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_region(axis: Any, box: list[float], truth: set[int], given: set[int], names: list[str]) -> None:
    """One box and the words at its left edge, from the top; a box is green if all of its words are right."""
    x0, y0, x1, y1 = box
    color = RIGHT if truth == given else WRONG
    axis.add_patch(Rectangle((x0 + 0.4, y0 + 0.4), x1 - x0 - 0.8, y1 - y0 - 0.8, fill=False, color=color, lw=1.5))
    words = [(k, RIGHT if k in truth else WRONG) for k in sorted(given)] + [(k, MISSED) for k in sorted(truth - given)]
    line = (y1 - y0) / 8
    for i, (attribute, shade) in enumerate(words):
        style = {"facecolor": shade, "edgecolor": "none", "pad": 1, "alpha": 0.85}
        axis.text(x0 + 1, y0 + 1 + line * i, names[attribute], color="white", va="top", fontsize=8, bbox=style)


def main(args: FigureArguments) -> None:
    """Draw both pictures."""
    run_dir = Path(args.run_dir)
    draw_curves(run_dir)
    dataset = args.load()
    model = load_model(VillaMappingModel, args.mapping_model)
    processor = VillaProcessor.from_pretrained(args.mapping_model)
    examples = [dataset[i] for i in range(min(args.num_images, len(dataset)))]
    batch = Collator(processor, len(attribute_names(dataset)))(examples)
    inputs = [batch[key].to(model.device) for key in ("pixel_values", "boxes", "region_mask")]
    with torch.no_grad():
        scores = model(*inputs).scores.cpu()
    groups = torch.tensor(model.config.group_ids) if args.exclusive_groups else None
    assigned = assign_attributes(scores, batch["region_mask"], batch["labels"], args.epsilon, args.mode, groups=groups)
    draw_regions(examples, assigned, attribute_names(dataset), run_dir / "regions.png")


if __name__ == "__main__":
    main(read_arguments(FigureArguments))
