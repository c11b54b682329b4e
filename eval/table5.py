"""Table 5 of the paper: how well attributes are mapped to regions, at random, by the VLM, by the mapping model.

    python eval/table5.py --config training/configs/docmnist_small.yaml --seeds 0 1 2 --output results/table5

Trains what is missing of Stages 0 and 1, and writes the table as Markdown, JSON and a plot. The rule of the assignment
is the config's, of its section `map_regions`.
"""

import time

from mapping import MappingArguments
from mapping import main as evaluate
from report import read_arguments
from tables import Metrics, Runs, TableArguments, publish

ROWS = {"random/": "random", "vlm_zs/": "VLM-ZS", "": "ViLLA"}
COLUMNS = {"mapping/precision": "precision", "mapping/recall": "recall", "mapping/f1": "F1"}
RULE = ("epsilon", "mode", "exclusive_groups")


def main(args: TableArguments) -> None:
    """Train, evaluate, write."""
    start = time.time()
    runs = Runs(args)
    rule = {key: value for key, value in runs.section("map_regions").items() if key in RULE}
    found: dict[str, list[Metrics]] = {title: [] for title in ROWS.values()}
    for seed in args.seeds:
        folders = runs.train("mapping", seed)
        options = {**runs.corpus, **rule, "output": str(runs.folder(seed) / "table5_mapping.json")}
        mapping_model = str(folders["stage1"] / "model")
        vlm = str(runs.section("stage1").get("vlm") or folders["stage0"] / "model")
        metrics = evaluate(MappingArguments(mapping_model=mapping_model, vlm=vlm, seed=seed, **options))
        for prefix, title in ROWS.items():
            found[title].append({key: metrics[prefix + key] for key in COLUMNS})
    publish("table5", found, COLUMNS, runs, start)


if __name__ == "__main__":
    main(read_arguments(TableArguments))
