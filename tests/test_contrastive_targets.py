"""Label smoothing and identical texts in the contrastive loss, against slow loops: targets, values, gradients."""

import math

import pytest
import torch

from modeling_villa.losses_villa import clip_contrastive_loss, contrastive_targets

IDS = [4, 9, 4, 4, 0, 9, 7]  # groups of three sizes, so that texts are held against different numbers


def slow_loss(image_embeds, text_embeds, scale, ids, identical, alpha):
    """Each image against the texts that count for it, and each text against the images that do."""
    count = len(ids)

    def held(i):
        return [j for j in range(count) if j == i or identical != "ignored" or ids[j] != ids[i]]

    def target(i, j):
        positives = [k for k in range(count) if ids[k] == ids[i]] if identical == "positives" else [i]
        hard = 1 / len(positives) if j in positives else 0.0
        others = len(held(i)) - 1
        return (1 - alpha) * hard + alpha / others * (1 - hard) if others else hard

    total = 0
    for i in range(count):
        rows = {j: torch.exp(scale * (image_embeds[i] * text_embeds[j]).sum()) for j in held(i)}
        columns = {j: torch.exp(scale * (image_embeds[j] * text_embeds[i]).sum()) for j in held(i)}
        for j in held(i):
            total = total - target(i, j) * torch.log(rows[j] / sum(rows.values())) / 2
            total = total - target(i, j) * torch.log(columns[j] / sum(columns.values())) / 2
    return total / count


def embeddings(count):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, count, 8, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("identical", ["negatives", "ignored", "positives"])
@pytest.mark.parametrize("ids", [IDS, [3, 3, 3], [5], list(range(6))])
def test_the_loss_equals_the_loop_in_value_and_gradient(ids, identical, alpha):
    targets, ignored = contrastive_targets(torch.tensor(ids), identical)
    targets = None if targets is None else targets.double()
    results = []
    for loss in (
        lambda images, texts: clip_contrastive_loss(images, texts, 10.0, targets, ignored, alpha),
        lambda images, texts: slow_loss(images, texts, 10.0, ids, identical, alpha),
    ):
        inputs = [values.clone().requires_grad_() for values in embeddings(len(ids))]
        value = loss(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_paper_s_way_needs_no_matrix_and_the_options_differ():
    ids = torch.tensor(IDS)
    assert contrastive_targets(ids) == (None, None)
    values = {
        (identical, alpha): clip_contrastive_loss(
            *embeddings(len(IDS)).float(), 10.0, *contrastive_targets(ids, identical), alpha
        ).item()
        for identical in ("negatives", "ignored", "positives")
        for alpha in (0.0, 0.2)
    }
    assert len({round(value, 4) for value in values.values()}) == 6


def test_smoothing_is_pyramidclip_s():
    images, texts = embeddings(5)
    found = clip_contrastive_loss(images, texts, 10.0, label_smoothing=0.2)
    targets = torch.full((5, 5), 0.05) + 0.75 * torch.eye(5)
    torch.testing.assert_close(found, clip_contrastive_loss(images, texts, 10.0, targets.double()))
    unused = torch.eye(3)[[0, 0, 2]]  # nobody's text stays out of the text side
    values = [clip_contrastive_loss(*embeddings(3), 1.0, unused, None, alpha) for alpha in (0.0, 0.3)]
    assert values[0] != values[1] and values[1].isfinite()


def test_only_other_identical_texts_are_ignored():
    images, texts = embeddings(3)
    texts = texts.clone().requires_grad_()
    targets, ignored = contrastive_targets(torch.tensor([1, 1, 2]), "ignored")
    assert targets is None
    loss = clip_contrastive_loss(images, texts, 10.0, None, ignored, 0.2)
    expected = slow_loss(images, texts, 10.0, [1, 1, 2], "ignored", 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert ignored.tolist() == [[False, True, False], [True, False, False], [False] * 3]


def test_bad_input():
    ids = torch.tensor(IDS)
    with pytest.raises(ValueError, match=r"identical_texts: found 'twins', expected one of negatives, ignored, pos"):
        contrastive_targets(ids, "twins")
    for alpha in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"label_smoothing: found {alpha}, expected .*\[0, 1\)"):
            clip_contrastive_loss(*embeddings(3), 1.0, label_smoothing=alpha)
    images, texts = embeddings(3)
    for ignored in (torch.zeros(3, 3), torch.zeros(2, 3).bool()):
        with pytest.raises(ValueError, match=r"ignored: found .*expected torch.bool of shape \(3, 3\)"):
            clip_contrastive_loss(images, texts, 1.0, None, ignored)
    for targets in (None, torch.eye(3)):
        with pytest.raises(ValueError, match="ignored: found a pair that has a target"):
            clip_contrastive_loss(images, texts, 1.0, targets, torch.eye(3).bool())
