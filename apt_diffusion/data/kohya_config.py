"""The TOML files of kohya's scripts, read as folders of ours.

Keys of a subset come from the subset, else from its data set, else from `[general]`. Settings of the whole run are not
taken from the file: they are named with the flags that they have here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

SAME = (
    "shuffle_caption", "keep_tokens", "caption_separator", "caption_prefix", "caption_suffix", "caption_dropout_rate",
    "caption_tag_dropout_rate", "enable_wildcard", "keep_tokens_separator", "secondary_separator",
)  # fmt: skip
RENAMED = {
    "image_dir": "instance_data_dir",
    "class_tokens": "instance_prompt",
    "num_repeats": "repeats",
    "alpha_mask": "masked_loss",
    "conditioning_data_dir": "mask_data_dir",
    "caption_extension": "caption_extension",
}
OF_A_SUBSET = RENAMED | dict(zip(SAME, SAME, strict=True))
OF_THE_RUN = {
    "resolution": "--resolution", "batch_size": "--train_batch_size", "enable_bucket": "--aspect_ratio_buckets",
    "min_bucket_reso": "--aspect_ratio_buckets", "max_bucket_reso": "--aspect_ratio_buckets",
    "bucket_reso_steps": "--aspect_ratio_buckets", "flip_aug": "--random_flip",
    "prior_loss_weight": "--prior_loss_weight", "validation_split": "--validation_split",
    "max_token_length": "--tokenizer_max_length", "resize_interpolation": "--image_interpolation_mode",
    "random_crop": "without --center_crop",
}  # fmt: skip
WITHOUT_INFLUENCE = ("cache_info", "debug_dataset", "is_reg", "subsets", "validation_seed", "skip_image_resolution")
Subset = dict[str, Any]


def is_kohyas(content: Mapping[str, Any]) -> bool:
    """Whether the content of a TOML file is one of kohya's scripts."""
    return "datasets" in content


def subsets(content: Mapping[str, Any]) -> Iterator[tuple[Subset, dict[str, tuple[str, str]], bool]]:
    """Of each subset: values by our keys, table and key where each stands, and whether it is of the class."""
    general = _table(content.get("general"))
    for d, dataset in enumerate(_tables(content.get("datasets"))):
        for s, subset in enumerate(_tables(dataset.get("subsets"))):
            values: Subset = {}
            places: dict[str, tuple[str, str]] = {}
            levels = (("general", general), (f"datasets[{d}]", dataset), (f"datasets[{d}].subsets[{s}]", subset))
            for name, level in levels:
                for key, ours in OF_A_SUBSET.items():
                    if key in level:
                        values[ours], places[ours] = level[key], (name, key)
            yield values, places | {"": (f"datasets[{d}].subsets[{s}]", "")}, subset.get("is_reg", False) is True


def unknown(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Table, key and what is wrong, for settings that the trainer here does not have."""
    yield from _wrong_types(content)
    for name, level in _levels(content):
        for key, value in level.items():
            if key in OF_A_SUBSET or key in OF_THE_RUN or key in WITHOUT_INFLUENCE:
                continue
            if value is True or value not in (0, None, "", 1.0):  # those are off, or defaults
                yield name, key, f"{key!r} of kohya's scripts is not here: take it out, or leave it off."
    for key in content:
        if key not in ("general", "datasets"):
            yield "", key, f"{key!r} is not known here."


def _wrong_types(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Whatever is no table where there should be one, and `is_reg` that is neither true nor false."""
    if not isinstance(content.get("general", {}), dict):
        yield "", "general", "[general] must be a table."
    if not _is_list_of_tables(content["datasets"]):
        yield "", "datasets", "each data set must be a table [[datasets]]."
    for d, dataset in enumerate(_tables(content["datasets"])):
        if not _is_list_of_tables(dataset.get("subsets", [])):
            yield f"datasets[{d}]", "subsets", "each subset must be a table [[datasets.subsets]]."
        for s, subset in enumerate(_tables(dataset.get("subsets"))):
            if not isinstance(subset.get("is_reg", False), bool):
                is_class = subset["is_reg"]
                yield f"datasets[{d}].subsets[{s}]", "is_reg", f"is_reg must be true or false, got {is_class!r}."


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(table, dict) for table in value)


def for_the_run(content: Mapping[str, Any]) -> list[str]:
    """Settings of the file that are flags here, and are not off: `"batch_size = 4 (--train_batch_size)"`."""
    found = [
        f"{key} = {value} ({OF_THE_RUN[key]})"
        for _, level in _levels(content)
        for key, value in level.items()
        if key in OF_THE_RUN and value not in (False, None)
    ]
    return list(dict.fromkeys(found))


def _levels(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "general", _table(content.get("general"))
    for d, dataset in enumerate(_tables(content.get("datasets"))):
        yield f"datasets[{d}]", dataset
        for s, subset in enumerate(_tables(dataset.get("subsets"))):
            yield f"datasets[{d}].subsets[{s}]", subset


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[Mapping[str, Any]]:
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []
