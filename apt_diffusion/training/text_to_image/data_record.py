"""Keeps what the data of a run was in its checkpoints, and refuses to resume with other data."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ...data.fingerprint import Prints, changes, fingerprint, hash_file
from ...data.pictures import Picture
from ..session import Session

SHOWN = 20  # changes that an error names

logger = logging.getLogger(__name__)


def record_data(session: Session, role: str, pictures: Sequence[Picture], roots: Sequence[Path]) -> None:
    """Notes pictures for the run's checkpoints, and compares them with those of the checkpoint that it resumes.

    Args:
        session: the run's.
        role: what they are for, as "subject".
        pictures: all of this role.
        roots: the folders that they are in.

    Raises:
        ValueError: where they differ, and `--allow_changed_data` was not given; it names each.
    """
    if not pictures:  # a class, say, is added to or taken from a run by flags, whose changes are reported as such
        return
    args = session.args
    prints = fingerprint(pictures, roots, (args.instance_prompt, args.class_prompt))
    if role == "subject" and args.dataset_config is not None:
        prints[Path(args.dataset_config).name] = [hash_file(Path(args.dataset_config))]
    session.data[role] = prints
    before: Prints | None = None if session.resumed is None else session.resumed.state.get("data", {}).get(role)
    found = [] if before is None else changes(before, prints)  # checkpoints of old versions say nothing
    if not found:
        return
    assert session.resumed is not None
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    listed = f"{'; '.join(found[:SHOWN])}{more}"
    if not args.allow_changed_data:
        raise ValueError(
            f"The pictures of the {role} are not those of {session.resumed.folder.name}: {listed}. Put them back, or "
            "go on with --allow_changed_data, no longer exactly."
        )
    logger.warning("Pictures of the %s that differ from those of the checkpoint: %s.", role, listed)
