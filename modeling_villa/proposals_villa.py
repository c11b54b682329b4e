"""Region proposers: an image in, boxes out, for images that come without regions."""

import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    fasterrcnn_mobilenet_v3_large_320_fpn,
)
from torchvision.ops import clip_boxes_to_image, remove_small_boxes
from torchvision.transforms.functional import pil_to_tensor
from transformers.modeling_utils import load_state_dict

# From an image to its boxes, (N, 4) x0, y0, x1, y1 in pixels of that image.
Proposer = Callable[[Image.Image], Any]
PROPOSERS = ("grid", "rpn")


def grid_boxes(width: int, height: int, cells: Sequence[int] = (1, 2, 3)) -> Tensor:
    """The cells of regular grids over an image; the default is the whole image, its quarters and its ninths.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        cells: for each grid its number of columns, which is that of its rows too.

    Returns:
        (sum of squares of `cells`, 4) float32 x0, y0, x1, y1 in pixels, grid after grid, row after row.

    Raises:
        ValueError: no grid, or a size or number of cells below 1.
    """
    if not cells or min(width, height, *cells) < 1:
        raise ValueError(f"A grid needs sizes and cells of at least 1, got {width} x {height} with cells {cells}.")
    grids = []
    for count in cells:
        x, y = torch.linspace(0, width, count + 1), torch.linspace(0, height, count + 1)
        row, column = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
        grids.append(torch.stack([x[column], y[row], x[column + 1], y[row + 1]], -1).view(-1, 4))
    return torch.cat(grids)


class RpnProposer:
    """The region proposal network of torchvision's Faster R-CNN (MobileNetV3-Large, 320 pixels).

    Ren et al., 2015, trained on COCO. The network is built at the first image. Calling the proposer with a PIL
    image gives (N, 4) float32 x0, y0, x1, y1 in pixels of that image, the most object-like first, 1 <= N <=
    `max_regions`, inside the image and at least a pixel wide and high. The same image gives the same boxes.

    Args:
        weights: "DEFAULT" (75 MB that torchvision downloads once), the path of a .safetensors file with the state
            dict of `torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn`, or None for random ones.
        max_regions: how many of the boxes that are left by the network's own non-maximum suppression to keep, > 0.

    Raises:
        ValueError: a number or weights that are none of these; when called, weights of another network.
        ConnectionError: when called, the weights cannot be downloaded; names the offline options.
    """

    def __init__(self, weights: str | None = "DEFAULT", max_regions: int = 50) -> None:
        if max_regions < 1:
            raise ValueError(f"max_regions must be at least 1, got {max_regions}.")
        if weights not in (None, "DEFAULT") and not (
            str(weights).endswith(".safetensors") and Path(str(weights)).is_file()
        ):
            raise ValueError(f'weights must be "DEFAULT", None or an existing .safetensors file, got {weights!r}.')
        self.weights = weights
        self.max_regions = max_regions

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Tensor:
        width, height = image.size
        shorter, longer = sorted(image.size)
        if shorter * self._model.transform.max_size < longer:  # resized, nothing would be left of the shorter side
            return grid_boxes(width, height, cells=[1])
        pixels = pil_to_tensor(image.convert("RGB")).float() / 255
        resized, _ = self._model.transform([pixels])
        proposals, _ = self._model.rpn(resized, self._model.backbone(resized.tensors))
        resized_height, resized_width = resized.image_sizes[0]
        boxes = proposals[0] * torch.tensor([width / resized_width, height / resized_height] * 2)
        boxes = clip_boxes_to_image(boxes, (height, width))
        boxes = boxes[remove_small_boxes(boxes, min_size=1.0)]
        return boxes if len(boxes) else grid_boxes(width, height, cells=[1])

    @cached_property
    def _model(self) -> Any:
        state = None
        if self.weights is not None:
            state = _download_weights() if self.weights == "DEFAULT" else load_state_dict(self.weights)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.default_generator.manual_seed(0)
            model = fasterrcnn_mobilenet_v3_large_320_fpn(
                weights=None,
                weights_backbone=None,
                rpn_pre_nms_top_n_test=max(150, self.max_regions),  # 150, of each scale, is torchvision's own
                rpn_post_nms_top_n_test=self.max_regions,
                rpn_score_thresh=0.0,  # the best there are, however unlike objects they look
            )
        del model.roi_heads  # what comes after the proposals
        if state is not None:
            _load_weights(model, state)
        return model.eval()


def _download_weights() -> dict[str, Tensor]:
    source = FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.DEFAULT
    try:
        return source.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the file is not what its hash says
        raise ConnectionError(
            f"The region proposal network's weights could not be downloaded from {source.url} ({error}). Without "
            f"network, put that file into {Path(torch.hub.get_dir()) / 'checkpoints'}, give "
            'proposer=RpnProposer("FILE.safetensors") with the same state dict, use proposer="grid", or give boxes.'
        ) from error


def _load_weights(model: Any, state: dict[str, Tensor]) -> None:
    # Steps counted by BatchNorm are in the files of networks that were trained with it, and are not used.
    unused = re.compile(r"roi_heads\..*|.*\.num_batches_tracked")
    state = {name: tensor for name, tensor in state.items() if not unused.fullmatch(name)}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if not unused.fullmatch(name)}
    wrong = [name for name in {**expected, **state} if name not in state or state[name].shape != expected.get(name)]
    if wrong:
        raise ValueError(
            f"The weights are not those of fasterrcnn_mobilenet_v3_large_320_fpn: {len(wrong)} tensors are missing, "
            f"left over or of another shape, such as {sorted(wrong)[:3]}."
        )
    model.load_state_dict(state, strict=False)


@cache
def _shared_rpn() -> RpnProposer:
    """One network for all pipelines of a process."""
    return RpnProposer()


def choose_boxes(image: Image.Image, boxes: Any, proposer: str | Proposer) -> Any:
    """The boxes as given, or, where they are None, those of a proposer.

    Args:
        image: the image, upright.
        boxes: list, array or tensor of x0, y0, x1, y1 in pixels of the image, or None.
        proposer: "grid" (`grid_boxes`), "rpn" (`RpnProposer`) or a function from a PIL image to boxes.

    Returns:
        At least one box; of what is given or proposed, nothing else is checked.

    Raises:
        ValueError: no box, or an unknown proposer.
    """
    if boxes is not None:
        source = "boxes"
    elif callable(proposer):
        boxes, source = proposer(image), "proposer"
    elif proposer == "grid":
        return grid_boxes(*image.size)
    elif proposer == "rpn":
        return _shared_rpn()(image)
    else:
        raise ValueError(f"proposer: found {proposer!r}, expected one of {PROPOSERS} or a function of an image.")
    if not hasattr(boxes, "__len__") or len(boxes) == 0:
        raise ValueError(
            f"{source}: found {boxes!r}, expected at least one x0, y0, x1, y1 in pixels of the image; where "
            "boxes are left out, a proposer finds them."
        )
    return boxes
