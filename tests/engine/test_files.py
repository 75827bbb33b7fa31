"""What engine/files.py promises: a file is there whole or not at all, and a lock holds until its process ends."""

import contextlib
import gzip
import hashlib
import multiprocessing
import os
import random
import signal
import time
import zipfile
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

from engine import files
from tests.engine.site import serve

fork = multiprocessing.get_context("fork")  # what a DataLoader's workers are, too


def names(folder):
    """Of what is in a folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# ---------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for kill -9."""


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """fsync of the very file that is renamed, after its last byte: a name alone may reach the disk before the data."""
    path, events = tmp_path / "file", []
    path.write_text("old")
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size, path.read_text()))
        fsync(descriptor)

    def watched_replace(part, target):
        events.append(("rename", part.stat().st_ino, part.stat().st_size, target.read_text()))
        return replace(part, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    with files.whole(path) as part:
        part.write_text("new and longer")
        inode = part.stat().st_ino
    assert events == [("fsync", inode, 14, "old"), ("rename", inode, 14, "old")]
    assert path.read_text() == "new and longer"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("no space left"), Killed()], ids=["disk full", "killed"])
def test_a_write_that_fails_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with files.whole(path, previous=tmp_path / "previous") as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"], "the half file was left, or the old one moved"


@pytest.mark.parametrize("moment", ["fsync", "first rename", "second rename", "afterwards"])
def test_at_every_moment_the_newest_or_previous_file_is_whole(moment, tmp_path, monkeypatch):
    """Killed between any two steps: what one would read first, else second, is whole."""
    path, previous, replace = tmp_path / "last", tmp_path / "previous", Path.replace
    path.write_text("2")
    previous.write_text("1")
    renames = []

    def killed(*_):
        raise Killed

    def rename(part, target):
        renames.append(target)
        if moment == ("first rename", "second rename")[len(renames) - 1]:
            raise Killed
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", rename)
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", killed)
    with contextlib.suppress(Killed), files.whole(path, previous) as part:
        part.write_text("3")
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert (
        found
        == {
            "fsync": {"last": "2", "previous": "1"},
            "first rename": {"last": "2", "previous": "1"},
            "second rename": {"previous": "2"},
            "afterwards": {"last": "3", "previous": "2"},
        }[moment]
    )


def test_a_first_file_has_no_previous_one(tmp_path):
    with files.whole(tmp_path / "last", tmp_path / "previous") as part:
        part.write_text("1")
    assert names(tmp_path) == ["last"]


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    """Each into a file of its own; the last to be ready stays."""
    path = tmp_path / "file"
    with files.whole(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 12345)
        with files.whole(path) as theirs:
            theirs.write_text("theirs, and longer")
        assert path.read_text() == "theirs, and longer"
    assert path.read_text() == "mine"


# ---------------------------------------------------------------------------------------------
# Checksums in archives
# ---------------------------------------------------------------------------------------------

VALUES = np.random.default_rng(0).standard_normal(1000)


@pytest.fixture(params=["torch", "numpy"])
def archive(request, tmp_path):
    """An archive with VALUES in it: its path, and the place of the values."""
    path = tmp_path / "file"
    if request.param == "torch":
        torch.save({"values": torch.from_numpy(VALUES)}, path)
    else:
        with path.open("wb") as file:
            np.savez(file, values=VALUES)
    return path, path.read_bytes().index(VALUES.tobytes())


def test_the_members_of_a_sound_archive_are_named(archive):
    found = files.check_zip(archive[0])
    assert [name for name in found if name.endswith(("/data.pkl", "values.npy"))]
    assert found == zipfile.ZipFile(archive[0]).namelist()


def test_a_flipped_bit_is_noticed_and_its_member_named(archive):
    """A CRC-32 finds each: here 40 of them, in the values, which torch.load would take as they are."""
    path, first = archive
    sound, rng = path.read_bytes(), random.Random(0)
    for _ in range(40):
        broken = bytearray(sound)
        broken[first + rng.randrange(VALUES.nbytes)] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"the checksum of (file/data/0|values\.npy) is wrong"):
            files.check_zip(path)


def test_an_archive_cut_short_is_refused(archive):
    path, _ = archive
    sound = path.read_bytes()
    for length in (0, 4, 100, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(ValueError, match="cut short or damaged"):
            files.check_zip(path)


# ---------------------------------------------------------------------------------------------
# Locks
# ---------------------------------------------------------------------------------------------


def in_another_process(work, *args):
    """Whether it came to an end; a lock that another process has is an exit with 3."""

    def run():
        try:
            work(*args)
        except TimeoutError:
            os._exit(3)
        os._exit(0)

    process = fork.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, 3)
    return process.exitcode == 0


def can_lock(folder):
    return in_another_process(files.lock, folder, False)


def test_a_folder_belongs_to_one_process_until_it_lets_go(tmp_path):
    folder = tmp_path / "new" / "run"
    with files.lock(folder, wait=False):
        assert not can_lock(folder)
        assert can_lock(tmp_path / "other")
    assert can_lock(folder)


def test_a_process_may_lock_its_own_folder_again(tmp_path):
    """And the inner one does not let go of the outer one's."""
    with files.lock(tmp_path):
        with files.lock(tmp_path, wait=False):
            pass
        assert not can_lock(tmp_path)


def test_folders_with_the_same_relative_name_are_two(tmp_path, monkeypatch):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with files.lock(Path("run")):
        monkeypatch.chdir(tmp_path / "b")
        with files.lock(Path("run")):
            assert not can_lock(tmp_path / "b" / "run")
        assert not can_lock(tmp_path / "a" / "run")


def test_a_lock_that_another_process_has_is_waited_for(tmp_path):
    done, ready = tmp_path / "done", fork.Event()

    def hold():
        with files.lock(tmp_path):
            ready.set()
            time.sleep(0.2)
            done.touch()

    other = fork.Process(target=hold)
    other.start()
    assert ready.wait(60)
    with files.lock(tmp_path):
        assert done.exists(), "it was not waited for"
    other.join(60)


def test_a_lock_dies_with_its_process_though_workers_live(tmp_path):
    """kill -9 leaves no time to let go; a forked worker that had inherited the lock would keep it."""
    receive, send = fork.Pipe(duplex=False)

    def hold():
        held = files.lock(tmp_path)
        worker = fork.Process(target=time.sleep, args=(60,))
        worker.start()
        send.send(worker.pid)
        time.sleep(60)
        del held

    owner = fork.Process(target=hold)
    owner.start()
    assert receive.poll(60)
    worker = receive.recv()
    try:
        assert not can_lock(tmp_path)
        os.kill(owner.pid, signal.SIGKILL)
        owner.join()  # with a time limit it would wait for a pipe that the worker has, too
        os.kill(worker, 0)  # it lives
        assert can_lock(tmp_path), "the data worker has inherited the lock"
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_holds_where_the_system_has_no_flock(tmp_path, monkeypatch):
    """Windows has no fcntl, and some builds of Python neither; filelock then writes down whose the lock is. A process
    that was killed has it no more."""
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    ready = fork.Event()
    owner = fork.Process(target=lambda: (held := files.lock(tmp_path), ready.set(), time.sleep(60), held))
    owner.start()
    assert ready.wait(60)
    with pytest.raises(TimeoutError):
        files.lock(tmp_path, wait=False)
    owner.kill()
    owner.join()
    with files.lock(tmp_path, wait=False):
        assert (tmp_path / ".lock").exists()


def test_what_is_no_folder_is_not_waited_for(tmp_path):
    """Apart from a lock that another process has."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as error:
        files.lock(tmp_path / "file" / "run")
    assert not isinstance(error.value, TimeoutError)


# ---------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 8192  # 2 MiB
MD5, SHA256 = (f"{kind}:{hashlib.new(kind, CONTENT).hexdigest()}" for kind in ("md5", "sha256"))

PACKED = gzip.compress(CONTENT)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as site:
        site.pages["/file.bin"] = CONTENT
        yield site


@pytest.fixture
def url(site):
    return f"{site.url}/file.bin"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "file.bin"


@pytest.mark.parametrize("checksum", [MD5, SHA256, SHA256[:15], None])
def test_a_file_is_downloaded_once_with_a_progress_bar(checksum, site, url, path, capfd):
    for _ in range(2):
        assert files.download(url, path, checksum) == path
        assert path.read_bytes() == CONTENT
    assert site.asked == ["/file.bin"]
    assert names(path.parent) == ["file.bin"]
    err = capfd.readouterr().err
    assert f"downloading {url}" in err
    assert "100%" in err


@pytest.mark.parametrize("checksum", [MD5, SHA256, SHA256[:15]])
def test_a_file_with_another_checksum_is_refused_and_not_kept(checksum, site, url, path):
    """One bit is enough. Next time the right one may come."""
    site.pages["/file.bin"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(ValueError, match=rf"checksum \w+:\w+, not {checksum}; not kept"):
        files.download(url, path, checksum)
    assert names(path.parent) == []
    site.pages["/file.bin"] = CONTENT
    assert files.download(url, path, checksum).read_bytes() == CONTENT


def test_a_file_of_the_wrong_kind_is_not_kept(site, url, path):
    def check(part):
        assert part.read_bytes() == CONTENT
        assert not path.exists(), "another process would take it"
        raise ValueError("a web page")

    with pytest.raises(ValueError, match="a web page"):
        files.download(url, path, check=check)
    assert names(path.parent) == []


@pytest.mark.parametrize("checksum", [MD5, None], ids=["checksum", "no checksum"])
def test_half_a_download_is_noticed_and_not_kept(checksum, site, url, path):
    """By its length too: without a checksum nobody could tell later."""
    site.answers = ["cut", "whole"]
    with pytest.raises(OSError, match=r"^IncompleteRead\(1048576 bytes read, 1048576 more expected\)$"):
        files.download(url, path, checksum)
    assert names(path.parent) == []
    assert files.download(url, path, checksum).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("address", "match"),
    [
        (None, "^404 Client Error: Not Found"),
        ("http://127.0.0.1:9/file.bin", "Connection refused$"),  # the port `discard`: nobody listens
        ("http://host.invalid/file.bin", "."),  # a name that can't exist (RFC 2606)
    ],
    ids=["404", "closed", "no such host"],
)
def test_a_network_that_fails_is_one_short_line(address, match, site, url, path):
    """The cause alone, not what the layers of a library say of each other."""
    site.answers = ["missing"]
    with pytest.raises(OSError, match=match) as error:
        files.download(address or url, path)
    assert "\n" not in str(error.value)
    assert " object at 0x" not in str(error.value)
    assert names(path.parent) == []


def test_a_packed_file_stays_packed(site, url, path):
    """Some servers call a .gz file a packed transfer of what is in it; unpacked, it would be another file."""
    site.pages["/file.bin"], site.answers = PACKED, ["gzip"]
    assert files.download(url, path).read_bytes() == PACKED


def test_what_a_killed_download_left_is_removed(site, url, path):
    """That of this file alone."""
    path.parent.mkdir()
    for name in ("file.bin.123.part", "file.bin2.123.part", "file.bin.txt"):
        (path.parent / name).write_bytes(b"half")
    files.download(url, path)
    assert names(path.parent) == ["file.bin", "file.bin.txt", "file.bin2.123.part"]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("answers", [["slow"], ["missing", "slow"]], ids=["well", "the first fails"])
def test_of_several_processes_one_downloads_and_the_others_wait(answers, site, url, path):
    """As those that torchrun starts, which all want the data at the same moment."""
    site.answers, start = answers, fork.Barrier(4)

    def want():
        start.wait(60)
        files.download(url, path, MD5)
        assert path.read_bytes() == CONTENT

    everyone = [fork.Process(target=want) for _ in range(4)]
    for process in everyone:
        process.start()
    for process in everyone:
        process.join(60)
    assert sorted(process.exitcode for process in everyone) == [0, 0, 0, len(answers) - 1]
    assert site.asked == ["/file.bin"] * len(answers)
    assert names(path.parent) == ["file.bin"]
