"""How DocMNIST looks and reads: pixels, outlines, captions, and PNG files.

Everything here is integer arithmetic on raw random words, so that the result is the same bytes on any machine
and with any version of NumPy, Pillow or zlib.
"""

import functools
import struct
import zlib
from typing import NamedTuple

import numpy as np

from .digits import DIGIT_SIZE, DigitSet

GRID = 3
CELLS = GRID * GRID
IMAGE_SIZE = GRID * DIGIT_SIZE
PAINT_THRESHOLD = 120  # digit pixels at or above it are painted
CHOICES = 12  # divisible by every number of templates that a group has

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The hsv colour map at 0, 0.2, 0.4, 0.6 and 0.8.
COLOURS = {
    "red": (255, 0, 0),
    "yellow": (204, 255, 0),
    "green": (0, 255, 102),
    "blue": (0, 102, 255),
    "purple": (204, 0, 255),
}
SHAPES = ("rectangle", "circle")
SIZES = ("small", "medium", "large")
GROUPS = {"digit": list(DIGITS), "colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}
ATTRIBUTES = tuple(name for names in GROUPS.values() for name in names)

TEMPLATES = {
    "digit": [
        "The image shows the digit {}",
        "Somewhere on the page is a handwritten {}",
        "One of the figures is {}",
        "The number {} has been written here",
    ],
    "colour": [
        "A {} digit can be seen",
        "There is writing in {} ink",
        "One of the figures is painted {}",
        "The page has something {} on it",
    ],
    "shape": [
        "A {} is drawn in white",
        "There is a {} over one of the digits",
        "The outline of a {} is visible",
        "Somebody has added a {}",
    ],
    "size": [
        "One of the outlines is {}",
        "The page has a {} shape on it",
        "A shape of {} size is present",
    ],
}

RECTANGLE_SIDES = (1, 4, 7)  # pixels inside the outline of a small, medium and large rectangle
CIRCLE_RADII = (1, 3, 5)  # pixels
PLACE_LOW, PLACE_HIGH = 5, 20  # where corners and centres lie: PLACE_LOW <= row, column < PLACE_HIGH

_BLACK, _WHITE = 0, len(COLOURS) + 1
PALETTE = np.array([(0, 0, 0), *COLOURS.values(), (255, 255, 255)], dtype=np.uint8)
_DEFAULT_SIZE = SIZES.index("medium")


class Drawing(NamedTuple):
    """A batch of n images.

    paint: (n, 84, 84) uint8, indices into PALETTE.
    cells: (n, 9, 4) int64, vocabulary labels of digit, colour, shape and size of each cell in row-major
        order; -1 for none, and for all four where the cell is empty.
    choices: (n, 20) int64 below CHOICES, which, modulo their number, draws among the templates of an
    attribute.
    order: (n, 20) int64, random permutations, to shuffle the sentences.
    """

    paint: np.ndarray
    cells: np.ndarray
    choices: np.ndarray
    order: np.ndarray

    @property
    def images(self) -> np.ndarray:
        """(n, 84, 84, 3) uint8, RGB."""
        return PALETTE[self.paint]


class RandomWords:
    """Random integers for a key of four integers; raw Philox words, which no NumPy release changes."""

    def __init__(self, seed: int, split: int, purpose: int, shard: int) -> None:
        self._source = np.random.Philox(np.random.SeedSequence([seed, split, purpose, shard]))

    def words(self, *shape: int) -> np.ndarray:
        """uint64 words of the given shape."""
        return self._source.random_raw(shape)

    def below(self, bound: int, *shape: int) -> np.ndarray:
        """int64 integers in [0, bound), bound < 2**32."""
        return ((self.words(*shape) >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    def permutations(self, count: int, length: int) -> np.ndarray:
        """(count, length) int64, a permutation of range(length) in each row."""
        return np.argsort(self.words(count, length), axis=1, kind="stable")


def draw(
    vocabulary: tuple[str, ...], digits: DigitSet, plain: np.ndarray, shaped: np.ndarray, random: RandomWords
) -> Drawing:
    """Draws DocMNIST images by the rules of ViLLA (section 4.1): digits, colours, outlines, sizes, places.

    Digits are drawn evenly from `digits`, everything else evenly from what `vocabulary` has of its group.
    Without colours digits are white; without sizes outlines are medium.

    Args:
        vocabulary: attribute names in the order of ATTRIBUTES, digits among them.
        digits: images of the vocabulary's digits alone.
        plain: (n,) number of cells without an outline in each image.
        shaped: (n,) number of cells with one; plain + shaped is 1 to 9.
        random: the stream to draw from.
    """
    count = len(plain)
    place = random.permutations(count, CELLS)
    digit = random.below(len(digits.labels), count, CELLS)
    colour = _draw_group(vocabulary, tuple(COLOURS), random, count)
    shape = _draw_group(vocabulary, SHAPES, random, count)
    size = _draw_group(vocabulary, SIZES, random, count)
    corner = random.below((PLACE_HIGH - PLACE_LOW) ** 2, count, CELLS)
    choices = random.below(CHOICES, count, len(ATTRIBUTES))
    order = random.permutations(count, len(ATTRIBUTES))

    filled = place < (plain + shaped)[:, None]
    outlined = place < shaped[:, None]

    cells = np.full((count, CELLS, len(GROUPS)), -1, dtype=np.int64)
    label_of = {name: label for label, name in enumerate(vocabulary)}
    digit_label = np.array([label_of.get(name, -1) for name in DIGITS])[digits.labels[digit]]
    cells[..., 0] = np.where(filled, digit_label, -1)
    for column, names, drawn, where in (
        (1, tuple(COLOURS), colour, filled),
        (2, SHAPES, shape, outlined),
        (3, SIZES, size, outlined),
    ):
        labels = np.array([label_of.get(name, -1) for name in names])
        cells[..., column] = np.where(where & (drawn >= 0), labels[drawn], -1)

    ink = np.where(colour >= 0, colour + 1, _WHITE).astype(np.uint8)
    size = np.where(size >= 0, size, _DEFAULT_SIZE)
    canvas = np.zeros((count, GRID, DIGIT_SIZE, GRID, DIGIT_SIZE), dtype=np.uint8)
    image, cell = np.nonzero(filled)
    strokes = (digits.images[digit[image, cell]] >= PAINT_THRESHOLD) * ink[image, cell][:, None, None]
    ringed = np.flatnonzero(outlined[image, cell])
    at = (image[ringed], cell[ringed])
    strokes[ringed] = np.maximum(strokes[ringed], _outlines()[shape[at], size[at], corner[at]])
    canvas[image, cell // GRID, :, cell % GRID, :] = strokes
    return Drawing(canvas.reshape(count, IMAGE_SIZE, IMAGE_SIZE), cells, choices, order)


def _draw_group(vocabulary: tuple[str, ...], group: tuple[str, ...], random: RandomWords, count: int) -> np.ndarray:
    """(count, 9) int64 places in `group`, evenly among those in the vocabulary; -1 where there are none."""
    members = np.array([index for index, name in enumerate(group) if name in vocabulary] or [-1])
    return members[random.below(len(members), count, CELLS)]


@functools.lru_cache(maxsize=1)
def _outlines() -> np.ndarray:
    """(2, 3, 225, 28, 28) uint8: white outlines by shape, size and place, clipped to the cell."""
    span = PLACE_HIGH - PLACE_LOW
    outlines = np.zeros((len(SHAPES), len(SIZES), span * span, DIGIT_SIZE, DIGIT_SIZE), dtype=np.uint8)
    for size in range(len(SIZES)):
        for shape, offsets in enumerate((_ring(RECTANGLE_SIDES[size]), _circle(CIRCLE_RADII[size]))):
            for place in range(span * span):
                points = offsets + np.array([PLACE_LOW + place // span, PLACE_LOW + place % span])
                points = points[((points >= 0) & (points < DIGIT_SIZE)).all(axis=1)]
                outlines[shape, size, place, points[:, 0], points[:, 1]] = _WHITE
    return outlines


def _ring(side: int) -> np.ndarray:
    """(k, 2) offsets from its first inner pixel of the outline just around a square of `side` pixels."""
    rows, columns = np.mgrid[-1 : side + 1, -1 : side + 1]
    edge = (rows == -1) | (rows == side) | (columns == -1) | (columns == side)
    return np.stack([rows[edge], columns[edge]], axis=1)


def _circle(radius: int) -> np.ndarray:
    """(k, 2) offsets from the centre: in each octant, the pixel nearest to the circle for every column."""
    points = set()
    for along in range(radius + 1):
        # The nearest whole number to sqrt(radius^2 - along^2), found without leaving the integers.
        across = max(y for y in range(radius + 1) if (2 * y - 1) ** 2 <= 4 * (radius**2 - along**2) or y == 0)
        if along <= across:
            points |= {(i * a, j * b) for a, b in ((along, across), (across, along)) for i in (-1, 1) for j in (-1, 1)}
    return np.array(sorted(points))


def png(paint: np.ndarray) -> bytes:
    """The PNG file (RGB, 8 bits) of one image of palette indices (84, 84).

    The pixels are compressed here, with one fixed prefix code and runs of zeros, because compression libraries
    differ in the bytes they write.
    """
    lines = np.zeros((IMAGE_SIZE, 1 + 3 * IMAGE_SIZE), dtype=np.uint8)  # each begins with its filter type, 0
    lines[:, 1:] = PALETTE[paint].reshape(IMAGE_SIZE, -1)
    pixels = lines.ravel()
    inked = np.flatnonzero(pixels)
    # A gap of zeros before each inked byte (and the end): one zero, repeats of it, the rest as zeros.
    gaps = np.diff(inked, prepend=-1, append=len(pixels)) - 1
    repeats = np.maximum(gaps - 1, 0)
    counts = [gaps - repeats]
    for _, length in _REPEATS:
        counts.append(repeats // length)
        repeats = repeats % length
    counts += [repeats, np.ones_like(gaps)]
    symbols = np.zeros((len(gaps), len(counts)), dtype=np.int64)
    symbols[:, 1:-2] = [symbol for symbol, _ in _REPEATS]
    symbols[:, -1] = [*pixels[inked], _END]
    tokens = np.repeat(symbols.ravel(), np.stack(counts, axis=1).ravel())
    bits = np.concatenate([_DEFLATE_HEADER, _CODES[tokens][_CODE_USED[tokens]]])
    body = np.packbits(bits, bitorder="little").tobytes()
    data = b"\x78\x01" + body + struct.pack(">I", zlib.adler32(pixels.tobytes()))
    header = struct.pack(">IIBBBBB", IMAGE_SIZE, IMAGE_SIZE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _lowest_first(value: int, width: int) -> list[int]:
    return [value >> place & 1 for place in range(width)]


def _prefix_code(lengths: dict[int, int]) -> dict[int, list[int]]:
    """Symbol -> code bits, from code lengths, as deflate numbers them (RFC 1951, 3.2.2)."""
    code: dict[int, list[int]] = {}
    value = width = 0
    for symbol in sorted(lengths, key=lambda symbol: (lengths[symbol], symbol)):
        value <<= lengths[symbol] - width
        width = lengths[symbol]
        code[symbol] = _lowest_first(value, width)[::-1]
        value += 1
    return code


def _deflate_header() -> list[int]:
    """The start of the one deflate block (RFC 1951, 3.2.7): a code of our own, sent as its code lengths."""
    count = max(_CODE_LENGTHS) + 1
    bits = [1, *_lowest_first(2, 2), *_lowest_first(count - 257, 5), *_lowest_first(1 - 1, 5)]
    # The lengths are sent in a code as well: 0 to 6 and 18, "11 to 138 zeros", with 3 bits each.
    code = _prefix_code(dict.fromkeys((*range(7), 18), 3))
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1]
    bits += _lowest_first(len(order) - 4, 4)
    for symbol in order:
        bits += _lowest_first(3 if symbol in code else 0, 3)
    symbol = 0
    while symbol < count:
        zeros = next(place for place in range(symbol, count) if place in _CODE_LENGTHS) - symbol
        if zeros > 10:
            bits += code[18] + _lowest_first(min(zeros, 138) - 11, 7)
            symbol += min(zeros, 138)
        else:
            bits += code[_CODE_LENGTHS.get(symbol, 0)]
            symbol += 1
    return bits + code[1]  # the one distance, 1, has 1 bit


def _token_codes() -> tuple[np.ndarray, np.ndarray]:
    """(286, k) uint8 code bits of each symbol, a repeat's extra and distance bits included; which are used."""
    words = _prefix_code(_CODE_LENGTHS)
    for symbol, length in _REPEATS:
        extra, start = _EXTRA[symbol]
        words[symbol] = [*words[symbol], *_lowest_first(length - start, extra), 0]
    codes = np.zeros((max(words) + 1, max(map(len, words.values()))), dtype=np.uint8)
    used = np.zeros(codes.shape, dtype=bool)
    for symbol, word in words.items():
        codes[symbol, : len(word)] = word
        used[symbol, : len(word)] = True
    return codes, used


_END = 256
_REPEATS = ((285, 258), (271, 30), (262, 8))  # symbol, and how many zeros it repeats
_EXTRA = {285: (0, 258), 271: (2, 27), 262: (0, 8)}  # symbol -> its extra bits, and the smallest count
_CODE_LENGTHS = {0: 1, 255: 2, 102: 4, 204: 4, 271: 4, 262: 5, 285: 6, _END: 6}  # Huffman's for DocMNIST
_DEFLATE_HEADER = np.array(_deflate_header(), dtype=np.uint8)
_CODES, _CODE_USED = _token_codes()
