"""A folder that appears whole: filled beside its place under another name, then renamed.

What is deleted here was made here, whatever stands beside the target:

- A run works in `TARGET.partial-XXXXXXXX`, a new name, so nobody's folder is ever in its way.
- The first file in it is the mark, with the folder's name and inode, so that no other folder and
  no copy passes for it; the run holds a lock on the mark until it ends.
- The mark then lists each file before it is made, and its inode after that.
- A folder is cleared with the mark read and the lock held, after a look at every entry: if one is
  not a regular file that the mark lists, all stay. It is done within the open folder, so no link is
  followed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from glm4.checkpoint_file import CheckpointError
from glm4_kernels.library import bad_type

MARK = ".glm4-quantize"
MARK_LIMIT = 1 << 20  # bytes of it: a line or two for each file
RANDOM = r"\.partial-[0-9a-f]{8}"
# safetensors from 0.8 on writes a file under such a name first.
TEMPORARY = r"\.tmp\w{6}"


def free_place(target: str | os.PathLike[str]) -> Path:
    """`target` as a path where a folder can be made; nothing is made yet.

    Raises:
        CheckpointError: it exists, has no name of its own, or what is above it takes no folder.
    """
    if not isinstance(target, (str, os.PathLike)):
        raise bad_type("quantize_checkpoint", "target", "a path", repr(target))
    path = Path(os.path.expanduser(target))
    if str(path).startswith("~"):
        raise CheckpointError(f"{path}: there is no such user")
    if path.name in ("", "..") or "\0" in str(path):
        raise CheckpointError(f"{os.fspath(target)!r}: must end in the name of a new folder")
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: must not exist yet; remove it, or choose another place")
    above = path.parent
    while not os.path.lexists(above):
        if above.name == "..":
            raise CheckpointError(f"{path}: {above.parent} does not exist")
        above = above.parent
    if not above.is_dir():
        raise CheckpointError(f"{path}: {above} must be a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path}: {above} must be a folder that you may write into")
    return path


@contextmanager
def appearing(target: Path, source: Path) -> Iterator[WorkingFolder]:
    """Yields a folder to fill, which becomes `target` if nothing fails, and is gone if it does.

    Args:
        target: of `free_place`.
        source: the folder that is read, in or around which nothing is made or deleted.

    Raises:
        CheckpointError: the target is in the source, another run is writing it, or it cannot be
            written. If it is there when all is done, that is kept, and the message says where.
    """
    above = Path(os.path.realpath(target.parent))
    if any(p.exists() and p.samefile(source) for p in (above, *above.parents)):
        raise CheckpointError(f"{target}: must not lie in {source}, which is read")
    parents = make_parents(target)
    try:
        clear_leftovers(target, source)
        folder = WorkingFolder.make(target)
        try:
            yield folder
            folder.publish(target)
        except BaseException:
            folder.discard()
            raise
        finally:
            folder.close()
    except BaseException:
        for parent in reversed(parents):
            with suppress(OSError):  # something is in it
                parent.rmdir()
        raise


def make_parents(target: Path) -> list[Path]:
    """Makes what is missing above `target`, and returns it, the outermost first."""
    missing = [above for above in target.parents if not os.path.lexists(above)][::-1]
    made: list[Path] = []
    for parent in missing:
        try:
            parent.mkdir()
            made.append(parent)
        except OSError as error:
            if isinstance(error, FileExistsError) and parent.is_dir():
                continue  # another run made it meanwhile
            for ours in reversed(made):
                with suppress(OSError):  # something is in it
                    ours.rmdir()
            raise CheckpointError(f"{parent}: cannot be made ({error.strerror})") from None
    return made


def clear_leftovers(target: Path, source: Path) -> None:
    """Deletes the folders of runs to `target` that were killed; refuses while one is at work."""
    left = re.compile(re.escape(target.name) + RANDOM)
    try:
        beside = sorted(os.listdir(target.parent))
    except OSError:  # one may write into a folder that one may not list
        return
    reading = [above.stat() for above in (source, *source.resolve().parents)]
    for path in (target.with_name(name) for name in beside if left.fullmatch(name)):
        try:
            folder = WorkingFolder(path)
        except OSError:  # a link, a file, another's
            continue
        try:
            itself = os.fstat(folder.folder)
            if folder.take() and not any(os.path.samestat(itself, above) for above in reading):
                folder.discard()
        finally:
            folder.close()


class WorkingFolder:
    """A folder, open, of one run: the one that has its mark locked."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if `path` is not a folder itself; a link to one is not."""
        self.path = path
        self.lock = -1
        self.made: dict[str, int] = {}  # inode of each file by name; 0 while it is being made
        self.folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    @classmethod
    def make(cls, target: Path) -> WorkingFolder:
        """A new one beside `target`, marked and locked."""
        path = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
        try:
            path.mkdir()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be made ({error.strerror})") from None
        folder = None
        try:
            folder = cls(path)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            folder.lock = os.open(MARK, flags, 0o666, dir_fd=folder.folder)
            fcntl.flock(folder.lock, fcntl.LOCK_EX)
            if os.write(folder.lock, folder.mark) < len(folder.mark):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                (path / MARK).unlink(missing_ok=True)
                path.rmdir()
            if folder is not None:
                folder.close()
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
        return folder

    @property
    def mark(self) -> bytes:
        inode = os.fstat(self.folder).st_ino
        return b"glm4 quantize works in %s, inode %d\n" % (os.fsencode(self.path.name), inode)

    def take(self) -> bool:
        """Whether this is what a run left, which then is ours.

        Raises:
            CheckpointError: the run goes on.
        """
        try:
            self.lock = os.open(MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.folder)
            is_file = stat.S_ISREG(os.fstat(self.lock).st_mode)
            written = os.pread(self.lock, MARK_LIMIT, 0) if is_file else b""
            if not written.startswith(self.mark):
                return False
            for line in written[len(self.mark) :].decode(errors="replace").splitlines():
                name, _, inode = line.rpartition(" ")
                self.made[name] = int(inode) if inode.isdecimal() else -1
            os.lseek(self.lock, 0, os.SEEK_END)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.path}: another run is writing into it") from None
        except OSError:
            return False
        return self.is_ours()  # it may have been finished a moment ago

    def is_ours(self) -> bool:
        """Whether the path still leads to this folder, and the mark in it is the locked one."""
        try:
            here = os.stat(self.path, follow_symlinks=False), os.fstat(self.folder)
            mark = os.stat(MARK, dir_fd=self.folder, follow_symlinks=False), os.fstat(self.lock)
        except OSError:
            return False
        return os.path.samestat(*here) and os.path.samestat(*mark)

    def note(self, name: str, inode: int) -> None:
        """Lists a file in the mark: 0 before it is made, its inode when it is."""
        line = f"{name} {inode}\n".encode()
        if os.write(self.lock, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.made[name] = inode

    def is_listed(self, name: str) -> bool:
        """Whether an entry is a regular file that a run made here."""
        info = os.stat(name, dir_fd=self.folder, follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode):
            return False
        if re.fullmatch(TEMPORARY, name):
            return 0 in self.made.values()
        return name == MARK or self.made.get(name) in (0, info.st_ino)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The path of a file to make; it is on the disk after the block, an error one line."""
        path = self.path / name
        if not self.is_ours() or os.path.lexists(path):
            raise CheckpointError(f"{path}: cannot be written (somebody changed its folder)")
        try:
            self.note(name, 0)
            yield path
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.folder)
            try:
                os.fchmod(file, os.fstat(self.lock).st_mode & 0o777)  # safetensors has its own
                os.fsync(file)
                self.note(name, os.fstat(file).st_ino)
            finally:
                os.close(file)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise CheckpointError(f"{path}: cannot be written ({reason or error})") from None

    def write(self, name: str, data: bytes) -> None:
        """A file of `data`; see `writing`."""
        with self.writing(name) as path, path.open("xb") as file:
            file.write(data)

    def rename(self, name: str, new: str) -> None:
        """Of a file in it."""
        if os.path.lexists(self.path / new):
            raise CheckpointError(f"{self.path / new}: must not be there (somebody made it)")
        try:
            self.note(new, self.made[name])
            os.rename(name, new, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.path / new}: not written ({error.strerror})") from None

    def publish(self, target: Path) -> None:
        """Renames the folder to `target`; where that fails, leaves it to the user."""
        if not self.is_ours():
            raise CheckpointError(f"{self.path}: was moved before it was finished")
        with suppress(OSError):  # not every file system does that to a folder
            os.fsync(self.folder)
        try:
            rename_new(self.path, target)
        except OSError as error:
            self.give_up()
            exists = isinstance(error, FileExistsError)
            reason = "was made by another meanwhile" if exists else f"not made ({error.strerror})"
            raise CheckpointError(
                f"{target}: {reason}; the finished checkpoint is kept in {self.path}: rename it "
                "to where you want it"
            ) from None
        self.give_up()

    def give_up(self) -> None:
        """From here on no run deletes anything in it."""
        with suppress(OSError):
            os.unlink(MARK, dir_fd=self.folder)
        os.close(self.lock)
        self.lock = -1

    def discard(self) -> None:
        """Deletes a folder that is ours with all that is in it; warns, and deletes nothing, if
        anything in it is not of a run."""
        if not self.is_ours():
            return
        names = os.listdir(self.folder)
        for name in names:
            if not self.is_listed(name):
                warnings.warn(
                    f"{self.path}: of a run that did not end, is left as it is, since {name} in it "
                    "is not of that run; remove it yourself",
                    stacklevel=2,
                )
                return
        try:
            for name in sorted(names, key=MARK.__eq__):  # the mark last
                os.unlink(name, dir_fd=self.folder)
            self.path.rmdir()
        except OSError as error:
            warnings.warn(f"{self.path}: cannot be removed ({error.strerror})", stacklevel=2)

    def close(self) -> None:
        for handle in (self.lock, self.folder):
            if handle >= 0:
                os.close(handle)


def rename_new(folder: Path, target: Path) -> None:
    """Renames a folder; FileExistsError if anything is at `target`.

    `os.rename` would replace an empty folder. Linux can be told not to; elsewhere, and on file
    systems that cannot, the name is taken first, by a folder of our own.
    """
    at_cwd, no_replace = -100, 1  # of Linux, which alone has this call
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        number = errno.ENOSYS
    else:
        if not renameat2(at_cwd, os.fsencode(folder), at_cwd, os.fsencode(target), no_replace):
            return
        number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number), os.fspath(target))
    target.mkdir()
    folder.rename(target)
