"""Pictures of Pathfinder: two dashed snakes, discs on two of their ends, and shorter snakes to mislead."""

import functools
import math
from typing import NamedTuple

import numba
import numpy as np
from PIL import Image, ImageDraw

SCALE = 2  # lines and discs are drawn at this multiple of the size, then made smaller
TRIES = 2000  # of the two snakes, in one call of the kernel: between calls an interrupt is heard


class Look(NamedTuple):
    """How pictures of a size are drawn; lengths in pixels.

    Source: lra_benchmarks/data/pathfinder.py of google-research/long-range-arena, its docstring; what is not there is
    the default of drewlinsley/pathfinder (commit ab9c130), snakes2_wrapper.py.
    """

    padding: int  # of the frame that nothing crosses
    margins: tuple[int, ...]  # kept free around a paddle; a picture draws one
    paddle: int  # length of a dash
    thickness: float
    marker: float  # radius of a disc
    seeds: int  # from the start of one snake to that of the other
    continuity: float  # higher is straighter
    distractors: int  # paddles in all of them at most
    snake_contrast: float
    paddle_contrast: float


LOOKS = {
    32: Look(1, (1,), 2, 0.5, 1.5, 7, 1.0, 20, 2.0, 0.75),
    64: Look(1, (1,), 5, 1.0, 2.5, 12, 1.8, 22, 0.8, 1.0),
    128: Look(1, (2, 3), 5, 1.5, 3.0, 20, 1.8, 35, 0.9, 1.0),
    256: Look(22, (3,), 5, 2.0, 5.0, 27, 1.8, 30, 1.0, 1.0),
}


class Tables(NamedTuple):
    """What depends on a look and a margin alone. Orientations are numbered: first the steps, then whole degrees.

    Attributes:
        size, padding, seeds, paddle, margin: of the look.
        sines, cosines: of every orientation.
        lines, footprints: of the paddle that goes back along a step, or on along a degree, around the pixel it
            starts at, (orientations, S, S) of 0..1; the footprint is the line and its margin.
        steps: from a pivot to the head of the next paddle, pixels (n, 2).
        weights: how likely each step is after an orientation, (orientations, n).
        disc: pixels within the margin, (k, 2).
        stems: pixels of the footprint of a paddle that starts at a pixel, for whole degrees, (360, most, 2).
        stem_sizes: how many they are; 0 for a degree at which the authors' search finds no place, whatever is taken:
            where all these pixels of a pixel at the border are beyond it, OpenCV's dilation has its least number.
    """

    size: int
    padding: int
    seeds: int
    paddle: int
    margin: int
    sines: np.ndarray
    cosines: np.ndarray
    lines: np.ndarray
    footprints: np.ndarray
    steps: np.ndarray
    weights: np.ndarray
    disc: np.ndarray
    stems: np.ndarray
    stem_sizes: np.ndarray


def _disc(radius: int) -> np.ndarray:
    """Pixels at most so far from (0, 0)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(x**2 + y**2 <= radius**2) - radius


def _smaller(image: np.ndarray, size: int) -> np.ndarray:
    """A picture of 0 and 255 at SCALE times the size, as 0..1."""
    return np.asarray(Image.fromarray(image.astype(np.uint8)).resize((size, size), Image.Resampling.LANCZOS)) / 255


def _paddle(look: Look, margin: int, orientation: float) -> tuple[np.ndarray, np.ndarray]:
    """The line from the middle of a small picture on, and its footprint."""
    reach = look.paddle + math.ceil(look.thickness) + margin
    middle, side = reach * SCALE, 2 * reach * SCALE + 1
    end = [math.ceil(middle + look.paddle * SCALE * turn(orientation)) for turn in (math.cos, math.sin)]
    blown = Image.new("F", (side, side))
    ImageDraw.Draw(blown).line([(middle, middle), tuple(end)], fill=255.0, width=round(look.thickness * SCALE))
    line = np.asarray(blown)
    wide = np.pad(line, margin * SCALE)
    around = [wide[y : y + side, x : x + side] for y, x in _disc(margin * SCALE) + margin * SCALE]
    return _smaller(line, 2 * reach + 1), _smaller(np.max(around, axis=0), 2 * reach + 1)


@functools.lru_cache(maxsize=16)
def tables(size: int, margin: int) -> Tables:
    """The tables of a size, for one of its margins."""
    look = LOOKS[size]
    step = look.paddle + margin
    angles = np.deg2rad(np.arange(0, 360, 360 / (2 * step * math.pi)))
    around = np.stack([np.sin(angles), np.cos(angles)], axis=1) * step
    steps = np.unique(np.floor(size + around).astype(np.int64) - size, axis=0)
    taken = np.arctan2(steps[:, 0], steps[:, 1])
    degrees = np.deg2rad(np.arange(-180, 180))
    orientations = np.concatenate([taken, degrees])
    turn = np.abs(taken - orientations[:, None])
    turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * look.continuity, math.pi / 2)
    back = np.where(taken < 0, taken + math.pi, taken - math.pi)
    paddles = [_paddle(look, margin, angle) for angle in np.concatenate([back, degrees])]
    lines, footprints = (np.stack(one).astype(np.float32).astype(np.float64) for one in zip(*paddles))
    stems = []
    for footprint in footprints[len(taken) :]:  # seen through a window of 2 step + 1, off its middle by one
        pixels = np.argwhere(footprint == 1) - footprint.shape[0] // 2 + 1
        pixels = pixels[(np.abs(pixels) <= step).all(axis=1)]
        reached = np.zeros((size, size), dtype=bool)
        for y, x in pixels:
            reached[max(0, -y) : size - max(0, y), max(0, -x) : size - max(0, x)] = True
        stems.append(pixels if reached.all() else pixels[:0])
    most = max(map(len, stems))
    return Tables(
        *(size, look.padding, look.seeds, look.paddle, margin),
        *(np.sin(orientations), np.cos(orientations), lines, footprints, steps),
        np.maximum(np.cos(turn), 0) ** 2,
        _disc(margin),
        np.stack([np.pad(stem, ((0, most - len(stem)), (0, 0))) for stem in stems]),
        np.array([len(stem) for stem in stems]),
    )


@numba.njit(cache=True)
def _go(y: int, x: int, sine: float, cosine: float, distance: int) -> tuple[int, int]:
    return math.ceil(y + distance * sine), math.ceil(x + distance * cosine)


@numba.njit(cache=True)
def _inside(size: int, y: int, x: int) -> bool:
    return 0 <= y < size and 0 <= x < size


@numba.njit(cache=True)
def _paint(onto: np.ndarray, stamp: np.ndarray, y: int, x: int, contrast: float) -> None:
    """The stamp around a pixel, where it is brighter."""
    size, reach = onto.shape[0], stamp.shape[0] // 2
    for i in range(max(0, y - reach), min(size, y + reach + 1)):
        for j in range(max(0, x - reach), min(size, x + reach + 1)):
            onto[i, j] = max(onto[i, j], contrast * stamp[i - y + reach, j - x + reach])


@numba.njit(cache=True)
def _free(mask: np.ndarray, stamp: np.ndarray, y: int, x: int) -> bool:
    """Whether a footprint around a pixel crosses none that is in the mask."""
    size, reach = mask.shape[0], stamp.shape[0] // 2
    for i in range(max(0, y - reach), min(size, y + reach + 1)):
        for j in range(max(0, x - reach), min(size, x + reach + 1)):
            if not mask[i, j] + stamp[i - y + reach, j - x + reach] < 1.8:
                return False
    return True


@numba.njit(cache=True)
def _extend(t, random, image, mask, snake, contrast, cumulative):
    """One more paddle of a snake: (pivot y, x, orientation, footprint's y, x, tip y, x); whether there is place."""
    size, n = t.size, len(t.steps)
    turn = snake[2]
    y, x = _go(snake[0], snake[1], t.sines[turn], t.cosines[turn], t.paddle + 2 * t.margin)
    total = 0.0
    for k in range(n):
        i, j, weight = y + t.steps[k, 0], x + t.steps[k, 1], t.weights[turn, k]
        if weight > 0 and _inside(size, i, j):
            worst = 0.0
            for d in range(len(t.disc)):
                v, w = i + t.disc[d, 0], j + t.disc[d, 1]
                if _inside(size, v, w):
                    worst = max(worst, mask[v, w])
            total += weight * (1 - worst)
        cumulative[k] = total
    if total < 1e-4:
        return False
    for _ in range(3):
        k = min(np.searchsorted(cumulative, total * random.random(), side="right"), n - 1)
        i, j = y + t.steps[k, 0], x + t.steps[k, 1]
        if _free(mask, t.footprints[k], i, j):
            _paint(image, t.lines[k], i, j, contrast)
            _paint(mask, t.footprints[snake[7]], snake[3], snake[4], 1.0)  # of the paddle before
            snake[0], snake[1], snake[2], snake[3], snake[4], snake[7] = y, x, k, i, j, k
            snake[5], snake[6] = i, j
            return True
    return False


@numba.njit(cache=True)
def _seed(t, image, snake, y, x, degree, contrast):
    """The first paddle of a snake, from a tail on; whether its ends are in the picture."""
    turn = len(t.steps) + degree
    head = _go(y, x, t.sines[turn], t.cosines[turn], t.paddle)
    reverse = len(t.steps) + (degree + 180) % 360
    pivot = _go(head[0], head[1], t.sines[reverse], t.cosines[reverse], t.paddle + t.margin)
    if not (_inside(t.size, head[0], head[1]) and _inside(t.size, pivot[0], pivot[1])):
        return False
    _paint(image, t.lines[turn], y, x, contrast)
    snake[0], snake[1], snake[2], snake[3], snake[4], snake[7] = pivot[0], pivot[1], turn, y, x, turn
    return True


@numba.njit(cache=True)
def _two_seeds(t, random, images, snakes, tips, contrast):
    """The first paddles of both: the one's in the middle, the other's so far from it; whether there is place."""
    low, high = 2 * t.seeds, t.size - 2 * t.seeds
    for k in range(3):
        degree = random.integers(0, 360)
        if t.stem_sizes[degree] == 0:
            return False
        stem = t.stems[degree, : t.stem_sizes[degree]]
        top, bottom = low - stem[:, 0].min(), high - stem[:, 0].max()
        left, right = low - stem[:, 1].min(), high - stem[:, 1].max()
        if bottom <= top or right <= left:
            return False
        y, x = random.integers(top, bottom), random.integers(left, right)
        if _seed(t, images[0], snakes[0], y, x, degree, contrast):
            break
        if k == 2:
            return False
    for _ in range(3):
        degree = random.integers(0, 360)
        away = random.integers(0, 360) * math.pi / 180
        v, w = round(y + t.seeds * math.sin(away)), round(x + t.seeds * math.cos(away))
        if _seed(t, images[1], snakes[1], v, w, degree, contrast):
            tips[0, 0], tips[0, 1], tips[1, 0], tips[1, 1] = y, x, v, w
            return True
    return False


@numba.njit(cache=True)
def _frame(mask, padding):
    mask[:] = 0
    mask[:padding] = 1
    mask[-padding:] = 1
    mask[:, :padding] = 1
    mask[:, -padding:] = 1


@numba.njit(cache=True, nogil=True)
def two_snakes(t, random, length, contrast, tries, images, mask, tips):
    """Two snakes of so many paddles, started anew until both have place.

    Args:
        t: the tables.
        random: a NumPy generator.
        length: paddles of a snake.
        contrast: brightness of a line.
        tries: how often to start at most.
        images: one a snake, (2, size, size), overwritten.
        mask: what is taken, (size, size), overwritten.
        tips: y, x of each snake's first and last end, (2, 4), overwritten.
    Returns:
        How many starts it took; 0 where none of them had place.
    """
    snakes = np.zeros((2, 8), dtype=np.int64)
    cumulative = np.zeros(len(t.steps))
    for attempt in range(1, tries + 1):
        images[:] = 0
        _frame(mask, t.padding)
        done = _two_seeds(t, random, images, snakes, tips, contrast)
        for _ in range(length - 1):
            for s in range(2):
                done = done and _extend(t, random, images[s], mask, snakes[s], contrast, cumulative)
            if not done:
                break
        if done:
            _paint(mask, t.footprints[snakes[1, 7]], snakes[1, 3], snakes[1, 4], 1.0)
            tips[:, 2:] = snakes[:, 5:7]
            return attempt
    return 0


@numba.njit(cache=True)
def _seed_anywhere(t, random, image, mask, snake, contrast, places):
    """The first paddle of a distractor; whether there is place."""
    size = t.size
    for _ in range(3):
        degree = random.integers(0, 360)
        if t.stem_sizes[degree] == 0:
            return False
        stem = t.stems[degree, : t.stem_sizes[degree]]
        clear = found = 0
        for y in range(size):
            for x in range(size):
                clear += mask[y, x] <= 0.3
                taken = False
                for k in range(len(stem)):
                    i, j = y + stem[k, 0], x + stem[k, 1]
                    if _inside(size, i, j) and (mask[i, j] > 0.3 or i == 0 or j == 0 or i == size - 1 or j == size - 1):
                        taken = True
                        break
                if not taken:
                    places[found, 0], places[found, 1] = y, x
                    found += 1
        if clear < 0.01 * size * size or found == 0:
            return False
        k = random.integers(0, found)
        if _seed(t, image, snake, places[k, 0], places[k, 1], degree, contrast):
            return True
    return False


@numba.njit(cache=True, nogil=True)
def distractors(t, random, count, length, contrast, image, mask):
    """As many shorter snakes as find place, each tried five times, painted onto the image and into the mask.

    Returns:
        How many they are.
    """
    snake = np.zeros(8, dtype=np.int64)
    cumulative = np.zeros(len(t.steps))
    places = np.zeros((t.size * t.size, 2), dtype=np.int64)
    placed = 0
    for _ in range(count):
        for _ in range(5):
            image_then, mask_then = image.copy(), mask.copy()
            done = _seed_anywhere(t, random, image, mask, snake, contrast, places)
            for _ in range(length - 1):
                done = done and _extend(t, random, image, mask, snake, contrast, cumulative)
            if done:
                _paint(mask, t.footprints[snake[7]], snake[3], snake[4], 1.0)
                placed += 1
                break
            image[:], mask[:] = image_then, mask_then
    return placed


def _marker(size: int, tip: np.ndarray, radius: float) -> np.ndarray:
    y, x = np.ogrid[: size * SCALE, : size * SCALE]
    return _smaller(255 * ((x - tip[1] * SCALE) ** 2 + (y - tip[0] * SCALE) ** 2 <= (radius * SCALE) ** 2), size)


class Picture(NamedTuple):
    """One example.

    Attributes:
        image: (size, size) of uint8.
        connected: whether the discs are on the two ends of one snake.
        starts: how often the two snakes were started.
        placed: how many distractors found place.
        snakes: both alone, (2, size, size) of floats.
        tips: y, x of the first and the last end of each, (2, 4).
    """

    image: np.ndarray
    connected: bool
    starts: int
    placed: int
    snakes: np.ndarray
    tips: np.ndarray


def draw(random: np.random.Generator, size: int, paddles: int = 14) -> Picture:
    """Draw one picture.

    Args:
        random: every number that is drawn comes from it.
        size: 32, 64, 128 or 256.
        paddles: of a snake: 14 is hard, 9 intermediate, 6 easy.
    """
    look = LOOKS[size]
    connected = bool(random.integers(2))
    t = tables(size, int(random.choice(look.margins)))
    snakes, mask, tips = np.zeros((2, size, size)), np.zeros((size, size)), np.zeros((2, 4), dtype=np.int64)
    starts = 0
    contrast = look.paddle_contrast * look.snake_contrast
    while (tries := two_snakes(t, random, paddles, contrast, TRIES, snakes, mask, tips)) == 0:
        starts += TRIES
    image, short = snakes.max(axis=0), paddles // 3
    placed = distractors(t, random, look.distractors // short, short, look.snake_contrast, image, mask)
    first = int(random.integers(2))
    last = first if connected else 1 - first
    image = np.maximum(image, _marker(size, tips[first, :2], look.marker))
    image = np.maximum(image, _marker(size, tips[last, 2:], look.marker))
    low, high = image.min(), image.max()
    scaled = (image - low) * (255 / (high - low)) + 0.5
    return Picture(scaled.astype(np.uint8), connected, starts + tries, placed, snakes, tips)
