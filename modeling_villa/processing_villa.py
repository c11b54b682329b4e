"""VillaProcessor: images, texts and boxes in one call; boxes are scaled along with their image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling

from .towers_villa import load_image_settings, load_tokenizer


class VillaImageProcessor(TorchvisionBackend):
    """Resizes to a fixed height and width without cropping, so that boxes keep their meaning."""

    _auto_class = "AutoImageProcessor"  # saved, it brings along this file
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


class VillaProcessor(ProcessorMixin):
    """Wraps a `VillaImageProcessor` and a tokenizer.

    `processor(images=, text=, boxes=, return_tensors="pt")` returns `pixel_values` (B, 3, H, W), `input_ids`
    and `attention_mask` (T, L), and, with boxes, `boxes` (B, R, 4) in pixels of `pixel_values` padded with
    zeros, and `region_mask` (B, R) bool.
    """

    _auto_class = "AutoProcessor"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_towers(cls, vision: str, text: str, image_size: int | None = None) -> "VillaProcessor":
        """The processor of `VillaClipModel.from_towers`: the image tower's settings and the text tower's tokenizer.

        Args and Raises: see there.
        """
        return cls(VillaImageProcessor(**load_image_settings(vision, image_size)), load_tokenizer(text))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        boxes: Sequence[Any] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: one PIL image or array, or a list of them.
            text: one text or a list; longer than the tokenizer's `model_max_length` is cut.
            boxes: per image a list of x0, y0, x1, y1 in pixels of the image as given; for one image that is
                not in a list, its boxes.
            return_tensors: "pt"; nothing else is supported.
            kwargs: passed on to the image processor.

        Raises:
            ValueError: nothing to process, boxes without images or in another number, or a box that is empty,
                inverted, outside its image or not finite.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}.')
        if images is None and text is None:
            raise ValueError("VillaProcessor needs images, text or both.")
        if boxes is not None and images is None:
            raise ValueError("boxes are in pixels of their images: give images too.")
        data: dict[str, Any] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            data["input_ids"], data["attention_mask"] = tokens["input_ids"], tokens["attention_mask"]
        if images is not None:
            if not isinstance(images, list | tuple):
                images, boxes = [images], None if boxes is None else [boxes]
            data["pixel_values"] = self.image_processor(list(images), return_tensors="pt", **kwargs)["pixel_values"]
        if boxes is not None:
            height, width = data["pixel_values"].shape[-2:]
            data["boxes"], data["region_mask"] = scale_boxes(boxes, [_size(i) for i in images], (width, height))
        return BatchFeature(data)


def check_tokenizer(tokenizer: Any, text_config: Any) -> None:
    """Check that a tokenizer is the text tower's, as far as their numbers tell.

    Args:
        tokenizer: a tokenizer of transformers.
        text_config: `VillaClipConfig.text_config`.

    Raises:
        ValueError: it has more tokens than the tower has embeddings, or another start, end or padding token than
            the tower's configuration; all differences are named.
    """
    config = getattr(text_config, "encoder_config", text_config)
    problems = []
    if len(tokenizer) > config.vocab_size:
        problems.append(f"{len(tokenizer)} tokens where the tower has {config.vocab_size}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found, expected = getattr(tokenizer, name, None), getattr(config, name, None)
        if None not in (found, expected) and found != expected:
            problems.append(f"{name} {found} where the tower has {expected}")
    if problems:
        raise ValueError(f"The tokenizer is not the text tower's: {', '.join(problems)}.")


def scale_boxes(
    boxes: Sequence[Any], sizes: Sequence[tuple[int, int]], target: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale boxes from their images' pixels to the resized images' and pad them.

    Args:
        boxes: per image a list of x0, y0, x1, y1 in pixels.
        sizes: per image its width and height in pixels.
        target: width and height in pixels after resizing.

    Returns:
        (B, R, 4) float32 and (B, R) bool, R at least 1.

    Raises:
        ValueError: see `VillaProcessor.__call__`.
    """
    if len(boxes) != len(sizes):
        raise ValueError(f"boxes are given for {len(boxes)} images, but there are {len(sizes)} images.")
    longest = max([len(image_boxes) for image_boxes in boxes], default=0)
    scaled = torch.zeros(len(boxes), max(longest, 1), 4)
    mask = torch.zeros(len(boxes), max(longest, 1), dtype=torch.bool)
    for i, (image_boxes, (width, height)) in enumerate(zip(boxes, sizes, strict=True)):
        if len(image_boxes) == 0:
            continue
        try:
            given = torch.as_tensor(np.asarray(image_boxes, dtype=np.float32))
        except (TypeError, ValueError) as error:  # ragged, or not numbers
            raise ValueError(f"boxes of image {i} must be a list of x0, y0, x1, y1; got {image_boxes}.") from error
        if given.dim() != 2 or given.shape[1] != 4:
            raise ValueError(f"boxes of image {i} must be a list of x0, y0, x1, y1; got shape {tuple(given.shape)}.")
        _check_inside(given, width, height, i)
        scaled[i, : len(given)] = given * given.new_tensor([target[0] / width, target[1] / height] * 2)
        mask[i, : len(given)] = True
    return scaled, mask


def _check_inside(boxes: torch.Tensor, width: int, height: int, image: int) -> None:
    x0, y0, x1, y1 = boxes.unbind(1)
    # NaN compares false, so a box that is not finite is not good either.
    rim = 1e-3  # pixels: what float32 rounding of x + width may add at the border
    good = (x0 >= -rim) & (y0 >= -rim) & (x1 > x0) & (y1 > y0) & (x1 <= width + rim) & (y1 <= height + rim)
    if not good.all():
        which = int((~good).nonzero()[0])
        raise ValueError(
            f"Box {which} of image {image} is {boxes[which].tolist()}: expected finite x0, y0, x1, y1 in pixels "
            f"with 0 <= x0 < x1 <= {width} (width) and 0 <= y0 < y1 <= {height} (height)."
        )


def _size(image: Any) -> tuple[int, int]:
    """Width and height of a PIL image, or of an array or tensor in either channel order."""
    if isinstance(image, Image.Image):
        return image.size
    shape = tuple(image.shape)
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):
        return shape[2], shape[1]
    return shape[1], shape[0]
