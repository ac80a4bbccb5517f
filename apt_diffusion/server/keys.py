"""API keys: who may draw, who may manage adapters, with which adapters, how often.

The file has the keys' hashes only. A key is 32 random bytes, so that one round of SHA-256 is enough; it is shown once.
"""

import contextlib
import fnmatch
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..io.atomic import write_text
from .refusals import Refusal

logger = logging.getLogger(__name__)

SCOPES = ("generate", "manage")
_PREFIX = "apt-"


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: for people and logs.
        hash: SHA-256 of the key, hexadecimal.
        scopes: of `SCOPES`.
        adapters: patterns of adapters' names (`cat-*`) that it may use; `None`: all.
        requests_per_minute: pictures that it may ask for.
        concurrent: requests at a time.
    """

    name: str
    hash: str = ""
    scopes: tuple[str, ...] = SCOPES
    adapters: tuple[str, ...] | None = None
    requests_per_minute: int = 600
    concurrent: int = 64

    def may_use(self, adapter: str) -> bool:
        """Whether its owner may draw with this adapter."""
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


NOBODY = Key("anonymous")  # of a server without keys


def read_keys(file: str | Path) -> dict[str, Key]:
    """The keys of a file, by hash.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for one that is damaged.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file of keys at {file}: `apt-diffusion keys add NAME --keys {file}`.")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["keys"]
        keys = [_checked(_key(entry)) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of keys ({error}): make one with `apt-diffusion keys add`.") from error
    return {key.hash: key for key in keys}


def add_key(
    file: str | Path,
    name: str,
    scopes: Sequence[str] = SCOPES,
    adapters: Sequence[str] | None = None,
    requests_per_minute: int = Key.requests_per_minute,
    concurrent: int = Key.concurrent,
) -> str:
    """Makes a key, keeps its hash in the file, and returns it: it cannot be had again.

    Raises:
        ValueError: for a name that is taken, or limits that cannot be meant.
    """
    file = Path(file).expanduser()
    keys = list(read_keys(file).values()) if file.is_file() else []
    if any(key.name == name for key in keys):
        raise ValueError(f"There is a key {name!r} already: remove it first, or choose another name.")
    secret = _PREFIX + secrets.token_urlsafe(32)
    allowed = None if adapters is None else tuple(adapters)
    key = Key(name, hash_of(secret), tuple(scopes), allowed, requests_per_minute, concurrent)
    _write(file, [*keys, _checked(key)])
    return secret


def remove_key(file: str | Path, name: str) -> None:
    """Takes a key out of the file; `ValueError` where there is none of this name."""
    keys = list(read_keys(file).values())
    if all(key.name != name for key in keys):
        raise ValueError(f"There is no key {name!r}; there are {', '.join(key.name for key in keys) or 'none'}.")
    _write(Path(file).expanduser(), [key for key in keys if key.name != name])


def hash_of(secret: str) -> str:
    """What the file keeps of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _key(entry: dict[str, Any]) -> Key:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
    return Key(**fields)


def _checked(key: Key) -> Key:
    if not key.name or not isinstance(key.name, str) or len(key.name) > 100:
        raise ValueError("a key needs a name of at most 100 characters")
    if not key.scopes or not set(key.scopes) <= set(SCOPES):
        raise ValueError(f"the scopes of {key.name!r} must be some of {', '.join(SCOPES)}")
    for limit in ("requests_per_minute", "concurrent"):
        value = getattr(key, limit)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{limit} of {key.name!r} must be a whole number from 1")
    return key


def _write(file: Path, keys: list[Key]) -> None:
    write_text(file, json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n")
    file.chmod(0o600)


class Keyring:
    """The keys of a running server, and how much each has used. A changed file is read again.

    Args:
        file: of keys, or `None` for a server that asks for none.
    """

    def __init__(self, file: str | Path | None) -> None:
        self.file = None if file is None else Path(file).expanduser()
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._left: dict[str, tuple[float, float]] = {}  # name -> (requests that it may make, at this time)
        self._running: dict[str, int] = {}
        if self.file is not None:
            read_keys(self.file)  # a server does not start with a file that it cannot read
            self._read()

    def key_of(self, authorization: str | None) -> Key:
        """The key of a request's header; `Refusal` where it has none, or a wrong one."""
        if self.file is None:
            return NOBODY
        self._read()
        kind, _, secret = (authorization or "").partition(" ")
        key = self._keys.get(hash_of(secret.strip())) if kind.lower() == "bearer" else None
        if key is None:
            raise Refusal(
                401,
                "This server asks for an API key: send the header `Authorization: Bearer KEY`.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key

    def check_rate(self, key: Key, pictures: int) -> None:
        """Counts these pictures; `Refusal` where the key has asked for too many in the last minute."""
        if pictures > key.requests_per_minute:
            most = key.requests_per_minute
            raise Refusal(400, f"The key {key.name!r} may ask for {most} pictures a minute.", param="n")
        now = time.monotonic()
        per_second = key.requests_per_minute / 60
        left, then = self._left.get(key.name, (float(key.requests_per_minute), now))
        left = min(float(key.requests_per_minute), left + (now - then) * per_second)
        if left < pictures:
            seconds = (pictures - left) / per_second
            raise Refusal(
                429,
                f"The key {key.name!r} may ask for {key.requests_per_minute} pictures a minute. Try again in "
                f"{seconds:.0f} s.",
                "rate_limit_exceeded",
                headers={"Retry-After": str(max(1, round(seconds)))},
            )
        self._left[key.name] = left - pictures, now

    @contextlib.contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """Context manager of one request; `Refusal` where the key has too many at this time."""
        running = self._running.get(key.name, 0)
        if running >= key.concurrent:
            raise Refusal(
                429,
                f"The key {key.name!r} may have {key.concurrent} requests at a time: wait for one to end.",
                "too_many_concurrent_requests",
                headers={"Retry-After": "1"},
            )
        self._running[key.name] = running + 1
        try:
            yield
        finally:
            self._running[key.name] -= 1

    def _read(self) -> None:
        assert self.file is not None
        try:
            stat = self.file.stat()
        except FileNotFoundError:  # nobody gets in while it is gone
            self._keys, self._stamp = {}, None
            return
        stamp = stat.st_mtime_ns, stat.st_ino
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self.file)
        except (OSError, ValueError) as error:
            logger.error("The former keys stay in use: %s", error)
