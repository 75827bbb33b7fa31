"""Files from the web: each comes once, whole, and checked.

A download goes to a temporary name, and gets its own only when it is what it should be. Of several processes that want
the same file one downloads, and the others wait for it.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: processes download each for itself
    fcntl = None

BROKEN = (OSError, http.client.HTTPException)  # what a network that fails raises


def download(url, path, checksum=None, check=None):
    """Bring the file at a URL to `path`, unless there is one already. Returns path.

    checksum  "md5:…" or "sha256:…", in hexadecimal, all of it or its start. A download that breaks off then goes on
              where it stopped, the next time; without one nobody could tell halves of two files from a whole one
    check     called with the temporary path: raises ValueError for a file of the wrong kind
    Raises ValueError for a file that is not the right one, which is not kept, and one of BROKEN if the network fails.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("a+b") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # another process had it
            part.unlink(missing_ok=True)
            return path
        if not part.exists():
            raise ConnectionError("another process has tried in vain")
        try:
            if not checksum:
                file.truncate(0)
            if not checksum or digest(file, checksum) != checksum:
                receive(url, file)
            if checksum and digest(file, checksum) != checksum:
                raise ValueError(f"it came with the checksum {digest(file, checksum)}, not {checksum}; not kept")
            if check:
                check(part)
            part.replace(path)
        except (*BROKEN, KeyboardInterrupt) as error:
            refused = isinstance(error, urllib.error.HTTPError)  # to go on from here, too
            if refused or not checksum or not os.fstat(file.fileno()).st_size:
                part.unlink()
            raise
        except ValueError:
            part.unlink()
            raise
    return path


def receive(url, file):
    """Append to an open file what it lacks of the one at the URL. Raises one of BROKEN if less comes."""
    done = os.fstat(file.fileno()).st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:  # not a part: the server starts from the beginning
            file.truncate(0)
            done = 0
        rest = response.headers.get("Content-Length")
        size = done + int(rest) if rest else None
        with tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=url.rpartition("/")[2][:40]) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                file.flush()
                bar.update(len(block))
    if size and bar.n != size:
        raise ConnectionError(f"only {bar.n} of {size} bytes came")


def digest(file, checksum):
    """The checksum of an open file: of the kind, and as long, as the one given."""
    kind, _, wanted = checksum.partition(":")
    found = hashlib.new(kind)
    file.seek(0)
    while block := file.read(1 << 20):
        found.update(block)
    return f"{kind}:{found.hexdigest()[: len(wanted)]}"
