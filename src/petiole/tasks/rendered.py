"""Tasks that are drawn by our own code from a seed: position, orientation, counting.

Each has 800 train, 200 val and 1,000 test images of 64x64 RGB pixels on a background of one random colour, without
noise, and every class equally often, as far as that divides.

    position     where one shape stands from left to right, in 16 bins; its shape, colour, size, rotation, height vary
    orientation  where one shape points, in 16 bins counter-clockwise from the right; shape, colour, size, place vary
    counting     how many shapes there are, 1 to 8; the area they cover together is drawn without regard to their number
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .images import Arrays
from .task import Split, Task

SIZE = 64  # edge of an image [pixels]
_PARTS = (("train", 800), ("val", 200), ("test", 1000))
_OVERSAMPLING = 4  # drawn that much larger and averaged, so that a shift by part of a pixel shows
_CONTRAST = 120.0  # least distance between the colours of shape and background; the RGB cube's diagonal is 441
_GAP = 2.0  # least distance between two shapes [pixels]
_NUM_BINS = 16
_MAX_COUNT = 8

Points = NDArray[np.float64]  # corners, [n, 2]
Rng = np.random.Generator


def render_task(name: str, seed: int) -> Task:
    """Returns the task `position`, `orientation` or `counting`; the same seed gives the same pixels."""
    scene, classes = _SCENES[name]
    rng = np.random.default_rng([seed, *name.encode()])
    splits = []
    for part, count in _PARTS:
        labels = rng.permutation(np.arange(count) % len(classes))
        pixels = np.stack([_paint(scene(int(label), rng), rng) for label in labels])
        splits.append(Split(Arrays(pixels, f"{name}, {part}"), labels))
    return Task(name, classes, *splits)


def _position(label: int, rng: Rng) -> list[Points]:
    x = SIZE / 4 + SIZE / 2 * (label + rng.random()) / _NUM_BINS
    y = rng.uniform(SIZE / 4, SIZE * 3 / 4)
    shape = _rotated(_any(_SYMMETRIC, rng), rng.uniform(0, math.tau))
    return [shape * (rng.uniform(5, 15) / _radius(shape)) + (x, y)]  # 15 < 64 / 4: never cut by the edge


def _orientation(label: int, rng: Rng) -> list[Points]:
    angle = math.tau * (label + rng.random()) / _NUM_BINS
    radius = rng.uniform(10, 20)
    shape = _rotated(_any(_POINTING, rng), angle)
    return [shape * (radius / _radius(shape)) + rng.uniform(radius + 1, SIZE - radius - 1, 2)]


def _counting(label: int, rng: Rng) -> list[Points]:
    shares = rng.uniform(0.5, 1.5, label + 1)
    areas = rng.uniform(300, 600) * shares / shares.sum()
    shapes = [_rotated(_any(_SYMMETRIC, rng), rng.uniform(0, math.tau)) * math.sqrt(area) for area in areas]
    shapes.sort(key=_radius, reverse=True)
    while (centres := _scattered([_radius(shape) for shape in shapes], rng)) is None:
        pass  # ends: at 600 square pixels the shapes' circles fill less than half of the image
    return [shape + centre for shape, centre in zip(shapes, centres, strict=True)]


def _scattered(radii: list[float], rng: Rng) -> list[Points] | None:
    """Centres of circles that touch neither each other nor the edge; None where the first ones leave no room."""
    centres: list[Points] = []
    for radius in radii:
        for centre in rng.uniform(radius + 1, SIZE - radius - 1, (40, 2)):
            if all(math.dist(centre, c) > radius + r + _GAP for c, r in zip(centres, radii, strict=False)):
                centres.append(centre)
                break
        else:
            return None
    return centres


def _paint(shapes: list[Points], rng: Rng) -> NDArray[np.uint8]:
    """An image `[H, W, 3]` of shapes in pixel coordinates, in random colours."""
    background = _colour(rng)
    image = Image.new("RGB", (SIZE * _OVERSAMPLING,) * 2, background)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        while math.dist(colour := _colour(rng), background) < _CONTRAST:
            pass
        corners = shape * _OVERSAMPLING - 0.5  # Pillow counts from the middle of the first pixel
        pen.polygon([(x, y) for x, y in corners.tolist()], fill=colour)
    return np.asarray(image.reduce(_OVERSAMPLING))


def _colour(rng: Rng) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _any(shapes: tuple[Points, ...], rng: Rng) -> Points:
    return shapes[rng.integers(len(shapes))]


def _rotated(shape: Points, angle: float) -> Points:
    """A shape turned counter-clockwise as seen: an image's y axis points down."""
    cos, sin = math.cos(angle), math.sin(angle)
    return shape @ np.array([[cos, -sin], [sin, cos]])


def _radius(shape: Points) -> float:
    return float(np.linalg.norm(shape, axis=1).max())


def _unit(corners: list[tuple[float, float]]) -> Points:
    """A polygon of area 1 with its centroid at the origin (shoelace formula)."""
    p = np.array(corners)
    q = np.roll(p, -1, axis=0)
    cross = p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]
    area = cross.sum() / 2
    centroid = ((p + q) * cross[:, None]).sum(axis=0) / (6 * area)
    return (p - centroid) / math.sqrt(abs(area))


def _ring(radii: list[float]) -> Points:
    steps = [math.tau * i / len(radii) for i in range(len(radii))]
    return _unit([(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, steps, strict=True)])


# disc, triangle, square, star
_SYMMETRIC = (_ring([1.0] * 40), _ring([1.0] * 3), _ring([1.0] * 4), _ring([1.0, 0.5] * 5))
# wedge, dart, drop: mirrored at the axis they point along, with the tip farthest from the centroid
_POINTING = (
    _unit([(1, 0), (-0.6, 0.45), (-0.6, -0.45)]),
    _unit([(1, 0), (-0.5, 0.4), (-0.25, 0), (-0.5, -0.4)]),
    _unit([(math.cos(t), 0.8 * math.sin(t) * math.sin(t / 2) ** 2) for t in (math.tau * i / 40 for i in range(40))]),
)
_BINS = tuple(str(i) for i in range(_NUM_BINS))
_SCENES = {
    "position": (_position, _BINS),
    "orientation": (_orientation, _BINS),
    "counting": (_counting, tuple(str(n + 1) for n in range(_MAX_COUNT))),
}
