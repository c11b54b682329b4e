"""The metrics against slow loops written from their definitions, and their speed at full size."""

import math
import time

import numpy as np
import pytest
import torch

from modeling_villa import metrics_villa
from modeling_villa.metrics_villa import mapping_scores, region_to_text_retrieval, text_to_region_retrieval


def slow_precision(scores, relevant, cutoff):
    """Share of relevant items among the first `cutoff`; of equal scores the lower index comes first."""
    ranking = sorted(range(len(scores)), key=lambda item: (-scores[item], item))[:cutoff]
    return sum(relevant[item] for item in ranking) / len(ranking)


def slow_text_to_region(scores, relevance):
    figures = {"precision@25": [], "precision@100": [], "r_precision": []}
    for query_scores, relevant in zip(scores.T.tolist(), relevance.T.tolist(), strict=True):
        if any(relevant):
            figures["precision@25"].append(slow_precision(query_scores, relevant, 25))
            figures["precision@100"].append(slow_precision(query_scores, relevant, 100))
            figures["r_precision"].append(slow_precision(query_scores, relevant, sum(relevant)))
    return {name: 100 * sum(values) / len(values) for name, values in figures.items()}


def slow_region_to_text(scores, relevance):
    rows = [row for row in zip(scores.tolist(), relevance.tolist(), strict=True) if any(row[1])]
    values = [slow_precision(*row, sum(row[1])) for row in rows]
    return {"r_precision": 100 * sum(values) / len(values)}


def slow_mapping(predicted, true):
    pairs = list(zip(predicted.flatten().tolist(), true.flatten().tolist(), strict=True))
    hits, wrong, missed = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    return {
        "precision": 100 * hits / (hits + wrong) if hits + wrong else 0.0,
        "recall": 100 * hits / (hits + missed),
        "f1": 100 * 2 * hits / (2 * hits + wrong + missed),
    }


def problem(seed=0, regions=150, attributes=9, levels=None, share=0.3):
    """Scores (with ties where `levels` is given) and relevance; one attribute and one region have nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(regions, attributes, generator=generator)
    if levels is not None:
        scores = (scores * levels).round()
    relevance = torch.rand(regions, attributes, generator=generator) < share
    relevance[:, -1] = False
    relevance[-1] = False
    relevance[0, 0] = True
    return scores, relevance


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("regions", [2, 24, 25, 26, 99, 150])
def test_retrieval_equals_the_loop(regions, levels):
    for seed in range(2):
        scores, relevance = problem(seed, regions, levels=levels)
        assert text_to_region_retrieval(scores, relevance) == pytest.approx(slow_text_to_region(scores, relevance))
        assert region_to_text_retrieval(scores, relevance) == pytest.approx(slow_region_to_text(scores, relevance))


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_chunks_change_nothing(monkeypatch, chunk):
    scores, relevance = problem(levels=1)
    expected = text_to_region_retrieval(scores, relevance), region_to_text_retrieval(scores, relevance)
    monkeypatch.setattr(metrics_villa, "CHUNK_ELEMENTS", chunk)
    assert (
        text_to_region_retrieval(scores, relevance),
        region_to_text_retrieval(scores, relevance),
    ) == expected


@pytest.mark.parametrize("metric", [text_to_region_retrieval, region_to_text_retrieval])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_types(metric, dtype):
    scores, relevance = problem(levels=1)
    expected = metric(scores, relevance)
    assert metric(scores.to(dtype).requires_grad_(), relevance) == expected
    assert metric(scores.numpy(), relevance.numpy()) == expected


def test_perfect_reversed_and_tied():
    relevance = torch.zeros(200, 2, dtype=torch.bool)
    relevance[:100, 0] = True
    relevance[100:, 1] = True
    figures = {"precision@25", "precision@100", "r_precision"}
    assert text_to_region_retrieval(relevance.float(), relevance) == dict.fromkeys(figures, 100.0)
    assert text_to_region_retrieval(-relevance.float(), relevance) == dict.fromkeys(figures, 0.0)
    # All equal: the first hundred regions come first, which serves the first query only.
    assert text_to_region_retrieval(torch.zeros(200, 2), relevance) == dict.fromkeys(figures, 50.0)
    assert region_to_text_retrieval(relevance.float(), relevance) == {"r_precision": 100.0}


def test_all_attributes_and_minus_infinity():
    assert region_to_text_retrieval(torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool)) == {"r_precision": 100}
    scores, relevance = torch.tensor([[0.0, -math.inf]]), torch.tensor([[True, False]])
    assert region_to_text_retrieval(scores, relevance) == {"r_precision": 100}


def test_order_of_queries_does_not_matter():
    scores, relevance = problem()
    order = torch.randperm(9)
    assert text_to_region_retrieval(scores[:, order], relevance[:, order]) == pytest.approx(
        text_to_region_retrieval(scores, relevance)
    )


@pytest.mark.parametrize("metric", [text_to_region_retrieval, region_to_text_retrieval])
def test_bad_retrieval_input(metric):
    scores, relevance = problem()
    with pytest.raises(ValueError, match=r"scores: found torch.float32 of shape \(150,\)"):
        metric(scores[:, 0], relevance)
    with pytest.raises(ValueError, match=r"scores: .*shape \(0, 9\)"):
        metric(scores[:0], relevance[:0])
    with pytest.raises(ValueError, match=r"scores: found torch.int64"):
        metric(scores.long(), relevance)
    with pytest.raises(ValueError, match=r"relevance: found torch.float32 .*expected torch.bool"):
        metric(scores, relevance.float())
    with pytest.raises(ValueError, match=r"relevance: found shape \(150, 8\).*scores, \(150, 9\)"):
        metric(scores, relevance[:, :8])
    with pytest.raises(ValueError, match=r"relevance: found no .*expected at least one"):
        metric(scores, torch.zeros_like(relevance))
    scores[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"scores: found NaN"):
        metric(scores, relevance)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_mapping_equals_the_loop(share):
    _, true = problem()
    predicted = torch.rand(true.shape, generator=torch.Generator().manual_seed(5)) < share
    assert mapping_scores(predicted, true) == pytest.approx(slow_mapping(predicted, true))
    assert mapping_scores(predicted.numpy(), true.numpy()) == mapping_scores(predicted, true)


def test_mapping_perfect_and_symmetric():
    _, true = problem()
    assert mapping_scores(true, true) == {"precision": 100.0, "recall": 100.0, "f1": 100.0}
    _, predicted = problem(1)
    forth, back = mapping_scores(predicted, true), mapping_scores(true, predicted)
    assert (forth["precision"], forth["recall"], forth["f1"]) == (
        back["recall"],
        back["precision"],
        back["f1"],
    )


def test_bad_mapping_input():
    _, true = problem()
    with pytest.raises(ValueError, match=r"predicted: found torch.float32"):
        mapping_scores(true.float(), true)
    with pytest.raises(ValueError, match=r"true: found torch.bool of shape \(150,\)"):
        mapping_scores(true, true[:, 0])
    with pytest.raises(ValueError, match=r"true: found shape \(149, 9\), expected .*\(150, 9\)"):
        mapping_scores(true, true[:149])
    with pytest.raises(ValueError, match=r"true: found no pair"):
        mapping_scores(true, np.zeros(true.shape, dtype=bool))


def test_fast_at_full_size():
    scores, relevance = problem(regions=100_000, attributes=20)
    start = time.perf_counter()
    text_to_region_retrieval(scores, relevance)
    region_to_text_retrieval(scores, relevance)
    # About half a second; the bound only catches a loop over regions, on any machine.
    assert time.perf_counter() - start < 10
