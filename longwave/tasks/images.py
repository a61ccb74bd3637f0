"""Pictures as sequences: pixel by pixel, in another order, row by row, or in patches."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from longwave.tasks.base import EVAL, opened, random_stream
from longwave.tasks.forms import Inputs, Row, Signal
from longwave.tasks.labelled import Labelled, Sets, by_class, existing_folder

DIGITS = Path(__file__).with_name("digits.npz")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
CIFAR = "CIFAR-10 is cifar-10-binary.tar.gz, at www.cs.toronto.edu/~kriz/cifar.html"
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue: ITU-R 601
SEEN = 2000  # pictures of the training set whose mean and deviation stand for all


class Arrays(Sequence):
    """Pictures in memory with their labels.

    Args:
        pictures: (n, H, W) or (n, H, W, channels) uint8.
        labels: (n,), whole numbers.
        names: of the classes.
        where: they come from, for errors.
    Raises:
        ValueError: where they do not fit together.
    """

    def __init__(self, pictures: np.ndarray, labels: np.ndarray, names: list[str], where: str):
        if pictures.ndim not in (3, 4) or pictures.dtype != np.uint8 or labels.shape != (len(pictures),):
            raise ValueError(
                f"{where} must be pictures (n, H, W) or (n, H, W, channels) uint8 with labels (n,); got "
                f"{pictures.shape} {pictures.dtype} with {labels.shape}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise ValueError(
                f"{where} has labels {int(labels.min())}..{int(labels.max())}, and they lie in 0..{len(names) - 1}"
            )
        self.pictures, self.labels = pictures, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: Any) -> tuple[np.ndarray, int]:
        return self.pictures[number], int(self.labels[number])


def _of_npz(file: Path) -> Sets:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{file} is not a readable .npz of plain arrays: {error}") from error
    if {"images", "labels"} <= arrays.keys():
        arrays |= {"x_train": arrays["images"], "y_train": arrays["labels"]}
    if not {"x_train", "y_train"} <= arrays.keys():
        raise ValueError(
            f"{file} has arrays {', '.join(sorted(arrays))}; it needs x_train and y_train (and for a test set x_test "
            "and y_test), or images and labels"
        )
    names = [str(label) for label in range(int(arrays["y_train"].max(initial=0)) + 1)]
    train = Arrays(arrays["x_train"], arrays["y_train"], names, f"{file}: x_train, y_train")
    if "x_test" not in arrays:
        return Sets(names, train, [])
    return Sets(names, train, Arrays(arrays["x_test"], arrays["y_test"], names, f"{file}: x_test, y_test"))


def _of_cifar(folder: Path) -> Sets:
    """Source: www.cs.toronto.edu/~kriz/cifar.html, "Binary version": a label, then 1,024 red, green and blue bytes."""

    def read(files: list[Path]) -> Arrays:
        records = []
        for file in files:
            raw = np.fromfile(file, np.uint8)
            if not len(raw) or len(raw) % 3073:
                raise ValueError(f"{file} has {len(raw)} bytes, no multiple of the 3,073 of a picture; get it again")
            records.append(raw.reshape(-1, 3073))
        every = np.concatenate(records)
        pictures = every[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Arrays(pictures, every[:, 0], CIFAR_CLASSES, str(folder))

    test = folder / "test_batch.bin"
    return Sets(CIFAR_CLASSES, read(sorted(folder.glob("data_batch_*.bin"))), read([test]) if test.exists() else [])


def _of_mnist(folder: Path) -> Sets:
    """Source: LeCun et al. (1998), the IDX format of yann.lecun.com/exdb/mnist."""

    def read(stem: str) -> np.ndarray:
        file = next((path for path in (folder / stem, folder / f"{stem}.gz") if path.exists()), None)
        if file is None:
            raise ValueError(f"{folder} has no {stem} and no {stem}.gz")
        try:
            raw = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
        except (OSError, EOFError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        axes = raw[3] if len(raw) > 3 else 0
        shape = np.frombuffer(raw, ">i4", axes, 4)
        if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * axes + math.prod(shape.tolist()):
            raise ValueError(f"{file} is no whole IDX file of bytes; get it again")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)

    names = [str(digit) for digit in range(10)]
    train, test = (
        Arrays(read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte"), names, str(folder))
        for part in ("train", "t10k")
    )
    return Sets(names, train, test)


class Images(Labelled, name="images"):
    """What is in a picture? It is read as a sequence.

    Source: Le et al. (2015), arXiv:1504.00941, sec. 4.2, for pixels and their permutation; the Image task of the Long
    Range Arena is CIFAR-10 with `grey`; patches are those of Dosovitskiy et al. (2021), arXiv:2010.11929.

    Pictures are the 1,797 digits of 8 x 8 pixels that come with longwave (the last fifth is the test set), or those of
    `images`: an `.npz` of arrays x_train, y_train, x_test, y_test (or images, labels); a folder with CIFAR-10's binary
    files, or with MNIST's; or a folder of pictures with one folder a class, or such below `train` and `test`. Values
    are standardised by the training set's mean and deviation of each channel (of 2,000 of its pictures).

    Raises:
        ValueError: where there is nothing of the kind, or a picture is cut short or of another size, with its name.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"order": "patches", "patch": 2})

    images: str = "digits"
    """The word digits, an .npz file or a folder."""
    order: Literal["pixels", "permuted", "rows", "patches"] = "pixels"
    """What a step is: a pixel, row by row; a pixel, in an order drawn once; a row of pixels; a square of them."""
    patch: int = Field(4, ge=1)
    """Pixels along a side of a patch."""
    size: int | None = Field(None, ge=1)
    """Pixels along both sides, to which pictures are scaled; None leaves them as they are."""
    grey: bool = False
    """Whether colours become grey."""

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [] if self.images == "digits" else [self.images]

    @property
    def inputs(self) -> Inputs:
        """The channels of a step."""
        return Signal(self._first.shape[1])

    @property
    def longest(self) -> int:
        """Steps of a picture."""
        return len(self._first)

    def look(self) -> Sets:
        """Pictures by class."""
        if self.images == "digits":
            return _of_npz(DIGITS)
        path = Path(self.images).expanduser()
        if path.suffix == ".npz":
            return _of_npz(path)
        folder = existing_folder(self.images, f"give digits, an .npz file or a folder ({CIFAR})")
        if (folder / "data_batch_1.bin").exists():
            return _of_cifar(folder)
        if list(folder.glob("train-images-idx3-ubyte*")):
            return _of_mnist(folder)
        return by_class(folder, PICTURES, CIFAR)

    def picture(self, item: tuple[np.ndarray | Path, int]) -> np.ndarray:
        """(H, W, channels) of 0..255."""
        source, _ = item
        if isinstance(source, Path):
            try:
                with Image.open(source) as opened:
                    source = np.asarray(opened.convert("L" if opened.mode in ("1", "L") else "RGB"))
            except (OSError, UnidentifiedImageError, SyntaxError) as error:
                raise ValueError(f"{item[0]} is not a whole picture: {error}; mend it or take it out") from error
        if self.size is not None:
            source = np.asarray(Image.fromarray(source).resize((self.size, self.size), Image.Resampling.BILINEAR))
        pixels = source.reshape(*source.shape[:2], -1)
        return (pixels @ GREY)[..., None] if self.grey and pixels.shape[2] == 3 else pixels

    def image(self, inputs: Tensor) -> Tensor:
        """The picture of the steps, in which permuted pixels stay where they are read."""
        height, width, channels = self.picture(self._sets.train[0]).shape
        if self.order == "patches":
            p = self.patch
            inputs = inputs.view(height // p, width // p, p, p, channels).swapaxes(1, 2)
        return inputs.reshape(height, width, channels)

    def row(self, item: tuple[np.ndarray | Path, int]) -> Row:
        """Its steps and its class."""
        steps = self._steps(item)
        if steps.shape != self._first.shape:
            raise ValueError(
                f"{_called(item)} has {steps.shape[0]} steps of {steps.shape[1]} numbers and others have "
                f"{self._first.shape[0]} of {self._first.shape[1]}; set size to make them equal"
            )
        return Row(steps, item[1])

    def _steps(self, item: tuple[np.ndarray | Path, int]) -> np.ndarray:
        mean, deviation = self._scale
        pixels = self.picture(item)
        H, W, C = pixels.shape
        if len(mean) != C:
            raise ValueError(f"{_called(item)} has {C} channels and others have {len(mean)}; set grey: true")
        x = (pixels.astype(np.float32) - mean) / deviation
        if self.order == "rows":
            return x.reshape(H, W * C)
        if self.order == "patches":
            p = self.patch
            if H % p or W % p:
                raise ValueError(f"patch = {p} does not divide pictures of {H} x {W} pixels; take another, or set size")
            return x.reshape(H // p, p, W // p, p, C).swapaxes(1, 2).reshape(H * W // p**2, p * p * C)
        x = x.reshape(H * W, C)
        return x if self.order == "pixels" else x[random_stream(0, EVAL, 0).permutation(H * W)]

    @opened
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each channel."""
        train = self._sets.train
        pictures = [self.picture(train[number]) for number in range(0, len(train), max(1, len(train) // SEEN))]
        channels = pictures[0].shape[2]
        pixels = np.concatenate([one.reshape(-1, channels) for one in pictures if one.shape[2] == channels])
        return pixels.mean(0, np.float64).astype(np.float32), np.maximum(pixels.std(0, np.float64), 1).astype(
            np.float32
        )

    @opened
    def _first(self) -> np.ndarray:
        return self._steps(self._sets.train[0])


def _called(item: tuple[np.ndarray | Path, int]) -> str:
    return str(item[0]) if isinstance(item[0], Path) else "a picture"
