"""The folder of adapters, as clients change it: uploads are whole and fit the model, or nothing has happened."""

import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from ..serving.store import AdapterStore
from .forms import BASE
from .refusals import Refusal

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """`Refusal` for a name that no uploaded adapter can have."""
    if not _NAME.fullmatch(name) or name.endswith(".safetensors") or name == BASE:
        raise Refusal(
            400,
            "An adapter's name has from 1 to 64 letters, digits, points, dashes and underscores, begins with a letter "
            f"or digit, and is not {BASE!r}.",
            param="name",
        )


async def upload(
    store: AdapterStore,
    name: str,
    parts: AsyncIterator[bytes],
    max_bytes: int,
    check: Callable[[Path], Awaitable[None]],
) -> bool:
    """Puts an adapter's file into the folder, or in the place of the one of that name.

    Args:
        store: of the folder.
        name: of the adapter.
        parts: of the file.
        max_bytes: of the file.
        check: raises `ValueError` for a file that cannot be used.

    Returns:
        Whether there was none of this name before.

    Raises:
        Refusal: for a name or a file that cannot be used.
    """
    check_name(name)
    handle, temporary = tempfile.mkstemp(dir=store.folder, prefix=".upload-", suffix=".safetensors")
    try:
        size = 0
        with os.fdopen(handle, "wb") as stream:
            async for part in parts:
                size += len(part)
                if size > max_bytes:
                    raise Refusal(413, f"An adapter may have {max_bytes / 2**20:.0f} MiB.", "too_large")
                stream.write(part)
        if not size:
            raise Refusal(400, "The body is empty: send the .safetensors file itself.")
        try:
            await check(Path(temporary))
        except ValueError as error:
            reason = str(error).replace(temporary, "the file")
            raise Refusal(422, f"This adapter cannot be used: {reason}", "invalid_adapter") from error
        is_new = name not in store.names()
        os.chmod(temporary, 0o644)
        os.replace(temporary, store.folder / f"{name}.safetensors" if is_new else store.file(name))
        return is_new
    finally:
        Path(temporary).unlink(missing_ok=True)


def delete(store: AdapterStore, name: str) -> None:
    """Removes an adapter's file, and the folder around it if nothing else is in it. `Refusal` where there is none."""
    if name not in store.names():
        raise Refusal(404, f"There is no adapter {name[:100]!r}: see GET /v1/models.", "model_not_found", "name")
    file = store.file(name)
    file.unlink(missing_ok=True)
    if file.parent != store.folder and not any(file.parent.iterdir()):
        file.parent.rmdir()
