"""The contrastive losses of both stages: pure functions, tensors in, scalar out.

Equations follow ViLLA (Varma et al., 2023), sections 5.1 and 5.2.
"""

import torch
from torch import Tensor
from torch.nn import functional

IDENTICAL_TEXTS = ("negatives", "ignored", "positives")


def mapping_contrastive_loss(scores: Tensor, region_mask: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Stage 1: an attribute's best region in an image that states it against its best in images that do not.

    ViLLA (Varma et al., 2023), section 5.1. With `s_ik = exp(max_r scores[i, r, k] / temperature)`, every
    positive (image i, attribute k that its text states) costs

        -log( s_ik / (s_ik + sum over images j whose text lacks k of s_jk) )

    and the loss is the mean over the positives of the batch. An attribute that every image states has no
    negatives: its positives count, at exactly 0. An image without a valid region is neither positive nor
    negative. Without any positive the loss is 0 and can still be differentiated.

    Only the maxima over regions matter, so maxima gathered from several processes, as (B, 1, A), give the
    loss of the global batch. Ties let the gradient through one of the tied regions.

    Args:
        scores: (B, R, A), floating point; cosine of region r of image i with attribute k, in [-1, 1]. What
            stands at invalid regions is not read. Half precision is computed in float32.
        region_mask: (B, R), bool; True where the region exists.
        labels: (B, A), bool; True where the text of image i states attribute k.
        temperature: tau, above 0.

    Returns:
        A scalar >= 0, float32 (float64 for float64 scores).

    Raises:
        ValueError: a shape or dtype that does not fit, or a temperature that is not above 0.
    """
    _check_scores(scores, region_mask, labels)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: found {temperature}, expected a finite number above 0")
    scores = _at_least_float32(scores)
    if scores.shape[1] == 0:
        return scores.sum()
    # The lowest finite number, not -inf: logsumexp over nothing but -inf has NaN gradients.
    lowest = torch.finfo(scores.dtype).min
    best = scores.masked_fill(~region_mask.unsqueeze(-1), lowest).max(dim=1).values
    has_region = region_mask.any(dim=1, keepdim=True)
    logits = (best / temperature).masked_fill(~has_region, lowest)
    against = logits.masked_fill(labels, lowest).logsumexp(dim=0)
    positives = labels & has_region
    # Images without a region are taken out before softplus, which would turn their difference into inf.
    difference = (against - logits).masked_fill(~positives, lowest)
    return functional.softplus(difference).sum() / positives.sum().clamp(min=1)


def clip_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    targets: Tensor | None = None,
    ignored: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Stages 0 and 2: bidirectional InfoNCE between N images (or regions) and N texts.

    ViLLA (Varma et al., 2023), section 5.2; CLIP's loss. With `logits = logit_scale * image_embeds @
    text_embeds.T`, the loss is the mean of two cross-entropies: over each row against `targets` (image to
    text), and over each column against the column-normalised transpose of `targets` (text to image). A text
    that no image has as its target is left out of the second one.

    Args:
        image_embeds: (N, d), floating point, rows of length 1. Half precision is computed in float32.
        text_embeds: (N, d), like `image_embeds`.
        logit_scale: 1 / tau, above 0; a number or a tensor with one element, which may be learned.
        targets: (N, N), floating point, row i the distribution over the texts of image i: entries >= 0, rows
            that sum to 1. None is the identity: image i belongs to text i alone.
        ignored: (N, N), bool, True for pairs that both softmaxes leave out; never one with a target. None for no
            pair.
        label_smoothing: alpha, in [0, 1), of PyramidCLIP (Gao et al., 2022; equation 5 of SoftCLIP, Gao et al., 2023;
            0.2 there). With n texts that image i is held against, and likewise for texts,
            `targets_i <- (1 - alpha) targets_i + alpha / (n - 1) (1 - targets_i)`.

    Returns:
        A scalar >= 0, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes that do not fit, an empty batch, a logit_scale that is not one number above 0,
            targets that are not row-stochastic, a target that is ignored, or a label_smoothing out of its range.
    """
    _check_embeddings(image_embeds, text_embeds)
    _check_logit_scale(logit_scale)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: found {label_smoothing}, expected a number in [0, 1)")
    count = len(image_embeds)
    # Autocast would carry out the product in half precision, and logit_scale multiplies its rounding error.
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale * (_at_least_float32(image_embeds) @ _at_least_float32(text_embeds).T)
    if ignored is not None:
        _check_ignored(ignored, targets, count)
        # The lowest finite number, not -inf, whose product with a target of 0 is NaN.
        logits = logits.masked_fill(ignored, torch.finfo(logits.dtype).min)
    if targets is None and label_smoothing == 0:
        diagonal = torch.arange(count, device=logits.device)
        to_text = functional.cross_entropy(logits, diagonal)
        to_image = functional.cross_entropy(logits.T, diagonal)
        return (to_text + to_image) / 2
    if targets is None:
        targets = torch.eye(count, device=logits.device)
    _check_targets(targets, count)
    targets = targets.to(logits)
    column_sums = targets.sum(dim=0)
    has_image = column_sums > 0
    transposed = targets.T / column_sums.masked_fill(~has_image, 1).unsqueeze(1)
    held = torch.ones_like(targets) if ignored is None else (~ignored).to(targets)
    targets = _smooth(targets, held, label_smoothing)
    transposed = _smooth(transposed, held.T, label_smoothing) * has_image.unsqueeze(1)
    to_text = -(targets * logits.log_softmax(dim=1)).sum() / count
    to_image = -(transposed * logits.T.log_softmax(dim=1)).sum() / has_image.sum()
    return (to_text + to_image) / 2


def identical_text_targets(text_ids: Tensor) -> Tensor:
    """Targets for `clip_contrastive_loss` that share an image's weight among all texts equal to its own.

    `targets[i, j] = [text_ids[i] == text_ids[j]] / (number of texts equal to text i)`.

    Args:
        text_ids: (N,), integer; equal numbers stand for equal texts.

    Returns:
        (N, N), float32, symmetric; rows and columns sum to 1.

    Raises:
        ValueError: `text_ids` is not a vector of integers.
    """
    if text_ids.dim() != 1 or text_ids.is_floating_point() or text_ids.dtype == torch.bool:
        found = f"{text_ids.dtype} of shape {tuple(text_ids.shape)}"
        raise ValueError(f"text_ids: found {found}, expected integers of shape (N,)")
    equal = (text_ids.unsqueeze(0) == text_ids.unsqueeze(1)).float()
    return equal / equal.sum(dim=1, keepdim=True)


def contrastive_targets(text_ids: Tensor, identical_texts: str = "negatives") -> tuple[Tensor | None, Tensor | None]:
    """`targets` and `ignored` of `clip_contrastive_loss`: what identical texts count as.

    A text that equals text i without being it is, for image i, a negative (ViLLA's code), ignored (in neither
    softmax), or a positive that shares the target with text i.

    Args:
        text_ids: (N,), integer; equal numbers stand for equal texts.
        identical_texts: "negatives", "ignored" or "positives".

    Returns:
        (N, N) float32, or None for the identity; (N, N) bool, or None for no pair. Both are symmetric.

    Raises:
        ValueError: `text_ids` is not a vector of integers, or `identical_texts` is none of those above.
    """
    if identical_texts not in IDENTICAL_TEXTS:
        raise ValueError(f"identical_texts: found {identical_texts!r}, expected one of {', '.join(IDENTICAL_TEXTS)}")
    if identical_texts == "negatives":
        return None, None
    shared = identical_text_targets(text_ids)
    if identical_texts == "positives":
        return shared, None
    return None, (shared > 0).fill_diagonal_(False)


def _smooth(targets: Tensor, held: Tensor, alpha: float) -> Tensor:
    """Rows with a share alpha spread over what each is held against but has no target in; alone, a row stays."""
    count = held.sum(dim=1, keepdim=True)
    smoothed = (1 - alpha) * targets + alpha / (count - 1).clamp(min=1) * (held - targets)
    return torch.where(count > 1, smoothed, targets)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_scores(scores: Tensor, region_mask: Tensor, labels: Tensor) -> None:
    if scores.dim() != 3 or not scores.is_floating_point():
        found = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(f"scores: found {found}, expected floating point of shape (B, R, A)")
    images, regions, attributes = scores.shape
    for name, mask, shape in (
        ("region_mask", region_mask, (images, regions)),
        ("labels", labels, (images, attributes)),
    ):
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            found = f"{mask.dtype} of shape {tuple(mask.shape)}"
            expected = f"torch.bool of shape {shape} for scores of shape {tuple(scores.shape)}"
            raise ValueError(f"{name}: found {found}, expected {expected}")


def _check_embeddings(image_embeds: Tensor, text_embeds: Tensor) -> None:
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if embeds.dim() != 2 or not embeds.is_floating_point() or len(embeds) == 0:
            found = f"{embeds.dtype} of shape {tuple(embeds.shape)}"
            raise ValueError(f"{name}: found {found}, expected floating point of shape (N, d) with N >= 1")
    if image_embeds.shape != text_embeds.shape:
        expected = f"the shape of image_embeds, {tuple(image_embeds.shape)}"
        raise ValueError(f"text_embeds: found shape {tuple(text_embeds.shape)}, expected {expected}")


def _check_logit_scale(logit_scale: Tensor | float) -> None:
    expected = "one finite number above 0"
    if isinstance(logit_scale, Tensor):
        # Not its value: reading it would make every step wait for the accelerator.
        if logit_scale.numel() != 1:
            found = f"a tensor of shape {tuple(logit_scale.shape)}"
            raise ValueError(f"logit_scale: found {found}, expected {expected}")
    elif not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale: found {logit_scale}, expected {expected}")


def _check_ignored(ignored: Tensor, targets: Tensor | None, count: int) -> None:
    if tuple(ignored.shape) != (count, count) or ignored.dtype != torch.bool:
        found = f"{ignored.dtype} of shape {tuple(ignored.shape)}"
        raise ValueError(f"ignored: found {found}, expected torch.bool of shape {(count, count)}")
    if (ignored.diagonal() if targets is None else ignored & (targets > 0)).any():
        raise ValueError("ignored: found a pair that has a target")


def _check_targets(targets: Tensor, count: int) -> None:
    if tuple(targets.shape) != (count, count) or not targets.is_floating_point():
        found = f"{targets.dtype} of shape {tuple(targets.shape)}"
        raise ValueError(f"targets: found {found}, expected floating point of shape {(count, count)}")
    tolerance = max(1e-4, torch.finfo(targets.dtype).eps)
    row_sums = _at_least_float32(targets).sum(dim=1)
    # Written so that NaN fails both.
    bad = ~((row_sums - 1).abs() <= tolerance) | ~(targets >= 0).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        found = f"row {row} with sum {row_sums[row].item():.6g} and minimum {targets[row].min().item():.6g}"
        raise ValueError(f"targets: found {found}, expected entries >= 0 and rows that sum to 1")
