"""Caches in files: two headers, then all keys, then all values, as they lie in memory.

A commit writes keys and values to the disk first, then a header over the older of the two: its number is one higher,
and its checksum says whether it is whole. Whenever the process ends, the newest whole header describes tokens that are
there. A writer holds a lock on the file, where the system has such locks.

That of a pool of pages is the same, of one sequence without tokens, with the table of pages behind the values; it is
written once.
"""

import contextlib
import os
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from .._checks import Array
from . import types
from .types import Form

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

MAGIC, VERSIONS = b"QKVCACHE", (2, 3)
_MOST_TOKENS = 1 << 62  # far from where sums of such numbers overflow
_OF_PAGES = struct.Struct("<8sq")  # magic and how many int64 the table has; then these, and CRC-32 of all that
_MAGIC_OF_PAGES = b"QKVPAGES"
_PAGE = 1 << 16  # a multiple of every system's page, which a flush begins on
# magic, version, bytes of one header, number of the commit, byte order and type, seven numbers of Geometry; of version
# 3, which caches have that version 2 cannot describe, the type of the values, and 1 where they are latent plus 2 where
# rows are rotated plus 4 where who opens it keeps bounds. Then lengths, reach and starts, (batch,) int64 each, and
# CRC-32 of all that.
_HEAD = struct.Struct("<8sIQQ17s7q")
_MORE = struct.Struct("<16sQ")


WHOLE = -2


class Geometry(NamedTuple):
    """The shape of a cache; window -1 is none, and WHOLE none and an encoder's tokens, which all queries see."""

    batch: int
    capacity: int
    window: int
    keep: int
    form: Form

    def is_possible(self) -> bool:
        """Whether a cache may have these numbers, which a file says."""
        heads, dim, dim_v = self.form.kv_heads, self.form.dim, self.form.dim_v
        ring = self.window >= 0 or (self.window in (-1, WHOLE) and self.keep == 0)
        dims = 1 <= dim <= _core.MAX_DIM and 1 <= dim_v <= _core.MAX_DIM
        dims = dims and (dim_v <= dim or not self.form.latent)
        return dims and heads >= 1 and self.keep >= 0 and ring and self.capacity - self.keep > max(self.window, 0)

    @property
    def version(self) -> int:
        """Of its file: the oldest that describes it, so that what has written one goes on with it."""
        form = self.form
        return 2 if form.k.name == form.v.name and not _kind(form) else 3

    def places(self) -> tuple[int, int, int, int]:
        """Bytes: of one header, before the keys, before the values, and of the file."""
        more = _MORE.size if self.version > 2 else 0
        head = _up(_HEAD.size + more + 24 * self.batch + 4)
        rows, form = self.batch * self.form.kv_heads * self.capacity, self.form
        size_k, size_v = (_up(rows * x.width * x.dtype.itemsize) for x in (form.k, form.v))
        return head, 2 * head, 2 * head + size_k, 2 * head + size_k + (0 if form.latent else size_v)

    def __str__(self) -> str:
        form = self.form
        more = ", latent" * form.latent + ", rotated" * form.rotate + ", with bounds" * form.bounds
        ring = f", window {self.window}, keep {self.keep}" if self.window >= 0 else ""
        ring += ", not causal" if self.window == WHOLE else ""
        return (
            f"batch {self.batch}, kv_heads {form.kv_heads}, head_dim {form.dim}, value_dim {form.dim_v}, "
            f"capacity {self.capacity}, {' and '.join(dict.fromkeys((form.k.name, form.v.name)))}{more}{ring}"
        )


class Store:
    """An open file: `k` and `v` are its memory, `lengths`, `reach` and `starts` what its last commit confirmed.

    Of a pool, which is `paged`, `table` is its table, and what is written to k and v stays in memory."""

    def __init__(self, where: str, path: Any, writable: bool, paged: bool = False) -> None:
        import mmap  # which few need: half a millisecond of every import

        with open(os.fspath(path), "r+b" if writable else "rb") as file:  # no number, which would be a file of others
            if writable:
                _lock(where, path, file)
            self._id = _file_id(os.fstat(file.fileno()))
            read = _read_headers(where, path, file, paged)
            self.geometry, (self.lengths, self.reach, self.starts), self._commits = read
            self.table = _read_table(where, path, file, self.geometry.places()[3]) if paged else []
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY if paged else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), 0, access=access)
        _, at_k, at_v, _ = self.geometry.places()
        batch, capacity, *_, form = self.geometry
        self.arrays: tuple[Array, ...] = tuple(
            np.ndarray((batch, form.kv_heads, capacity, x.width), x.dtype, self._map, at)
            for x, at in form.parts((form.k, at_k), (form.v, at_v))
        )
        self.k, self.v = form.views(*self.arrays)

    def is_at(self, path: Any) -> bool:
        """Whether this is the file of that name."""
        return os.path.exists(path) and _file_id(os.stat(path)) == self._id

    def check_writable(self, where: str) -> None:
        if not self.k.flags.writeable:
            raise ValueError(f"{where}: the cache was opened for reading; open(path, writable=True) or load(path)")

    def withdraw(self, lengths: Array) -> None:
        """Before tokens beyond these are overwritten."""
        if (lengths < self.lengths).any():
            self.commit(lengths, lengths, np.minimum(self.starts, lengths))

    def commit(self, lengths: Array, reach: Array, starts: Array) -> None:
        """From now on a process that opens the file finds these tokens, whatever happens to this one."""
        head, at_k, *_, end = self.geometry.places()
        self._map.flush(at_k, end - at_k)
        made = _header(self.geometry, self._commits + 1, lengths, reach, starts)
        at = head * ((self._commits + 1) % 2)
        self._map[at : at + len(made)] = made
        self._map.flush(at, head)
        self._commits += 1
        self.lengths, self.reach, self.starts = lengths.copy(), reach.copy(), starts.copy()


def _kind(form: Form) -> int:
    return form.latent + 2 * form.rotate + 4 * form.bounds


def _file_id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lock(where: str, path: Any, file: Any) -> None:
    """Until the file's last descriptor is closed, that of the memory map among them."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{where}: {os.fspath(path)!r} is open for writing, by another cache or process") from None
    except OSError:  # a file system without locks
        pass


@contextlib.contextmanager
def creating(path: Any, geometry: Geometry, *, over: bool) -> Iterator[str]:
    """An empty cache, whose file takes the name `path` at the end; until then it lies beside that, under a new name. If
    there is a file of that name by then, it is replaced, or that is an error."""
    path = os.path.realpath(os.fsdecode(path))
    new = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}.new")
    end = geometry.places()[3]
    zeros = np.zeros(geometry.batch, np.int64)
    try:
        file = open(new, "xb")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, path) from None
    try:
        with file:
            file.write(_header(geometry, 0, zeros, zeros, zeros))
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a signal later
                os.posix_fallocate(file.fileno(), 0, end)
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        yield new
        if over:
            os.replace(new, path)
        else:
            _take_name(new, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise


def _take_name(new: str, path: str) -> None:
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.replace(new, path)
    else:
        os.unlink(new)


def name_of(where: str, path: Any) -> Any:
    """A path, and no number of an open file, which would be closed."""
    try:
        return os.fspath(path)
    except TypeError:
        raise TypeError(f"{where}: path must be a str or path-like, got {path!r}") from None


def check_free(where: str, path: Any) -> None:
    """That no cache writes to the file of this name, if there is one."""
    path = name_of(where, path)
    with contextlib.suppress(FileNotFoundError, PermissionError), open(path, "rb") as file:
        _lock(where, path, file)


def _up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _header(geometry: Geometry, commit: int, *tables: Array) -> bytes:
    batch, capacity, window, keep, form = geometry
    numbers = (batch, form.kv_heads, form.dim, form.dim_v, capacity, window, keep)
    version = geometry.version
    made = _HEAD.pack(MAGIC, version, geometry.places()[0], commit, _type_name(form.k.name), *numbers)
    if version > 2:
        made += _MORE.pack(form.v.name.encode(), _kind(form))
    made += b"".join(table.astype("<i8").tobytes() for table in tables)
    return made + _checksum(made)


def _checksum(data: bytes) -> bytes:
    import zlib

    return struct.pack("<I", zlib.crc32(data))


def _type_name(name: str) -> bytes:
    return f"{sys.byteorder[0]}{name}".encode()


def write_table(path: str, table: list[int]) -> None:
    """Behind the values of a new file, and on the disk."""
    made = _OF_PAGES.pack(_MAGIC_OF_PAGES, len(table)) + np.array(table, "<i8").tobytes()
    with open(path, "ab") as file:
        file.write(made + _checksum(made))
        file.flush()
        os.fsync(file.fileno())


def _read_table(where: str, path: Any, file: Any, at: int) -> list[int]:
    file.seek(at)
    made = file.read()
    magic, count = _OF_PAGES.unpack(made[: _OF_PAGES.size]) if len(made) >= _OF_PAGES.size else (b"", 0)
    end = _OF_PAGES.size + 8 * count
    if magic != _MAGIC_OF_PAGES or len(made) != end + 4 or made[end:] != _checksum(made[:end]):
        raise ValueError(f"{where}: {os.fspath(path)!r} is damaged or truncated: its table of pages is not whole")
    table: list[int] = np.frombuffer(made[_OF_PAGES.size : end], "<i8").tolist()
    return table


def _read_headers(where: str, path: Any, file: Any, paged: bool) -> tuple[Geometry, Array, int]:
    """Of the newest whole header: the geometry, its tables, and the number of its commit."""

    def fail(what: str) -> ValueError:
        return ValueError(f"{where}: {os.fspath(path)!r} {what}")

    begin = file.read(_HEAD.size)
    if len(begin) < _HEAD.size or begin[:8] != MAGIC:
        raise fail(f"is no cache of qkv_fast (it begins with {begin[:8]!r})")
    _, version, head, *_ = _HEAD.unpack(begin)
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise fail(f"has version {version} of the format, this qkv_fast reads versions {known}")
    room = _HEAD.size + (_MORE.size if version > 2 else 0)
    size = os.fstat(file.fileno()).st_size
    whole = []
    for at in (0, head):
        file.seek(min(at, size))
        made = file.read(min(head, size))
        if len(made) < room or made[:12] != begin[:12]:
            continue
        _, _, _, commit, name, batch, *numbers = _HEAD.unpack(made[: _HEAD.size])
        end = room + 24 * batch
        if batch < 1 or len(made) < end + 4 or made[end : end + 4] != _checksum(made[:end]):
            continue
        name_v, more = _MORE.unpack(made[_HEAD.size : room]) if version > 2 else (name[1:], 0)
        names = [x.rstrip(b"\0") for x in (name, name[:1] + name_v)]
        whole.append((commit, names, more, batch, numbers, made[room:end]))
    if not whole:
        raise fail("is damaged or truncated: neither of its headers is whole")
    commit, names, more, batch, (heads, dim, dim_v, capacity, window, keep), tables = max(whole)
    named = {_type_name(known): known for known in types.NAMES}
    for name in names:
        if name not in named:
            known = ", ".join(types.NAMES)
            held = name.decode("ascii", "replace")
            raise fail(f"holds {held} (l or b: byte order), this machine and version read {known}")
    k_name, v_name = (named[name] for name in names)
    form = types.make_form(where, heads, (dim, dim_v), (k_name, v_name), *(bool(more & i) for i in (1, 2, 4)))
    if more != _kind(form) or (form.latent and k_name != v_name):
        raise fail(f"is damaged: there are no {k_name} keys and {v_name} values of this kind ({more})")
    geometry = Geometry(batch, capacity, window, keep, form)
    if not geometry.is_possible():
        raise fail(f"is damaged: there is no cache of {geometry}")
    end = geometry.places()[3]
    file.seek(end)
    if (size > end and file.read(8) == _MAGIC_OF_PAGES) != paged:
        raise fail(f"is {'no' if paged else 'the'} file of a PagedKVCache")
    if size < end or (size > end and not paged):
        raise fail(f"is truncated or damaged: it has {size} bytes, a cache of {geometry} has {geometry.places()[3]}")
    found = np.frombuffer(tables, "<i8").astype(np.int64).reshape(3, batch)  # a copy
    lengths, reach, starts = found
    longest = capacity if window < 0 else _MOST_TOKENS
    sizes = (lengths < 0).any() or (reach < lengths).any() or (reach > longest).any()
    if sizes or (starts < 0).any() or (starts > lengths).any() or commit > _MOST_TOKENS:
        held = f"{lengths.tolist()} tokens, of {reach.tolist()}, from {starts.tolist()} on, in commit {commit}"
        raise fail(f"is damaged: it has {held}")
    return geometry, found, commit
