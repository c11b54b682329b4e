"""Retrieval and mapping metrics of ViLLA (Varma et al., 2023, section 6), in per cent.

Rankings are stable and descending: of two equal scores, the one with the lower index comes first, on every
device, so the same scores always give the same figure.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray[Any, Any]

# Elements that are ranked at a time; a sort holds about 20 bytes for each.
CHUNK_ELEMENTS = 4_000_000


def text_to_region_retrieval(scores: ArrayLike, relevance: ArrayLike) -> dict[str, float]:
    """How well each attribute, as a query, finds the regions that show it among all N regions.

    Precision@K is the share of relevant regions among the K first, R-Precision the same with K = the number
    of regions relevant to the query. With fewer than K regions in all, all are taken and the denominator is
    N, so that a perfect ranking of relevant regions alone still gives 100. A query with fewer than K relevant
    regions cannot reach 100 at K; the field counts it so. Queries with nothing relevant are left out.

    Args:
        scores: (N, A), floating point, higher is more alike; tensor or numpy array, on any device.
        relevance: (N, A), bool; True where region n shows attribute k.

    Returns:
        "precision@25", "precision@100" and "r_precision": means over the queries, 0 to 100.

    Raises:
        ValueError: a shape or dtype that does not fit, a NaN score, or no query with a relevant region.
    """
    scores_tensor, relevant = _checked(scores, relevance)
    regions = len(scores_tensor)
    hits = _hits_at(scores_tensor.T, relevant.T, (min(25, regions), min(100, regions)))
    if len(hits) == 0:
        raise ValueError("relevance: found no query with a relevant region, expected at least one")
    at_25, at_100, r_precision = (100 * hits.mean(dim=0)).tolist()
    return {"precision@25": at_25, "precision@100": at_100, "r_precision": r_precision}


def region_to_text_retrieval(scores: ArrayLike, relevance: ArrayLike) -> dict[str, float]:
    """How well each region, as a query, finds the attributes that it shows among all A.

    R-Precision of a region with R attributes: the share of them among its R best-scoring ones. Regions that
    show nothing are left out.

    Args:
        scores: (N, A), floating point, higher is more alike; tensor or numpy array, on any device.
        relevance: (N, A), bool; True where region n shows attribute k.

    Returns:
        "r_precision": the mean over the regions, 0 to 100.

    Raises:
        ValueError: a shape or dtype that does not fit, a NaN score, or no region with a relevant attribute.
    """
    hits = _hits_at(*_checked(scores, relevance), ())
    if len(hits) == 0:
        raise ValueError("relevance: found no region with a relevant attribute, expected at least one")
    return {"r_precision": 100 * hits.mean().item()}


def mapping_scores(predicted: ArrayLike, true: ArrayLike) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of region-attribute pairs, over all pairs together.

    Args:
        predicted: (N, A), bool; True where attribute k is assigned to region n.
        true: (N, A), bool; True where region n shows attribute k.

    Returns:
        "precision" (0 where nothing is predicted), "recall" and "f1", 0 to 100.

    Raises:
        ValueError: a shape or dtype that does not fit, or no true pair at all.
    """
    predicted_tensor, true_tensor = torch.as_tensor(predicted), torch.as_tensor(true)
    _check_bool("predicted", predicted_tensor)
    _check_bool("true", true_tensor)
    _check_same_shape("true", true_tensor, "predicted", predicted_tensor)
    hits = int((predicted_tensor & true_tensor.to(predicted_tensor.device)).sum())
    assigned, existing = int(predicted_tensor.sum()), int(true_tensor.sum())
    if existing == 0:
        raise ValueError("true: found no pair, expected at least one")
    return {
        "precision": 100 * hits / max(assigned, 1),
        "recall": 100 * hits / existing,
        "f1": 200 * hits / (assigned + existing),
    }


def arrays_of_rows(
    predictions: list[list[float]], references: list[list[float]]
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Scores and truth, (N, A) each, from lists of rows, as the `evaluate` metrics in eval/metrics store them.

    Args:
        predictions: N rows of A scores.
        references: N rows of A values, 0 or 1.

    Raises:
        ValueError: rows of different lengths or none, a NaN score, a reference that is neither 0 nor 1, or no 1 at all.
    """
    width = len(predictions[0] or ()) if predictions else 0
    for name, rows in (("predictions", predictions), ("references", references)):
        for i, row in enumerate(rows):
            if len(row or ()) != width:
                found = f"{len(row or ())} values in row {i}"
                raise ValueError(f"{name}: found {found}, expected {width}, as in row 0 of predictions")
    if width == 0:
        raise ValueError(f"predictions: found {len(predictions)} rows of 0 values, expected at least one value")
    scores, truth = np.array(predictions, dtype=float), np.array(references, dtype=float)
    if np.isnan(scores).any():
        raise ValueError(f"predictions: found NaN in row {np.argwhere(np.isnan(scores))[0, 0]}, expected numbers")
    wrong = (truth != 0) & (truth != 1)
    if wrong.any():
        raise ValueError(f"references: found {truth[wrong][0]:g} in row {np.argwhere(wrong)[0, 0]}, expected 0 or 1")
    if not truth.any():
        raise ValueError("references: found no 1, expected at least one")
    return scores, truth == 1


def _hits_at(scores: Tensor, relevance: Tensor, cutoffs: tuple[int, ...]) -> Tensor:
    """Precision of each query (row) that has anything relevant, at the cutoffs and at its own R.

    (Q, M) and (Q, M) -> (number of queries kept, len(cutoffs) + 1), float64, 0 to 1.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, scores.shape[1]))
    results = []
    for chunk, relevant in zip(scores.split(rows), relevance.split(rows), strict=True):
        if chunk.isnan().any():
            raise ValueError("scores: found NaN, expected numbers")
        counts = relevant.sum(dim=1)
        kept = counts > 0
        counts = counts[kept]
        order = chunk[kept].argsort(dim=1, descending=True, stable=True)
        found = relevant[kept].gather(1, order).cumsum(dim=1)
        limits = [torch.full_like(counts, cutoff) for cutoff in cutoffs] + [counts]
        at = torch.stack(limits, dim=1)
        # On the CPU, since not every accelerator has float64.
        results.append(found.gather(1, at - 1).cpu().double() / at.cpu())
    return torch.cat(results)


def _checked(scores: ArrayLike, relevance: ArrayLike) -> tuple[Tensor, Tensor]:
    scores_tensor, relevance_tensor = torch.as_tensor(scores).detach(), torch.as_tensor(relevance)
    if scores_tensor.dim() != 2 or not scores_tensor.is_floating_point() or scores_tensor.numel() == 0:
        found = f"{scores_tensor.dtype} of shape {tuple(scores_tensor.shape)}"
        raise ValueError(f"scores: found {found}, expected floating point of shape (N, A), neither of them 0")
    _check_bool("relevance", relevance_tensor)
    _check_same_shape("relevance", relevance_tensor, "scores", scores_tensor)
    return scores_tensor, relevance_tensor.to(scores_tensor.device)


def _check_bool(name: str, values: Tensor) -> None:
    if values.dim() != 2 or values.dtype != torch.bool:
        found = f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(f"{name}: found {found}, expected torch.bool of shape (N, A)")


def _check_same_shape(name: str, values: Tensor, other_name: str, other: Tensor) -> None:
    if values.shape != other.shape:
        expected = f"that of {other_name}, {tuple(other.shape)}"
        raise ValueError(f"{name}: found shape {tuple(values.shape)}, expected {expected}")
