"""Caches in files: opened elsewhere, killed in the middle, damaged; and keys in files larger than memory may be."""

import inspect
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import zlib
from copy import copy as copied

import numpy as np
import pytest
from _quantised import QUANTISED, as_stored
from _util import ALL_TYPES, child_says, normal, same_bits

import qkv_fast
from qkv_fast import KVCache, PagedKVCache

HEADER = 1 << 16  # bytes of one, for a small batch
dtypes = pytest.mark.parametrize("dtype", [*ALL_TYPES, *QUANTISED])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.kv"


def tokens(seed, n, batch=2):
    rng = np.random.default_rng(seed)
    return normal(rng, (batch, 2, n, 8)), normal(rng, (batch, 2, n, 4))


def made(path, n=7, dtype="float32"):
    cache = KVCache(2, 2, 8, 20, value_dim=4, path=path, dtype=dtype)
    cache.append(*tokens(0, n), lengths=[n, n - 2])
    cache.flush()
    return cache


def same_tokens(a, b):
    assert a.lengths.tolist() == b.lengths.tolist() and np.array_equal(a.positions, b.positions)
    there = a.positions >= 0
    same_bits(a.keys.swapaxes(1, 2)[there], b.keys.swapaxes(1, 2)[there])
    same_bits(a.values.swapaxes(1, 2)[there], b.values.swapaxes(1, 2)[there])


@dtypes
def test_another_process_attends_in_place(path, dtype):
    cache = made(path, dtype=dtype)
    cache.append(*tokens(1, 1))  # not flushed
    q = normal(np.random.default_rng(2), (2, 4, 1, 8), "float64" if dtype == "float64" else "float32")
    np.save(path.with_suffix(".npy"), q)
    code = f"""
import numpy as np, qkv_fast
cache = qkv_fast.KVCache.open({str(path)!r})
assert cache.keys.flags.owndata == {dtype in QUANTISED}  # a copy where rows are bytes
np.save({str(path.with_suffix(".npy"))!r}, cache.attend(np.load({str(path.with_suffix(".npy"))!r})))
print(cache.lengths)
"""
    assert child_says(code) == "[7 5]"
    cache.truncate([7, 5])
    same_bits(np.load(path.with_suffix(".npy")), cache.attend(q))


def test_constructor_opens_what_is_there(path):
    first = made(path)
    first.save(path.with_name("copy.kv"))
    del first
    again = KVCache(2, 2, 8, 20, value_dim=4, path=path)
    same_tokens(again, KVCache.load(path.with_name("copy.kv")))
    del again
    with pytest.raises(ValueError, match=r"capacity 20, float32; asked for was .* capacity 21, float32"):
        KVCache(2, 2, 8, 21, value_dim=4, path=path)
    with pytest.raises(ValueError, match=r"capacity 20, float32; asked for was .* capacity 20, int4"):
        KVCache(2, 2, 8, 20, value_dim=4, path=path, dtype="int4")


@dtypes
@pytest.mark.parametrize("ring", [{}, dict(window=6, keep=2)], ids=["slab", "ring"])
def test_saved_and_loaded(path, ring, dtype):
    cache = KVCache(2, 2, 8, 12, value_dim=4, dtype=dtype, **ring)
    for seed in range(5 if ring else 1):
        cache.append(*tokens(seed, 9), lengths=[9, 4])
    cache.save(path)
    q = normal(np.random.default_rng(9), (2, 4, 3, 8), "float64" if dtype == "float64" else "float32")
    for copy in (KVCache.load(path), KVCache.open(path)):
        same_tokens(copy, cache)
        same_bits(copy.attend(q), cache.attend(q))
        assert repr(copy) == repr(cache)
    loaded = KVCache.load(path)
    for each in (cache, loaded):
        each.append(*tokens(7, 1))
    same_tokens(loaded, cache)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("dtype, value_dtype", [("float16", "int8"), ("int8", "int4"), ("float32", "bfloat16")])
def test_keys_and_values_of_two_types(path, dtype, value_dtype):
    """Version 3 of the format; what version 2 can say stays in it, so that older ones read it."""
    cache = KVCache(2, 2, 8, 20, value_dim=4, path=path, dtype=dtype, value_dtype=value_dtype)
    cache.append(*tokens(0, 7))
    cache.flush()
    reader, loaded = KVCache.open(path), KVCache.load(path)
    q = normal(np.random.default_rng(9), (2, 4, 3, 8))
    for copy in (reader, loaded):
        same_tokens(copy, cache)
        same_bits(copy.attend(q), cache.attend(q))
        assert repr(copy) == repr(cache)
    made(path.with_name("plain.kv"))
    versions = [struct.unpack_from("<I", each.read_bytes(), 8)[0] for each in (path, path.with_name("plain.kv"))]
    assert versions == [3, 2]
    del cache, reader
    with pytest.raises(ValueError, match=f"{dtype} and {value_dtype}; asked for was .* capacity 20, {dtype}"):
        KVCache(2, 2, 8, 20, value_dim=4, path=path, dtype=dtype)
    data = path.read_bytes()
    name = data.index(value_dtype.encode(), HEADER + 101)
    end = HEADER + 125 + 48
    data = data[:name] + b"int9\0\0\0\0" + data[name + 8 :]
    path.write_bytes(data[:end] + struct.pack("<I", zlib.crc32(data[HEADER:end])) + data[end + 4 :])
    with pytest.raises(ValueError, match="int9"):
        KVCache.open(path)


@dtypes
@pytest.mark.parametrize("rotate", [False, True])
def test_latent_values(path, dtype, rotate):
    """One copy of rows in the file as well."""
    form = dict(value_dim=4, dtype=dtype, latent=True, rotate=rotate and dtype in QUANTISED)
    cache = KVCache(2, 2, 8, 20, path=path, **form)
    cache.append(tokens(0, 9)[0], lengths=[9, 6])
    cache.reorder([1, 1])
    cache.flush()
    assert path.stat().st_size == 2 * HEADER + -(-cache.nbytes // HEADER) * HEADER
    q = normal(np.random.default_rng(9), (2, 4, 3, 8), "float64" if dtype == "float64" else "float32")
    ring = KVCache(2, 2, 8, 20, window=6, keep=2, **form)
    ring.append(tokens(0, 30)[0])
    ring.save(path.with_name("ring.kv"))
    for each, at in ((cache, path), (ring, path.with_name("ring.kv"))):
        for copy in (KVCache.open(at), KVCache.load(at)):
            same_tokens(copy, each)
            same_bits(copy.attend(q), each.attend(q))
            assert repr(copy) == repr(each)
            assert copy.nbytes == each.nbytes
    del cache, copy
    with pytest.raises(ValueError, match=f"capacity 20, {dtype}, latent.*; asked for was .* capacity 20, {dtype}$"):
        KVCache(2, 2, 8, 20, value_dim=4, dtype=dtype, path=path)
    for at, number in ((69, 9), (117, 8)):  # value_dim; what says that values are latent, rows rotated, bounds kept
        data = bytearray(path.read_bytes())
        for first in (0, HEADER):
            struct.pack_into("<q", data, first + at, number)
            end = first + 125 + 48
            struct.pack_into("<I", data, end, zlib.crc32(data[first:end]))
        wrong = path.with_name("wrong.kv")
        wrong.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            KVCache.open(wrong)


def test_opened_for_reading_changes_nothing(path):
    made(path)
    before = path.read_bytes()
    reader = KVCache.open(path)
    calls = (
        lambda: reader.append(*tokens(0, 1)), lambda: reader.truncate(0), lambda: reader.reorder([1, 0]), reader.flush,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="opened for reading"):
            call()
    assert reader.lengths.tolist() == [7, 5] and path.read_bytes() == before


def test_a_ring_is_not_written_in_place(path):
    KVCache(1, 1, 8, 12, window=3).save(path)
    with pytest.raises(ValueError, match="a ring is not written in place"):
        KVCache.open(path, writable=True)


def test_what_becomes_invalid_is_withdrawn_at_once(path):
    cache = made(path)
    cache.truncate([3, 5])
    assert KVCache.open(path).lengths.tolist() == [3, 5]
    cache.append(*tokens(1, 2))
    assert KVCache.open(path).lengths.tolist() == [3, 5]
    cache.flush()
    cache.reorder([0, 0])
    assert KVCache.open(path).lengths.tolist() == [5, 0]
    cache.flush()
    same_tokens(KVCache.open(path), cache)


def test_one_writer_at_a_time(path):
    pytest.importorskip("fcntl", reason="the system has no such locks")
    cache = made(path)
    for call in (lambda: KVCache.open(path, writable=True), lambda: KVCache(2, 2, 8, 20, value_dim=4, path=path)):
        with pytest.raises(ValueError, match="is open for writing, by another cache or process"):
            call()
    KVCache.open(path), KVCache.load(path)
    code = f"""
import qkv_fast
try: qkv_fast.KVCache.open({str(path)!r}, writable=True)
except ValueError: print("held")
"""
    assert child_says(code) == "held"
    del cache
    KVCache.open(path, writable=True).append(*tokens(1, 1))
    assert child_says(code) == ""


def test_a_refused_constructor_lets_go_of_the_file(path):
    """Though the exception, and with it the frames that it went through, is kept."""
    made(path)
    with pytest.raises(ValueError, match="asked for was") as kept:
        KVCache(2, 2, 8, 21, value_dim=4, path=path)
    KVCache(2, 2, 8, 20, value_dim=4, path=path)
    assert kept.value.__traceback__


def test_two_that_make_the_same_file(path, monkeypatch):
    """The second finds none, but when it names its own there is one by now: it opens that."""
    first = made(path)
    first.save(path.with_name("copy.kv"))
    del first
    monkeypatch.setattr(os.path, "exists", lambda name: False)
    second = KVCache(2, 2, 8, 20, value_dim=4, path=path)
    monkeypatch.undo()
    same_tokens(second, KVCache.load(path.with_name("copy.kv")))
    assert sorted(os.listdir(path.parent)) == ["chat.kv", "copy.kv"]


def test_saved_over_a_file_that_is_being_written(path):
    pytest.importorskip("fcntl", reason="the system has no such locks")
    cache = made(path)
    with pytest.raises(ValueError, match=r"KVCache.save: .* is open for writing"):
        KVCache(2, 2, 8, 20).save(path)
    cache.append(*tokens(1, 1))
    cache.flush()
    same_tokens(KVCache.open(path), cache)
    del cache
    KVCache(2, 2, 8, 20).save(path)
    assert KVCache.open(path).lengths.tolist() == [0, 0]


def test_saved_over_itself(path):
    """The cache goes on in its file, which has what there is."""
    cache = made(path)
    link = path.with_name("link.kv")
    link.symlink_to(path.name)
    cache.append(*tokens(1, 1))
    cache.save(link)
    assert KVCache.open(path).lengths.tolist() == [8, 6]
    cache.append(*tokens(2, 1))
    cache.flush()
    same_tokens(KVCache.open(path), cache)
    with pytest.raises(ValueError, match="opened for reading"):
        KVCache.open(path).save(path)


def test_other_files_stay_as_they_are(path):
    """Also those whose names begin with that of the file; a link stays one."""
    others = [path.with_name(path.name + end) for end in (".new", ".new.new", "~", ".tmp")]
    for other in others:
        other.write_bytes(b"mine")
    cache = made(path)
    elsewhere = path.with_name("elsewhere.kv")
    elsewhere.write_bytes(b"")
    link = path.with_name("link.kv")
    link.symlink_to(elsewhere.name)
    cache.save(link)
    assert link.is_symlink() and all(other.read_bytes() == b"mine" for other in others)
    same_tokens(KVCache.open(elsewhere), cache)
    assert len(os.listdir(path.parent)) == 3 + len(others)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_files_that_may_not_be_written(path):
    made(path)
    path.chmod(0o400)
    with pytest.raises(PermissionError):
        KVCache.open(path, writable=True)
    KVCache.open(path)
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError):
        KVCache(1, 1, 8, 5, path=path.with_name("another"))
    with pytest.raises(PermissionError):
        KVCache(1, 1, 8, 5).save(path.with_name("another"))
    path.parent.chmod(0o700)


@pytest.mark.parametrize("capacity", [2**58, 2**62, 2**70])
def test_files_larger_than_any(path, capacity):
    with pytest.raises(OverflowError, match="no file is as large as a cache of batch 1"):
        KVCache(1, 1, 8, capacity, path=path)
    assert os.listdir(path.parent) == []


def checked(header):
    """A header with its checksum."""
    end = struct.calcsize("<8sIQQ17s7q") + 2 * 24
    return header[:end] + struct.pack("<I", zlib.crc32(header[:end])) + header[end + 4 :]


DAMAGE = {
    "empty": (lambda data: b"", "is no cache"),
    "other": (lambda data: b"\x93NUMPY" + data[6:], "is no cache .*NUMPY"),
    "version": (lambda data: data[:8] + struct.pack("<I", 1) + data[12:], "version 1 .* reads versions 2 and 3"),
    "short": (lambda data: data[:-1], "is truncated or damaged"),
    "very short": (lambda data: data[:20], "is no cache"),
    "short of a header": (lambda data: data[:110], "is damaged or truncated"),
    "long": (lambda data: data + b"\0", "is truncated or damaged"),
    "both headers": (
        lambda data: data[:40] + b"?" + data[41 : HEADER + 40] + b"?" + data[HEADER + 41 :], "neither of its headers",
    ),
    "type": (
        lambda data: checked(data[:29] + b"int9\0\0\0" + data[36:HEADER]) + bytes(HEADER) + data[2 * HEADER :], "int9",
    ),
}  # fmt: skip


# Numbers that no cache has, in a header that is whole: where they stand, and what they are.
IMPOSSIBLE = {
    "heads": (53, 0), "dim": (61, 0), "large dim": (61, 20000), "value_dim": (69, -4), "capacity": (77, 0),
    "window": (85, -3), "wide window": (85, 20), "keep": (93, -1), "keep without window": (93, 3),
    "tokens": (101, 10**9), "negative tokens": (109, -5), "reach": (117, 3), "far reach": (125, 2**62 + 1),
    "starts": (133, 8), "negative starts": (141, -1),
    "commit": (20, 2**63),
}  # fmt: skip
OF_RINGS = sorted(IMPOSSIBLE.keys() - {"keep without window"})


@pytest.mark.parametrize("name, ring", [*((n, False) for n in IMPOSSIBLE), *((n, True) for n in OF_RINGS)])
def test_numbers_that_no_cache_has(path, name, ring):
    cache = KVCache(2, 2, 8, 20, value_dim=4, **dict(window=7, keep=2) if ring else {})
    cache.append(*tokens(0, 7))
    cache.save(path)
    data = path.read_bytes()
    at, number = IMPOSSIBLE[name]
    newest = HEADER  # of the second commit
    assert struct.unpack_from("<7q", data, newest + 45) == (2, 2, 8, 4, 20, *((7, 2) if ring else (-1, 0)))
    header = bytearray(data[newest : 2 * HEADER])
    struct.pack_into("<Q" if name == "commit" else "<q", header, at, number)
    data = data[:newest] + checked(bytes(header)) + data[2 * HEADER :]
    path.write_bytes(data)
    for call in (lambda: KVCache.open(path), lambda: KVCache.open(path, writable=True), lambda: KVCache.load(path)):
        with pytest.raises(ValueError, match=r"is (truncated or )?damaged"):
            call()
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(path, name):
    damage, message = DAMAGE[name]
    made(path)
    data = damage(path.read_bytes())
    path.write_bytes(data)
    for call in (
        lambda: KVCache.open(path), lambda: KVCache.open(path, writable=True), lambda: KVCache.load(path),
        lambda: KVCache(2, 2, 8, 20, value_dim=4, path=path),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert path.read_bytes() == data and os.listdir(path.parent) == [path.name]


def test_one_header_is_enough(path):
    cache = made(path)
    cache.append(*tokens(1, 1))
    cache.flush()
    data = path.read_bytes()
    numbers = [struct.unpack_from("<Q", data, at + 20)[0] for at in (0, HEADER)]
    newest = HEADER * int(numbers[1] > numbers[0])
    path.write_bytes(data[: newest + 60] + b"torn" + data[newest + 64 :])
    assert KVCache.open(path).lengths.tolist() == [7, 5]  # of the flush before


def pool_of(dtype="float32", window=None):
    """Sequences that share pages, one that is padded, one that is empty, and one that is gone."""
    pool = PagedKVCache(2, 8, 12, page_size=4, value_dim=4, dtype=dtype, window=window)
    a, b, c = pool.add(), pool.add(), pool.add()
    pool.append([a, b], *tokens(0, 9), starts=[0, 5])
    pool.append([a, b], *tokens(1, 1))
    pool.fork(a, 9)
    pool.remove(c)
    pool.add()
    return pool


@pytest.mark.parametrize("window", [None, 3])
@dtypes
def test_a_pool_is_saved_and_opened(path, dtype, window):
    """Each page is written once, as it is stored; and what is changed afterwards leaves the file as it is."""
    pool = pool_of(dtype, window)
    pool.save(path)
    before, q = path.read_bytes(), normal(np.random.default_rng(9), (3, 4, 1, 8), "float64")
    q = q if dtype == "float64" else q.astype("float32")
    opened = PagedKVCache.open(path)
    assert repr(opened) == repr(pool) and opened.free_pages == pool.free_pages and opened.window == window
    for each in (opened, copied(opened), pickle.loads(pickle.dumps(opened))):
        for s in pool.sequences:
            same_bits(each.gather(s), pool.gather(s))
        same_bits(each.attend([0, 1, 3], q), pool.attend([0, 1, 3], q))
    for each in (opened, pool):
        assert each.fork(1) == 5
        each.append([0, 5], *tokens(2, 6))
        each.reorder([1, 3], [0, 1])
    for s in pool.sequences:
        same_bits(opened.gather(s), pool.gather(s))
    assert opened.free_pages == pool.free_pages and path.read_bytes() == before
    opened.save(path)
    same_bits(PagedKVCache.open(path).gather(5), pool.gather(5))
    assert os.listdir(path.parent) == [path.name]


def table_at(data):
    return data.rindex(b"QKVPAGES")


def table_with(at, number):
    """The table of pages, whole, but for one number."""

    def change(data):
        begin = table_at(data)
        made = bytearray(data[begin:-4])
        struct.pack_into("<q", made, 16 + 8 * at, number)
        return data[:begin] + bytes(made) + struct.pack("<I", zlib.crc32(made))

    return change


DAMAGED_POOLS = {
    "empty": (lambda data: b"", "is no cache"),
    "short": (lambda data: data[:-1], "table of pages is not whole"),
    "without its table": (lambda data: data[: table_at(data)], "no file of a PagedKVCache"),
    "cut in the values": (lambda data: data[: table_at(data) - 100], "no file of a PagedKVCache|truncated"),
    "cut in the header": (lambda data: data[:110], "is damaged or truncated"),
    "long": (lambda data: data + b"\0", "table of pages is not whole"),
    "torn": (lambda data: data[:-9] + b"?" + data[-8:], "table of pages is not whole"),
    "version": (lambda data: data[:8] + struct.pack("<I", 1) + data[12:], "version 1"),
    "page size": (table_with(0, 0), "no such table"),
    "odd page size": (table_with(0, 5), "no such table"),
    "window": (table_with(1, -3), "no such table"),
    "next": (table_with(2, 0), "no such table"),
    "number": (table_with(3, -1), "no such table"),
    "length": (table_with(4, 99), "no such table"),
    "huge length": (table_with(4, 2**62), "no such table"),
    "start": (table_with(5, 11), "no such table"),
    "gone": (table_with(6, 1), "no such table"),
    "no pages": (table_with(7, -1), "no such table"),
    "many pages": (table_with(7, 2**60), "no such table"),
    "page": (table_with(8, 12), "no such table"),
    "negative page": (table_with(8, -1), "no such table"),
}


@pytest.mark.parametrize("name", DAMAGED_POOLS)
def test_damaged_pools(path, name):
    damage, message = DAMAGED_POOLS[name]
    pool_of().save(path)
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"PagedKVCache\.open: .*({message})"):
        PagedKVCache.open(path)
    assert path.read_bytes() == data


def test_files_of_the_other_kind(path):
    pool_of().save(path)
    for call in (KVCache.open, KVCache.load, lambda p: KVCache(1, 2, 8, 48, value_dim=4, path=p)):
        with pytest.raises(ValueError, match="is the file of a PagedKVCache"):
            call(path)
    path.unlink()
    made(path)
    with pytest.raises(ValueError, match="is no file of a PagedKVCache"):
        PagedKVCache.open(path)
    pytest.importorskip("fcntl", reason="the system has no such locks")
    writer = KVCache.open(path, writable=True)
    with pytest.raises(ValueError, match=r"PagedKVCache\.save: .* is open for writing"):
        pool_of().save(path)
    assert writer.lengths.tolist() == [7, 5]


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError):
        KVCache.open(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        KVCache(1, 1, 8, 5, path=tmp_path / "absent" / "x")
    with pytest.raises(IsADirectoryError):
        KVCache.open(tmp_path)
    with pytest.raises(IsADirectoryError):
        KVCache(1, 1, 8, 5).save(tmp_path)
    assert os.listdir(tmp_path) == [] and not tmp_path.with_name(f"{tmp_path.name}.new").exists()


def digits(*numbers):
    """Rows (n, 16) of -8, which makes a step of int4 be 1, and of seven octal digits of each number."""
    places = [x[:, None] // 8 ** np.arange(7) % 8 for x in numbers]
    rows = np.concatenate([np.full((numbers[0].size, 1), -8), *places], axis=1)
    return np.pad(rows, ((0, 0), (0, 16 - rows.shape[1]))).astype("float32")


WRITER = f"""
import sys, random, numpy as np, qkv_fast
{inspect.getsource(digits)}
path, seed, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cache = qkv_fast.KVCache(1, 2, 16, 4000, path=path, dtype=dtype)
random.seed(seed)
n, epoch = int(cache.lengths[0]), seed * 100000
while True:
    many = min(random.randint(1, 9), 4000 - n)
    at, now = np.arange(n, n + many), np.full(many, epoch)
    cache.append(*(np.broadcast_to(x, (1, 2, many, 16)) for x in (digits(at, now), digits(now))))
    n += many
    if random.random() < 0.4:
        cache.flush()
        print("flushed", n, flush=True)
    if random.random() < 0.2 or n == 4000:
        n, epoch = random.randint(n // 2, n), epoch + 1
        print("cut", n, flush=True)
        cache.truncate(n)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_a_killed_process_leaves_what_flush_confirmed(path, dtype):
    """Keys tell token and epoch, values the epoch: a row that is half new would not fit."""
    random.seed(0)
    confirmed = 0
    for seed in range(1, 7):
        command = [sys.executable, "-P", "-c", WRITER, str(path), str(seed), dtype]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            said = [writer.stdout.readline() for _ in range(random.randint(5, 300))]
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.read().splitlines()  # what it still said before it died
        assert writer.returncode == -signal.SIGKILL
        confirmed = int([line for line in said if line.strip()][-1].split()[1])
        cache = KVCache.open(path)
        n = int(cache.lengths[0])
        assert n >= confirmed
        epoch = (np.rint(cache.values[0, 0, :, 1:8]) @ 8 ** np.arange(7)).astype(int)
        for stored, expected in ((cache.keys, digits(np.arange(n), epoch)), (cache.values, digits(epoch))):
            assert np.array_equal(stored[0], as_stored(expected, dtype)[None].repeat(2, axis=0))
        assert np.all(np.diff(epoch) >= 0)


LARGE = """
import resource, sys, numpy as np, qkv_fast
shape, k_path, v_path, q_path = (16, 65536, 64), *sys.argv[1:]
k, v = (np.memmap(path, "float32", "r", shape=shape) for path in (k_path, v_path))
q = np.load(q_path)
qkv_fast.attention(q, q, q, num_threads=2)  # the pool's stacks are there
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
limit = 64 << 20
assert k.nbytes + v.nbytes == 8 * limit
resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
try:
    np.array(k)
except MemoryError:
    pass
else:
    raise AssertionError("the limit does not hold")
for name, kind in (("single", "float32"), ("double", "float64")):  # keys in place, and widened
    np.save(f"{q_path}.{name}.npy", qkv_fast.attention(q.astype(kind), k, v, causal=True, num_threads=2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_files_eight_times_larger_than_the_memory_that_may_be_taken(tmp_path):
    """What bounds a call over a memory map is what it allocates: the pages of a file that is only read can be dropped
    at any time, so they are the system's to keep. The limit is therefore set when the files are mapped, that much above
    what the process has by then; RLIMIT_AS counts mappings as well."""
    shape, rng = (16, 65536, 64), np.random.default_rng(0)
    paths = [tmp_path / name for name in ("k", "v")]
    arrays = [np.memmap(path, "float32", "w+", shape=shape) for path in paths]
    for x in arrays:  # the rest stays a hole of zeros
        x[:, ::4096] = normal(rng, (16, 16, 64))
        x.flush()
    q = normal(rng, (16, 5, 64))
    np.save(tmp_path / "q.npy", q)
    done = subprocess.run(
        [sys.executable, "-P", "-c", LARGE, *map(str, paths), str(tmp_path / "q.npy")],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    k, v = arrays
    for name, kind in (("single", "float32"), ("double", "float64")):
        got = np.load(tmp_path / f"q.npy.{name}.npy")
        for head in (0, 15):
            expected = qkv_fast.attention(q[head].astype(kind), np.array(k[head]), np.array(v[head]), causal=True)
            same_bits(got[head], expected)


@pytest.mark.parametrize("cache", [KVCache(1, 1, 8, 2), PagedKVCache(1, 8, 2)])
def test_a_number_is_no_path(cache, path):
    """Of an open file, which stays open."""
    with open(path, "wb") as file:
        with pytest.raises(TypeError, match=f"save: path must be a str or path-like, got {file.fileno()}"):
            cache.save(file.fileno())
        assert os.fstat(file.fileno()).st_size == 0
