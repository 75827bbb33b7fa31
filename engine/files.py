"""Files that are whole: written, checked, downloaded and locked in one place.

whole       a file appears under its name when all of it is on the disk, or not at all
check_zip   the checksums inside a zip archive, which is what torch.save and NumPy write
lock        a folder for one process at a time, until it lets go or dies
download    a file from the web comes once, whole, and checked
"""

import contextlib
import glob
import os
import sys
import zipfile
import zlib

import filelock
import pooch


@contextlib.contextmanager
def whole(path, previous=None):
    """Write a file whole or not at all: `with whole(path) as part:`, and the block writes the file `part`.

    When the block ends without an error, `part` is forced to the disk and renamed to `path`; else it is removed, and
    what was at `path` stays. So a process may be killed at any moment. Two processes may write the same file: one wins.
    previous: where an older file at `path` goes just before that; at any moment one of the two is whole.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing behind it
        if previous and path.exists():
            path.replace(previous)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_zip(path):
    """The names of an archive's members, once their checksums are found right (0.1 s for ViT-B).

    torch.load does not look at them: damaged weights load as other numbers without a word. Raises ValueError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError):
        raise ValueError("a zip file that is cut short or damaged") from None
    if damaged:
        raise ValueError(f"a damaged zip file: the checksum of {damaged} is wrong")
    return names


def lock(folder, wait=True):
    """Make a folder, which is created if need be, this process's own: `with lock(folder):`, or until it ends.

    It ends with the process, however that ends: data workers, which are forks of it, do not inherit it (filelock 4.1
    and later). Keep what is returned as long as the lock is needed. A process may lock its own folder again.
    wait: for another process that has it. False raises TimeoutError then; OSError if nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One lock for each folder in a process, so that it does not wait for itself.
    return filelock.FileLock(folder / ".lock", is_singleton=True).acquire(timeout=-1 if wait else 0)


def download(url, path, checksum=None, check=None):
    """Bring the file at a URL to `path`, unless there is one already. Returns path.

    Of several processes that want it one downloads, and the others wait.

    checksum  "md5:…" or "sha256:…", in hexadecimal, all of it or its start
    check     called with a temporary path: raises ValueError for a file of the wrong kind, as a page that says
              "please log in"
    Raises ValueError for a file that is not the right one, OSError if the network fails or less than the whole file
    comes. Nothing is kept then.
    """
    if path.exists():
        return path
    with lock(path.parent):
        if not path.exists():  # else another process has had it in the meantime
            for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
                left.unlink()  # by a process that was killed
            with whole(path) as part:
                receive(url, part)
                verify(part, checksum)
                if check:
                    check(part)
    return path


def receive(url, path):
    """Bring the file at a URL to `path`, with a progress bar. Raises OSError, with the cause alone, if that fails."""
    print(f"downloading {url}", file=sys.stderr)
    # identity: what a server compresses on the way would be unpacked here, be it a file that ends in .gz
    fetch = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 20, headers={"Accept-Encoding": "identity"})
    try:
        fetch(url, path, None)
    except OSError as error:
        while error.__context__:  # below what the layers of the library say of each other
            error = error.__context__
        raise OSError(str(error) or type(error).__name__) from None


def verify(path, checksum):
    """Raise ValueError unless a file has this checksum, "kind:hexadecimal" or its start; None: any will do."""
    if checksum:
        kind, _, wanted = checksum.partition(":")
        found = pooch.file_hash(path, kind)[: len(wanted)]
        if found != wanted:
            raise ValueError(f"it came with the checksum {kind}:{found}, not {checksum}; not kept")
