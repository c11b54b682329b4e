"""Precision@25 and Precision@100, text to region, as an `evaluate` metric; README.md beside it is its card."""

import datasets
import evaluate

from modeling_villa.metrics_villa import arrays_of_rows, text_to_region_retrieval

_DESCRIPTION = """\
Precision@25 and Precision@100 of text to region retrieval: each attribute, as a query, ranks all regions; the share of
regions that show it among the K best-scoring ones; the mean over the attributes, in per cent. With fewer than K regions
in all, all are taken. Attributes that no region shows are left out.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of N rows of A floats, one row per region: the score of each attribute, higher is more alike.
    references: list of N rows of A values, 0 or 1: 1 where the region shows the attribute.
Returns:
    precision@25, precision@100: 0 to 100 each.
Examples:
>>> import evaluate
>>> metric = evaluate.load("eval/metrics/precision_at_k")
>>> metric.compute(predictions=[[-i] for i in range(40)], references=[[i < 20] for i in range(40)])
{'precision@25': 80.0, 'precision@100': 50.0}
"""

_CITATION = """\
@inproceedings{varma2023villa,
    title = {{ViLLA}: Fine-Grained Vision-Language Representation Learning from Real-World Data},
    author = {Varma, Maya and Delbrouck, Jean-Benoit and Hooper, Sarah and Chaudhari, Akshay and Langlotz, Curtis},
    booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
    pages = {22225--22235},
    year = {2023}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PrecisionAtK(evaluate.Metric):
    """Precision@25 and Precision@100, text to region."""

    def _info(self) -> evaluate.MetricInfo:
        # float64 keeps both as given: float32 could make ties of scores, an integer feature would turn 0.5 into 0.
        row = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
            reference_urls=["https://arxiv.org/abs/2308.11194"],
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        values = text_to_region_retrieval(*arrays_of_rows(predictions, references))
        return {name: values[name] for name in ("precision@25", "precision@100")}
