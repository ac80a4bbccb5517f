"""Pictures signed by C2PA, read with its own reader; certificates that cannot sign."""

import base64
import datetime
import io
import json

import httpx
import pytest
from PIL import Image
from support.server import served

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.cli import main
from apt_diffusion.server.settings import ServerSettings

c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
x509 = pytest.importorskip("cryptography.x509")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A chain of two certificates as C2PA asks for, and the key, as PEM files."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = [
        x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "A studio"), x509.NameAttribute(NameOID.COMMON_NAME, n)]
        )
        for n in ("root", "signer")
    ]

    def base(name, key):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(names[0]).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=2))
        return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)

    def usage(signs_pictures):
        return x509.KeyUsage(signs_pictures, False, False, False, False, not signs_pictures, False, False, False)

    ca = base(names[0], root).add_extension(x509.BasicConstraints(True, None), True).add_extension(usage(False), True)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    signer = base(names[1], leaf).add_extension(usage(True), True).add_extension(issuer, False)
    signer = signer.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    folder = tmp_path_factory.mktemp("certificate")
    chain = [one.sign(root, hashes.SHA256()) for one in (signer, ca)]
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(leaf.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return folder


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_picture_is_signed(tiny_sd_path, tmp_path, certificate, kind):
    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
    settings = ServerSettings(
        adapters=str(tmp_path), num_inference_steps=2,
        c2pa_certificate=str(certificate / "chain.pem"), c2pa_key=str(certificate / "key.pem"),
    )  # fmt: skip
    with served(pipe, settings) as (address, _):
        body = {"prompt": "two dots", "size": "16x16", "output_format": kind}
        answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=60).json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    told = json.loads(c2pa.Reader(f"image/{kind}", io.BytesIO(data)).json())
    manifest = told["manifests"][told["active_manifest"]]
    assert told["validation_state"] == "Valid" and manifest["signature_info"]["common_name"] == "signer"
    action = manifest["assertions"][0]["data"]["actions"][0]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert b"Iptc4xmpExt:DigitalSourceType" in data and Image.open(io.BytesIO(data)).size == (16, 16)
    if kind == "png":
        changed = bytearray(data)
        changed[-20] ^= 1  # a byte of the pixels
        assert "Valid" not in _state("image/png", bytes(changed))


def _state(kind: str, data: bytes) -> list[str]:
    try:
        return [json.loads(c2pa.Reader(kind, io.BytesIO(data)).json())["validation_state"]]
    except c2pa.C2paError:
        return ["unreadable"]


def test_what_cannot_sign_is_told_before_the_model_loads(certificate, tmp_path, capsys, no_models):
    chain, key = str(certificate / "chain.pem"), str(certificate / "key.pem")
    for flags, message in (
        (["--c2pa_certificate", chain], "needs both"),
        (["--c2pa_certificate", chain, "--c2pa_key", str(tmp_path / "none")], "No such file"),
        (["--c2pa_certificate", key, "--c2pa_key", key], "cannot sign pictures by es256"),
        (["--c2pa_certificate", chain, "--c2pa_key", key, "--c2pa_algorithm", "ed25519"], "cannot sign pictures"),
    ):
        assert main(["serve", "--adapters", str(tmp_path), *flags]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, error
