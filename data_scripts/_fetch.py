"""Shared by the data scripts: download a file from several mirrors, verify its checksum, unpack it safely.

Three rules hold throughout. A file has its final name only once its checksum is right, and a folder only once
everything is in it, so a run killed at any moment leaves nothing that looks finished. What was fetched is kept and
the next run goes on from there. Nothing that exists is overwritten.
"""

import contextlib
import hashlib
import http.client
import json
import lzma
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn
from urllib.parse import urlsplit

try:
    from tqdm import tqdm

    from sslbook.errors import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: run `python -m pip install -e .` in the repository root first")

CHUNK = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """A file and where to find it.

    Args:
        name: its name on disk.
        urls: the mirrors, in the order in which they are tried.
        size: its length in bytes.
        checksum: ``sha256:<hex>`` or ``md5:<hex>``.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    checksum: str


@dataclass(frozen=True)
class RetryPolicy:
    """When to retry a mirror and when to try the next.

    Args:
        attempts: failures in a row, without progress between them, after which a mirror is given up.
        pause: seconds before the second attempt; doubled for each further one, up to `longest_pause`.
        longest_pause: the longest wait in seconds, also when the server asks for more.
        timeout: seconds without a byte that count as a failure.
        slowest: bytes per second below which a mirror is put last. It is used at any speed if no other delivers.
        window: seconds over which that speed is measured.
    """

    attempts: int = 4
    pause: float = 1.0
    longest_pause: float = 30.0
    timeout: float = 30.0
    slowest: float = 200_000.0
    window: float = 20.0


class _MirrorFailed(Exception):
    """This mirror will not deliver the file."""


class _TooSlow(Exception):
    """This mirror delivers, but slowly."""


class _Retry(Exception):
    """A transient error: worth another attempt at the same mirror."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


# --------------------------------------------------------------------------------------------------------------------
# Checksums and space


def digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file's bytes, with a progress bar for a large one."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    size = path.stat().st_size
    with open(path, "rb") as stream, _bar(f"check {path.name}", size, hidden=size < 1 << 28) as bar:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
            bar.update(len(chunk))
    return state.hexdigest()


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether the bytes of `path` have this ``algorithm:hex`` checksum."""
    algorithm, _, expected = checksum.partition(":")
    return digest(path, algorithm) == expected.lower()


def require_space(folder: Path, size: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{what} needs {_human(size)} and the disk of {folder} has {_human(free)} free: "
            "make room, or choose another folder with --out"
        )


def _human(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def _bar(name: str, total: int, initial: int = 0, hidden: bool = False) -> tqdm:
    # disable=None: shown on a terminal only, so that a log file is not filled with bars.
    return tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, leave=False, disable=hidden or None)


# --------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch(source: RemoteFile, folder: Path, retry: RetryPolicy = RetryPolicy()) -> Path:
    """The file of `source` in `folder`, fetched unless it is there, its checksum verified either way.

    What arrives is kept in ``<name>.part``; the next run, or the next mirror, goes on from its end.

    Raises:
        UserError: a file of that name with other contents is in the way, the disk is too small, or no mirror
            delivered the file.
    """
    target = folder / source.name
    if target.exists():
        if has_checksum(target, source.checksum):
            return target
        raise UserError(f"{target} has the wrong checksum (not {source.checksum}): move it away and run again")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{source.name}.part"
    require_space(folder, source.size - _length(part), source.name)

    troubles: list[str] = []
    queue = [(url, retry.slowest) for url in source.urls]
    for url, slowest in queue:  # grows while it is walked: a slow mirror is asked again, after all others
        print(f"{source.name}: from {urlsplit(url).netloc}", file=sys.stderr)
        try:
            _from_mirror(source, url, part, retry, slowest)
        except _TooSlow:
            queue.append((url, 0.0))
        except _MirrorFailed as error:
            troubles.append(f"{urlsplit(url).netloc}: {error}")
        else:
            os.replace(part, target)
            _note(part).unlink(missing_ok=True)
            return target
    raise UserError(
        f"{source.name} could not be fetched ({'; '.join(troubles)}): run again later to go on from here, "
        f"name another address with --mirror, or put the file into {folder} yourself"
    )


def _from_mirror(source: RemoteFile, url: str, part: Path, retry: RetryPolicy, slowest: float) -> None:
    """Complete `part` from one mirror and verify it; raise `_MirrorFailed` or `_TooSlow` if that cannot be done."""
    failures = 0
    while True:
        before = _length(part)
        try:
            if before != source.size:
                _transfer(source, url, part, retry, slowest)
        except _Retry as error:
            # A connection that breaks every few megabytes still gets there; only attempts without progress are counted.
            failures = failures + 1 if _length(part) - before < 1 << 20 else 1
            if failures >= retry.attempts:
                raise _MirrorFailed(f"{error}, {failures} times") from None
            time.sleep(min(max(error.wait, retry.pause * 2 ** (failures - 1)), retry.longest_pause))
            continue
        if has_checksum(part, source.checksum):
            return
        pieces_from = _read_note(part)["urls"]
        _discard(part)
        if pieces_from == [url]:
            raise _MirrorFailed("wrong checksum")
        # Some of the bytes came from elsewhere, so this mirror is not to blame yet: once more, from it alone.


def _transfer(source: RemoteFile, url: str, part: Path, retry: RetryPolicy, slowest: float) -> None:
    """One request: append to `part` what is missing, or all of it if the server cannot resume."""
    if _length(part) > source.size:
        _discard(part)
    have, note = _length(part), _read_note(part)
    headers = {"User-Agent": "sslbook-data-scripts", "Accept-Encoding": "identity"}
    same_server = have > 0 and note["urls"][-1] == url
    if have:
        headers["Range"] = f"bytes={have}-"
        if same_server and note["validator"]:
            headers["If-Range"] = note["validator"]  # the server sends everything if its file has changed
    with _network():
        try:
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=retry.timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:
                error.close()
                _discard(part)
                raise _Retry("the partial file does not fit") from None
            raise

    with response:
        validator = _validator(response)
        if have and response.status == 206:
            begin, total = _content_range(response)
            if begin != have or total not in (None, source.size):
                raise _MirrorFailed(f"offers bytes {begin} to the end of {total}, not {have} to {source.size}")
            if same_server and validator != note["validator"]:
                _discard(part)
                raise _Retry("its file has changed since the partial download")
            urls = note["urls"] if same_server else [*note["urls"], url]
        else:
            length = response.headers.get("Content-Length")
            if length is not None and length != str(source.size):
                raise _MirrorFailed(f"offers {length} bytes instead of {source.size}")
            have, urls = 0, [url]
        mode = "ab" if have else "wb"
        with open(part, mode) as stream, _bar(source.name, source.size, have) as bar:
            _note(part).write_text(json.dumps({"urls": urls, "validator": validator}))
            begun, received = time.monotonic(), 0
            while True:
                with _network():
                    chunk = response.read1(CHUNK)
                if not chunk:
                    break
                have += len(chunk)
                if have > source.size:
                    raise _MirrorFailed(f"sends more than {source.size} bytes")
                stream.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
                elapsed = time.monotonic() - begun
                if elapsed >= retry.window:
                    if received < slowest * elapsed:
                        raise _TooSlow
                    begun, received = time.monotonic(), 0
    if have < source.size:
        raise _Retry(f"connection closed after {have} of {source.size} bytes")


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Turn network errors into transient and permanent ones (a full disk is neither)."""
    try:
        yield
    except urllib.error.HTTPError as error:
        wait = error.headers.get("Retry-After", "") if error.headers else ""
        error.close()
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Retry(f"HTTP {error.code}", float(wait) if wait.isdigit() else 0.0) from None
        raise _MirrorFailed(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise _Retry(str(error.reason)) from None
    except TimeoutError:
        raise _Retry("no answer in time") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(str(error) or type(error).__name__) from None


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What identifies this version of the server's file: a strong ETag, else its date."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _content_range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """First byte and total length from ``Content-Range: bytes 100-199/200`` (None: not given)."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    begin = span.partition("-")[0]
    if unit != "bytes" or not begin.isdigit():
        return None, None
    return int(begin), int(total) if total.isdigit() else None


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    """The file beside the partial one: the mirrors its bytes came from, and the last one's version of the file."""
    return part.with_name(part.name + ".json")


def _read_note(part: Path) -> dict:
    try:
        note = json.loads(_note(part).read_text())
        return {"urls": [str(url) for url in note["urls"]] or [""], "validator": note["validator"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"urls": [""], "validator": None}  # of unknown origin: goes on, and the checksum decides


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Unpacking


def unpack(
    archive: Path, destination: Path, inside: str | None = None, check: Callable[[Path], None] | None = None
) -> None:
    """Unpack `archive` so that `destination` appears whole or not at all.

    Args:
        archive: a tar (of any compression) or zip file.
        destination: a folder that does not exist yet.
        inside: the folder within the archive that becomes `destination`; None takes the archive's root.
        check: called with the unpacked folder before it gets its name; raises to refuse it.
    """
    if destination.exists():
        raise UserError(f"{destination} exists already: move it away and run again")
    with workspace(destination) as folder:
        extract(archive, folder)
        result = folder / inside if inside else folder
        if not result.is_dir():
            raise UserError(f"{archive} does not hold the folder {inside}: is it the right archive?")
        if check:
            check(result)
        os.rename(result, destination)


@contextlib.contextmanager
def workspace(destination: Path) -> Iterator[Path]:
    """An empty folder beside `destination` (so that a rename suffices in the end), removed whatever happens."""
    folder = destination.with_name(f".{destination.name}.unpacking")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def extract(archive: Path | IO[bytes], folder: Path, name: str | None = None) -> int:
    """Write an archive's plain files below `folder`; return how many.

    Only names and bytes are taken from the archive: no owner, mode or date. Links, devices, encrypted members and
    names that lead out of `folder` are refused with the whole archive; the data sets fetched here have none.

    Args:
        archive: a file, or an open stream of a tar archive.
        folder: an existing, empty folder.
        name: what to call the archive in messages.
    """
    name = name or str(archive)
    room = shutil.disk_usage(folder).free
    count = 0
    with reading(name):
        for member, size, stream in members(archive, name):
            target = folder / member
            try:
                if stream is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                room -= size
                if room < 0:
                    raise UserError(f"unpacking {name} would fill the disk of {folder}: make room and run again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
                count += 1
            except (FileExistsError, NotADirectoryError):
                raise UserError(f"{name} holds {str(member)!r} twice: it is not the right archive") from None
    return count


def members(archive: Path | IO[bytes], name: str) -> Iterator[tuple[PurePosixPath, int, IO[bytes] | None]]:
    """(checked relative path, size, bytes; None for a folder) of every member of a tar or zip, in order."""
    if isinstance(archive, Path) and zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
                    raise UserError(f"{name} holds {info.filename!r}, a link, device or encrypted file: refused")
                path = inner_path(info.filename, name)
                if info.is_dir():
                    yield path, 0, None
                else:
                    with zipped.open(info) as stream:
                        yield path, info.file_size, stream
        return
    with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as opened:
        for info in opened:
            path = inner_path(info.name, name)
            if not (info.isreg() or info.isdir()):
                raise UserError(f"{name} holds {info.name!r}, a link or device: refused")
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and newer: a second opinion
                tarfile.data_filter(info, "/nowhere")
            yield path, info.size, opened.extractfile(info) if info.isreg() else None
        while opened.fileobj.read(1 << 20):  # to the very end, where gzip and xz keep their checksums
            pass


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the archive readers raise for a damaged file into one line that names it."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile lists every compression it tried
        raise UserError(f"{name} is damaged, or not a tar or zip archive ({reason}): fetch it again") from None
    except OSError as error:
        if error.errno is not None:  # the disk's, not the archive's
            raise
        raise UserError(f"{name} is damaged ({error}): fetch it again") from None


def inner_path(member: str, name: str) -> PurePosixPath:
    """A member's path, refused if it is absolute, climbs out, or could mean a Windows drive."""
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in member or (path.parts and path.parts[0].endswith(":")):
        raise UserError(f"{name} holds {member!r}, which leads out of its folder: refused")
    return path


# --------------------------------------------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's `main`: status 0, or one line of error and status 2 (130 when interrupted)."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # permissions, a full disk, a folder that is a file
        print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
