"""assign_attributes against a slow loop written from its definition."""

import math

import pytest
import torch

from modeling_villa.assignment_villa import MODES, assign_attributes


def slow_assign(scores, region_mask, labels, epsilon, mode, groups=None):
    images, regions, attributes = scores.shape
    assigned = torch.zeros(images, regions, attributes, dtype=torch.bool)
    for i in range(images):
        valid = [r for r in range(regions) if region_mask[i, r]]
        stated = [k for k in range(attributes) if labels[i, k]]
        for r in valid:
            for k in stated:
                rivals = (
                    [scores[i, other, k] for other in valid]
                    if mode == "attributes_to_regions"
                    else [scores[i, r, other] for other in stated]
                )
                assigned[i, r, k] = scores[i, r, k] > max(rivals) - epsilon
        if groups is None:
            continue
        for r in valid:
            for group in set(groups.tolist()) - {-1}:
                members = [k for k in stated if groups[k] == group and assigned[i, r, k]]
                for k in members:
                    # max takes the first of equals.
                    assigned[i, r, k] = k == max(members, key=lambda k: scores[i, r, k].item())
    return assigned


def batch(seed=0, images=6, regions=5, attributes=7, levels=None):
    """Cosines with ragged regions, one image without any, and one without attributes; `levels` makes ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, regions, attributes, generator=generator, dtype=torch.float64) * 2 - 1
    if levels is not None:
        scores = (scores * levels).round() / levels
    counts = torch.randint(0, regions + 1, (images, 1), generator=generator)
    labels = torch.rand(images, attributes, generator=generator) < 0.6
    mask = torch.arange(regions) < counts
    mask[0] = False
    labels[1] = False
    return scores, mask, labels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.5, 3.0])
@pytest.mark.parametrize("levels", [None, 3])
def test_equals_the_loop(mode, epsilon, levels):
    for seed in range(3):
        scores, mask, labels = batch(seed, levels=levels)
        found = assign_attributes(scores, mask, labels, epsilon, mode)
        assert torch.equal(found, slow_assign(scores, mask, labels, epsilon, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [[-1] * 7, [0] * 7, [0, 5, -1, 5, 0, 5, -1], [3, -1, 3, -1, 8, 8, 8]])
@pytest.mark.parametrize("levels", [None, 3])
def test_groups_equal_the_loop(mode, groups, levels):
    groups = torch.tensor(groups)
    for seed in range(3):
        scores, mask, labels = batch(seed, levels=levels)
        found = assign_attributes(scores, mask, labels, 0.5, mode, groups)
        assert torch.equal(found, slow_assign(scores, mask, labels, 0.5, mode, groups))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 4), (2, 4, 1), (1, 0, 3), (0, 2, 3), (2, 3, 0)])
def test_sizes(sizes):
    scores = torch.rand(sizes)
    mask, labels = torch.ones(sizes[:2], dtype=torch.bool), torch.ones(sizes[0], sizes[2], dtype=torch.bool)
    for mode in MODES:
        found = assign_attributes(scores, mask, labels, mode=mode, groups=torch.zeros(sizes[2]).long())
        assert found.shape == scores.shape
        assert found.dtype == torch.bool
        assert torch.equal(found, slow_assign(scores, mask, labels, 0.2, mode, torch.zeros(sizes[2]).long()))


def test_defaults_are_the_papers():
    scores, mask, labels = batch()
    assert torch.equal(
        assign_attributes(scores, mask, labels),
        assign_attributes(scores, mask, labels, epsilon=0.2, mode="attributes_to_regions"),
    )


def test_comparison_is_strict():
    scores = torch.tensor([[[1.0], [0.75], [0.5]]], dtype=torch.float64)
    mask, labels = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    assert assign_attributes(scores, mask, labels, epsilon=0.5).flatten().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_epsilon_keeps_the_best(dtype):
    scores, mask, labels = batch()
    scores = scores.to(dtype)
    covered = assign_attributes(scores, mask, labels, epsilon=1e-12).any(dim=1)
    assert torch.equal(covered, labels & mask.any(dim=1, keepdim=True))
    taken = assign_attributes(scores, mask, labels, epsilon=1e-12, mode="regions_to_attributes").any(dim=2)
    assert torch.equal(taken, mask & labels.any(dim=1, keepdim=True))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_equals_float32(mode):
    scores, mask, labels = batch()
    half = scores.half()
    assert torch.equal(
        assign_attributes(half, mask, labels, mode=mode),
        assign_attributes(half.float(), mask, labels, mode=mode),
    )


@pytest.mark.parametrize("mode", MODES)
def test_follows_permutations(mode):
    scores, mask, labels = batch()
    groups = torch.tensor([0, 0, 1, 1, -1, -1, 0])
    expected = assign_attributes(scores, mask, labels, mode=mode, groups=groups)
    images, regions, attributes = (torch.randperm(size) for size in scores.shape)

    def permute(values):
        return values[images][:, regions][:, :, attributes]

    found = assign_attributes(
        permute(scores),
        mask[images][:, regions],
        labels[images][:, attributes],
        mode=mode,
        groups=groups[attributes],
    )
    assert torch.equal(found, permute(expected))


def test_exclusion_wins_over_coverage():
    """Two colours and one region: the weaker colour keeps nothing, an attribute outside the group stays."""
    scores = torch.tensor([[[0.9, 0.8, 0.1]]])
    mask, labels = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    found = assign_attributes(scores, mask, labels, groups=torch.tensor([4, 4, -1]))
    assert found.flatten().tolist() == [True, False, True]


def test_ties_within_a_group_go_to_the_lowest_index():
    scores = torch.full((1, 1, 4), 0.5)
    mask, labels = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[False, True, True, True]])
    found = assign_attributes(scores, mask, labels, groups=torch.zeros(4).long())
    assert found.flatten().tolist() == [False, True, False, False]


def test_scores_that_are_not_read_may_be_anything():
    scores, mask, labels = batch()
    unread = ~(mask.unsqueeze(2) & labels.unsqueeze(1))
    for mode in MODES:
        expected = assign_attributes(scores, mask, labels, mode=mode)
        for filler in (math.nan, math.inf, 99.0):
            found = assign_attributes(scores.masked_fill(unread, filler), mask, labels, mode=mode)
            assert torch.equal(found, expected)


def test_input_is_left_alone():
    scores, mask, labels = batch()
    scores.requires_grad_()
    before = scores.detach().clone()
    assert not assign_attributes(scores, mask, labels, groups=torch.zeros(7).long()).requires_grad
    assert torch.equal(scores, before)


def test_bad_input():
    scores, mask, labels = batch()
    with pytest.raises(ValueError, match=r"scores: found torch.float64 of shape \(6, 5\)"):
        assign_attributes(scores[..., 0], mask, labels)
    with pytest.raises(ValueError, match=r"region_mask: found torch.bool of shape \(6, 4\).*\(6, 5\)"):
        assign_attributes(scores, mask[:, :4], labels)
    with pytest.raises(ValueError, match=r"labels: found torch.int64 .*expected torch.bool"):
        assign_attributes(scores, mask, labels.long())
    for epsilon in (0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"epsilon: found {epsilon}, expected .* above 0"):
            assign_attributes(scores, mask, labels, epsilon)
    with pytest.raises(ValueError, match=r"mode: found 'both', expected one of 'attributes_to_regions'"):
        assign_attributes(scores, mask, labels, mode="both")
    with pytest.raises(ValueError, match=r"groups: found torch.int64 of shape \(6,\), expected .*\(7,\)"):
        assign_attributes(scores, mask, labels, groups=torch.zeros(6).long())
    with pytest.raises(ValueError, match=r"groups: found torch.float32"):
        assign_attributes(scores, mask, labels, groups=torch.zeros(7))
    with pytest.raises(ValueError, match=r"groups: found -2"):
        assign_attributes(scores, mask, labels, groups=torch.full((7,), -2))
    image, region = mask.nonzero()[-1].tolist()
    attribute = labels[image].nonzero()[0].item()
    for bad in (math.nan, -math.inf):
        scores[image, region, attribute] = bad
        with pytest.raises(ValueError, match=rf"scores: found {bad} at image {image}, region {region}"):
            assign_attributes(scores, mask, labels)
