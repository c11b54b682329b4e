"""Pipelines: zero-shot detection over regions, and region-attribute mapping."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import Pipeline, ZeroShotObjectDetectionPipeline
from transformers.image_utils import load_image

from .assignment_villa import assign_attributes
from .processing_villa import scale_boxes
from .proposals_villa import Proposer, choose_boxes

# To the type checker they are Any: their methods' signatures suit none of transformers' own subclasses either.
_Pipeline: Any = Pipeline
_ZeroShotObjectDetectionPipeline: Any = ZeroShotObjectDetectionPipeline

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
_BATCHING = ("batch_size", "num_workers")


class VillaZeroShotObjectDetectionPipeline(_ZeroShotObjectDetectionPipeline):
    """Zero-shot object detection with a `VillaClipModel`: the scores of labels for given or proposed boxes.

    A model of another kind gets transformers' own pipeline, so that this class can stand for the whole task.

        detector = pipeline("zero-shot-object-detection", model="org/villa")
        detector("cat.jpg", candidate_labels=["cat", "couch"], boxes=[[0, 0, 100, 80], [20, 30, 200, 190]])

    One pass of the model serves all regions and labels of a batch of images. The score of a region for a label is,
    as in CLIP, the softmax over the candidate labels of cosine / temperature. With a single label that would be 1
    whatever the region shows, so there it is (1 + cosine) / 2, and a useful threshold is above 0.5.
    """

    _before = ("candidate_labels", "boxes", "proposer", "hypothesis_template", "timeout")
    _after = ("threshold", "top_k")

    def __new__(cls, *args: Any, model: Any = None, **kwargs: Any) -> Any:
        if model is not None and model.config.model_type != "villa_clip":
            return ZeroShotObjectDetectionPipeline(model=model, **kwargs)
        return super().__new__(cls)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return _pick(kwargs, self._before), {}, _pick(kwargs, self._after)

    def __call__(self, image: Any, candidate_labels: str | Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """
        Args:
            image: a PIL image, path, URL or base64 string; a dictionary with `image`, `candidate_labels` and, if
                wanted, `boxes`; a list of these; or a generator or torch dataset of them, read as it goes.
            candidate_labels: a list of labels, or a string with commas between them; with a list of images also a
                list of such lists, one per image.
            boxes: x0, y0, x1, y1 in pixels of the upright image, at least one; with a list of images, one such list
                per image; with a generator, the same for every image that has none in its dictionary.
            proposer: where the boxes come from if there are none: "grid" (the default: the whole image, its
                quarters and its ninths), "rpn" (torchvision's region proposal network), or a function from a PIL
                image to boxes.
            hypothesis_template: the sentence around a label, default "This is a photo of {}.".
            threshold: scores must be above it, default 0.1.
            top_k: how many of the best to return; default all.
            timeout: seconds to wait for an image from the web; default no limit.
            batch_size: images at a time, default 1.

        Returns:
            Per image a list of {"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}, one for every region
            and label above the threshold, best first; boxes in whole pixels, rounded down.

        Raises:
            ValueError: naming the argument, what was found and what was expected.
        """
        _check_names("keyword", kwargs, (*self._before, *self._after, *_BATCHING))
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        inputs, kwargs = _one_per_image(image, kwargs, ("candidate_labels", "boxes"))
        if isinstance(inputs, list) and not inputs:
            return []
        # Not the parent's own, which drops the labels of whatever is not a single image.
        return super(_ZeroShotObjectDetectionPipeline, self).__call__(inputs, **kwargs)

    def preprocess(
        self,
        inputs: Any,
        candidate_labels: Any = None,
        boxes: Any = None,
        proposer: str | Proposer = "grid",
        hypothesis_template: str = "This is a photo of {}.",
        timeout: float | None = None,
    ) -> Iterable[dict[str, Any]]:
        item = _read_item(inputs, {"candidate_labels": candidate_labels, "boxes": boxes})
        labels = _check_labels(item["candidate_labels"])
        if hypothesis_template.count("{}") != 1:
            raise ValueError(f"hypothesis_template: found {hypothesis_template!r}, expected a sentence with one {{}}.")
        yield {
            "is_last": True,
            "candidate_labels": labels,
            "prompts": [hypothesis_template.replace("{}", label) for label in labels],
            **_prepare(_load(item["image"], timeout), item["boxes"], proposer, self),
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("is_last", "candidate_labels", "image_boxes")}
        given = model_inputs.pop("prompts")
        batched = not isinstance(given[0], str)  # by the base class's collation, into a list per image
        groups = given if batched else [given]
        texts = list(dict.fromkeys(prompt for group in groups for prompt in group))
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        output = self.model(tokens["input_ids"], tokens["attention_mask"], **model_inputs)
        columns = [[texts.index(prompt) for prompt in group] for group in groups]
        return {
            "logits": output.logits_per_region,
            "columns": columns if batched else columns[0],
            "region_mask": model_inputs["region_mask"],
            **kept,
        }

    def postprocess(self, model_outputs: Any, threshold: float = 0.1, top_k: int | None = None) -> list[dict[str, Any]]:
        (output,) = model_outputs
        mask, labels = output["region_mask"][0], output["candidate_labels"]
        logits = output["logits"][0][mask][:, output["columns"]].float()
        if len(labels) == 1:
            scores = (1 + logits / self.model.logit_scale.float().exp().cpu()) / 2
        else:
            scores = logits.softmax(-1)
        results = [
            {"score": score, "label": label, "box": self._get_bounding_box(box)}
            for box, row in zip(output["image_boxes"][0][mask], scores.tolist(), strict=True)
            for label, score in zip(labels, row, strict=True)
            if score > threshold
        ]
        results.sort(key=lambda result: result["score"], reverse=True)
        return results[:top_k] if top_k else results


class RegionAttributeMappingPipeline(_Pipeline):
    """Which attributes each region of an image shows, by a `VillaMappingModel` (ViLLA, Varma et al., 2023).

        mapper = pipeline("region-attribute-mapping", model="org/villa-mapping")
        mapper("street.jpg", boxes=[[0, 0, 100, 80], [20, 30, 200, 190]], text="A red car before a white house.")

    Scores are cosines, from -1 to 1, of projected region and attribute; `assign_attributes` makes pairs of them.

    Raises:
        ValueError: the model is no `VillaMappingModel`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _before = ("boxes", "proposer", "attributes", "text", "timeout")
    _after = ("epsilon", "mode", "exclusive_groups", "threshold", "draw")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        kind = self.model.config.model_type
        if kind != "villa_mapping":
            raise ValueError(f"region-attribute-mapping needs a VillaMappingModel, got a model of type {kind!r}.")

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return _pick(kwargs, self._before), {}, _pick(kwargs, self._after)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Args:
            inputs: a PIL image, path, URL or base64 string; a dictionary with `image` and, if wanted, `boxes` and
                `attributes` or `text`; a list of these; or a generator or torch dataset of them, read as it goes.
            boxes: x0, y0, x1, y1 in pixels of the upright image, at least one; with a list of images, one such list
                per image; with a generator, the same for every image that has none in its dictionary.
            proposer: where the boxes come from if there are none: "grid" (the default: the whole image, its
                quarters and its ninths), "rpn" (torchvision's region proposal network), or a function from a PIL
                image to boxes.
            attributes: names from the model's vocabulary; with a list of images also a list of such lists.
            text: instead of `attributes`, a text that names them as whole words, in upper or lower case; with a
                list of images also a list of texts. Without either, the whole vocabulary is tried.
            epsilon: width of the band below the best score in which pairs are made, default 0.2.
            mode: "attributes_to_regions", where every attribute finds a region (the default for attributes that
                the caller states), or "regions_to_attributes", where every region finds an attribute (the default
                for the whole vocabulary, of which an image shows but a part).
            exclusive_groups: whether a region keeps but the best attribute of each of the vocabulary's groups,
                default True.
            threshold: if given, scores must be above it.
            draw: whether to return the annotated picture too, default False.
            timeout: seconds to wait for an image from the web; default no limit.
            batch_size: images at a time, default 1.

        Returns:
            Per image, in the order of its boxes, a list of {"box": {"xmin", "ymin", "xmax", "ymax"}, "attributes":
            [{"label", "score"}, ...]}, the best attribute first; boxes in whole pixels, rounded down. With `draw`,
            {"regions": that list, "image": PIL image of the upright image's size}.

        Raises:
            ValueError: naming the argument, what was found and what was expected.
        """
        _check_names("keyword", kwargs, (*self._before, *self._after, *_BATCHING))
        inputs, kwargs = _one_per_image(inputs, kwargs, ("boxes", "attributes", "text"))
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def preprocess(
        self,
        inputs: Any,
        boxes: Any = None,
        proposer: str | Proposer = "grid",
        attributes: Sequence[str] | None = None,
        text: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        item = _read_item(inputs, {"boxes": boxes, "attributes": attributes, "text": text})
        stated = self._find_attributes(item["attributes"], item["text"])
        labels = torch.zeros(1, len(self.model.config.attributes), dtype=torch.bool)
        labels[:, slice(None) if stated is None else stated] = True
        image = _load(item["image"], timeout)
        regions = _prepare(image, item["boxes"], proposer, self)
        return {"image": image, "labels": labels, "stated": stated is not None, **regions}

    def _find_attributes(self, attributes: Sequence[str] | None, text: str | None) -> list[int] | None:
        """Indices of the attributes that the caller states; None for none."""
        if attributes is not None and text is not None:
            raise ValueError(f"attributes, text: found both ({attributes!r}, {text!r}), expected at most one of them.")
        if attributes is not None:
            names = [attributes] if isinstance(attributes, str) else attributes
            if not isinstance(names, list | tuple) or not names:
                raise ValueError(f"attributes: found {names!r}, expected at least one name; without, all are tried.")
            return self.model.attribute_indices(names)
        return None if text is None else find_attributes(text, self.model.config.attributes)

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("image", "labels", "stated", "image_boxes")}
        scores = self.model(**model_inputs).scores
        return {"scores": scores, "region_mask": model_inputs["region_mask"], **kept}

    def postprocess(
        self,
        model_outputs: Any,
        epsilon: float = 0.2,
        mode: str | None = None,
        exclusive_groups: bool = True,
        threshold: float | None = None,
        draw: bool = False,
    ) -> Any:
        scores, mask = model_outputs["scores"].float(), model_outputs["region_mask"]
        if mode is None:
            mode = "attributes_to_regions" if model_outputs["stated"] else "regions_to_attributes"
        groups = torch.tensor(self.model.config.group_ids) if exclusive_groups else None
        assigned = assign_attributes(scores, mask, model_outputs["labels"], epsilon, mode, groups)
        if threshold is not None:
            assigned &= scores > threshold
        names = self.model.config.attributes
        regions = []
        for box, row, kept in zip(model_outputs["image_boxes"][mask], scores[mask], assigned[mask], strict=True):
            found = [{"label": names[k], "score": row[k].item()} for k in kept.nonzero()[:, 0].tolist()]
            found.sort(key=lambda attribute: attribute["score"], reverse=True)
            corners = zip(("xmin", "ymin", "xmax", "ymax"), box.int().tolist(), strict=True)
            regions.append({"box": dict(corners), "attributes": found})
        if not draw:
            return regions
        return {"regions": regions, "image": draw_regions(model_outputs["image"], regions)}


def find_attributes(text: str, names: Sequence[str]) -> list[int]:
    """Indices of the names that stand in the text as whole words, in upper or lower case.

    Raises:
        ValueError: no text, or none of the names stands in it.
    """
    if not isinstance(text, str):
        raise ValueError(f"text: found {text!r}, expected a string.")
    patterns = [r"\s+".join(map(re.escape, name.split())) for name in names]
    found = [k for k, pattern in enumerate(patterns) if re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]
    if not found:
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"text: found none of the vocabulary's {len(names)} attributes ({listed}) in {text!r}.")
    return found


def draw_regions(image: Image.Image, regions: Sequence[dict[str, Any]]) -> Image.Image:
    """A copy of the image with every box and the names and scores of its attributes.

    Args:
        image: RGB.
        regions: as `RegionAttributeMappingPipeline` returns them, boxes in pixels of the image.
    """
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    width = max(1, round(min(image.size) / 200))
    for i, region in enumerate(regions):
        colour = _COLOURS[i % len(_COLOURS)]
        x0, y0, x1, y1 = (region["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
        canvas.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
        lines = [f"{attribute['label']} {attribute['score']:.2f}" for attribute in region["attributes"]]
        if lines:
            corner = (x0 + width, y0 + width)
            canvas.rectangle(canvas.multiline_textbbox(corner, "\n".join(lines)), fill=colour)
            canvas.multiline_text(corner, "\n".join(lines), fill="white")
    return image


def _prepare(image: Image.Image, boxes: Any, proposer: str | Proposer, pipe: Any) -> dict[str, Tensor]:
    """What the model needs of one image: `pixel_values` (1, 3, H, W), `boxes` (1, R, 4) in pixels of these and
    `region_mask` (1, R); and `image_boxes` (1, R, 4), the boxes in pixels of the image."""
    boxes = choose_boxes(image, boxes, proposer)
    pixels = pipe.image_processor([image], return_tensors="pt").to(pipe.dtype)["pixel_values"]
    height, width = pixels.shape[-2:]
    scaled, mask = scale_boxes([boxes], [image.size], (width, height))
    given = torch.stack([torch.as_tensor(box, dtype=torch.float32) for box in boxes])
    return {"pixel_values": pixels, "boxes": scaled, "region_mask": mask, "image_boxes": given[None]}


def _load(image: Any, timeout: float | None) -> Image.Image:
    """The image, upright and RGB, from what `load_image` takes or a path object."""
    try:
        return load_image(os.fspath(image) if isinstance(image, os.PathLike) else image, timeout=timeout)
    except Exception as error:  # of the network, of base64, of the decoder: each has its own
        raise ValueError(
            f"image: found {image!r:.200}, expected a PIL image, or an image's path, URL or base64 ({error!s:.200})."
        ) from error


def _one_per_image(inputs: Any, kwargs: dict[str, Any], names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """With a list of images, hand every image its own entry of those keywords that have one per image."""
    if not isinstance(inputs, list | tuple):
        return inputs, kwargs
    items = [dict(item) if isinstance(item, Mapping) else {"image": item} for item in inputs]
    rest = dict(kwargs)
    for name in names:
        values: Any = kwargs.get(name)
        if isinstance(values, str) or not hasattr(values, "__len__"):
            continue
        if name in ("attributes", "candidate_labels") and all(isinstance(value, str) for value in values):
            continue
        if len(values) != len(items):
            raise ValueError(f"{name}: found {len(values)} entries for {len(items)} images, expected one per image.")
        for item, value in zip(items, rest.pop(name), strict=True):
            item.setdefault(name, value)
    return items, rest


def _read_item(inputs: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """One image, alone or in a dictionary, with what is given for it, and for the rest what is given for all."""
    item = dict(inputs) if isinstance(inputs, Mapping) else {"image": inputs}
    _check_names("key", item, ("image", *defaults))
    if "image" not in item:
        raise ValueError(f"image: found a dictionary with {list(item)}, expected one with an image.")
    return {"image": item["image"]} | {
        name: default if item.get(name) is None else item[name] for name, default in defaults.items()
    }


def _check_labels(labels: Any) -> list[str]:
    found = [label.strip() for label in labels.split(",")] if isinstance(labels, str) else labels
    if not isinstance(found, list | tuple) or not found or not all(isinstance(x, str) and x.strip() for x in found):
        raise ValueError(f"candidate_labels: found {labels!r}, expected at least one label, none of them empty.")
    return list(found)


def _check_names(kind: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}."
            raise ValueError(f"Unknown {kind} {name!r}: {hint}")


def _pick(kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}
