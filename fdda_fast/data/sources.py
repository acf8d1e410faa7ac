"""Labelled image data sets: ImageFolder trees, IDX folders, scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import ImageFolder

from .idx import read_idx
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_image

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)
_IDX_STEMS = {"train": "train", "test": "t10k"}
_FOLDER_NAMES = {"train": ("train",), "test": ("val", "test")}


class ImageSource:
    """A labelled data set with random access.

    Attributes:
        name: what to call it in records.
        labels: int64 [N] tensor.
        class_names: one per class.
        preprocessing: how its images become network inputs.
        flip: whether a mirrored image keeps its class (for augmentation).
    """

    name: str
    labels: torch.Tensor
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """float32 [n, C, S, S], normalised, in the order of `indices`."""
        raise NotImplementedError

    def file_of(self, index: int) -> str:
        """The file that image `index` was read from."""
        raise NotImplementedError


class ArraySource(ImageSource):
    """Images held in memory.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: integers [N].
        file: the file they came from.
    """

    def __init__(
        self,
        name: str,
        pixels: torch.Tensor,
        labels: np.ndarray,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        file: str,
        flip: bool,
    ) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{file}: {len(pixels)} images but {len(labels)} labels")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
            raise ValueError(
                f"{file}: labels must lie in 0..{len(class_names) - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        self.name = name
        self.pixels = pixels
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.flip = flip
        self._file = file

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        index = torch.as_tensor(indices, dtype=torch.long)
        return self.preprocessing.normalize(self.pixels[index])

    def file_of(self, index: int) -> str:
        return self._file


class FolderSource(ImageSource):
    """An ImageFolder tree (`root/class/image.png`), read on demand."""

    flip = True

    def __init__(self, name: str, root: Path, preprocessing: Preprocessing) -> None:
        try:
            self._folder = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise ValueError(
                f"{root}: not an ImageFolder tree (root/class/image files): {error}"
            ) from error
        self._root = root
        self.name = name
        self.labels = torch.tensor(self._folder.targets, dtype=torch.long)
        self.class_names = tuple(self._folder.classes)
        self.preprocessing = preprocessing

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        size = self.preprocessing.image_size
        out = torch.empty(len(indices), self.preprocessing.channels, size, size)
        for row, index in enumerate(indices):
            # Not the folder's loader, which makes RGB of everything.
            out[row] = read_image(self._folder.samples[int(index)][0], self.preprocessing)
        return out

    def file_of(self, index: int) -> str:
        return str(Path(self._folder.samples[int(index)][0]).relative_to(self._root))


def open_source(
    spec: str,
    split: str,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageSource:
    """Opens a data set by name or path.

    Args:
        spec: `digits` (shipped with scikit-learn), `fashion-mnist` (Debian's package
            dataset-fashion-mnist), a folder of IDX files (`train-images-idx3-ubyte[.gz]` ...), or
            an ImageFolder tree with or without `train/` and `val/` (or `test/`) below it.
        split: `train` or `test`. Digits: 70 % / 30 %, stratified. A tree without split folders
            serves as either.
        image_size, resize: of ImageFolder trees; by default 224, and image_size * 256 / 224, as is
            usual for ImageNet. The other sets' images are taken as they are.
        mean, std: of folders; by default ImageNet's of trees, Fashion-MNIST's of IDX files. Those
            of `digits` and `fashion-mnist` are fixed.

    Raises:
        ValueError: unknown spec or split, damaged data, or an option that the set does not follow.
    """
    if split not in _IDX_STEMS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    given = {"image_size": image_size, "resize": resize, "mean": mean, "std": std}
    if spec == "digits":
        return _as_given(_digits(split), given)
    if spec == "fashion-mnist":
        return _as_given(_idx_folder("fashion-mnist", FASHION_MNIST_DIR, split), given)
    root = Path(spec)
    if not root.is_dir():
        raise ValueError(
            f"data set {spec!r} is neither 'digits', 'fashion-mnist' nor an existing folder"
        )
    if _idx_file(root, split, "images") is not None:
        mean = mean if mean is not None else FASHION_MNIST_MEAN
        std = std if std is not None else FASHION_MNIST_STD
        return _as_given(_idx_folder(root.name, root, split, mean, std), given)
    root = _split_folder(root, split)
    image_size = image_size if image_size is not None else 224
    resize = resize if resize is not None else round(image_size * 256 / 224)
    mean = mean if mean is not None else IMAGENET_MEAN
    std = std if std is not None else IMAGENET_STD
    preprocessing = Preprocessing(image_size, resize, tuple(mean), tuple(std))
    return FolderSource(Path(spec).name, root, preprocessing)


def _as_given(source: ArraySource, given: Mapping[str, Any]) -> ArraySource:
    """The source; ValueError where it is not what was asked for, since it cannot be changed."""
    for name, own in source.preprocessing.to_dict().items():
        value = given[name]
        if value is not None and (tuple(value) if isinstance(own, tuple) else value) != own:
            raise ValueError(f"{name}: expected {own}, as {source.name} has it, got {value}")
    return source


def _split_folder(root: Path, split: str) -> Path:
    """`root/train`, `root/val` or `root/test`; `root` itself where it has none of them."""
    folders = {
        name: next((root / n for n in names if (root / n).is_dir()), None)
        for name, names in _FOLDER_NAMES.items()
    }
    present = [folder for folder in folders.values() if folder is not None]
    if not present:
        return root
    if folders[split] is None:
        raise ValueError(
            f"{root} has {present[0].name}/ but no {'/ or '.join(_FOLDER_NAMES[split])}/"
        )
    # Labels are the ranks of the class folders' names, so these must be the same in both.
    classes = [{d.name for d in folder.iterdir() if d.is_dir()} for folder in present]
    if len(classes) == 2 and classes[0] != classes[1]:
        raise ValueError(
            f"{root}: {present[0].name}/ and {present[1].name}/ have different classes: "
            f"{sorted(classes[0] ^ classes[1])[:5]}"
        )
    return folders[split]


def _digits(split: str) -> ArraySource:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=0.3, stratify=data.target, random_state=0
    )
    rows = np.sort(train if split == "train" else test)
    return ArraySource(
        "digits",
        torch.from_numpy(pixels[rows]),
        data.target[rows],
        [str(d) for d in range(10)],
        Preprocessing(image_size=8, resize=8, mean=(0.3053,), std=(0.3763,)),
        f"sklearn.datasets.load_digits ({split})",
        flip=False,
    )


def _idx_file(root: Path, split: str, kind: str) -> Path | None:
    dimensions = {"images": 3, "labels": 1}[kind]
    stem = f"{_IDX_STEMS[split]}-{kind}-idx{dimensions}-ubyte"
    return next((p for p in (root / stem, root / f"{stem}.gz") if p.is_file()), None)


def _idx_folder(
    name: str,
    root: Path,
    split: str,
    mean: Sequence[float] = FASHION_MNIST_MEAN,
    std: Sequence[float] = FASHION_MNIST_STD,
) -> ArraySource:
    images_file, labels_file = (_idx_file(root, split, kind) for kind in ("images", "labels"))
    if images_file is None or labels_file is None:
        hint = (
            " (Debian: apt-get install dataset-fashion-mnist)" if root == FASHION_MNIST_DIR else ""
        )
        raise ValueError(f"{root}: no IDX images and labels for split {split!r}{hint}")
    pixels, labels = read_idx(images_file), read_idx(labels_file)
    if pixels.ndim != 3 or pixels.shape[1] != pixels.shape[2] or labels.ndim != 1:
        raise ValueError(
            f"{images_file}: expected square images [N, S, S] and labels [N], "
            f"got {pixels.shape} and {labels.shape}"
        )
    is_fashion = name == "fashion-mnist"
    names = FASHION_MNIST_CLASSES if is_fashion else [str(c) for c in range(int(labels.max()) + 1)]
    size = pixels.shape[1]
    return ArraySource(
        name,
        torch.from_numpy(pixels.copy())[:, None],
        labels,
        names,
        Preprocessing(size, size, tuple(mean), tuple(std)),
        str(images_file),
        flip=is_fashion,
    )
