"""The pictures of a run: of the subject, of its class, and held out; and the report of `--check_data` on them."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...data.buckets import Size, generate_buckets, parse_buckets
from ...data.dataset_config import DatasetConfig
from ...data.dreambooth import Framing
from ...data.folders import FolderOptions, Scan, has_pictures, scan_pictures
from ...data.masks import check_any_mask
from ...data.pictures import Picture
from ...data.report import report
from ...data.rows import CAPTION_COLUMN, scan_rows
from ..checkpoints import Checkpoint
from .data_arguments import caption_options, dataset_config
from .stable_diffusion import StableDiffusionBase

logger = logging.getLogger(__name__)


@dataclass
class PictureSets:
    """What the folders of a run hold.

    Attributes:
        subject: at least one.
        of_class: none where the run has no class, or its folder no pictures yet.
        held_out: where they have a folder of their own.
    """

    subject: list[Scan]
    of_class: list[Scan]
    held_out: Scan | None

    @property
    def scans(self) -> list[Scan]:
        """All of them."""
        return [*self.subject, *self.of_class, *([] if self.held_out is None else [self.held_out])]

    @property
    def problems(self) -> list[str]:
        """What stops the run."""
        return [problem for scan in self.scans for problem in scan.problems]

    def pictures(self) -> list[Picture]:
        """Those of the subject; `ValueError` for a problem."""
        return [picture for scan in self.subject for picture in scan.checked()]


def scan_picture_sets(args: argparse.Namespace) -> PictureSets:
    """Looks at all pictures that the flags name."""
    column = args.caption_column or CAPTION_COLUMN
    masks = None if args.mask_data_dir is None else Path(args.mask_data_dir)
    options = FolderOptions(
        column, args.recursive, "--instance_prompt", caption_options(args), args.masked_loss, masks
    )
    config = None if args.dataset_config is None else dataset_config(args)
    others = _folders_by_role(args, config)
    held_out = None
    if args.validation_data_dir is not None:
        of_folder = replace(options, mask_folder=None)  # which are those of the pictures that are trained on
        within = others | _subjects_folders(args, config)
        held_out = scan_pictures(args.validation_data_dir, args.instance_prompt, of_folder, within)
    if args.dataset_name is not None:
        columns = args.image_column, args.caption_column
        scan = scan_rows(args.dataset_name, args.dataset_config_name, *columns, args.instance_prompt, options)
        return PictureSets([_with_masks(scan, options)], scan_class_folder(args), held_out)
    if config is None:
        subject = [_scan_subject(args.instance_data_dir, args.instance_prompt, options, others)]
        return PictureSets(subject, scan_class_folder(args), held_out)
    if config.for_the_run:
        logger.warning(
            "Not taken from %s, as they are flags of the whole run here: %s.",
            args.dataset_config, ", ".join(config.for_the_run),
        )  # fmt: skip
    subject = [_scan_subject(folder.path, folder.prompt, folder.options, others) for folder in config.folders]
    within = others | _subjects_folders(args, config)
    of_class = [scan_pictures(folder.path, folder.prompt, folder.options, within) for folder in config.of_class]
    return PictureSets(subject, of_class, held_out)


def _folders_by_role(args: argparse.Namespace, config: DatasetConfig | None) -> dict[Path, str]:
    """What folders beside the subject's hold: one that lies within another is not read as a part of it."""
    named: list[tuple[Path | str | None, str]] = [
        (args.mask_data_dir, "the folder of masks"),
        (args.class_data_dir if args.with_prior_preservation else None, "the folder of the class"),
        (args.validation_data_dir, "held out"),
    ]
    for folder in () if config is None else config.folders:
        named.append((folder.options.mask_folder, "the folder of masks"))
    named += [(folder.path, "the folder of the class") for folder in (() if config is None else config.of_class)]
    return {Path(folder): what for folder, what in named if folder is not None}


def _subjects_folders(args: argparse.Namespace, config: DatasetConfig | None) -> dict[Path, str]:
    given = [] if args.instance_data_dir is None else [Path(args.instance_data_dir)]
    folders = given if config is None else [folder.path for folder in config.folders]
    return dict.fromkeys(folders, "the folder of the subject")


def _scan_subject(folder: str | Path, prompt: str, options: FolderOptions, others: Mapping[Path, str]) -> Scan:
    return _with_masks(scan_pictures(folder, prompt, options, others), options)


def _with_masks(scan: Scan, options: FolderOptions) -> Scan:
    """Notes where there should be masks, and none is."""
    if options.masked:
        try:
            check_any_mask(scan.pictures, scan.folder, options.mask_folder)
        except ValueError as error:
            scan.problems.append(str(error))
    return scan


def scan_class_folder(args: argparse.Namespace) -> list[Scan]:
    """What `--class_data_dir` holds; nothing where it has no pictures yet."""
    if not args.with_prior_preservation:
        return []
    others = _folders_by_role(args, None) | _subjects_folders(args, None)
    if not has_pictures(args.class_data_dir, args.recursive, others):
        return []
    options = FolderOptions(args.caption_column or CAPTION_COLUMN, args.recursive, "--class_prompt", of_class=True)
    return [scan_pictures(args.class_data_dir, args.class_prompt, options, others)]


def used_class_pictures(args: argparse.Namespace, scans: list[Scan]) -> list[Picture]:
    """Pictures of the class, each once, also in a folder that repeats them; at most `--num_class_images` of them."""
    of_all = [list(dict.fromkeys(scan.checked())) for scan in scans]
    limit = args.num_class_images if args.dataset_config is None else None
    return [picture for of_one in of_all for picture in of_one[:limit]]


def make_framing(args: argparse.Namespace, base: StableDiffusionBase) -> Framing:
    """How pictures are cropped; `ValueError` for buckets that the VAE cannot encode whole.

    Args:
        args: the script's flags, with the `resolution` settled.
        base: the base model.
    """
    buckets: tuple[Size, ...] = ()
    if args.aspect_ratio_buckets == "auto":
        buckets = generate_buckets(args.resolution, base.stride)
    elif args.aspect_ratio_buckets is not None:
        buckets = parse_buckets(args.aspect_ratio_buckets)
    for height, width in buckets:
        try:
            base.check_resolution(height), base.check_resolution(width)
        except ValueError as error:
            raise ValueError(f"--aspect_ratio_buckets, {height},{width}: {error}") from error
    settings = args.center_crop, args.random_flip, args.image_interpolation_mode, base.stride
    return Framing(args.resolution, *settings, buckets)


def check_group(args: argparse.Namespace, resumed: Checkpoint | None, num_processes: int) -> int:
    """How many samples make a batch of all processes; with buckets a resumed run must be between two batches.

    Raises:
        ValueError: where it is not.
    """
    group = args.train_batch_size * num_processes
    if resumed is not None and args.aspect_ratio_buckets and resumed.state["position"] % group:
        raise ValueError(
            f"{resumed.folder} has seen {resumed.state['position']} samples, which are no whole batches of {group}: "
            "with --aspect_ratio_buckets, resume with the --train_batch_size and the number of processes of before."
        )
    return group


def data_report(
    args: argparse.Namespace,
    sets: PictureSets,
    trained_at: Callable[[Picture], tuple[int, int]],
    of_the_run: Sequence[str],
) -> str:
    """What `--check_data` prints.

    Args:
        args: the script's flags.
        sets: the pictures that they name.
        trained_at: height and width at which a picture is trained.
        of_the_run: sentences on what stops the run although each picture can be read.
    """
    repeated = [f"With --repeats {args.repeats}, that many times as often."] if args.repeats > 1 else []
    if args.validation_split:
        repeated.append(f"A share of {args.validation_split:g} of these pictures is held out (--validation_split).")
    parts = [report(scan, "The subject", trained_at, repeated) for scan in sets.subject]
    if args.dataset_config is not None:
        parts += [report(scan, "The class", trained_at) for scan in sets.of_class]
    elif args.with_prior_preservation:
        parts.append(_class_report(args, sets.of_class, trained_at))
    if sets.held_out is not None:
        parts.append(report(sets.held_out, "Held out", trained_at))
    parts += [f"Stops the run: {problem}" for problem in of_the_run]
    problems = len(sets.problems) + len(of_the_run)
    parts.append(f"Problems that stop the run: {problems}." if problems else "Nothing stops the run.")
    return "\n\n".join(parts)


def _class_report(
    args: argparse.Namespace, scans: list[Scan], trained_at: Callable[[Picture], tuple[int, int]]
) -> str:
    present = sum(len(set(scan.pictures)) for scan in scans)
    missing, unused = max(0, args.num_class_images - present), max(0, present - args.num_class_images)
    notes = [f"{missing} missing ones will be drawn by the base model (--num_class_images)."] if missing else []
    notes += [f"{unused} of them are not used: --num_class_images is {args.num_class_images}."] if unused else []
    if not scans:
        return "\n".join([f"The class: {args.class_data_dir}", *notes])
    return report(scans[0], "The class", trained_at, notes)
