"""Table 3 of the paper: text -> region and region -> text retrieval, every method through the same code.

    python eval/table3.py --config training/configs/docmnist_small.yaml --seeds 0 1 2 --output results/table3

Trains what is missing, goes on with what was cut off, and writes the table as Markdown, JSON and a plot. The methods
are the files of training/configs/methods.
"""

import time
from dataclasses import dataclass, field

from report import read_arguments
from retrieval import RetrievalArguments
from retrieval import main as retrieve
from tables import Metrics, Runs, TableArguments, method_config, publish

TITLES = {
    "clip_zs": "CLIP-ZS",
    "clip_ft_img": "CLIP-FT-Img",
    "clip_ft_reg": "CLIP-FT-Reg",
    "clip_zs_map": "CLIP-ZS-Map",
    "villa": "ViLLA",
    "ceiling": "ceiling (true pairs)",
}
COLUMNS = {
    "text_to_region/precision@25": "text → region P@25",
    "text_to_region/precision@100": "P@100",
    "text_to_region/r_precision": "R-Prec",
    "region_to_text/r_precision": "region → text R-Prec",
}


@dataclass
class Table3Arguments(TableArguments):
    """Which methods."""

    methods: list[str] = field(
        default_factory=lambda: list(TITLES), metadata={"help": "names of files in training/configs/methods"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be distinct names, at least one; got {self.methods}.")
        for method in self.methods:
            method_config(method)


def run_methods(args: Table3Arguments, runs: Runs, seed: int) -> dict[str, Metrics]:
    """Train and evaluate every method with one seed; method's title -> its metrics."""
    models = []
    for method in args.methods:
        folders = runs.train(method, seed)
        models.append(f"{method}={list(folders.values())[-1] / 'model'}")
    output = str(runs.folder(seed) / "table3_retrieval.json")
    found = retrieve(RetrievalArguments(models=models, seed=seed, output=output, **runs.corpus))
    return {TITLES.get(method, method): {key: found[f"{method}/{key}"] for key in COLUMNS} for method in args.methods}


def main(args: Table3Arguments) -> None:
    """Train, evaluate, write."""
    start = time.time()
    runs = Runs(args)
    per_seed = [run_methods(args, runs, seed) for seed in args.seeds]
    found = {row: [metrics[row] for metrics in per_seed] for row in per_seed[0]}
    publish("table3", found, COLUMNS, runs, start)


if __name__ == "__main__":
    main(read_arguments(Table3Arguments))
