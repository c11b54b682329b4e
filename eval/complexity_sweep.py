"""Figure 3 of the paper: retrieval against the pairwise complexity of DocMNIST, at a fixed budget of pairs.

    python eval/complexity_sweep.py --config training/configs/docmnist_small.yaml \
        --dataset_kwargs '{"attribute_budget": 60000}' --methods clip_ft_img villa --output results/complexity_sweep

Trains what is missing, goes on with what was cut off, and writes Markdown, JSON and one plot of both directions.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import pyplot as plt

from report import read_arguments
from table3 import Table3Arguments, run_methods
from tables import Metrics, Runs, markdown, summarise, write

DIRECTIONS = {
    "text_to_region/r_precision": "text → region R-Prec",
    "region_to_text/r_precision": "region → text R-Prec",
}


@dataclass
class SweepArguments(Table3Arguments):
    """Which complexities."""

    methods: list[str] = field(
        default_factory=lambda: ["clip_ft_img", "villa"],
        metadata={"help": "names of files in training/configs/methods"},
    )
    complexities: list[float] = field(
        default_factory=lambda: [5.0, 9.1, 15.2, 21.2, 25.1, 29.4],
        metadata={"help": "region-attribute pairs of an image, on average"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.complexities or len(set(self.complexities)) < len(self.complexities):
            raise ValueError(f"complexities must be distinct numbers, at least one; got {self.complexities}.")


def draw(path: Path, curves: dict[str, dict[float, list[Metrics]]]) -> None:
    """One panel per direction, one line per method, the seeds' standard deviation as bars."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, DIRECTIONS.items(), strict=True):
        for method, points in curves.items():
            cells = [summarise({"": metrics})[""][key] for metrics in points.values()]
            errors = [cell[1] for cell in cells] if len(cells[0]) > 1 else None
            axis.errorbar(list(points), [cell[0] for cell in cells], errors, marker="o", ms=4, label=method)
        axis.set(title=title, xlabel="average pairwise complexity", ylim=(0, 100))
    axes[0].legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main(args: SweepArguments) -> None:
    """Train, evaluate, write."""
    start = time.time()
    seconds: dict[str, float | None] = {}
    curves: dict[str, dict[float, list[Metrics]]] = {}
    for complexity in args.complexities:
        runs = Runs(args, f"c{complexity}", complexity=complexity)
        for seed in args.seeds:
            for method, metrics in run_methods(args, runs, seed).items():
                curves.setdefault(method, {}).setdefault(complexity, []).append(metrics)
        seconds |= runs.seconds
    path = Path(args.output or runs.root.parent / "complexity_sweep")
    found = {f"{method}, c = {c}": metrics for method, points in curves.items() for c, metrics in points.items()}
    write(path, markdown(summarise(found), DIRECTIONS, "figure 3"), found, args, seconds, start)
    draw(path, curves)


if __name__ == "__main__":
    main(read_arguments(SweepArguments))
