"""The endpoints' handler: answers against the pipelines, bad requests, limits, and a life without our package."""

import base64
import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from pipeline_helpers import BOXES, LABELS, picture
from tiny_models import save_clip, save_mapping

from modeling_villa import handler, proposals_villa
from modeling_villa.handler import EndpointHandler
from modeling_villa.proposals_villa import RpnProposer

PARAMETERS = {"candidate_labels": LABELS}


@pytest.fixture(scope="module")
def clip(clip_folder):
    return EndpointHandler(clip_folder)


@pytest.fixture(scope="module")
def mapping(mapping_folder):
    return EndpointHandler(mapping_folder)


def encode(image, format="PNG", **more):
    buffer = BytesIO()
    image.save(buffer, format=format, **more)
    return base64.b64encode(buffer.getvalue()).decode()


def answer(endpoint, inputs, parameters=None):
    """What comes back, after the way through JSON that a request and its answer take."""
    request = {"inputs": inputs} if parameters is None else {"inputs": inputs, "parameters": parameters}
    return json.loads(json.dumps(endpoint(json.loads(json.dumps(request)))))


def error(endpoint, inputs, parameters=None):
    found = answer(endpoint, inputs, parameters)
    assert isinstance(found, dict) and list(found) == ["error"], found
    assert "Traceback" not in found["error"] and "log has more" not in found["error"]
    return found["error"]


def test_detection(clip):
    image = encode(picture())
    more = {"boxes": BOXES, "threshold": 0, "top_k": 7, "hypothesis_template": "a {}"}
    expected = clip.detector(picture(), candidate_labels=LABELS, **more)
    assert len(expected) == 7 and answer(clip, image, {**PARAMETERS, **more}) == expected
    assert answer(clip, image, {**PARAMETERS, "boxes": BOXES}) == clip.detector(picture(), LABELS, boxes=BOXES)
    assert answer(clip, image, {**PARAMETERS, "proposer": "grid"}) == clip.detector(picture(), LABELS)
    assert answer(clip, image, {**PARAMETERS, "proposer": "grid", "threshold": None, "boxes": None}) == (
        clip.detector(picture(), LABELS)
    )


def test_classification_without_boxes(clip):
    image, expected = encode(picture()), clip.classifier(picture(), candidate_labels=LABELS)
    assert [set(result) for result in expected] == [{"score", "label"}] * 3
    assert answer(clip, image, PARAMETERS) == expected
    assert answer(clip, image, {**PARAMETERS, "top_k": 2}) == expected[:2]
    assert answer(clip, image, {**PARAMETERS, "threshold": expected[1]["score"]}) == expected[:1]
    template = "a {} thing"
    expected = clip.classifier(picture(), candidate_labels=LABELS, hypothesis_template=template)
    assert answer(clip, image, {**PARAMETERS, "hypothesis_template": template}) == expected


def test_mapping(mapping):
    image = encode(picture())
    assert answer(mapping, image) == mapping.mapper(picture())
    assert answer(mapping, image, {}) == answer(mapping, image, None) and len(answer(mapping, image)) == 14
    for more in (
        {"boxes": BOXES, "attributes": ["red", "round"], "epsilon": 0.01},
        {"boxes": BOXES, "text": "A Large red car.", "threshold": 0.1},
        {"proposer": "grid", "epsilon": 3},
    ):
        assert answer(mapping, image, more) == mapping.mapper(picture(), **more)


def test_region_proposal_network(clip, mapping, monkeypatch):
    rpn = RpnProposer(None, max_regions=4)
    monkeypatch.setattr(proposals_villa, "_shared_rpn", lambda: rpn)
    image, boxes = encode(picture()), rpn(picture()).tolist()
    found = answer(clip, image, {**PARAMETERS, "proposer": "rpn", "threshold": 0})
    assert found == clip.detector(picture(), LABELS, boxes=boxes, threshold=0)
    assert answer(mapping, image, {"proposer": "rpn"}) == mapping.mapper(picture(), boxes=boxes)

    def no_network():
        raise ConnectionError("no weights; use a grid")

    monkeypatch.setattr(proposals_villa, "_shared_rpn", no_network)
    assert error(mapping, image, {"proposer": "rpn"}) == "no weights; use a grid"


def test_every_kind_of_input(mapping, served):
    folder, url = served
    picture().save(folder / "image.png")
    plain, expected = encode(picture()), mapping.mapper(picture(), boxes=BOXES)
    folded = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    links = [f"{url}/image.png", f"{url}/image.png".replace("http", "HTTP")]
    for inputs in (plain, folded, f"data:image/png;base64,{plain}", *links):
        for given in (inputs, {"image": inputs}):
            assert answer(mapping, given, {"boxes": BOXES}) == expected
    assert mapping({"inputs": picture(), "parameters": {"boxes": BOXES}}) == expected


def test_every_kind_of_file(mapping):
    corner = {"boxes": [[0, 0, 60, 40]]}
    for format in handler.FORMATS:
        assert len(answer(mapping, encode(picture(), format), corner)) == 1
    for mode in ("L", "LA", "RGBA", "P", "1", "I;16"):
        image = picture().convert("L").convert(mode) if mode in ("LA", "I;16") else picture().convert(mode)
        assert len(answer(mapping, encode(image), corner)) == 1
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    assert len(answer(mapping, encode(picture(40, 60), exif=turned), corner)) == 1
    assert "Box 0 of image 0" in error(mapping, encode(picture(40, 60)), corner)
    for format in ("PPM", "EPS"):  # for EPS, Pillow would start Ghostscript
        assert "no readable image" in error(mapping, encode(picture(), format))


EXPECTED = "a base64 string, an http(s) URL or"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("", ["inputs: found ''", EXPECTED]),
        (7, ["inputs: found 7", EXPECTED]),
        ([encode(picture())], ["inputs: found ['iVBOR", EXPECTED]),
        ({"picture": "x"}, ["inputs: found keys ['picture']", EXPECTED]),
        ({"image": "x", "boxes": []}, ["inputs: found keys ['image', 'boxes']", EXPECTED]),
        ({"image": None}, ["inputs: found None", EXPECTED]),
        ("what is this?", ["inputs: found 'what is this?'", EXPECTED]),
        ("abc", ["inputs: found 'abc'", EXPECTED, "Incorrect padding"]),
        ("data:image/png,abcd", ["inputs: found 'data:image/png,abcd'", "a data: URI has to be"]),
        (base64.b64encode(b"This is no image at all.").decode(), ["found 24 bytes that are no readable image", "JPEG"]),
        (encode(picture())[:400], ["found 300 bytes that are no readable image", "PNG"]),
        ("http://127.0.0.1:1/a.png", ["the URL 'http://127.0.0.1:1/a.png' could not be read", "refused"]),
        ("http://", ["the URL 'http://' could not be read"]),
        ("https://[::1/a.png", ["the URL 'https://[::1/a.png' could not be read"]),
    ],
)
def test_bad_images(mapping, inputs, words, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    message = error(mapping, inputs)
    for word in words:
        assert word in message


def test_missing_inputs(clip):
    for request in ({}, {"inputs": None, "parameters": {}}, {"image": "abc"}, [], None, "abc"):
        message = clip(request)["error"]
        assert message.startswith("inputs: missing (found ") and EXPECTED in message
    assert "keys ['image']" in clip({"image": "abc"})["error"]


def test_url_that_does_not_answer_with_an_image(mapping, served):
    folder, url = served
    (folder / "page.html").write_text("<html>no image</html>")
    assert "no readable image" in error(mapping, f"{url}/page.html")
    assert "HTTP Error 404" in error(mapping, f"{url}/missing.png")


def test_no_path_of_this_machine_is_opened(mapping, tmp_path, monkeypatch):
    """However it is written, even where the path is good base64."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / name for name in ("image.png", "abcd")]
    for path in paths:
        picture().save(path, format="PNG")
    opened, own_open = [], open

    def watched_open(path, *args, **kwargs):
        opened.append(str(path))
        return own_open(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", watched_open)
    for path in paths:
        for text in (str(path), path.name, f"./{path.name}", path.as_uri(), f"file:{path}", f"data:{path}"):
            for inputs in (text, {"image": text}):
                assert EXPECTED in error(mapping, inputs) or "no readable image" in error(mapping, inputs)
    assert not [path for path in opened if Path(path).absolute() in paths]
    Image.open(paths[0]).close()
    assert opened[-1] == str(paths[0])  # the watch works


def test_a_redirection_to_a_file_is_not_followed(mapping, served, monkeypatch):
    folder, url = served
    picture().save(folder / "image.png")

    def redirect(self):
        self.send_response(302)
        self.send_header("Location", (folder / "image.png").as_uri())
        self.end_headers()

    monkeypatch.setattr("http.server.SimpleHTTPRequestHandler.do_GET", redirect)
    assert "could not be read" in error(mapping, f"{url}/image.png")


def test_too_many_bytes(mapping, served):
    folder, url = served
    limit, message = 20 * 2**20, "inputs: found an image of more than 20 MB, expected a smaller one."
    for size in (limit, limit + 1, limit + 2, 2 * limit):
        (folder / "image.png").write_bytes(bytes(size))
        for inputs in (f"{url}/image.png", base64.b64encode(bytes(size)).decode()):
            found = mapping({"inputs": inputs})["error"]
            assert f"found {limit} bytes that are no" in found if size == limit else found == message


def bomb(width, height):
    """A PNG of a few bytes that says it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("size", [(8000, 7000), (60000, 60000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_not_decoded(mapping, size, monkeypatch):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self))
    assert error(mapping, bomb(*size)) == "inputs: found an image of more than 50 megapixels, expected a smaller one."
    assert decoded == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidate_labels": None}, ["candidate_labels: missing, expected a list of labels, at least one"]),
        ({"candidate_labels": []}, ["candidate_labels: found [], expected a list of labels, at least one"]),
        ({"candidate_labels": ["a", ""]}, ["candidate_labels: found ['a', '']", "none of them empty"]),
        ({"candidate_labels": "a"}, ["candidate_labels: found 'a', expected a list"]),
        ({"candidate_labels": [1]}, ["candidate_labels: found [1]"]),
        ({"candidate_labels": ["red " * 30]}, ["max_position_embeddings"]),
        ({"candidate_label": ["a"]}, ["unknown parameter 'candidate_label': did you mean 'candidate_labels'?"]),
        ({"zzz": 1}, ["unknown parameter 'zzz': this model's are candidate_labels", "proposer"]),
        ({"attributes": ["red"]}, ["unknown parameter 'attributes'", "candidate_labels"]),
        ({"threshold": "high"}, ["threshold: found 'high', expected a number"]),
        ({"threshold": float("nan")}, ["threshold: found nan, expected a number"]),
        ({"threshold": True}, ["threshold: found True, expected a number"]),
        ({"top_k": 0}, ["top_k: found 0, expected a whole number, at least 1"]),
        ({"top_k": 1.5}, ["top_k: found 1.5, expected a whole number"]),
        ({"proposer": "gird"}, ['proposer: found \'gird\', expected "grid" or "rpn"']),
        ({"proposer": ["grid"]}, ["proposer: found ['grid'], expected"]),
        ({"hypothesis_template": "a"}, ["hypothesis_template: found 'a', expected a sentence with one {}"]),
    ],
)
def test_bad_parameters_of_the_one_to_one_model(clip, change, words):
    message = error(clip, encode(picture()), {**PARAMETERS, **change})
    for word in words:
        assert word in message


N_X_4 = "expected a list of [x0, y0, x1, y1] in pixels of the image, at least one"
RANGE = "0 <= x0 < x1 <= 60 (width) and 0 <= y0 < y1 <= 40 (height)"


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([], ["boxes: found []", N_X_4]),
        ([1, 2, 3, 4], ["boxes: found [1, 2, 3, 4]", N_X_4]),
        ([[1, 2, 3]], ["boxes: found [[1, 2, 3]]", N_X_4]),
        ([[1, 2, 3, "4"]], ["boxes: found [[1, 2, 3, '4']]", N_X_4]),
        ([[1, 2, 3, None]], ["boxes: found [[1, 2, 3, None]]", N_X_4]),
        ([[0, 0, 5, float("inf")]], ["boxes: found [[0, 0, 5, inf]]", N_X_4]),
        ([[0, 0, 5, 10**400]], ["boxes: found [[0, 0, 5, 1000", N_X_4]),
        ("0,0,5,5", ["boxes: found '0,0,5,5'", N_X_4]),
        ({"xmin": 0}, ["boxes: found {'xmin': 0}", N_X_4]),
        ([[0, 0, 5, 5], [5, 5, 5, 9]], ["Box 1 of image 0 is [5.0, 5.0, 5.0, 9.0]", RANGE]),
        ([[9, 0, 5, 5]], ["Box 0 of image 0 is [9.0, 0.0, 5.0, 5.0]", RANGE]),
        ([[0, 0, 61, 5]], ["Box 0 of image 0 is [0.0, 0.0, 61.0, 5.0]", RANGE]),
        ([[-3, 0, 6, 5]], ["Box 0 of image 0 is", RANGE]),
    ],
)
def test_bad_boxes(clip, mapping, boxes, words):
    for endpoint, parameters in ((clip, PARAMETERS), (mapping, {})):
        message = error(endpoint, encode(picture()), {**parameters, "boxes": boxes})
        for word in words:
            assert word in message


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"attributes": ["redd"]}, ["Unknown attribute 'redd'", "vocabulary of 5", "nearest: ['red'"]),
        ({"attributes": []}, ["attributes: found [], expected a list of names of the model's vocabulary"]),
        ({"attributes": "red"}, ["attributes: found 'red', expected a list"]),
        ({"text": ""}, ["text: found '', expected a text that names attributes"]),
        ({"text": "a car"}, ["text: found none of the vocabulary's 5 attributes (red, blue,"]),
        ({"text": "red", "attributes": ["red"]}, ["attributes, text: found both"]),
        ({"epsilon": 0}, ["epsilon: found 0, expected a number above 0"]),
        ({"epsilon": "0.1"}, ["epsilon: found '0.1', expected a number above 0"]),
        ({"candidate_labels": ["red"]}, ["unknown parameter 'candidate_labels'"]),
        ({"draw": True}, ["unknown parameter 'draw'", "this model's are attributes, text, epsilon, boxes"]),
        ({"atributes": ["red"]}, ["unknown parameter 'atributes': did you mean 'attributes'?"]),
        ([1], ["parameters: found [1], expected some of attributes, text"]),
        ("red", ["parameters: found 'red', expected some of attributes, text"]),
    ],
)
def test_bad_parameters_of_the_mapping_model(mapping, parameters, words):
    message = error(mapping, encode(picture()), parameters)
    for word in words:
        assert word in message


def test_what_nobody_foresaw_is_logged_and_not_shown(mapping, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory in a secret place")

    monkeypatch.setattr(mapping, "mapper", fail)
    message = mapping({"inputs": encode(picture())})["error"]
    assert message == "The model failed on this request (RuntimeError); the endpoint's log has more."
    assert "a secret place" in caplog.text


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="serves villa_clip and villa_mapping models, got one of type 'bert'"):
        EndpointHandler(str(tmp_path))


def test_the_repository_alone_is_enough(clip, mapping, tmp_path):
    """As an endpoint starts: handler.py from the model's folder, our package nowhere."""
    folders = [save_clip(tmp_path / "clip"), save_mapping(tmp_path / "mapping")]
    image = encode(picture())
    requests = [
        [{"inputs": image, "parameters": {**PARAMETERS, "boxes": BOXES}}, {"inputs": image, "parameters": PARAMETERS}],
        [{"inputs": image, "parameters": {"boxes": BOXES}}, {"inputs": image}, {"inputs": "abc"}],
    ]
    for folder in folders:
        assert (Path(folder) / "handler.py").read_bytes() == Path(handler.__file__).read_bytes()
    code = (
        "import json, sys\n"
        "sys.modules['modeling_villa'] = None\n"
        f"sys.path.insert(0, {folders[0]!r})\n"
        "from handler import EndpointHandler\n"
        f"endpoints = [EndpointHandler(folder) for folder in {folders!r}]\n"
        "requests = json.load(open('requests.json'))\n"
        "answers = [[endpoint(one) for one in some] for endpoint, some in zip(endpoints, requests)]\n"
        "json.dump(answers, open('answers.json', 'w'))\n"
    )
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "not supported" not in run.stderr, run.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers[0] == [clip(request) for request in requests[0]]
    assert answers[1] == [mapping(request) for request in requests[1]] and "error" in answers[1][2]
