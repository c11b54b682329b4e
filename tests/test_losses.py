"""Both losses against slow loops written from the paper's equations: values and gradients."""

import math

import pytest
import torch

from modeling_villa.losses_villa import (
    clip_contrastive_loss,
    identical_text_targets,
    mapping_contrastive_loss,
)


def slow_mapping_loss(scores, region_mask, labels, temperature=0.07):
    images, regions, attributes = scores.shape

    def sigma(image, attribute):
        valid = [scores[image, r, attribute] for r in range(regions) if region_mask[image, r]]
        return torch.exp(torch.stack(valid).max() / temperature)

    usable = [i for i in range(images) if region_mask[i].any()]
    terms = []
    for i in usable:
        for k in range(attributes):
            if labels[i, k]:
                negatives = [sigma(j, k) for j in usable if not labels[j, k]]
                terms.append(-torch.log(sigma(i, k) / (sigma(i, k) + sum(negatives))))
    return torch.stack(terms).mean() if terms else scores.sum() * 0


def slow_clip_loss(image_embeds, text_embeds, logit_scale, targets=None):
    count = len(image_embeds)
    targets = torch.eye(count) if targets is None else targets
    logits = [[logit_scale * (i * t).sum() for t in text_embeds] for i in image_embeds]
    to_text = to_image = 0
    texts = 0
    for i in range(count):
        total = sum(torch.exp(logits[i][j]) for j in range(count))
        to_text = to_text - sum(targets[i, j] * torch.log(torch.exp(logits[i][j]) / total) for j in range(count))
    for j in range(count):
        column = sum(targets[i, j] for i in range(count))
        if column > 0:
            texts += 1
            total = sum(torch.exp(logits[i][j]) for i in range(count))
            for i in range(count):
                to_image = to_image - targets[i, j] / column * torch.log(torch.exp(logits[i][j]) / total)
    return (to_text / count + to_image / texts) / 2


def batch(seed=0, images=6, regions=5, attributes=7, dtype=torch.float64):
    """Cosines with ragged regions (at least one each) and random labels."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, regions, attributes, generator=generator, dtype=torch.float64) * 2 - 1
    counts = torch.randint(1, regions + 1, (images, 1), generator=generator)
    labels = torch.rand(images, attributes, generator=generator) < 0.5
    return scores.to(dtype), torch.arange(regions) < counts, labels


def embeddings(seed=0, count=6, dim=8):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(pair, dim=-1).unbind()


def value_and_gradients(loss, *inputs):
    inputs = [values.clone().requires_grad_() for values in inputs]
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


def assert_same_loss(fast, slow, *inputs):
    fast_value, fast_gradients = value_and_gradients(fast, *inputs)
    slow_value, slow_gradients = value_and_gradients(slow, *inputs)
    torch.testing.assert_close(fast_value, slow_value.to(fast_value))
    for found, expected in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(found, expected)


class TestMappingLoss:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("temperature", [0.07, 1.0])
    def test_equals_the_loop(self, seed, temperature):
        scores, mask, labels = batch(seed)
        assert_same_loss(
            lambda s: mapping_contrastive_loss(s, mask, labels, temperature),
            lambda s: slow_mapping_loss(s, mask, labels, temperature),
            scores,
        )

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 3), (3, 9, 1), (9, 2, 20)])
    def test_sizes(self, sizes):
        scores, mask, labels = batch(1, *sizes)
        labels[0, 0] = True
        assert_same_loss(
            lambda s: mapping_contrastive_loss(s, mask, labels),
            lambda s: slow_mapping_loss(s, mask, labels),
            scores,
        )

    def test_the_reference_code_denominator_is_not_used(self):
        """Two images, one attribute: the paper's -log(a / (a + b)), without an exp(0) for the positive."""
        scores = torch.tensor([[[0.1]], [[0.2]]])
        loss = mapping_contrastive_loss(
            scores, torch.ones(2, 1, dtype=torch.bool), torch.tensor([[True], [False]]), 0.1
        )
        assert loss.item() == pytest.approx(-math.log(math.e / (math.e + math.e**2)), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_no_negatives_is_exactly_zero(self, dtype):
        scores, mask, labels = batch(dtype=dtype)
        labels[:] = True
        value, (gradient,) = value_and_gradients(lambda s: mapping_contrastive_loss(s, mask, labels), scores)
        assert value.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_attribute_without_negatives_counts_as_a_zero_term(self):
        scores, mask, labels = batch()
        labels[:] = False
        labels[0, 0] = True
        alone = mapping_contrastive_loss(scores, mask, labels)
        labels[:, 1] = True
        together = mapping_contrastive_loss(scores, mask, labels)
        torch.testing.assert_close(together, alone / (1 + len(scores)))

    def test_no_positives_is_zero_and_differentiable(self):
        scores, mask, labels = batch()
        value, (gradient,) = value_and_gradients(
            lambda s: mapping_contrastive_loss(s, mask, torch.zeros_like(labels)), scores
        )
        assert value.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_image_without_regions_takes_no_part(self):
        scores, mask, labels = batch()
        mask[2] = False
        assert_same_loss(
            lambda s: mapping_contrastive_loss(s, mask, labels),
            lambda s: slow_mapping_loss(s, mask, labels),
            scores,
        )
        kept = [0, 1, 3, 4, 5]
        torch.testing.assert_close(
            mapping_contrastive_loss(scores, mask, labels),
            mapping_contrastive_loss(scores[kept], mask[kept], labels[kept]),
        )

    @pytest.mark.parametrize("regions", [0, 3])
    def test_no_regions_at_all(self, regions):
        scores = torch.rand(2, regions, 4)
        mask = torch.zeros(2, regions, dtype=torch.bool)
        labels = torch.ones(2, 4, dtype=torch.bool)
        value, (gradient,) = value_and_gradients(lambda s: mapping_contrastive_loss(s, mask, labels), scores)
        assert value.item() == 0
        assert not gradient.any()

    def test_invalid_regions_are_not_read(self):
        scores, mask, labels = batch()
        assert not mask.all()
        dirty = scores.masked_fill(~mask.unsqueeze(-1), torch.nan)
        clean_value, (clean,) = value_and_gradients(lambda s: mapping_contrastive_loss(s, mask, labels), scores)
        value, (gradient,) = value_and_gradients(lambda s: mapping_contrastive_loss(s, mask, labels), dirty)
        assert torch.equal(value, clean_value)
        assert torch.equal(gradient, clean)

    def test_gradient_goes_through_one_region(self):
        scores, mask, labels = batch()
        scores = scores[:, :1].expand(-1, 5, -1)
        _, (gradient,) = value_and_gradients(lambda s: mapping_contrastive_loss(s, mask, labels), scores)
        assert (gradient != 0).sum(dim=1).max() == 1

    def test_maxima_give_the_same_loss(self):
        scores, mask, labels = batch()
        maxima = scores.masked_fill(~mask.unsqueeze(-1), -2).amax(dim=1, keepdim=True)
        torch.testing.assert_close(
            mapping_contrastive_loss(maxima, mask.any(dim=1, keepdim=True), labels),
            mapping_contrastive_loss(scores, mask, labels),
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        scores, mask, labels = batch(dtype=dtype)
        found = mapping_contrastive_loss(scores, mask, labels, temperature=0.001)
        assert found.dtype == torch.float32
        assert torch.equal(found, mapping_contrastive_loss(scores.float(), mask, labels, temperature=0.001))

    def test_symmetric_in_images_regions_and_attributes(self):
        scores, mask, labels = batch()
        expected = mapping_contrastive_loss(scores, mask, labels)
        images, regions, attributes = (torch.randperm(size) for size in scores.shape)
        permuted = scores[images][:, regions][:, :, attributes]
        found = mapping_contrastive_loss(permuted, mask[images][:, regions], labels[images][:, attributes])
        torch.testing.assert_close(found, expected)

    def test_gradcheck(self):
        scores, mask, labels = batch(images=3, regions=2, attributes=3)
        assert torch.autograd.gradcheck(lambda s: mapping_contrastive_loss(s, mask, labels), scores.requires_grad_())

    def test_bad_input(self):
        scores, mask, labels = batch(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"scores: found torch.float32 of shape \(6, 5\).*\(B, R, A\)"):
            mapping_contrastive_loss(scores[..., 0], mask, labels)
        with pytest.raises(ValueError, match=r"scores: found torch.int64"):
            mapping_contrastive_loss(scores.long(), mask, labels)
        with pytest.raises(ValueError, match=r"region_mask: found torch.bool of shape \(6, 4\).*\(6, 5\)"):
            mapping_contrastive_loss(scores, mask[:, :4], labels)
        with pytest.raises(ValueError, match=r"region_mask: found torch.float32 .*expected torch.bool"):
            mapping_contrastive_loss(scores, mask.float(), labels)
        with pytest.raises(ValueError, match=r"labels: found torch.bool of shape \(7, 6\).*\(6, 7\)"):
            mapping_contrastive_loss(scores, mask, labels.T)
        for temperature in (0, -0.07, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"temperature: found {temperature}, expected .* above 0"):
                mapping_contrastive_loss(scores, mask, labels, temperature)


class TestClipLoss:
    @pytest.mark.parametrize("count", [1, 2, 7])
    @pytest.mark.parametrize("scale", [1.0, 1 / 0.07])
    def test_equals_the_loop(self, count, scale):
        image_embeds, text_embeds = embeddings(count=count)
        assert_same_loss(clip_contrastive_loss, slow_clip_loss, image_embeds, text_embeds, torch.tensor(scale).double())

    @pytest.mark.parametrize("ids", [[0, 1, 0, 2, 2, 2], [5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5]])
    def test_equals_the_loop_with_identical_texts(self, ids):
        targets = identical_text_targets(torch.tensor(ids)).double()
        assert_same_loss(
            lambda *inputs: clip_contrastive_loss(*inputs, 10.0, targets),
            lambda *inputs: slow_clip_loss(*inputs, 10.0, targets),
            *embeddings(),
        )

    def test_equals_the_loop_with_soft_targets_and_an_unused_text(self):
        targets = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        targets[:, 4] = 0
        targets /= targets.sum(dim=1, keepdim=True)
        assert_same_loss(
            lambda *inputs: clip_contrastive_loss(*inputs, 10.0, targets),
            lambda *inputs: slow_clip_loss(*inputs, 10.0, targets),
            *embeddings(),
        )

    def test_identity_targets_change_nothing(self):
        image_embeds, text_embeds = embeddings()
        torch.testing.assert_close(
            clip_contrastive_loss(image_embeds, text_embeds, 14.3, torch.eye(6)),
            clip_contrastive_loss(image_embeds, text_embeds, 14.3),
        )

    def test_symmetric_in_sides_and_order(self):
        image_embeds, text_embeds = embeddings()
        expected = clip_contrastive_loss(image_embeds, text_embeds, 14.3)
        order = torch.randperm(6)
        torch.testing.assert_close(clip_contrastive_loss(text_embeds, image_embeds, 14.3), expected)
        torch.testing.assert_close(clip_contrastive_loss(image_embeds[order], text_embeds[order], 14.3), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_autocast_are_computed_in_float32(self, dtype):
        image_embeds, text_embeds = (values.to(dtype) for values in embeddings())
        expected = clip_contrastive_loss(image_embeds.float(), text_embeds.float(), 100.0)
        assert torch.equal(clip_contrastive_loss(image_embeds, text_embeds, 100.0), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = clip_contrastive_loss(image_embeds.float(), text_embeds.float(), 100.0)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    def test_bad_input(self):
        image_embeds, text_embeds = embeddings()
        with pytest.raises(ValueError, match=r"image_embeds: found torch.float64 of shape \(8,\)"):
            clip_contrastive_loss(image_embeds[0], text_embeds, 1.0)
        with pytest.raises(ValueError, match=r"image_embeds: .*shape \(0, 8\).*N >= 1"):
            clip_contrastive_loss(image_embeds[:0], text_embeds[:0], 1.0)
        with pytest.raises(ValueError, match=r"text_embeds: found shape \(5, 8\), expected .*\(6, 8\)"):
            clip_contrastive_loss(image_embeds, text_embeds[:5], 1.0)
        for scale in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"logit_scale: found {scale}, expected .* above 0"):
                clip_contrastive_loss(image_embeds, text_embeds, scale)
        with pytest.raises(ValueError, match=r"logit_scale: found a tensor of shape \(2,\)"):
            clip_contrastive_loss(image_embeds, text_embeds, torch.ones(2))

    def test_bad_targets(self):
        image_embeds, text_embeds = embeddings()
        with pytest.raises(ValueError, match=r"targets: .*shape \(5, 6\), expected .*\(6, 6\)"):
            clip_contrastive_loss(image_embeds, text_embeds, 1.0, torch.eye(6)[:5])
        with pytest.raises(ValueError, match=r"targets: found torch.bool"):
            clip_contrastive_loss(image_embeds, text_embeds, 1.0, torch.eye(6).bool())
        targets = torch.eye(6)
        targets[2, 3] = 0.5
        with pytest.raises(ValueError, match=r"targets: found row 2 with sum 1.5"):
            clip_contrastive_loss(image_embeds, text_embeds, 1.0, targets)
        targets[2, 4] = -0.5
        with pytest.raises(ValueError, match=r"targets: found row 2 with sum 1 and minimum -0.5"):
            clip_contrastive_loss(image_embeds, text_embeds, 1.0, targets)
        with pytest.raises(ValueError, match=r"targets: found row 0 with sum nan"):
            clip_contrastive_loss(image_embeds, text_embeds, 1.0, torch.full((6, 6), math.nan))

    def test_half_precision_targets_pass_their_own_rounding(self):
        targets = identical_text_targets(torch.tensor([0, 0, 0, 1, 1, 2])).bfloat16()
        assert clip_contrastive_loss(*embeddings(), 1.0, targets).isfinite()


class TestIdenticalTextTargets:
    def test_equals_the_loop(self):
        ids = [4, 9, 4, 4, 0, 9]
        expected = [[(a == b) / ids.count(a) for b in ids] for a in ids]
        torch.testing.assert_close(identical_text_targets(torch.tensor(ids)), torch.tensor(expected))

    def test_bad_input(self):
        for bad in (torch.zeros(2, 2).long(), torch.zeros(2), torch.zeros(2).bool()):
            with pytest.raises(ValueError, match=r"text_ids: found .*expected integers of shape \(N,\)"):
                identical_text_targets(bad)
