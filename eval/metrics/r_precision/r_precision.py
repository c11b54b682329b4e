"""R-Precision of regions and attributes as an `evaluate` metric; README.md beside it is its card."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from modeling_villa.metrics_villa import ArrayLike, arrays_of_rows, region_to_text_retrieval, text_to_region_retrieval

_DESCRIPTION = """\
R-Precision between image regions and textual attributes: of the R candidates relevant to a query, the share found among
the query's R best-scoring candidates; the mean over the queries, in per cent. Queries are the attributes (text to
region) or the regions (region to text). Queries with nothing relevant are left out.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of N rows of A floats, one row per region: the score of each attribute, higher is more alike.
    references: list of N rows of A values, 0 or 1: 1 where the region shows the attribute.
    direction: "text_to_region" (default) or "region_to_text"; for `evaluate.combine`, set it in `evaluate.load`.
Returns:
    r_precision: 0 to 100.
Examples:
>>> import evaluate
>>> metric = evaluate.load("eval/metrics/r_precision")
>>> scores = [[0.9, 0.1], [0.8, 0.3], [0.2, 0.7], [0.6, 0.4]]
>>> metric.compute(predictions=scores, references=[[1, 0], [0, 1], [0, 1], [1, 0]])
{'r_precision': 50.0}
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

_RETRIEVAL: dict[str, Callable[[ArrayLike, ArrayLike], dict[str, float]]] = {
    "text_to_region": text_to_region_retrieval,
    "region_to_text": region_to_text_retrieval,
}


def _checked(direction: str) -> str:
    if direction not in _RETRIEVAL:
        raise ValueError(f"direction: found {direction!r}, expected one of {', '.join(map(repr, _RETRIEVAL))}")
    return direction


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RPrecision(evaluate.Metric):
    """R-Precision, text to region or region to text."""

    def __init__(self, *, direction: str = "text_to_region", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.direction = _checked(direction)

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
        self, predictions: list[list[float]], references: list[list[float]], direction: str | None = None
    ) -> dict[str, float]:
        retrieval = _RETRIEVAL[self.direction if direction is None else _checked(direction)]
        return {"r_precision": retrieval(*arrays_of_rows(predictions, references))["r_precision"]}
