"""Fetching over a bad line and unpacking what should not be trusted."""

import gzip
import hashlib
import io
import json
import random
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import _fetch
import pytest
from _fetch import RemoteFile, RetryPolicy, fetch, unpack
from loopback import File, Server

from sslbook.errors import UserError

pytestmark = pytest.mark.slow

DATA = random.Random(0).randbytes(300_000)
QUICK = RetryPolicy(pause=0.0, timeout=5.0, slowest=0.0)


def source(*urls: str, data: bytes = DATA) -> RemoteFile:
    return RemoteFile("set.bin", urls, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_fetches_once(server: Server, tmp_path: Path) -> None:
    file = File(DATA)
    wanted = source(server.put("/a", file))
    assert fetch(wanted, tmp_path / "new", QUICK).read_bytes() == DATA
    assert names(tmp_path / "new") == {"set.bin"}
    fetch(wanted, tmp_path / "new", QUICK)
    assert file.asked == [None]


def test_resumes_after_broken_connections(server: Server, tmp_path: Path) -> None:
    file = File(DATA, cuts=[100_000, 50_000])
    assert fetch(source(server.put("/a", file)), tmp_path, QUICK).read_bytes() == DATA
    assert file.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_resumes_in_a_later_run_and_from_another_mirror(server: Server, tmp_path: Path) -> None:
    broken = server.put("/a", File(DATA, cuts=[100_000, 0, 0, 0, 0]))
    with pytest.raises(UserError, match="closed after 100000 of 300000"):
        fetch(source(broken), tmp_path, QUICK)
    assert names(tmp_path) == {"set.bin.part", "set.bin.part.json"}
    good = File(DATA, etag='"other server"')
    assert fetch(source(server.put("/b", good)), tmp_path, QUICK).read_bytes() == DATA
    assert good.asked == ["bytes=100000-"]


def test_restarts_without_range_requests(server: Server, tmp_path: Path) -> None:
    file = File(DATA, ranges=False, cuts=[100_000])
    assert fetch(source(server.put("/a", file)), tmp_path, QUICK).read_bytes() == DATA
    assert file.asked == [None, "bytes=100000-"]


@pytest.mark.parametrize("honors_if_range", [True, False])
def test_does_not_mix_two_versions(server: Server, tmp_path: Path, honors_if_range: bool) -> None:
    url = server.put("/a", File(bytes(len(DATA)), etag='"old"', cuts=[1000, 0, 0, 0]))
    with pytest.raises(UserError):
        fetch(source(url), tmp_path, QUICK)
    new = File(DATA, etag='"new"', honors_if_range=honors_if_range)
    server.put("/a", new)
    assert fetch(source(url), tmp_path, QUICK).read_bytes() == DATA
    assert new.asked == (["bytes=1000-"] if honors_if_range else ["bytes=1000-", None])


def test_restarts_when_the_pieces_of_two_mirrors_do_not_match(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(bytes(1000))  # of unknown origin: no note beside it
    file = File(DATA)
    assert fetch(source(server.put("/a", file)), tmp_path, QUICK).read_bytes() == DATA
    assert file.asked == ["bytes=1000-", None]


@pytest.mark.parametrize("length", [len(DATA), len(DATA) + 5])
def test_complete_or_overlong_partial_file(server: Server, tmp_path: Path, length: int) -> None:
    (tmp_path / "set.bin.part").write_bytes((DATA + b"extra")[:length])
    file = File(DATA)
    assert fetch(source(server.put("/a", file)), tmp_path, QUICK).read_bytes() == DATA
    assert len(file.asked) == (0 if length == len(DATA) else 1)


def test_wrong_bytes_then_a_good_mirror(server: Server, tmp_path: Path) -> None:
    bad, short = File(bytes(len(DATA))), File(DATA[:-1])
    urls = (
        server.put("/bad", bad),
        server.put("/short", short),
        server.put("/none", File(b"")),
        server.put("/ok", File(DATA)),
    )
    del server.files["/none"]
    assert fetch(source(*urls), tmp_path, QUICK).read_bytes() == DATA
    assert len(bad.asked) == len(short.asked) == 1  # neither is worth another attempt


def test_all_mirrors_fail(server: Server, tmp_path: Path) -> None:
    urls = server.put("/bad", File(bytes(len(DATA)))), server.put("/short", File(DATA[:9])), "http://127.0.0.1:1/x"
    with pytest.raises(UserError, match=r"wrong checksum; .*offers 9 bytes instead of 300000; .*refused, 4 times"):
        fetch(source(*urls), tmp_path, QUICK)
    assert not (tmp_path / "set.bin").exists()


def test_retries_a_busy_server_a_few_times(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(_fetch.time, "sleep", waits.append)
    file = File(DATA, statuses=[503, 429, 500])
    fetch(source(server.put("/a", file)), tmp_path / "a", RetryPolicy(pause=1.0, slowest=0.0, longest_pause=3.0))
    assert waits == [1.0, 2.0, 3.0]
    file = File(DATA, statuses=[503] * 9)
    with pytest.raises(UserError, match="HTTP 503, 4 times"):
        fetch(source(server.put("/a", file)), tmp_path / "b", QUICK)
    assert len(file.asked) == 4


def test_leaves_a_silent_mirror(server: Server, tmp_path: Path) -> None:
    silent = File(DATA, stalls=9)
    urls = server.put("/silent", silent), server.put("/ok", File(DATA))
    assert fetch(source(*urls), tmp_path, RetryPolicy(attempts=2, pause=0.0, timeout=0.1)).read_bytes() == DATA
    assert len(silent.asked) == 2


def test_tries_a_slow_mirror_last(server: Server, tmp_path: Path) -> None:
    # No server is this fast, so every mirror counts as slow; the window of zero seconds makes that certain.
    strict = RetryPolicy(pause=0.0, slowest=1e15, window=0.0)
    slow, gone = File(DATA), File(DATA, statuses=[404])
    urls = server.put("/slow", slow), server.put("/gone", gone)
    assert fetch(source(*urls), tmp_path, strict).read_bytes() == DATA
    assert len(slow.asked) == 2
    assert len(gone.asked) == 1
    assert slow.asked[1] is not None  # what the slow mirror had sent was kept


def test_keeps_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="wrong checksum"):
        fetch(source(), tmp_path, QUICK)
    assert (tmp_path / "set.bin").read_bytes() == b"mine"


def test_disk_too_small(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File(DATA)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=299_999))
    with pytest.raises(UserError, match=r"needs 0\.3 MB"):
        fetch(source(server.put("/a", file)), tmp_path, QUICK)
    assert file.asked == []


# --------------------------------------------------------------------------------------------------------------------


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, 0o6777
    return info


def test_unpacks_a_tar(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar.gz", (entry("top/x/1"), b"one"), (entry("top/x", tarfile.DIRTYPE), b""))
    unpack(archive, tmp_path / "out", "top")
    assert (tmp_path / "out/x/1").read_bytes() == b"one"
    assert not (tmp_path / "out/x/1").stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR)
    assert names(tmp_path) == {"a.tar.gz", "out", "out/x", "out/x/1"}
    with pytest.raises(UserError, match="exists already"):
        unpack(archive, tmp_path / "out", "top")


def test_unpacks_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1", "one")
        archive.mkdir("y")
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path / "out") == {"x", "x/1", "y"}


EVIL = {
    "climbs": [(entry("../evil"), b"x")],
    "climbs later": [(entry("a/b/../../../evil"), b"x")],
    "absolute": [(entry("/tmp/evil"), b"x")],
    "backslashes": [(entry("..\\evil"), b"x")],
    "drive": [(entry("C:\\evil"), b"x")],
    "symbolic link out": [(entry("link", tarfile.SYMTYPE, ".."), b""), (entry("link/evil"), b"x")],
    "symbolic link, absolute": [(entry("link", tarfile.SYMTYPE, "/tmp"), b""), (entry("link/evil"), b"x")],
    "hard link": [(entry("evil", tarfile.LNKTYPE, "../precious"), b""), (entry("evil"), b"x")],
    "device": [(entry("evil", tarfile.CHRTYPE), b"")],
    "pipe": [(entry("evil", tarfile.FIFOTYPE), b"")],
    "same name twice": [(entry("evil"), b"x"), (entry("evil"), b"y")],
    "file below a file": [(entry("evil"), b"x"), (entry("evil/inner"), b"y")],
}


@pytest.mark.parametrize("members", EVIL.values(), ids=EVIL.keys())
def test_refuses_a_tar_that_leaves_its_folder(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    box = tmp_path / "box"
    box.mkdir()
    (box / "precious").write_bytes(b"mine")
    archive = tar(tmp_path / "a.tar.gz", (entry("harmless"), b"x"), *members)
    with pytest.raises(UserError, match=r"refused|twice") as error:
        unpack(archive, box / "out")
    assert "\n" not in str(error.value)
    assert names(tmp_path) == {"a.tar.gz", "box", "box/precious"}
    assert (box / "precious").read_bytes() == b"mine"


@pytest.mark.parametrize(("name", "mode"), [("../evil", 0), ("/tmp/evil", 0), ("evil", stat.S_IFLNK | 0o777)])
def test_refuses_a_zip_that_leaves_its_folder(tmp_path: Path, name: str, mode: int) -> None:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("harmless", "x")
        archive.writestr(info, "/etc")
    with pytest.raises(UserError, match="refused"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path) == {"a.zip"}


def test_damaged_archives_leave_nothing(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(100_000)
    whole = tar(tmp_path / "a.tar.gz", (entry("x"), data)).read_bytes()
    plain = gzip.decompress(whole)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the checksum at gzip's end
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", data)
    broken_zip = bytearray((tmp_path / "a.zip").read_bytes())
    broken_zip[5000] ^= 1
    for bytes_ in whole[:-50_000], plain[:-50_000], bytes(flipped), b"<html>not here</html>", b"", bytes(broken_zip):
        (tmp_path / "b").write_bytes(bytes_)
        with pytest.raises(UserError, match="damaged") as error:
            unpack(tmp_path / "b", tmp_path / "out")
        assert "\n" not in str(error.value)
        assert names(tmp_path) == {"a.tar.gz", "a.zip", "b"}


def test_interrupted_unpacking_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar(tmp_path / "a.tar", (entry("1"), b"one"), (entry("2"), b"two"), mode="w")
    copy = shutil.copyfileobj

    def interrupted(stream: io.BytesIO, out: io.BytesIO, length: int) -> None:
        if (tmp_path / ".out.unpacking/1").exists() and out.name.endswith("2"):
            raise KeyboardInterrupt
        copy(stream, out, length)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out")
    assert names(tmp_path) == {"a.tar"}
    monkeypatch.undo()

    # A run that was killed outright leaves its workspace; the next one clears it.
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking/stale").write_bytes(b"")
    unpack(archive, tmp_path / "out")
    assert names(tmp_path) == {"a.tar", "out", "out/1", "out/2"}


def test_check_can_reject_the_content(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise UserError(f"{sorted(names(folder))} is not enough")

    with pytest.raises(UserError, match=r"\['1'\] is not enough"):
        unpack(tar(tmp_path / "a.tar.gz", (entry("1"), b"")), tmp_path / "out", check=refuse)
    assert names(tmp_path) == {"a.tar.gz"}


def test_archive_larger_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar(tmp_path / "a.tar.gz", (entry("1"), bytes(10_000)))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9_999))
    with pytest.raises(UserError, match="would fill the disk"):
        unpack(archive, tmp_path / "out")


def test_ignores_a_corrupt_note(server: Server, tmp_path: Path) -> None:
    for text in "", "{", json.dumps({"urls": []}), json.dumps([1]), json.dumps({"urls": 3, "validator": 1}):
        (tmp_path / "set.bin.part").write_bytes(DATA[:1000])
        (tmp_path / "set.bin.part.json").write_text(text)
        fetch(source(server.put("/a", File(DATA))), tmp_path, QUICK).unlink()


def test_errors_are_one_line_and_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def denied() -> None:
        (tmp_path / "missing/x").write_bytes(b"")

    def wrong() -> None:
        raise UserError("mend this")

    for main, message in (
        (denied, f"error: {tmp_path}/missing/x: No such file or directory\n"),
        (wrong, "error: mend this\n"),
    ):
        with pytest.raises(SystemExit, match="2"):
            _fetch.run(main)
        assert capsys.readouterr().err == message
