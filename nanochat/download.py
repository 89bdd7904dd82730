"""Fetch a file once: resumed, retried, verified, locked.

The one idea to know: bytes gather in `NAME.part` and become `NAME` by a rename only after they
were checked, so a file that is there is whole, whatever was interrupted and however often.
It does not unpack, cache by address, or authenticate.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

from nanochat.common import UserError

ATTEMPTS = 6  # tries that bring nothing new; the waits between them add up to FIRST_WAIT * (2^5 - 1) = 7.75 s
FIRST_WAIT = 0.25  # seconds, doubled after each such try
TIMEOUT = 10.0  # seconds without a single byte after which a connection counts as dead
CHUNK = 1 << 20  # bytes
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)  # answers that may be different a moment later


def download_file(
    url: str,
    path: str | os.PathLike,
    *,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    progress: bool = True,
) -> Path:
    """Make sure that the file at `url` is at `path`, and return that path.

    A file that is there already is taken as it is. Several processes may ask for the same file:
    one fetches, the others wait for it. What an interrupted download left is continued, also by
    a later process.

    Args:
        sha256: expected digest in hex; without it, what the server announces is checked: the
            size always, and the digest where the server is a hub (see `_verify`).
        check: called with the path of the fetched file before it is published; raises ValueError
            for content that is not what it should be, which is then fetched again.
        progress: show a bar on a terminal.

    Raises:
        UserError: names the file and the cause, when the server refuses or every try failed.
    """
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with FileLock(f"{path}.lock"):
            if not path.exists():  # another process may have fetched it while we waited
                _fetch_patiently(url, path, sha256, check, progress)
    return path


def _fetch_patiently(url: str, path: Path, sha256: str | None, check: Callable | None, progress: bool) -> None:
    """Try until the file is whole and published, or until nothing new came ATTEMPTS times."""
    part = path.with_name(path.name + ".part")
    failures, began = 0, time.monotonic()
    while True:
        size_before = _size(part)
        try:
            announced = _continue_part(url, part, path.name, progress)
            _verify(part, announced, sha256, check)
        except urllib.error.HTTPError as error:
            error.close()
            cause = f"the server answered {error.code} {error.reason}"
            if error.code == 416:  # what we kept does not belong to the file that is there now
                _forget(part)
            elif error.code not in PASSING_STATUS:
                raise UserError(f"cannot fetch {path.name}: {cause} for {url}") from None
            failures += 1
        except ConnectionError as error:  # a cut that brought something new costs no try
            if _size(part) <= size_before:
                failures += 1
            cause = str(error)
        except ValueError as error:
            _forget(part)
            failures += 1
            cause = str(error)
        else:
            os.replace(part, path)
            _forget(part)
            return
        if failures >= ATTEMPTS:
            raise UserError(
                f"cannot fetch {path.name} from {url}: {cause} (gave up after {time.monotonic() - began:.0f} s). "
                "Check the connection and the address, then run this again: it goes on where it stopped."
            )
        time.sleep(FIRST_WAIT * 2 ** max(failures - 1, 0))


def _continue_part(url: str, part: Path, name: str, progress: bool) -> http.client.HTTPMessage:
    """Append to `part` what the server has beyond it, and return the answer's headers.

    Raises ConnectionError where the connection is not made, dies or ends early, and HTTPError
    where the server refuses. A write that fails (disk full) is neither, and is not caught here.
    """
    from tqdm import tqdm

    version_file = _version_file(part)
    version = version_file.read_text() if version_file.exists() else ""
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat", "Accept-Encoding": "identity"})
    if version and _size(part):
        request.add_header("Range", f"bytes={_size(part)}-")
        request.add_header("If-Range", version)  # a server whose file has changed since sends the whole new one
    with _open(request) as response:
        start, total = _span(response)
        if start and (start != _size(part) or _version(response.headers) != version):  # one that ignores If-Range
            _forget(part)
            raise ConnectionError("the file on the server has changed since its download began")
        version_file.write_text(_version(response.headers))
        bar = tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, leave=False,
                   disable=None if progress else True)  # None: no bar where the output is no terminal
        with bar, open(part, "ab" if start else "wb") as out:
            while data := _read(response):
                out.write(data)
                bar.update(len(data))
            out.flush()
            os.fsync(out.fileno())
        if total is not None and _size(part) < total:
            raise ConnectionError(f"the connection ended after {_size(part):,} of {total:,} bytes")
        return response.headers


class _RememberDigest(urllib.request.HTTPRedirectHandler):
    """The hub names a file's digest in its redirect to the storage, not in the storage's own answer."""

    digest = None

    def redirect_request(self, request, answer, code, message, headers, new_url):
        self.digest = headers.get("X-Linked-Etag", self.digest)
        return super().redirect_request(request, answer, code, message, headers, new_url)


def _open(request: urllib.request.Request):
    """Send the request. Any trouble on the way to an answer becomes a ConnectionError."""
    redirects = _RememberDigest()
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(getattr(reason, "strerror", None) or str(reason)) from error
    if redirects.digest and "X-Linked-Etag" not in response.headers:
        response.headers["X-Linked-Etag"] = redirects.digest
    return response


def _read(response) -> bytes:
    """The next bytes, as soon as some are there; b"" at the end."""
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"the connection broke: {error}") from error


def _span(response) -> tuple[int, int | None]:
    """(offset of the first byte that is sent, size of the whole file or None where it is not told).

    `Content-Range: bytes 500-999/1000` -> (500, 1000)
    """
    partial = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206 and partial:
        return int(partial[1]), int(partial[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _verify(part: Path, headers, sha256: str | None, check: Callable[[Path], None] | None) -> None:
    """Raise ValueError where the bytes are not those that were announced.

    The hub announces large files by `X-Linked-Etag`, their SHA-256, and small ones by an `ETag`
    of 40 hex digits, their git blob id; other file servers put the plain SHA-1 there. An ETag of
    any other form has no agreed meaning, and is not compared.
    """
    linked = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))
    expected = sha256 or (linked[1] if linked else None)
    if expected and _digest(part, hashlib.sha256()) != expected.lower():
        raise ValueError(f"the bytes that arrived do not have the SHA-256 {expected[:12]}...")
    etag = re.fullmatch(r'"?([0-9a-f]{40})"?', headers.get("ETag", ""))
    if etag and not expected:
        blob = hashlib.sha1(b"blob %d\0" % _size(part))
        if etag[1] not in (_digest(part, blob), _digest(part, hashlib.sha1())):
            raise ValueError(f"the bytes that arrived do not have the SHA-1 {etag[1][:12]}...")
    if check:
        check(part)


def _digest(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _version(headers) -> str:
    """What names this version of the file in a later `If-Range`; empty where nothing does."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)
