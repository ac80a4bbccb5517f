"""Image classification with few pictures: data in CoOp's layouts, its sampling of shots, its base and new classes.

A data set's folder holds a `split_zhou_*.json`, or FGVC Aircraft's lists, or a folder of pictures per class. All give
`Labelled`; `few_shot` and `class_group` cut out what a protocol trains and tests on.
"""

import logging
import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .classification_sets import DATA_SETS, PLAIN_TEMPLATE, DataSet
from .columns import kind_of, with_pictures
from .reading import is_picture
from .sources import (
    HubPicture,
    PictureSource,
    check_columns,
    check_pictures,
    inside,
    load_hub_splits,
    read_json,
    read_lines,
)

logger = logging.getLogger(__name__)

Item = tuple[PictureSource, int]  # a picture and its label
VAL_SHOTS = 4  # at most, in CoOp
UNLABELLED = (None, -1)  # how data sets of the hub mark a test split whose labels are secret
UNSPLIT = (0.5, 0.2)  # shares of train and val that CoOp takes from folders without splits


@dataclass(frozen=True)
class Labelled:
    """Class names by label, and the items of each split. Names may repeat (CoOp's ImageNet has two twice)."""

    class_names: list[str]
    train: list[Item]
    val: list[Item]
    test: list[Item]


def read_data_set(folder: str | Path, name: str | None = None, training: bool = True) -> Labelled:
    """A data set in whichever of the known layouts its folder has.

    Args:
        folder: with `split_zhou_*.json`, or `variants.txt` and `images_variant_*.txt` (FGVC Aircraft), or pictures in
            `<split>/<class>/` or `<class>/`, themselves or in the data set's folder of pictures (`images`, `2750`,
            ...). Where there are no splits, half of each class is for training, 20 % for validation, as in CoOp.
        name: one of `DATA_SETS`; it knows the folder of pictures and how folder names become class names.
        training: `False` for an evaluation alone: training pictures may then be missing.

    Raises:
        FileNotFoundError: where there is nothing of this kind, or pictures are missing: their number and the first.
        ValueError: for annotations of another format, or test pictures of classes that training does not have.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with a data set.")
    row = DATA_SETS[name] if name else None
    files = sorted(folder.glob("split_zhou_*.json"))
    if len(files) > 1:
        raise ValueError(f"{folder} has several splits: {[file.name for file in files]}. Keep the one that is meant.")
    if files:
        return _read_zhou(files[0], row, training)
    if (folder / "variants.txt").is_file():
        return _read_aircraft(folder, training)
    return _read_folders(folder, row or DataSet("images"), training)


def _labelled(names: dict[int, str], splits: dict[str, list[Item]], where: str, training: bool) -> Labelled:
    """Checked, with labels from 0 in the order of the original ones."""
    labels = sorted({label for _, label in splits["train"]})
    if not labels and not training:
        labels = sorted({label for items in splits.values() for _, label in items})
    if not labels or not splits["test"]:
        raise ValueError(f"{where} has no pictures to {'test' if labels else 'train'} on.")
    number = {label: index for index, label in enumerate(labels)}
    unknown = sorted({names[label] for split in ("val", "test") for _, label in splits[split] if label not in number})
    if unknown:
        raise ValueError(f"{where}: {len(unknown)} classes have no pictures to train on, e.g. {unknown[:3]}.")
    renumbered = {split: [(picture, number[label]) for picture, label in items] for split, items in splits.items()}
    return Labelled([names[label] for label in labels], **renumbered)


# CoOp's JSON


def _read_zhou(file: Path, row: DataSet | None, training: bool) -> Labelled:
    content = read_json(file, "CoOp's split of a data set")
    try:
        rows = {
            split: [(str(path), int(label), str(name)) for path, label, name in content[split]]
            for split in ("train", "val", "test")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file} has not the format {{"train": [[path, label, class name], ...], "val": ..., "test": ...}}: '
            f"{error!r}."
        ) from error
    names: dict[int, str] = {}
    for _, label, name in (item for items in rows.values() for item in items):
        if names.setdefault(label, name) != name:
            raise ValueError(f"{file} has two names for class {label}: {names[label]!r} and {name!r}.")
    example = next((path for split in ("test", "val", "train") for path, _, _ in rows[split]), "")
    image_dir = file.parent / row.image_dir if row else _find_image_dir(file.parent, example)
    splits: dict[str, list[Item]] = {
        split: [(inside(image_dir, path), label) for path, label, _ in items] for split, items in rows.items()
    }
    _check_pictures(splits, training, f"{file.name} names them; they are looked for in {image_dir}.")
    return _labelled(names, splits, str(file), training)


def _find_image_dir(folder: Path, example: str) -> Path:
    """The picture folder of a data set outside of CoOp's list: the folder itself, or its subfolder with pictures."""
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return next((path for path in candidates if inside(path, example).is_file()), folder)


def _check_pictures(splits: dict[str, list[Item]], training: bool, remedy: str) -> None:
    """All pictures must be there; without training only the test's, and the others may not have been downloaded.

    Validation pictures that are not there are then left out.
    """
    needed = ["train", "val", "test"] if training else ["test"]
    check_pictures([picture for split in needed for picture, _ in splits[split]], remedy)
    if not all(isinstance(picture, Path) and picture.is_file() for picture, _ in splits["val"]):
        logger.info("Validation pictures are missing: there will be no val_accuracy.")
        splits["val"] = []


# FGVC Aircraft


def _read_aircraft(folder: Path, training: bool) -> Labelled:
    names = dict(enumerate(_lines(folder / "variants.txt")))
    label_of = {name: label for label, name in names.items()}
    splits: dict[str, list[Item]] = {}
    for split in ("train", "val", "test"):
        file = folder / f"images_variant_{split}.txt"
        splits[split] = []
        for line in _lines(file):
            picture, _, variant = line.partition(" ")
            if variant not in label_of:
                raise ValueError(f"{file}: {variant!r} is none of the {len(names)} variants of variants.txt.")
            splits[split].append((inside(folder / "images", f"{picture}.jpg"), label_of[variant]))
    _check_pictures(splits, training, f"They are looked for in {folder / 'images'}.")
    return _labelled(names, splits, str(folder), training)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    return [line.strip() for line in read_lines(file) if line.strip()]


# A folder per class


def _read_folders(folder: Path, row: DataSet, training: bool) -> Labelled:
    root = folder / row.image_dir if (folder / row.image_dir).is_dir() else folder
    names = _wordnet_names(folder)
    if not (root / "train").is_dir() and (training or not (root / "test").is_dir()):
        found = _by_class(root, row.ignored)
        splits = _cut(found)
    else:
        val = next((root / name for name in ("val", "validation", "valid") if (root / name).is_dir()), None)
        test = root / "test" if (root / "test").is_dir() else val  # ImageNet: val is for testing
        if test is None:
            raise FileNotFoundError(f"{root} has a folder `train`, but neither `test` nor `val`.")
        of_split = {"train": root / "train", "val": val if val != test else None, "test": test}
        splits = {split: _by_class(path, row.ignored) if path else {} for split, path in of_split.items()}
        found = {key: [] for by_class in splits.values() for key in by_class}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no data set: neither a split_zhou_*.json, nor variants.txt, nor folders of pictures."
        )
    label_of = {key: label for label, key in enumerate(sorted(found))}
    items: dict[str, list[Item]] = {
        split: [(path, label_of[key]) for key in sorted(by_class) for path in by_class[key]]
        for split, by_class in splits.items()
    }
    class_names = {label: names.get(key) or row.class_name(key) for key, label in label_of.items()}
    return _labelled(class_names, items, str(folder), training)


def _by_class(root: Path, ignored: tuple[str, ...]) -> dict[str, list[Path]]:
    """`{path of the class's folder within root: its pictures}`, sorted."""
    found = defaultdict(list)
    for path in sorted(root.rglob("*")):
        key = path.parent.relative_to(root).as_posix()
        if key not in (".", *ignored) and is_picture(path):
            found[key].append(path)
    return dict(found)


def _cut(by_class: dict[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
    """Splits of a data set that has none: the same ones every time."""
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}, "test": {}}
    for key, paths in by_class.items():
        shuffled = random.Random(key).sample(paths, len(paths))
        train, val = (round(share * len(paths)) for share in UNSPLIT)
        parts = shuffled[:train], shuffled[train : train + val], shuffled[train + val :]
        for split, part in zip(splits.values(), parts, strict=True):
            split[key] = part
    return splits


def _wordnet_names(folder: Path) -> dict[str, str]:
    """CoOp's `classnames.txt` of ImageNet, `{folder: class name}`, where there is one."""
    file = folder / "classnames.txt"
    names = {}
    for line in _lines(file) if file.is_file() else []:
        key, _, name = line.partition(" ")
        if not name:
            raise ValueError(f"{file}: {line!r} should be the name of a folder, a space, and the name of its class.")
        names[key] = name
    return names


# The hub


def read_hub(
    name: str,
    data_set: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    training: bool = True,
) -> Labelled:
    """A data set of the hub: splits `train`, `test` (or `validation`), labels with their names.

    Labels are `datasets.ClassLabel`, or texts, which are then the names, in alphabetical order. A test split whose
    labels are secret (-1, or none) is left alone; the validation split is tested on.

    Raises:
        ImportError, ValueError: where it cannot be loaded, or has other columns or splits, or columns of another kind.
    """
    hub = load_hub_splits(name)
    for split in ("train", "validation", "val", "valid", "test"):
        if split in hub:
            check_columns(hub[split], (image_column, label_column), name)
    val = next((hub[split] for split in ("validation", "val", "valid") if split in hub), None)
    test = hub.get("test", val)
    secret = test is not None and set(test.unique(label_column)) <= set(UNLABELLED)
    if secret and val is not None and test is not val:
        logger.info("The test split of %r has no labels: its validation split is tested on.", name)
        test = val
    if test is None or (training and "train" not in hub):
        raise ValueError(f"The data set {name!r} needs the splits train and test (or validation); it has {list(hub)}.")
    parts = {"train": hub.get("train"), "val": None if val is test else val, "test": test}
    names = _label_names([rows for rows in (test, *parts.values()) if rows], label_column, name)
    splits = {
        split: _hub_items(rows, names, image_column, label_column, f"{name!r}, split {split!r}") if rows else []
        for split, rows in parts.items()
    }
    rule = DATA_SETS[data_set].class_name if data_set else str
    return _labelled({label: rule(text) for label, text in enumerate(names)}, splits, f"{name!r}", training)


def _label_names(parts: list[Any], column: str, name: str) -> list[str]:
    """Names by label, of `ClassLabel`s or of labels that are texts, in any of the splits."""
    feature = parts[0].features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"The labels of {name!r} carry no class names: the column {column!r} is {feature}.")
    return sorted({text for rows in parts for text in rows.unique(column) if text is not None})


def _hub_items(rows: Any, names: list[str], image_column: str, label_column: str, where: str) -> list[Item]:
    rows = with_pictures(rows, [image_column], where)
    number = {text: label for label, text in enumerate(names)}
    items: list[Item] = []
    for row, label in enumerate(rows[label_column]):
        label = number.get(label) if isinstance(label, str) else label
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise ValueError(
                f"{where}, row {row}: the label is {kind_of(label)}, and should be from 0 to {len(names) - 1}. The "
                "labels of this split are secret, or it is of another data set: give it labels or leave it out."
            )
        items.append((HubPicture(rows, row, image_column), label))
    return items


def template_of(name: str | None) -> str:
    """The template of one of `DATA_SETS`; "a photo of a {}." for any other."""
    return DATA_SETS[name].template if name else PLAIN_TEMPLATE


# Protocols


def few_shot(data: Labelled, num_shots: int, seed: int) -> Labelled:
    """`num_shots` training pictures per class, at most 4 for validation, the whole test split.

    The draws are CoOp's: `random.sample` by class, classes in the order in which the split names them, first for
    training, then for validation. A class with fewer pictures gives all.
    """
    draws = random.Random(seed)
    per_class = Counter(label for _, label in data.train)
    scarce = sum(per_class[label] < num_shots for label in range(len(data.class_names)))
    if scarce and data.train:
        logger.info("%d of %d classes have fewer than %d training pictures.", scarce, len(per_class), num_shots)
    train = _shots(data.train, num_shots, draws)
    return replace(data, train=train, val=_shots(data.val, min(num_shots, VAL_SHOTS), draws))


def _shots(items: list[Item], num_shots: int, draws: random.Random) -> list[Item]:
    by_label: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_label[item[1]].append(item)
    chosen: list[Item] = []
    for of_class in by_label.values():
        chosen += draws.sample(of_class, num_shots) if len(of_class) >= num_shots else of_class
    return chosen


def class_group(data: Labelled, group: str) -> Labelled:
    """The first half of the classes (`"base"`, the larger one), the second (`"new"`), or `"all"`; labels from 0."""
    if group == "all":
        return data
    half = math.ceil(len(data.class_names) / 2)
    start, stop = {"base": (0, half), "new": (half, len(data.class_names))}[group]
    if start == stop:
        raise ValueError("New classes need a data set of at least two classes.")

    def within(items: list[Item]) -> list[Item]:
        return [(picture, label - start) for picture, label in items if start <= label < stop]

    part = Labelled(data.class_names[start:stop], within(data.train), within(data.val), within(data.test))
    if not part.test:
        raise ValueError(f"There are no test pictures of the {len(part.class_names)} {group} classes.")
    return part


def harmonic_mean(base: float, new: float) -> float:
    """Harmonic mean of the accuracies on base and new classes; 0 if one of them is 0."""
    return 2 * base * new / (base + new) if base * new else 0.0
