"""From the scores of a mapping model to region-attribute pairs (ViLLA, Varma et al., 2023, section 5.2)."""

import torch
from torch import Tensor

MODES = ("attributes_to_regions", "regions_to_attributes")


def assign_attributes(
    scores: Tensor,
    region_mask: Tensor,
    labels: Tensor,
    epsilon: float = 0.2,
    mode: str = "attributes_to_regions",
    groups: Tensor | None = None,
) -> Tensor:
    """Pairs the regions of each image with the attributes that its text states.

    ViLLA (Varma et al., 2023), section 5.2 and its footnote 5. Among the valid regions and the stated
    attributes of an image,

        "attributes_to_regions": attribute k goes to every region r with s_rk > max_r' s_r'k - epsilon;
        "regions_to_attributes": region r takes every attribute k with s_rk > max_k' s_rk' - epsilon.

    The first gives every attribute a region (where there is one) and may leave regions bare; the second, for
    tight boxes, gives every region an attribute and may leave attributes out. There, a small epsilon means
    the best attribute alone, or all of them where several have exactly the same score. The best pair itself
    is always within epsilon, however small.

    `groups` then thins the result: of the assigned attributes of one group, a region keeps the one with the
    highest score (at a tie, the lowest index). Exclusion wins over coverage: an attribute beaten in all its
    regions is left without any, since handing it a second-best region would put a known contradiction into
    the training pairs of Stage 2.

    Args:
        scores: (B, R, A), floating point; cosine of region r of image i with attribute k. Scores of invalid
            regions and of attributes that the text does not state are not read.
        region_mask: (B, R), bool; True where the region exists.
        labels: (B, A), bool; True where the text of image i states attribute k.
        epsilon: the width of the band below the maximum, in units of the scores, finite and above 0; the
            comparison is strict.
        mode: "attributes_to_regions" or "regions_to_attributes".
        groups: (A,), integer, or None; the group of each attribute, -1 for none.

    Returns:
        (B, R, A), bool; True only at valid regions and stated attributes.

    Raises:
        ValueError: a shape or dtype that does not fit, an epsilon out of range, an unknown mode, a group
            below -1, or a score that is read and is not finite.
    """
    _check_inputs(scores, region_mask, labels, groups)
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon: found {epsilon}, expected a finite number above 0 (the comparison is strict)")
    if mode not in MODES:
        raise ValueError(f"mode: found {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    allowed = region_mask.unsqueeze(2) & labels.unsqueeze(1)
    if not allowed.any():
        return allowed
    # Half precision would round the threshold.
    scores = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    scores = scores.masked_fill(~allowed, -torch.inf)
    _check_finite(scores, allowed)
    dim = 1 if mode == "attributes_to_regions" else 2
    best = scores.amax(dim=dim, keepdim=True)
    # An epsilon below the resolution of the scores leaves best - epsilon at best.
    assigned = allowed & ((scores > best - epsilon) | (scores == best))
    return assigned if groups is None else _exclude_within_groups(assigned, scores, groups)


def _exclude_within_groups(assigned: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    """Keeps, for every region and group, the best assigned attribute; attributes of group -1 all stay."""
    groups = groups.to(scores.device)
    distinct, dense = torch.unique(groups, return_inverse=True)
    images, regions, attributes = scores.shape
    group_of = dense.expand(images, regions, attributes)
    candidates = scores.masked_fill(~assigned, -torch.inf)
    best = candidates.new_full((images, regions, len(distinct)), -torch.inf)
    best = best.scatter_reduce(2, group_of, candidates, "amax")
    tied = assigned & (candidates == best.gather(2, group_of))
    index = torch.arange(attributes, device=scores.device)
    positions = torch.where(tied, index, attributes)
    first = positions.new_full(best.shape, attributes).scatter_reduce(2, group_of, positions, "amin")
    return assigned & ((groups == -1) | (index == first.gather(2, group_of)))


def _check_inputs(scores: Tensor, region_mask: Tensor, labels: Tensor, groups: Tensor | None) -> None:
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
    if groups is None:
        return
    if tuple(groups.shape) != (attributes,) or groups.is_floating_point() or groups.dtype == torch.bool:
        found = f"{groups.dtype} of shape {tuple(groups.shape)}"
        raise ValueError(f"groups: found {found}, expected integers of shape {(attributes,)}")
    if (groups < -1).any():
        raise ValueError(f"groups: found {int(groups.min())}, expected numbers >= 0, or -1 for no group")


def _check_finite(scores: Tensor, allowed: Tensor) -> None:
    bad = allowed & ~scores.isfinite()
    if bad.any():
        image, region, attribute = bad.nonzero()[0].tolist()
        found = f"{scores[image, region, attribute].item()} at image {image}, region {region}"
        raise ValueError(f"scores: found {found}, attribute {attribute}, expected finite numbers")
