"""Region proposers: the grid, torchvision's region proposal network and its weights, and the choice among them."""

import socket
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import box_iou

from modeling_villa import proposals_villa
from modeling_villa.proposals_villa import RpnProposer, choose_boxes, grid_boxes


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def network():
    """A whole detector with weights of its own, and what torchvision's own forward pass makes of it."""
    torch.manual_seed(7)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, rpn_score_thresh=0.0).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_mean" in name:
                tensor.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "rpn.safetensors"
    save_file(network.state_dict(), path)
    return str(path)


def test_grid():
    boxes = grid_boxes(60, 30)
    expected = [
        [column * 60 / n, row * 30 / n, (column + 1) * 60 / n, (row + 1) * 30 / n]
        for n in (1, 2, 3)
        for row in range(n)
        for column in range(n)
    ]
    assert boxes.dtype == torch.float32 and boxes.tolist() == expected
    assert grid_boxes(7, 5, cells=[2]).tolist() == [
        [0, 0, 3.5, 2.5],
        [3.5, 0, 7, 2.5],
        [0, 2.5, 3.5, 5],
        [3.5, 2.5, 7, 5],
    ]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4001), (4003, 3), (33, 77)])
def test_grid_covers_the_image_and_nothing_else(width, height):
    for n in (1, 2, 3, 7):
        boxes = grid_boxes(width, height, cells=[n])
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert (areas > 0).all() and areas.sum().item() == pytest.approx(width * height)


@pytest.mark.parametrize(("width", "height", "cells"), [(0, 5, [1]), (5, -1, [1]), (5, 5, []), (5, 5, [2, 0])])
def test_grid_of_nothing(width, height, cells):
    with pytest.raises(ValueError, match=r"sizes and cells of at least 1, got .*\d+ x .*\d+ with cells \["):
        grid_boxes(width, height, cells)


def test_rpn_gives_the_proposals_that_the_detector_works_with(network, weights):
    """Those that reach the detector's own region head, scaled back to the image."""
    image, seen = picture(200, 150), {}

    def watch(module, args):
        seen["proposals"], seen["sizes"] = args[1][0], args[2][0]

    hook = network.roi_heads.register_forward_pre_hook(watch)
    with torch.no_grad():
        network([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255])
    hook.remove()
    height, width = seen["sizes"]
    expected = seen["proposals"][:20] * torch.tensor([200 / width, 150 / height] * 2)
    expected = expected[((expected[:, 2:] - expected[:, :2]) >= 1).all(1)]
    found = RpnProposer(weights, max_regions=20)(image)
    assert len(found) > 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_rpn_is_deterministic_bounded_and_leaves_random_numbers_alone():
    image = picture(90, 60)
    torch.manual_seed(3)
    expected_random = torch.rand(3)
    torch.manual_seed(3)
    first = RpnProposer(None, max_regions=12)(image)
    assert torch.equal(torch.rand(3), expected_random)
    again = RpnProposer(None, max_regions=12)
    assert torch.equal(again(image), first) and torch.equal(again(image), first)
    assert 1 <= len(first) <= 12 and first.dtype == torch.float32
    assert torch.equal(RpnProposer(None, max_regions=4)(image), first[:4])
    assert not torch.equal(again(picture(90, 60, seed=1))[:4], first[:4])
    assert torch.equal(again(image.convert("RGBA")), first)
    assert box_iou(first, first).fill_diagonal_(0).max() < 1


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2000, 2), (3, 2500), (641, 1), (640, 1), (500, 300)])
def test_rpn_boxes_are_inside_the_image_and_not_empty(size):
    boxes = RpnProposer(None, max_regions=200)(picture(*size))
    assert 1 <= len(boxes) <= 200
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor(size)).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 0.999).all()


def test_weights_that_do_not_fit(tmp_path, network):
    state = network.state_dict()
    name = "rpn.head.cls_logits.weight"
    for change, wrong in (
        ({}, [name]),
        ({name: torch.zeros(2)}, [name]),
        ({name: state[name], "rpn.extra": torch.zeros(2)}, ["rpn.extra"]),
    ):
        path = tmp_path / "wrong.safetensors"
        save_file({key: value for key, value in state.items() if key != name} | change, path)
        with pytest.raises(ValueError) as error:
            RpnProposer(str(path))(picture(40, 40))
        assert "are not those of fasterrcnn_mobilenet_v3_large_320_fpn: 1 tensors are missing, left" in str(error.value)
        assert str(wrong) in str(error.value)


def test_region_heads_may_be_missing_from_the_weights(tmp_path, network, weights):
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("roi_heads.")}
    save_file(state, tmp_path / "rpn.safetensors")
    image = picture(60, 60)
    assert torch.equal(RpnProposer(str(tmp_path / "rpn.safetensors"))(image), RpnProposer(weights)(image))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="max_regions must be at least 1, got 0"):
        RpnProposer(None, max_regions=0)
    (tmp_path / "rpn.pth").write_bytes(b"")
    for wrong in ("missing.safetensors", str(tmp_path / "rpn.pth"), "default"):
        with pytest.raises(ValueError, match=r'weights must be "DEFAULT", None or an existing .safetensors file, got '):
            RpnProposer(wrong)


def test_download_that_fails_names_the_offline_options(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError(socket.gaierror("no such host"))

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    proposer = RpnProposer()  # nothing is built or downloaded yet
    for _ in range(2):
        with pytest.raises(ConnectionError) as error:
            proposer(picture(20, 20))
        for words in ("no such host", str(tmp_path / "hub" / "checkpoints"), "FILE.safetensors", "grid", "give boxes"):
            assert words in str(error.value)


def test_downloaded_weights_are_read_without_unpickling(tmp_path, monkeypatch, network, weights):
    asked = {}

    def load(url, **kwargs):
        asked.update(kwargs, url=url)
        return network.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    image = picture(50, 40)
    assert torch.equal(RpnProposer()(image), RpnProposer(weights)(image))
    assert asked["weights_only"] is True and asked["check_hash"] is True and asked["url"].startswith("https://")


def test_choice(monkeypatch):
    image, boxes = picture(60, 30), [[1, 2, 3, 4]]
    assert choose_boxes(image, boxes, "grid") is boxes
    assert torch.equal(choose_boxes(image, None, "grid"), grid_boxes(60, 30))
    assert choose_boxes(image, None, lambda given: [[0, 0, *given.size]]) == [[0, 0, 60, 30]]
    rpn = RpnProposer(None, max_regions=3)
    monkeypatch.setattr(proposals_villa, "_shared_rpn", lambda: rpn)
    assert torch.equal(choose_boxes(image, None, "rpn"), rpn(image))


def test_one_network_for_all():
    assert proposals_villa._shared_rpn() is proposals_villa._shared_rpn()
    assert proposals_villa._shared_rpn().weights == "DEFAULT"


@pytest.mark.parametrize(
    ("boxes", "proposer", "message"),
    [
        ([], "grid", r"boxes: found \[\], expected at least one x0, y0, x1, y1 in pixels"),
        (5, "grid", "boxes: found 5, expected at least one"),
        (torch.zeros(0, 4), "grid", "boxes: found tensor.*expected at least one"),
        (None, lambda image: [], r"proposer: found \[\], expected at least one"),
        (None, "gird", r"proposer: found 'gird', expected one of \('grid', 'rpn'\) or a function"),
        (None, SimpleNamespace(), "proposer: found namespace"),
    ],
)
def test_no_boxes_or_an_unknown_proposer(boxes, proposer, message):
    with pytest.raises(ValueError, match=message):
        choose_boxes(picture(20, 20), boxes, proposer)
