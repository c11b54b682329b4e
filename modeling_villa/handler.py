"""Inference endpoints: an image and parameters in, checked; JSON out.

This file stands at the root of a model's repository, beside the model's code, and needs nothing of our package. A
request is

    {"inputs": IMAGE, "parameters": {...}}

with IMAGE a base64 string (with or without `data:image/...;base64,`), an http(s) URL, or {"image": one of these}.
What the answer is depends on the model, and for a `VillaClipModel` on the parameters:

    VillaMappingModel                          region-attribute-mapping        one entry per region
    VillaClipModel with boxes or a proposer    zero-shot-object-detection      one entry per region and label
    VillaClipModel without                     zero-shot-image-classification  one entry per label

`parameters` are the keywords of these pipelines; `PARAMETERS` lists them. A request that cannot be answered gets
{"error": what was found and what was expected}. Nothing in a request is ever opened as a path on this machine.
"""

import base64
import binascii
import difflib
import logging
from collections.abc import Callable
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image
from transformers import AutoConfig, ZeroShotImageClassificationPipeline, pipeline

logger = logging.getLogger(__name__)

MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 50
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # decoders that start no other program
URL_TIMEOUT = 10  # seconds
EXPECTED_IMAGE = 'a base64 string, an http(s) URL or {"image": one of these}'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # not so NaN


def _is_boxes(value: Any) -> bool:
    boxes = isinstance(value, list) and all(isinstance(box, list) and len(box) == 4 for box in value)
    return boxes and len(value) > 0 and all(_is_number(side) for box in value for side in box)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_text(name) for name in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# Of each parameter, which models take it, what it must be and how that is said.
CLIP, MAPPING = "villa_clip", "villa_mapping"
PARAMETERS: dict[str, tuple[tuple[str, ...], Callable[[Any], bool], str]] = {
    "candidate_labels": ((CLIP,), _is_names, "a list of labels, at least one, none of them empty"),
    "hypothesis_template": ((CLIP,), lambda x: _is_text(x) and x.count("{}") == 1, "a sentence with one {}"),
    "top_k": ((CLIP,), lambda x: isinstance(x, int) and _is_number(x) and x >= 1, "a whole number, at least 1"),
    "attributes": ((MAPPING,), _is_names, "a list of names of the model's vocabulary, at least one"),
    "text": ((MAPPING,), _is_text, "a text that names attributes of the model's vocabulary"),
    "epsilon": ((MAPPING,), lambda x: _is_number(x) and x > 0, "a number above 0"),
    "boxes": ((CLIP, MAPPING), _is_boxes, "a list of [x0, y0, x1, y1] in pixels of the image, at least one"),
    "proposer": ((CLIP, MAPPING), lambda x: x in ("grid", "rpn"), '"grid" or "rpn"'),
    "threshold": ((CLIP, MAPPING), _is_number, "a number"),
}


class _Classifier(ZeroShotImageClassificationPipeline):
    def check_model_type(self, supported_models: Any) -> None:
        """Nothing: it would log an error, since the model was loaded for another task, the detection."""


class EndpointHandler:
    """What an inference endpoint calls.

    Args:
        path: folder of the model's repository, whose code this file is part of.

    Raises:
        ValueError: the model is none of ours.
    """

    def __init__(self, path: str = "") -> None:
        # The code is that of the repository which this very file came from.
        self.kind = AutoConfig.from_pretrained(path, trust_remote_code=True).model_type
        if self.kind == MAPPING:
            self.mapper = pipeline("region-attribute-mapping", model=path, trust_remote_code=True)  # type: ignore[call-overload]
        elif self.kind == CLIP:
            self.detector = pipeline("zero-shot-object-detection", model=path, trust_remote_code=True)
            self.classifier = _Classifier(
                model=self.detector.model,
                tokenizer=self.detector.tokenizer,
                image_processor=self.detector.image_processor,
                device=self.detector.device,
            )
        else:
            raise ValueError(f"This handler serves {CLIP} and {MAPPING} models, got one of type {self.kind!r}.")

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data: the request, as above.

        Returns:
            The pipeline's list, or {"error": message}; JSON-serialisable.
        """
        try:
            if not isinstance(data, dict) or data.get("inputs") is None:
                found = f"keys {list(data)}" if isinstance(data, dict) else type(data).__name__
                raise ValueError(f'inputs: missing (found {found}), expected {{"inputs": {EXPECTED_IMAGE}}}.')
            parameters = self._check_parameters(data.get("parameters") or {})
            return self._answer(_read_image(data["inputs"]), parameters)
        except (ValueError, ConnectionError) as error:  # ConnectionError: the proposer's weights cannot be downloaded
            return {"error": str(error)}
        except Exception as error:
            logger.exception("A request failed.")
            return {"error": f"The model failed on this request ({type(error).__name__}); the endpoint's log has more."}

    def _check_parameters(self, given: Any) -> dict[str, Any]:
        own = [name for name, (kinds, _, _) in PARAMETERS.items() if self.kind in kinds]
        if not isinstance(given, dict):
            raise ValueError(f"parameters: found {given!r:.100}, expected some of {', '.join(own)}.")
        for name, value in given.items():
            if name not in own:
                near = difflib.get_close_matches(name, own, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"this model's are {', '.join(own)}."
                raise ValueError(f"parameters: unknown parameter {name!r:.100}: {hint}")
            _, check, expected = PARAMETERS[name]
            if value is not None and not check(value):
                raise ValueError(f"{name}: found {value!r:.200}, expected {expected}.")
        if self.kind == CLIP and given.get("candidate_labels") is None:
            raise ValueError(f"candidate_labels: missing, expected {PARAMETERS['candidate_labels'][2]}.")
        return {name: value for name, value in given.items() if value is not None}

    def _answer(self, image: Image.Image, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        if self.kind == MAPPING:
            return self.mapper(image, **parameters)
        if "boxes" in parameters or "proposer" in parameters:
            return self.detector(image, **parameters)
        threshold, top_k = parameters.pop("threshold", None), parameters.pop("top_k", None)
        results = self.classifier(image, **parameters)
        return [result for result in results if threshold is None or result["score"] > threshold][:top_k]


def _read_image(inputs: Any) -> Image.Image:
    """The request's image.

    Raises:
        ValueError: it is not one, or too large.
    """
    if isinstance(inputs, dict):
        if list(inputs) != ["image"]:
            raise ValueError(f"inputs: found keys {list(inputs)}, expected {EXPECTED_IMAGE}.")
        inputs = inputs["image"]
    if isinstance(inputs, Image.Image):  # sent as the body of the request, and decoded by the endpoint's server
        return inputs
    if not isinstance(inputs, str) or not inputs.strip():
        raise ValueError(f"inputs: found {inputs!r:.100}, expected {EXPECTED_IMAGE}.")
    is_url = inputs.lower().startswith(("http://", "https://"))
    content = _download(inputs) if is_url else _decode(inputs)
    if len(content) > MAX_MEGABYTES * 2**20:
        raise ValueError(f"inputs: found an image of more than {MAX_MEGABYTES} MB, expected a smaller one.")
    return _open(content)


def _download(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "villa-endpoint"}), timeout=URL_TIMEOUT) as response:
            return response.read(MAX_MEGABYTES * 2**20 + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"inputs: the URL {url!r:.200} could not be read ({error!s:.200}).") from error


def _decode(text: str) -> bytes:
    header, _, body = text.partition(",") if text.startswith("data:") else ("data:;base64", "", text)
    if len(body) > MAX_MEGABYTES * 2**20 * 3 // 2:  # 4 characters for 3 bytes, and line breaks
        return bytes(MAX_MEGABYTES * 2**20 + 1)
    try:
        if not header.endswith(";base64"):
            raise ValueError("a data: URI has to be data:image/...;base64,...")
        return base64.b64decode("".join(body.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"inputs: found {text!r:.60}, expected {EXPECTED_IMAGE} ({error}).") from error


def _open(content: bytes) -> Image.Image:
    """The decoded image; its size is looked at before anything is decoded."""
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        megapixels = image.width * image.height / 1e6
        if megapixels <= MAX_MEGAPIXELS:
            image.load()
    except Image.DecompressionBombError:
        megapixels = float("inf")
    except Exception as error:  # decoders of broken files raise what they please
        raise ValueError(
            f"inputs: found {len(content)} bytes that are no readable image, expected a file of type "
            f"{', '.join(FORMATS)}."
        ) from error
    if megapixels > MAX_MEGAPIXELS:
        raise ValueError(f"inputs: found an image of more than {MAX_MEGAPIXELS} megapixels, expected a smaller one.")
    return image
