"""The `evaluate` metrics of eval/metrics: against the pure functions, slow loops, and what their cards say."""

import doctest
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from test_metrics import problem, slow_mapping, slow_region_to_text, slow_text_to_region

from modeling_villa.metrics_villa import mapping_scores, region_to_text_retrieval, text_to_region_retrieval

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "eval" / "metrics"
NAMES = ("mapping_f1", "precision_at_k", "r_precision")
SECTIONS = [
    "## Metric Description",
    "## How to Use",
    "### Inputs",
    "### Output Values",
    "#### Values from Popular Papers",
    "### Examples",
    "## Limitations and Bias",
    "## Citation",
    "## Further References",
]
every_metric = pytest.mark.parametrize("name", NAMES)

# Runs the cards of the named metrics as doctests; says so if anything looks for the network.
RUN_CARDS = r"""
import doctest, re, socket, sys
from pathlib import Path

def refuse(self, address):
    print("NETWORK", address)
    raise OSError("no network here")

socket.socket.connect = refuse
for name in sys.argv[1:]:
    card = Path("eval/metrics", name, "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    print(name, doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(code, {}, name, name, 0)))
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """evaluate keeps the copied scripts and the rows in a folder of this module; paths start at the root."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        patch.setattr(sys, "path", list(sys.path))  # evaluate appends the first one to it
        patch.chdir(ROOT)
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def load(name, **options):
    return evaluate.load(f"eval/metrics/{name}", **options)


def pure(name, scores, relevance):
    """What the metric gives with its defaults, by the pure functions."""
    if name == "mapping_f1":
        return mapping_scores(scores > 0.5, relevance)
    values = text_to_region_retrieval(scores, relevance)
    keys = ("r_precision",) if name == "r_precision" else ("precision@25", "precision@100")
    return {key: values[key] for key in keys}


# Values


@every_metric
@pytest.mark.parametrize("levels", [None, 1])
def test_equals_the_pure_function(name, levels):
    scores, relevance = problem(levels=levels)
    assert load(name).compute(predictions=scores, references=relevance) == pure(name, scores, relevance)


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("regions", [2, 30, 120])
def test_equals_the_loops(regions, levels):
    scores, relevance = problem(3, regions, levels=levels)
    rows = {"predictions": scores, "references": relevance}
    slow = slow_text_to_region(scores, relevance)
    retrieval = load("r_precision")
    assert retrieval.compute(**rows)["r_precision"] == pytest.approx(slow.pop("r_precision"))
    assert load("precision_at_k").compute(**rows) == pytest.approx(slow)
    assert retrieval.compute(**rows, direction="region_to_text") == pytest.approx(
        slow_region_to_text(scores, relevance)
    )
    for threshold in (-1, 0.25):  # with levels, -1 is itself a score: the comparison is strict
        assert load("mapping_f1").compute(**rows, threshold=threshold) == pytest.approx(
            slow_mapping(scores > threshold, relevance)
        )


def test_options_hold_from_load_and_for_one_call():
    scores, relevance = problem()
    rows = {"predictions": scores, "references": relevance}
    there, back = pure("r_precision", scores, relevance), region_to_text_retrieval(scores, relevance)
    assert there != back
    metric = load("r_precision", direction="region_to_text")
    assert metric.compute(**rows) == back
    assert metric.compute(**rows, direction="text_to_region") == there
    assert metric.compute(**rows) == back
    low, high = (mapping_scores(scores > threshold, relevance) for threshold in (0, 1))
    assert low != high
    metric = load("mapping_f1", threshold=1)
    assert metric.compute(**rows) == high
    assert metric.compute(**rows, threshold=0) == low
    assert metric.compute(**rows) == high


@every_metric
@pytest.mark.parametrize(
    ("of_scores", "of_truth"),
    [
        (torch.Tensor.tolist, torch.Tensor.tolist),
        (torch.Tensor.numpy, torch.Tensor.numpy),
        (list, lambda truth: truth.int().tolist()),
        (lambda scores: scores.bfloat16().requires_grad_(), torch.Tensor.long),
        (lambda scores: scores.half().numpy(), lambda truth: truth.double().numpy()),
    ],
    ids=["lists", "numpy", "rows of tensors", "bfloat16", "half"],
)
def test_kinds_of_input(name, of_scores, of_truth):
    scores, relevance = problem(levels=1)  # small whole numbers, exact in every type
    found = load(name).compute(predictions=of_scores(scores), references=of_truth(relevance))
    assert found == pure(name, scores, relevance)


def test_booleans_are_a_mapping():
    _, true = problem()
    _, predicted = problem(1)
    metric = load("mapping_f1")
    assert metric.compute(predictions=predicted, references=true) == mapping_scores(predicted, true)
    assert metric.compute(predictions=predicted.tolist(), references=true.tolist()) == mapping_scores(predicted, true)


def test_double_precision_is_kept():
    rows = {"predictions": [[0.5], [0.5 + 1e-12]], "references": [[0], [1]]}
    assert load("r_precision").compute(**rows) == {"r_precision": 100.0}
    assert load("mapping_f1").compute(**rows) == {"precision": 100.0, "recall": 100.0, "f1": 100.0}


def test_infinite_scores_are_ranked():
    rows = {"predictions": [[-math.inf, 0.0], [math.inf, 1.0]], "references": [[0, 0], [1, 1]]}
    assert load("r_precision").compute(**rows) == {"r_precision": 100.0}


# Batches


@every_metric
@pytest.mark.parametrize("sizes", [(1, 64, 3, 82), (149, 1), (0, 100, 0, 50), (50,) * 3], ids=str)
def test_ragged_batches_give_exactly_the_value_of_one_call(name, sizes):
    scores, relevance = problem(levels=2)
    metric = load(name)
    for some_scores, some_relevance in zip(scores.split(sizes), relevance.split(sizes), strict=True):
        metric.add_batch(predictions=some_scores, references=some_relevance)
    assert len(metric) == 150
    expected = pure(name, scores, relevance)
    assert metric.compute() == expected
    # No row of the first evaluation is left in the second.
    assert metric.compute(predictions=scores[:40], references=relevance[:40]) == pure(name, scores[:40], relevance[:40])


@every_metric
def test_rows_one_at_a_time(name):
    scores, relevance = problem(regions=30)
    metric = load(name, keep_in_memory=True)
    for row, truth in zip(scores.tolist(), relevance.tolist(), strict=True):
        metric.add(prediction=row, reference=truth)
    assert metric.compute() == pure(name, scores, relevance)


# combine


def test_combine_by_path():
    scores, relevance = problem()
    metrics = evaluate.combine([f"eval/metrics/{name}" for name in NAMES])
    expected = text_to_region_retrieval(scores, relevance) | mapping_scores(scores > 0.5, relevance)
    assert metrics.compute(predictions=scores, references=relevance) == expected
    for some_scores, some_relevance in zip(scores.split(47), relevance.split(47), strict=True):
        metrics.add_batch(predictions=some_scores, references=some_relevance)
    assert metrics.compute() == expected


def test_combine_with_options():
    scores, relevance = problem()
    metrics = evaluate.combine(
        {
            "text_to_region": load("r_precision"),
            "region_to_text": load("r_precision", direction="region_to_text"),
            "strict": load("mapping_f1", threshold=1.5),
            "lenient": load("mapping_f1", threshold=-1.5),
        }
    )
    parts = {
        "text_to_region": pure("r_precision", scores, relevance),
        "region_to_text": region_to_text_retrieval(scores, relevance),
        "strict": mapping_scores(scores > 1.5, relevance),
        "lenient": mapping_scores(scores > -1.5, relevance),
    }
    expected = {f"{part}_{key}": value for part, values in parts.items() for key, value in values.items()}
    assert len(set(expected.values())) == 8
    assert metrics.compute(predictions=scores, references=relevance) == expected


# Bad input

GOOD = {"predictions": [[0.1, 0.2], [0.3, 0.4]], "references": [[0, 1], [1, 0]]}


@every_metric
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictions": [[0.1, 0.2], [0.3]]}, r"predictions: found 1 values in row 1, expected 2, as in row 0"),
        ({"predictions": [[0.1, 0.2], None]}, r"predictions: found 0 values in row 1, expected 2"),
        ({"references": [[0, 1, 1], [1, 0, 0]]}, r"references: found 3 values in row 0, expected 2"),
        ({"references": [[0, 1], [1]]}, r"references: found 1 values in row 1, expected 2"),
        ({"predictions": [[0.1, 0.2], [math.nan, 0.4]]}, r"predictions: found NaN in row 1, expected numbers"),
        ({"predictions": [[0.1, None], [0.3, 0.4]]}, r"predictions: found NaN in row 0, expected numbers"),
        ({"references": [[0, 1], [1, 2]]}, r"references: found 2 in row 1, expected 0 or 1"),
        ({"references": [[0.5, 1], [1, 0]]}, r"references: found 0\.5 in row 0, expected 0 or 1"),
        ({"references": [[0, 1], [-1, 0]]}, r"references: found -1 in row 1, expected 0 or 1"),
        ({"references": [[0, 1], [1, math.nan]]}, r"references: found nan in row 1, expected 0 or 1"),
        ({"references": [[0, 0], [0, 0]]}, r"references: found no 1, expected at least one"),
        ({"predictions": [], "references": []}, r"predictions: found 0 rows of 0 values, expected at least one"),
        ({"predictions": [[], []], "references": [[], []]}, r"predictions: found 2 rows of 0 values"),
        # These two are evaluate's own.
        ({"references": [[0, 1]]}, r"number of predictions \(2\) and references \(1\)"),
        ({"predictions": [0.1, 0.2]}, r"don't match the expected format[^$]*\[0\.1, 0\.2\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_rows(name, changes, message):
    metric = load(name, keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**{**GOOD, **changes})
    # The next evaluation knows nothing of it.
    expected = pure(name, np.array(GOOD["predictions"]), np.array(GOOD["references"]) == 1)
    assert metric.compute(**GOOD) == expected


@every_metric
def test_batches_of_different_widths(name):
    metric = load(name, keep_in_memory=True)
    metric.add_batch(**GOOD)
    metric.add_batch(predictions=[[0.1, 0.2, 0.3]], references=[[0, 1, 0]])
    with pytest.raises(ValueError, match="predictions: found 3 values in row 2, expected 2"):
        metric.compute()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("r_precision", {"direction": "image_to_text"}, r"direction: found 'image_to_text', expected one of "),
        ("r_precision", {"direction": ""}, r"direction: found '', expected .*'text_to_region', 'region_to_text'"),
        ("mapping_f1", {"threshold": math.nan}, "threshold: found nan, expected a number"),
        ("mapping_f1", {"threshold": "0.5"}, "threshold: found '0.5', expected a number"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)
    with pytest.raises(ValueError, match=message):
        load(name, keep_in_memory=True).compute(**GOOD, **options)


# Scripts and cards


def test_each_folder_holds_a_script_and_a_card():
    assert tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir())) == NAMES
    for name in NAMES:
        assert {path.name for path in (FOLDER / name).iterdir() if path.is_file()} == {f"{name}.py", "README.md"}
        assert load(name).name == name


def test_features_and_citation_are_the_same_in_every_metric():
    assert len({str(load(name).features) for name in NAMES}) == 1
    assert len({load(name).citation for name in NAMES}) == 1


@every_metric
def test_docstring_example(name):
    metric = load(name)
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, name, 0)
    assert len(test.examples) >= 3
    said = []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


@every_metric
def test_card_has_the_layout_and_names_what_there_is(name):
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert set(meta) == {"title", "tags", "description"} and meta["tags"] == ["evaluate", "metric"]
    assert re.findall(r"^#+ .*", body, re.MULTILINE)[1:] == SECTIONS
    listed = {
        section: re.findall(r"^- \*\*(.+?)\*\*", body.split(section, 1)[1].split("\n#")[0], re.MULTILINE)
        for section in ("### Inputs", "### Output Values")
    }
    metric = load(name)
    options = [key for key in inspect.signature(metric._compute).parameters if key not in metric.features]
    assert listed["### Inputs"] == [*metric.features, *options]
    assert listed["### Output Values"] == list(metric.compute(**GOOD))
    assert metric.citation.strip() in body


def test_cards_hold_without_a_network_from_the_root(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", RUN_CARDS, *NAMES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counts = {name: (FOLDER / name / "README.md").read_text(encoding="utf-8").count(">>> ") for name in NAMES}
    assert min(counts.values()) >= 8
    expected = [f"{name} TestResults(failed=0, attempted={count})" for name, count in counts.items()]
    assert done.stdout.splitlines() == expected, done.stdout
    assert list((tmp_path / "modules").rglob("r_precision.py"))
