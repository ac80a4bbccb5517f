"""C2PA: pictures signed with the owner's certificate, saying that a model made them. Needs `c2pa-python`."""

import io
import json
from pathlib import Path
from typing import Any

from ..provenance import MADE_BY_MODEL
from ..version import __version__
from .settings import ServerSettings

ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
_MANIFEST = {
    "claim_generator_info": [{"name": "apt-diffusion", "version": __version__}],
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": MADE_BY_MODEL}]},
        }
    ],
}


class PictureSigner:
    """Signs picture files.

    Args:
        certificate: PEM file, the signer's certificate first, then those up to the root.
        key: PEM file of its private key.
        algorithm: of `ALGORITHMS`, as the key has it.

    Raises:
        ModuleNotFoundError: without `c2pa-python`.
        FileNotFoundError: where a file is missing.
        ValueError: for a certificate and key that cannot sign pictures.
    """

    def __init__(self, certificate: str | Path, key: str | Path, algorithm: str = "es256") -> None:
        import c2pa

        if algorithm not in ALGORITHMS:
            raise ValueError(f"C2PA has no algorithm {algorithm!r}: take one of {', '.join(ALGORITHMS)}.")
        self._c2pa: Any = c2pa
        self._secrets = [Path(file).expanduser().read_bytes() for file in (certificate, key)]
        self._algorithm = algorithm.encode()
        try:
            self.signed(_pixel(), "png")  # a key that cannot sign is told at the start
        except c2pa.C2paError as error:
            raise ValueError(f"{certificate} and {key} cannot sign pictures by {algorithm}: {error}") from error

    def signed(self, data: bytes, kind: str) -> bytes:
        """The picture file with its signed manifest.

        Args:
            data: the file.
            kind: `"png"`, `"jpeg"` or `"webp"`.
        """
        info = self._c2pa.C2paSignerInfo(self._algorithm, *self._secrets, None)
        target = io.BytesIO()
        builder = self._c2pa.Builder(json.dumps(_MANIFEST))
        builder.sign(self._c2pa.Signer.from_info(info), f"image/{kind}", io.BytesIO(data), target)
        return target.getvalue()


def signer_of(settings: ServerSettings) -> PictureSigner | None:
    """The signer that the settings name, or `None`; errors as [`PictureSigner`]'s."""
    if settings.c2pa_certificate is None and settings.c2pa_key is None:
        return None
    if settings.c2pa_certificate is None or settings.c2pa_key is None:
        raise ValueError("Signing needs both c2pa_certificate and c2pa_key.")
    return PictureSigner(settings.c2pa_certificate, settings.c2pa_key, settings.c2pa_algorithm)


def _pixel() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    return stream.getvalue()
