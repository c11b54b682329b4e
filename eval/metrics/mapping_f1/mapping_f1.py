"""Precision, recall and F1 of region-attribute pairs as an `evaluate` metric; README.md beside it is its card."""

import math
from numbers import Real
from typing import Any

import datasets
import evaluate

from modeling_villa.metrics_villa import arrays_of_rows, mapping_scores

_DESCRIPTION = """\
Micro-averaged precision, recall and F1 of region-attribute pairs, in per cent. A pair is predicted where its score is
above a threshold; all pairs of all regions and attributes are counted together.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of N rows of A floats, one row per region: the score of each attribute, higher is more alike.
    references: list of N rows of A values, 0 or 1: 1 where the region shows the attribute.
    threshold: a pair is predicted where its score is greater; 0.5 by default, for booleans and probabilities. For
        `evaluate.combine`, set it in `evaluate.load`.
Returns:
    precision (0 where nothing is predicted), recall, f1: 0 to 100 each.
Examples:
>>> import evaluate
>>> metric = evaluate.load("eval/metrics/mapping_f1")
>>> metric.compute(predictions=[[1, 0], [0, 1], [1, 0]], references=[[1, 0], [0, 1], [1, 1]])
{'precision': 100.0, 'recall': 75.0, 'f1': 85.71428571428571}
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


def _checked(threshold: object) -> float:
    if not isinstance(threshold, Real) or math.isnan(threshold):
        raise ValueError(f"threshold: found {threshold!r}, expected a number")
    return float(threshold)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MappingF1(evaluate.Metric):
    """Precision, recall and F1 of region-attribute pairs."""

    def __init__(self, *, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = _checked(threshold)

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

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], threshold: float | None = None
    ) -> dict[str, float]:
        limit = self.threshold if threshold is None else _checked(threshold)
        scores, truth = arrays_of_rows(predictions, references)
        return mapping_scores(scores > limit, truth)
