"The cache's file read by a second reader, and under flipped bits, cuts, kills, full disks and two writers."

import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import tiny
from heed_nb import cached_weights, checkpoints, density_cache, trainer, weights
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import collate
from heed_nb.density import position_weights
from heed_nb.density_cache import DensityCache, DensityCacheWriter, build, density_key, dequantize, merge, quantize
from heed_nb.hybrid import pair_with_teacher, to_hybrid, unpair
from heed_nb.losses import record_outputs
from heed_nb.teachers import LanguageInputs, family_of, load_teacher
from heed_nb.toyworld import Documents

processes = multiprocessing.get_context("fork")
IDENTITY = {"tower": "0123abcd", "reduce": "mean"}


def samples(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"sample-{i}": torch.rand(n, generator=g) ** 3 for i, n in enumerate(lengths)}


def write(path, content, identity=IDENTITY):
    with DensityCacheWriter(path, identity) as writer:
        for key, density in content.items():
            writer.add(key, density)
    return path


@pytest.fixture
def dozen(tmp_path):
    content = samples((36, 1, 0, 100, 2, 37, 250, 3, 64, 7, 8, 33))
    return write(tmp_path / "dozen", content), content


@pytest.fixture
def without_sync(monkeypatch):
    "Closing does not wait for the disk."
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def plain_reader(path):
    "The format's table, read without the module."
    content = path.read_bytes()
    magic, version, length, index_offset, records, index_crc = struct.unpack("<8sIIQQI", content[:36])
    start = 64 + -(-length // 64) * 64
    assert magic == b"HEEDrho4" and version == 1 and not any(content[36:60]) and not any(content[64 + length : start])
    assert struct.unpack("<I", content[60:64])[0] == zlib.crc32(content[:60] + content[64:start])
    assert zlib.crc32(content[index_offset:]) == index_crc and content[index_offset : index_offset + 8] == b"rhoINDEX"
    hashes = struct.unpack(f"<{records}Q", content[index_offset + 8 : index_offset + 8 + 8 * records])
    offsets = struct.unpack(f"<{records}Q", content[index_offset + 8 + 8 * records :])
    assert list(hashes) == sorted(hashes)
    result, ends = {}, []
    for offset in sorted(offsets):
        crc, magic, key, n, low, high = struct.unpack("<I4sIIff", content[offset : offset + 24])
        levels = content[offset + 24 + key : offset + 24 + key + -(-n // 2)]
        end = -(-(offset + 24 + key + len(levels)) // 64) * 64
        assert offset % 64 == 0 and magic == b"rho4" and crc == zlib.crc32(content[offset + 4 : end])
        assert not any(content[offset + 24 + key + len(levels) : end])
        halves = [half for byte in levels for half in (byte % 16, byte // 16)]
        result[content[offset + 24 : offset + 24 + key].decode()] = [
            low + (high - low) * half / 15 for half in halves[:n]
        ]
        ends.append(end)
    assert [start, *ends] == sorted(offsets) + [index_offset]
    return json.loads(content[64 : 64 + length]), result


def test_the_file_is_what_its_table_says(tmp_path):
    random.seed(0)
    content = samples([random.choice((0, 1, 2, 3, random.randrange(400))) for _ in range(60)])
    content["ключ " * 40] = torch.full((5,), 0.25)
    content["two"] = torch.tensor([-3e38, 3e38, 0, 1e-45])
    path = write(tmp_path / "cache", content)
    identity, expected = plain_reader(path)
    cache = DensityCache(path, IDENTITY)
    assert identity == IDENTITY and list(cache) == list(expected) == list(content)
    for key, density in content.items():
        assert cache[key].dtype == torch.float32
        torch.testing.assert_close(cache[key], torch.tensor(expected[key]), rtol=1e-6, atol=1e-9)
        if len(density):
            half_step = (density.max().double() - density.min().double()) / 30
            assert (cache[key].double() - density.double()).abs().max() <= half_step * (1 + 1e-6) + 1e-45
            assert cache[key].min() == density.min() and cache[key].max() == density.max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_every_type_of_number_is_kept_as_its_float32(tmp_path, dtype):
    density = (torch.rand(50) * 20).to(dtype)
    cache = DensityCache(write(tmp_path / "cache", {"tensor": density, "array": density.float().numpy()}))
    assert cache["tensor"].equal(cache["array"])
    low, high, levels = quantize(density.float().numpy())
    assert cache["tensor"].equal(torch.from_numpy(dequantize(low, high, levels, 50)))


def test_what_was_kept_is_kept_as_it_is():
    for seed in range(200):
        r = np.random.default_rng(seed)
        rho = (r.standard_normal(r.integers(1, 300)) * 10.0 ** r.integers(-30, 30)).astype(np.float32)
        once = dequantize(*quantize(rho), len(rho))
        assert (dequantize(*quantize(once), len(rho)) == once).all()


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_the_error_of_a_weight_has_a_closed_bound(tau):
    "Half a step over the range is 1/30; a softmax moves by at most that at the position and that over all."
    worst = 0
    for seed in range(50):
        rho = torch.rand(1, 400, generator=torch.Generator().manual_seed(seed)).double() ** 4
        kept = torch.from_numpy(dequantize(*quantize(rho[0].float().numpy()), 400))[None].double()
        visual = torch.ones(1, 400, dtype=torch.bool)
        change = (position_weights(kept, visual, tau=tau) / position_weights(rho, visual, tau=tau)).log().abs().max()
        assert change <= 2 / (30 * tau) + 1e-6
        worst = max(worst, change)
    assert worst > 1 / (30 * tau)  # the bound is of the right size

    # with text at beta times the mean, which may set the top of the range: (1 + beta) / 30 instead of 1 / 30
    for seed in range(50):
        rho = torch.rand(1, 60, generator=torch.Generator().manual_seed(seed)).double() ** 4
        visual = torch.arange(60)[None] < 40
        kept = rho.clone()
        kept[visual] = torch.from_numpy(dequantize(*quantize(rho[visual].float().numpy()), 40)).double()
        change = (position_weights(kept, visual, tau=tau) / position_weights(rho, visual, tau=tau)).log().abs().max()
        assert change <= 2 * 3 / (30 * tau) / (1 - 2 / 30) + 1e-6


def test_the_papers_cache_fits_into_250_mb(tmp_path):
    "No record of n tokens takes more than n / 2 bytes and 128: 540,000 of them with 360M tokens stay below."
    r = np.random.default_rng(0)
    lengths = [*range(130), *r.integers(0, 2500, 300)]
    content = {f"{i:024x}": np.zeros(n, np.float32) for i, n in enumerate(lengths)}
    size = write(tmp_path / "cache", content).stat().st_size
    assert size <= sum(lengths) / 2 + 127.5 * len(lengths) + 256
    assert 360e6 / 2 + 127.5 * 540e3 + 256 <= 250e6
    assert len(density_key([], {})) == 24


def read_all(path, content):
    "How many records could be read, each with its value; the errors otherwise."
    errors = []
    try:
        cache = DensityCache(path, IDENTITY)
    except ValueError as error:
        return 0, [str(error)]
    for key, density in content.items():
        try:
            assert cache[key].equal(density), "a wrong value was returned"
        except (ValueError, KeyError) as error:
            errors.append(str(error))
            assert key in str(error)
    return len(content) - len(errors), errors


def test_any_one_flipped_bit_is_caught(tmp_path):
    content = samples((5, 0, 30))
    path = write(tmp_path / "cache", content)
    content, good = dict(DensityCache(path)), path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(good)):
            byte, place = good[bit // 8], bit // 8
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), place)
            whole, errors = read_all(path, content)
            assert errors and whole in (0, 2) and not any("\n" in error for error in errors), bit
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert read_all(path, content) == (3, [])


def read_after_a_cut(path, content, length):
    cache, read, refused = DensityCache(path), [], {}
    expected = dict(cache)
    os.truncate(path, length)
    for key in content:
        try:
            assert cache[key].equal(expected[key])
            read.append(key)
        except ValueError as error:
            refused[key] = str(error)
    with pytest.raises(ValueError, match=rf"^record .*at byte \d+ of {path} is cut$"):
        list(cache)
    (path.parent / "seen").write_text(json.dumps([read, refused]))


@pytest.mark.parametrize("length", [0, 5000, 40000, 40100])
def test_a_file_that_is_cut_after_it_was_opened_is_refused_where_it_ends(tmp_path, length):
    content = samples([2500] * 40)
    path = write(tmp_path / "cache", content)
    starts = sorted(DensityCache(path)._offsets.tolist())
    process = processes.Process(target=read_after_a_cut, args=(path, content, length))  # SIGBUS would kill it
    process.start()
    process.join()
    assert process.exitcode == 0
    read, refused = json.loads((tmp_path / "seen").read_text())
    whole = sum(end <= length for end in starts[1:])
    assert read == list(content)[:whole] and list(refused) == list(content)[whole:]
    for key, start in zip(refused, starts[whole:]):
        assert refused[key] == f"record {key!r} at byte {start} of {path} is cut"


def test_bits_flipped_at_random_never_give_a_wrong_value(dozen, tmp_path, without_sync):
    content, good, broken = dict(DensityCache(dozen[0])), dozen[0].read_bytes(), tmp_path / "broken"
    r = random.Random(0)
    for trial in range(500):
        broken.unlink(missing_ok=True)
        changed = bytearray(good)
        for bit in r.sample(range(8 * len(good)), r.choice((1, 2, 3, 10, 200))):
            changed[bit // 8] ^= 1 << bit % 8
        broken.write_bytes(changed)
        assert read_all(broken, content)[1]
        try:
            DensityCacheWriter(broken).close()
        except ValueError:
            continue
        read_all(broken, content)  # a writer took it: for the index alone, or not at all


def test_a_file_that_was_closed_is_refused_at_any_other_length(tmp_path, without_sync):
    content = samples((5, 0, 30))
    path = write(tmp_path / "cache", content)
    good, cut = path.read_bytes(), tmp_path / "cut"
    starts = sorted(DensityCache(path)._offsets.tolist()) + [len(good) - 8 - 16 * 3]
    for length in [*range(len(good)), len(good) + 1, len(good) + 64]:
        cut.unlink(missing_ok=True)
        cut.write_bytes((good + bytes(64))[:length])
        with pytest.raises(ValueError) as error:
            DensityCache(cut)
        message, lost = str(error.value), sum(length >= end for end in starts[1:])
        assert str(cut) in message and "\n" not in message
        if starts[0] <= length < starts[3]:
            assert f"record {lost}" in message
            if length >= starts[lost] + 24 + len("sample-0"):  # its name is there
                assert f"'sample-{lost}'" in message
        if length >= starts[0]:
            with DensityCacheWriter(cut, IDENTITY) as writer:
                assert len(writer) == lost
                for key, density in content.items():
                    writer.add(key, density)
            assert cut.read_bytes() == good


def test_a_file_that_was_not_closed_gives_its_whole_records_at_any_length(tmp_path, without_sync):
    content = samples((5, 0, 30))
    path, cut = write(tmp_path / "cache", content), tmp_path / "cut"
    good, expected = path.read_bytes(), dict(DensityCache(path))
    starts = sorted(DensityCache(path)._offsets.tolist())
    writer = DensityCacheWriter(tmp_path / "open", IDENTITY)
    for key, density in content.items():
        writer.add(key, density)
    unclosed = writer.path.read_bytes()
    for length in range(starts[0], len(unclosed) + 1):
        cut.unlink(missing_ok=True)
        cut.write_bytes(unclosed[:length])
        whole = sum(length >= end for end in [*starts[1:], len(unclosed)])
        cache = DensityCache(cut, IDENTITY)
        assert list(cache) == list(content)[:whole] and all(cache[key].equal(expected[key]) for key in cache)
        for key in list(content)[whole:]:
            assert key not in cache
            with pytest.raises(
                KeyError, match=f"has no record '{key}' among its {whole}; its writer was killed or is at work"
            ):
                cache[key]
        with DensityCacheWriter(cut, IDENTITY) as again:
            assert [key in again for key in content] == [i < whole for i in range(3)]
            for key, density in content.items():
                again.add(key, density)
        assert cut.read_bytes() == good
    writer.close()
    assert writer.path.read_bytes() == good


def write_without_end(path, written):
    writer = DensityCacheWriter(path, IDENTITY)
    while True:
        n = len(writer)
        writer.add(f"sample-{n}", torch.full((n % 3000,), float(n)))
        written.value = n + 1


def test_killed_at_random_moments_it_loses_one_record_at_most(tmp_path):
    random.seed(0)
    path, written, survived = tmp_path / "cache", processes.Value("q"), 0
    for attempt in range(6):
        process = processes.Process(target=write_without_end, args=(path, written))
        process.start()
        while written.value <= survived:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        cache = DensityCache(path, IDENTITY)
        assert len(cache) - written.value in (0, 1)  # killed before it could say so
        survived = len(cache)
        for n, key in enumerate(cache):
            assert key == f"sample-{n}" and cache[key].equal(torch.full((n % 3000,), float(n)))
    with DensityCacheWriter(path, IDENTITY) as writer:
        assert len(writer) == survived
    assert len(plain_reader(path)[1]) == survived


def die_half_way(path, content, at):
    def torn(fd, data, offset, pwrite=os.pwrite):
        nonlocal at
        at -= 1
        if at < 0:
            pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(fd, data, offset)

    os.pwrite = torn
    write(path, content)


@pytest.mark.parametrize("at", range(1, 7))  # header, five records, index
def test_killed_within_a_write_it_goes_on(tmp_path, at):
    content = samples((36, 250, 1, 0, 30))
    process = processes.Process(target=die_half_way, args=(tmp_path / "cache", content, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(DensityCache(tmp_path / "cache", IDENTITY)) == list(content)[: at - 1]
    assert write(tmp_path / "cache", content).read_bytes() == write(tmp_path / "whole", content).read_bytes()


def test_a_length_that_changed_in_a_file_without_an_end_is_no_cut(tmp_path):
    content = samples((36, 250, 1, 0, 30))
    writer = DensityCacheWriter(tmp_path / "open", IDENTITY)
    for key, density in content.items():
        writer.add(key, density)
    unclosed, path = writer.path.read_bytes(), tmp_path / "cache"
    starts = [unclosed.index(key.encode()) - 24 for key in content]
    for record in range(4):  # the last one can't be told from one that was cut
        for bit in range(64):  # of the key's length and the number of tokens
            path.unlink(missing_ok=True)
            changed = bytearray(unclosed)
            changed[starts[record] + 8 + bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            for opened in (DensityCache, DensityCacheWriter):
                with pytest.raises(ValueError, match=rf"record {record}\b.* is damaged"):
                    opened(path, IDENTITY)
            assert path.read_bytes() == changed


def test_a_damaged_record_of_a_file_to_go_on_with_is_named(dozen):
    path, content = dozen
    place = path.read_bytes().index(b"sample-6") + 20
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    damaged = path.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"^record 6 \('sample-6'\) at byte \d+ of .* is damaged; remove the file, or cut it to \d+ bytes",
    ):
        DensityCacheWriter(path)
    assert path.read_bytes() == damaged
    cache = DensityCache(path)
    for key in content:
        if key == "sample-6":
            with pytest.raises(ValueError, match=r"^record 'sample-6' at byte \d+ of .* is damaged$"):
                cache[key]
        else:
            cache[key]


def test_a_damaged_index_is_written_anew(dozen):
    path, _ = dozen
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    with pytest.raises(ValueError, match="the index of .* is damaged"):
        DensityCache(path)
    DensityCacheWriter(path).close()
    assert path.read_bytes() == good


def test_keys_that_share_a_hash_keep_their_own_records(tmp_path, monkeypatch):
    monkeypatch.setattr(density_cache, "_hash", lambda key: len(key))
    content = samples(range(1, 20))
    cache = DensityCache(write(tmp_path / "cache", content))
    assert [len(cache[key]) for key in content] == list(range(1, 20))
    assert "sample-x" not in cache and "sample-xy" not in cache


def hold(path, ready):
    writer = DensityCacheWriter(path, IDENTITY)
    writer.add("held", torch.rand(9))
    child = os.fork()
    if not child:
        signal.pause()  # a process that outlives the writer
    ready.send(child)
    signal.pause()


def test_two_writers_exclude_each_other(tmp_path):
    path = tmp_path / "cache"
    ready, theirs = processes.Pipe()
    process = processes.Process(target=hold, args=(path, theirs))
    process.start()
    child = ready.recv()
    try:
        with pytest.raises(ValueError, match=f"^another writer holds {path}; wait for it or choose another path$"):
            DensityCacheWriter(path)
        assert len(DensityCache(path)["held"]) == 9
    finally:
        process.kill()
        process.join()
    try:
        with DensityCacheWriter(path) as writer:  # free, though a child of its holder lives on
            assert "held" in writer
            with pytest.raises(ValueError, match="another writer holds"):
                DensityCacheWriter(path)
            DensityCache(path)  # a reader in the same process does not drop the lock
            with pytest.raises(ValueError, match="another writer holds"):
                DensityCacheWriter(path)
    finally:
        os.kill(child, signal.SIGKILL)
    DensityCacheWriter(path).close()


def test_a_forked_process_can_not_write(tmp_path):
    writer = DensityCacheWriter(tmp_path / "cache")
    child = os.fork()
    if not child:
        try:
            writer.add("child", torch.rand(3))
        except ValueError:
            writer.close()
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    writer.add("parent", torch.rand(3))
    writer.close()
    assert list(DensityCache(writer.path)) == ["parent"]


def test_readers_keep_what_they_saw_while_a_writer_goes_on(dozen):
    path, content = dozen
    before = DensityCache(path)
    expected, closed = dict(before), path.read_bytes()
    with DensityCacheWriter(path) as writer:
        assert path.read_bytes() == closed  # nothing to add, nothing changed
        assert not writer.add("sample-0", torch.zeros(3))
        assert path.read_bytes() == closed
        for n in range(20):
            assert writer.add(f"more-{n}", torch.rand(300))
            assert len(DensityCache(path)) == len(writer) == 13 + n
    for cache in (before, DensityCache(path)):
        assert all(cache[key].equal(value) for key, value in expected.items())
    assert len(before) == 12 and "more-0" not in before and len(DensityCache(path)) == 32


def out_of_disk(path, content, limit):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write(path, content)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        (path.parent / "error").write_text(str(error))
        os._exit(3)


@pytest.mark.parametrize(
    "records, what", [(0, "the header"), (2, "record 'sample-2'"), (4, "record 'sample-4'"), (5, "the index")]
)
def test_a_full_disk_keeps_the_records_before(tmp_path, records, what):
    content = samples((36, 250, 100, 0, 30))
    whole = write(tmp_path / "whole", content)
    cache = DensityCache(whole)
    starts = sorted(cache._offsets.tolist()) + [whole.stat().st_size - 8 - 16 * 5]
    path = tmp_path / "full"
    process = processes.Process(target=out_of_disk, args=(path, content, starts[records] + 5 if records else 20))
    process.start()
    process.join()
    assert process.exitcode == 3
    message = (tmp_path / "error").read_text()
    assert (
        f"can't write {what} to {path} (File too large); it keeps {records} records" in message and "\n" not in message
    )
    if records:
        left = DensityCache(path)
        assert list(left) == list(content)[:records] and all(left[key].equal(cache[key]) for key in left)
    assert write(path, content).read_bytes() == whole.read_bytes()


def test_an_interrupt_within_a_write_leaves_a_whole_file(tmp_path, monkeypatch):
    content = samples((36, 250, 100))
    writer = DensityCacheWriter(tmp_path / "cache", IDENTITY)
    writer.add("sample-0", content["sample-0"])
    pwrite = os.pwrite

    def interrupted(fd, data, offset):
        pwrite(fd, data, offset)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), writer:
        monkeypatch.setattr(os, "pwrite", interrupted)
        try:
            writer.add("sample-1", content["sample-1"])
        finally:
            monkeypatch.undo()
    assert list(DensityCache(writer.path)) == ["sample-0"]
    assert write(writer.path, content).read_bytes() == write(tmp_path / "whole", content).read_bytes()


@pytest.mark.parametrize(
    "identity, message",
    [
        (IDENTITY | {"tower": "ffff"}, "was made with tower '0123abcd', not 'ffff'"),
        ({"tower": "0123abcd"}, "was made with reduce 'mean', not None"),
        (IDENTITY | {"radius": "2"}, "was made with radius None, not '2'"),
        ({}, "was made with reduce 'mean', not None"),
    ],
)
def test_a_cache_of_another_identity_is_refused(dozen, identity, message):
    path, _ = dozen
    before = path.read_bytes()
    for opened in (DensityCache, DensityCacheWriter):
        with pytest.raises(ValueError) as error:
            opened(path, identity)
        assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before
    with DensityCacheWriter(path) as writer:
        assert writer.identity == IDENTITY == DensityCache(path).identity


def test_a_cache_of_another_format_version_is_refused(dozen):
    path, _ = dozen
    content = bytearray(path.read_bytes())
    content[8:12] = struct.pack("<I", 2)
    content[60:64] = struct.pack("<I", zlib.crc32(content[:60] + content[64:128]))
    path.write_bytes(content)
    for opened in (DensityCache, DensityCacheWriter):
        with pytest.raises(ValueError, match=f"^{path} has format version 2; only version 1 can be read$"):
            opened(path)


@pytest.mark.parametrize("content", [b"HEED", b"safetensors" * 100])
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    for opened in (DensityCache, DensityCacheWriter):
        with pytest.raises(ValueError, match=f"^{path} is not a density cache$"):
            opened(path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=f"^no density cache at {tmp_path / 'none'}$"):
        DensityCache(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "key, density, message",
    [
        ("page", torch.tensor([0.1, math.nan]), "the density of 'page' holds NaN or infinity"),
        ("page", torch.tensor([0.1, math.inf]), "the density of 'page' holds NaN or infinity"),
        ("page", np.array([1e300]), "the density of 'page' holds NaN or infinity"),
        (
            "page",
            torch.rand(2, 3),
            r"the density of 'page' must be numbers in one dimension, \[tokens\], got float32 \[2, 3\]",
        ),
        ("page", np.array(["a"]), "the density of 'page' must be numbers in one dimension"),
        (
            "page",
            torch.tensor([1j]),
            r"the density of 'page' must be numbers in one dimension, \[tokens\], got complex64 \[1\]",
        ),
        ("", torch.rand(3), "a key is a string of 1 to 1024 bytes in UTF-8, got ''"),
        ("é" * 513, torch.rand(3), "a key is a string of 1 to 1024 bytes in UTF-8"),
        ("\ud800", torch.rand(3), r"a key is a string of 1 to 1024 bytes in UTF-8, got '\\ud800'$"),
        (7, torch.rand(3), "a key is a string of 1 to 1024 bytes in UTF-8, got 7"),
    ],
)
def test_what_can_not_be_kept_is_refused(tmp_path, key, density, message):
    with DensityCacheWriter(tmp_path / "cache") as writer:
        writer.add("good", torch.rand(3))
        with pytest.raises(ValueError, match=f"^{message}"):
            writer.add(key, density)
    assert list(DensityCache(writer.path)) == ["good"]
    with pytest.raises(KeyError, match=r"has no record '\\ud800' among its 1$"):
        DensityCache(writer.path)["\ud800"]
    with pytest.raises(ValueError, match="the writer of .* is closed"):
        writer.add("late", torch.rand(3))
    with pytest.raises(ValueError, match="an identity maps strings to strings"):
        DensityCacheWriter(tmp_path / "new", {"radius": 1})
    assert not (tmp_path / "new").exists()


def test_empty_and_constant_densities(tmp_path):
    cache = DensityCache(write(tmp_path / "cache", {"text": torch.zeros(0), "flat": torch.full((7,), 0.1), "none": []}))
    assert cache["text"].shape == cache["none"].shape == (0,) and cache["flat"].equal(torch.full((7,), 0.1))
    assert len(DensityCache(write(tmp_path / "empty", {}))) == 0
    (tmp_path / "killed").touch()  # a writer was, before its header
    with pytest.raises(ValueError, match=f"^{tmp_path / 'killed'} is empty; a DensityCacheWriter begins it anew$"):
        DensityCache(tmp_path / "killed")
    assert "flat" in DensityCache(write(tmp_path / "killed", {"flat": torch.zeros(3)}))
    assert cache.get("flat") is not None and cache.get("other") is None and 7 not in cache


def test_a_cache_travels_to_another_process(dozen):
    cache = DensityCache(dozen[0], IDENTITY)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.identity == IDENTITY and copy["sample-3"].equal(cache["sample-3"])


def test_the_key_covers_all_that_shows():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8)
    image = Image.fromarray(pixels)
    shaped = Image.fromarray(pixels.reshape(4, 6, 3))
    palette = [image.quantize(4), image.quantize(4)]
    palette[1].putpalette(palette[1].getpalette()[::-1])
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    clear = image.quantize(4)
    clear.info["transparency"] = 2
    different = [
        [],
        [image],
        [image, image],
        [shaped],
        [image.convert("L")],
        *([p] for p in palette),
        [turned],
        [clear],
        [shaped, image],
        [image, shaped],
    ]
    keys = [density_key(images, IDENTITY) for images in different] + [
        density_key([image], IDENTITY | {"reduce": "max"})
    ]
    assert len(set(keys)) == len(keys)
    assert density_key([image.copy()], dict(reversed(IDENTITY.items()))) == keys[1]


class Page:
    def __init__(self, i):
        self.key, self.images = f"page-{i}", [Image.new("L", (5, 4), i % 200)]


class Pages:
    def __getitem__(self, i):
        return Page(i)

    def __len__(self):
        return 60


def ramp(pages):
    "A density for each page, with the process that made it."
    for page in pages:
        if page.key == "page-13":
            raise ValueError("page 13 can't be read")
    return [torch.tensor([page.images[0].getpixel((0, 0)), float(os.getpid())]) for page in pages]


def test_processes_build_one_file(tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(ValueError) as error:
        build(path, Pages(), ramp, IDENTITY, processes=2, batch_size=4, progress=False)
    assert str(error.value) == "page 13 can't be read, in sample page-13"
    first = DensityCache(path, IDENTITY)
    assert len(first) >= 4
    cache = build(
        path,
        Pages(),
        ramp,
        IDENTITY,
        indices=[i for i in range(60) if i != 13],
        processes=2,
        batch_size=4,
        progress=False,
    )
    made_by = {float(cache[density_key(Page(i).images, IDENTITY)][1]) for i in range(60) if i != 13}
    assert (
        len(cache) == 59 and float(os.getpid()) not in made_by and len(made_by) >= 3
    )  # what the first two made was not made again
    assert all(cache[key].equal(first[key]) for key in first)
    assert all(cache[density_key(Page(i).images, IDENTITY)][0] == i for i in range(60) if i != 13)
    before = path.read_bytes()
    build(path, Pages(), None, IDENTITY, indices=range(12), progress=False)  # nothing to compute
    assert path.read_bytes() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error, message",
    [(KeyError("image"), "KeyError: 'image', in sample 6"), (OSError("no such page"), "no such page, in sample 6")],
)
def test_a_sample_that_can_not_be_read_is_named(tmp_path, workers, error, message):
    class Missing(Pages):
        def __getitem__(self, i):
            if i == 6:
                raise error
            return Page(i)

    with pytest.raises(ValueError, match=f"^{message}$"):
        build(
            tmp_path / "cache",
            Missing(),
            ramp,
            IDENTITY,
            indices=range(12),
            processes=workers,
            batch_size=4,
            progress=False,
        )
    assert len(DensityCache(tmp_path / "cache")) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_can_not_be_decoded_is_named(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    image, buffer = Image.effect_noise((64, 64), 50), io.BytesIO()
    image.save(buffer, "PNG")

    class Truncated(Pages):
        def __getitem__(self, i):
            page = Page(i)
            if i == 6:
                page.images = [Image.open(io.BytesIO(buffer.getvalue()[:2000]))]
            return page

    with pytest.raises(ValueError, match="^can't decode image 0: image file is truncated.*, in sample page-6$"):
        build(
            tmp_path / "cache",
            Truncated(),
            ramp,
            IDENTITY,
            indices=range(12),
            processes=workers,
            batch_size=4,
            progress=False,
        )
    assert len(DensityCache(tmp_path / "cache")) == 4


def test_what_only_samples_together_do_wrong_names_them_all(tmp_path):
    def pairs_fail(pages):
        if len(pages) > 1:
            raise ValueError("out of memory")
        return [torch.rand(3)]

    with pytest.raises(ValueError, match="^out of memory, in samples page-0, page-1$"):
        build(tmp_path / "cache", Pages(), pairs_fail, IDENTITY, batch_size=2, progress=False)


def test_a_reader_that_a_writer_crosses_looks_again(dozen, monkeypatch):
    "A writer that goes on cuts the last record off, which was not whole, between a reader's look at the size and its map."
    path, content = dozen
    writer = DensityCacheWriter(path, IDENTITY)
    writer.add("last", torch.rand(3000))
    end, crossed, mapped = writer._end, [], density_cache.mmap.mmap
    os.truncate(path, end - 64)

    def cut_first(fd, length, access):
        if not crossed:
            crossed.append(True)
            os.truncate(path, writer._records["last"])
        return mapped(fd, length, access=access)

    monkeypatch.setattr(density_cache.mmap, "mmap", cut_first)
    assert list(DensityCache(path, IDENTITY)) == list(content) and crossed


def test_parts_become_one(tmp_path, dozen):
    path, content = dozen
    names = list(content)
    parts = [
        write(tmp_path / name, {key: content[key] for key in keys})
        for name, keys in (("a", names[:7]), ("b", names[5:]))
    ]
    assert merge(tmp_path / "merged", parts).path.read_bytes() == path.read_bytes()
    write(tmp_path / "c", {}, IDENTITY | {"tower": "other"})
    with pytest.raises(ValueError, match=f"^{tmp_path / 'c'} was made with tower 'other'"):
        merge(tmp_path / "mixed", [*parts, tmp_path / "c"])
    with pytest.raises(ValueError, match=f"^no parts are given to merge into {tmp_path / 'none'}$"):
        merge(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


class FewPages(Documents):
    "Eight pages of the toy world, one of them text alone."

    def __len__(self):
        return 8

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return replace(sample, images=[]) if i == 5 else sample


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "The toy teacher, its processor, its collate, and a cache of the pages."
    torch.set_num_threads(1)
    teacher, processor = load_teacher(Path(__file__).parent.parent / "outputs/teachers/toy-qwen3vl")
    collated = partial(collate, processor=processor)
    path = tmp_path_factory.mktemp("toy") / "cache"
    cache = cached_weights.build_density_cache(
        path, teacher, FewPages(), collated, processor, SETTINGS, batch_size=3, progress=False
    )
    return SimpleNamespace(teacher=teacher, processor=processor, collate=collated, path=path, cache=cache)


SETTINGS = TrainSettings(token_budget=1500, lr=3e-4, batch_size=4, stages=(0.2, 0.8, 0.0), threads=1)


def distilled(toy, out, condition="C4", settings=SETTINGS, teacher=None, data=FewPages()):
    teacher = teacher or toy.teacher
    trainer.distill(
        to_hybrid(teacher),
        teacher,
        data,
        toy.collate,
        CONDITIONS[condition],
        settings,
        out,
        processor=toy.processor,
        progress=False,
    )
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_cached_density_is_the_towers_within_half_a_step(toy):
    documents = [FewPages()[i] for i in range(8)]
    batch = toy.collate(documents)
    inputs = family_of(toy.teacher).language_inputs(
        toy.teacher, {k: v for k, v in batch.items() if k not in ("labels", "keys")}
    )
    exact = family_of(toy.teacher).density(inputs)
    keys = cached_weights.with_cache_keys(toy.collate, toy.cache.identity, documents)["cache_keys"]
    kept = cached_weights.cached_values(toy.cache, keys, batch["keys"], None, inputs.visual_mask)
    assert len(toy.cache) == 8 and kept[5].eq(0).all() and not kept[~inputs.visual_mask].any()
    for row, near, visual in zip(exact, kept, inputs.visual_mask):
        if visual.any():
            assert 0 < (near - row)[visual].abs().max() <= (row[visual].max() - row[visual].min()) / 30 + 1e-5


@pytest.mark.parametrize("condition, budget", [("C4", 3500), ("C4-shuffled", 900)])
def test_training_from_the_cache_is_nearly_the_same(toy, tmp_path, condition, budget):
    settings = replace(SETTINGS, token_budget=budget)
    computed = distilled(toy, tmp_path / "computed", condition, settings)
    cached = distilled(toy, tmp_path / "cached", condition, replace(settings, density_cache=str(toy.path)))
    uniform = distilled(toy, tmp_path / "uniform", "C3", replace(settings, token_budget=1))
    differences = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(cached, computed, strict=True)]
    assert len(differences) > 1 and 0 < max(differences) < 0.005
    assert abs(uniform[0]["loss"] / computed[0]["loss"] - 1) > 5 * max(differences)


def test_the_last_stage_needs_no_cache(toy, tmp_path):
    few = cached_weights.build_density_cache(
        tmp_path / "few",
        toy.teacher,
        FewPages(),
        toy.collate,
        toy.processor,
        SETTINGS,
        progress=False,
        indices=trainer.batch_indices(8, 4, 0, 0),
    )
    settings = replace(SETTINGS, token_budget=2000, stages=(0.0, 0.01, 0.99), density_cache=str(few.path))
    assert [line["stage"] for line in distilled(toy, tmp_path / "run", settings=settings)][:3] == [2, 3, 3]
    with pytest.raises(ValueError) as error:
        distilled(toy, tmp_path / "other", settings=replace(settings, stages=(0.0, 1.0, 0.0)))
    lost = next(i for i in trainer.batch_indices(8, 4, 0, 1) if i != 5)
    assert f"sample 'toy-train-0-{lost:06d}' is not in the cache: {few.path} has no record" in str(error.value)
    assert "step 2 (stage 2)" in str(error.value) and "\n" not in str(error.value)


def test_a_cache_that_is_not_the_teachers_is_refused_before_any_step(toy, tmp_path):
    settings = replace(SETTINGS, density_cache=str(toy.path))
    other = copy.deepcopy(toy.teacher)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "visual" in n)[0] += 1e-3
    for changed, message in (
        (dict(teacher=other), f"^{toy.path} was made with tower '"),
        (dict(settings=replace(settings, reduce="max")), f"^{toy.path} was made with reduce 'mean', not 'max'"),
        (dict(settings=replace(settings, density_cache=str(tmp_path / "none"))), "^no density cache at "),
    ):
        with pytest.raises(ValueError, match=message):
            distilled(toy, tmp_path / "run", **dict(settings=settings) | changed)
        assert not (tmp_path / "run").exists()
    processor = copy.deepcopy(toy.processor)
    processor.image_processor.size = {"longest_edge": 4096, "shortest_edge": 1024}
    with pytest.raises(ValueError, match="was made with processor.size '{.*262144.*}', not '{.*4096.*}'"):
        DensityCache(toy.path, cached_weights.density_identity(toy.teacher, processor, SETTINGS))
    with pytest.raises(ValueError, match="to check it, distill needs the teacher's processor"):
        trainer.distill(
            to_hybrid(toy.teacher), toy.teacher, FewPages(), toy.collate, CONDITIONS["C4"], settings, tmp_path / "run"
        )
    short = replace(SETTINGS, token_budget=1, density_cache=str(tmp_path / "none"))
    assert distilled(toy, tmp_path / "uniform", "C3", short)  # it weighs nothing by density
    for name in ("density_cache", "gradient_cache"):
        with pytest.raises(ValueError, match=f"{name} is 7; the path of a cache, or nothing"):
            replace(SETTINGS, **{name: 7})


def test_the_identity_is_the_students_too_and_not_its_mixers(toy):
    identity = cached_weights.density_identity(toy.teacher, toy.processor, SETTINGS)
    assert (
        identity
        == toy.cache.identity
        == cached_weights.density_identity(
            to_hybrid(toy.teacher, seed=3), toy.processor, replace(SETTINGS, seed=3, tau=1.0)
        )
    )


def identities(teacher, processor):
    return cached_weights.density_identity(teacher, processor, SETTINGS), cached_weights.gradient_identity(
        teacher, processor, CONDITIONS["C5"], LAYERS
    )


def identities_there(folder):
    "What another process makes of a saved teacher."
    return identities(*load_teacher(folder))


def test_an_identity_is_that_of_the_saved_teacher_in_another_process(tmp_path):
    found = {}
    for family in tiny.TINY:
        teacher, processor = tiny.teacher(family), tiny.processor(family)
        for part in (teacher, processor):
            part.save_pretrained(tmp_path / family)
        found[family] = identities(teacher, processor)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(identities_there, [tmp_path / family for family in found]) == list(found.values())


@pytest.mark.parametrize("family", tiny.TINY)
def test_an_identity_is_the_teachers_in_its_pair_too(family):
    teacher, processor = tiny.teacher(family), tiny.processor(family)
    density, gradient = found = identities(teacher, processor)
    teacher.set_attn_implementation("eager")
    teacher.config.get_text_config().use_cache = False
    student = to_hybrid(teacher)
    pair_with_teacher(student, teacher)
    assert (
        identities(teacher, processor) == found
        and cached_weights.density_identity(student, processor, SETTINGS) == density
    )
    unpair(student)
    assert identities(teacher, processor) == found


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("vision_config", "num_heads", 2),
        ("vision_config", "hidden_act", "silu"),
        ("vision_config", "rope_parameters", {"rope_theta": 100.0, "rope_type": "axial"}),
        (
            "text_config",
            "rope_parameters",
            dict(rope_type="default", rope_theta=100.0, mrope_section=[6, 5, 5], mrope_interleaved=True),
        ),
        ("text_config", "rms_norm_eps", 0.1),
    ],
)
def test_the_same_weights_under_another_config_are_another_teacher(toy, gradients, part, name, value):
    config = copy.deepcopy(toy.teacher.config)
    setattr(getattr(config, part), name, value)
    other = type(toy.teacher)(config).eval()
    other.load_state_dict(toy.teacher.state_dict())
    density, gradient = identities(other, toy.processor)
    with pytest.raises(
        ValueError, match=rf"^{gradients('C5').path} was made with {part}\.{name} .*, not .*; choose another path"
    ):
        DensityCache(gradients("C5").path, gradient)
    if part == "text_config":
        assert density == toy.cache.identity
    else:
        with pytest.raises(
            ValueError, match=rf"^{toy.path} was made with {part}\.{name} .*, not .*; choose another path"
        ):
            DensityCache(toy.path, density)


def test_masks_are_made_of_what_the_tower_sees_where_a_cache_is_named_too(toy, tmp_path):
    settings = replace(SETTINGS, token_budget=900)
    computed = distilled(toy, tmp_path / "computed", "mask-25", settings)
    named = distilled(toy, tmp_path / "named", "mask-25", replace(settings, density_cache=str(toy.path)))
    assert [line["loss"] for line in named] == [line["loss"] for line in computed]


# Gradient weights

LAYERS = (0, 1, 2)  # what to_hybrid replaces in a toy teacher


@pytest.fixture(scope="module")
def gradients(toy, tmp_path_factory):
    "A function: the gradient cache of a condition, by batches of three."
    folder, made = tmp_path_factory.mktemp("gradients"), {}

    def make(condition):
        if condition not in made:
            made[condition] = cached_weights.build_gradient_cache(
                folder / condition,
                toy.teacher,
                FewPages(),
                toy.collate,
                toy.processor,
                CONDITIONS[condition],
                LAYERS,
                batch_size=3,
                progress=False,
            )
        return made[condition]

    return make


def sensitivities(toy, documents, condition):
    "The teacher's own, by autograd on the outputs of whole layers; unpadded, one document at a time."
    found = []
    toy.teacher.requires_grad_()  # a run freezes it
    for document in documents:
        batch = toy.collate([document])
        with record_outputs(family_of(toy.teacher).layers(toy.teacher)[i] for i in LAYERS) as outputs:
            loss = toy.teacher(**{k: v for k, v in batch.items() if k != "keys"}).loss
        found.append(
            weights.variant_of(
                condition.weights, torch.stack([g.square().sum(-1) for g in torch.autograd.grad(loss, outputs)])
            )[..., 0, :]
        )
    return found


@pytest.mark.parametrize("name", ["C5", "+LD", "+SL"])
@pytest.mark.parametrize("temper", [1, 0.25])
def test_cached_gradient_weights_are_the_teachers_within_half_a_level(toy, gradients, name, temper):
    documents, condition, cache = [FewPages()[i] for i in range(8)], CONDITIONS[name], gradients(name)
    batch = cached_weights.with_cache_keys(toy.collate, cache.identity, documents)
    mask, settings = batch["attention_mask"], replace(SETTINGS, temper=temper)
    cached = partial(
        cached_weights.cached_values, cache, batch["cache_keys"], batch["keys"], 3 if name == "+LD" else None
    )
    weights = trainer.alignment_weights(
        condition, settings, None, LanguageInputs({}, mask > 2, []), mask, batch["keys"], cached
    )
    assert weights[..., mask == 0].abs().sum() == 0 and torch.allclose(weights.sum(-1), mask.sum(-1).float())
    for i, s in enumerate(sensitivities(toy, documents, condition)):
        kept, there = weights[..., i, :][..., mask[i] > 0], (s / s.amax(-1, keepdim=True)).pow(1 / 6)
        half = (there.max() - there.min()) / 30 + 1e-4
        low, high = ((there + sign * half).clamp(0, 1).pow(6 * temper) for sign in (-1, 1))
        near = kept / kept.amax(-1, keepdim=True)
        assert ((low - 1e-5 <= near) & (near <= high + 1e-5)).all()


@pytest.mark.parametrize("name", ["C5", "+LD"])
def test_training_from_a_gradient_cache_is_nearly_the_same_and_takes_no_backward_pass_of_the_teacher(
    toy, gradients, tmp_path, monkeypatch, name
):
    settings = replace(SETTINGS, token_budget=1500, temper=0.5)
    computed = distilled(toy, tmp_path / "computed", name, settings)
    uniform = distilled(toy, tmp_path / "uniform", "C3", replace(settings, token_budget=1))
    settings = replace(settings, gradient_cache=str(gradients(name).path))
    monkeypatch.setattr(trainer, "residual_sensitivity", None)
    cached = distilled(toy, tmp_path / "cached", name, settings)
    differences = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(cached, computed, strict=True)]
    assert len(differences) > 1 and 0 < max(differences) < 0.05
    assert abs(uniform[0]["loss"] / computed[0]["loss"] - 1) > 3 * max(differences)


def test_a_run_from_a_gradient_cache_resumes_with_the_same_bits(toy, gradients, tmp_path):
    settings = replace(SETTINGS, token_budget=1500, gradient_cache=str(gradients("C5").path), checkpoint_every=1)

    class Interrupted(FewPages):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            if self.read > 7:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    distilled(toy, tmp_path / "whole", "C5", settings)
    with pytest.raises(KeyboardInterrupt):
        distilled(toy, tmp_path / "run", "C5", settings, data=Interrupted())
    assert len(checkpoints.checkpoints(tmp_path / "run")) == 1
    distilled(toy, tmp_path / "run", "C5", settings)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == (
        tmp_path / "whole/student/model.safetensors"
    ).read_bytes()


def test_an_interrupted_gradient_cache_is_completed(toy, gradients, tmp_path, monkeypatch):
    build = partial(
        cached_weights.build_gradient_cache,
        tmp_path / "cache",
        toy.teacher,
        FewPages(),
        toy.collate,
        toy.processor,
        CONDITIONS["C5"],
        LAYERS,
        batch_size=3,
        progress=False,
    )
    whole = gradients("C5").path.read_bytes()
    build(indices=range(6))
    computed = []
    monkeypatch.setattr(
        cached_weights,
        "sample_sensitivities",
        lambda *given, of=cached_weights.sample_sensitivities: computed.extend(s.key for s in given[-1]) or of(*given),
    )
    assert build().path.read_bytes() == whole and computed == [FewPages()[i].key for i in (6, 7)]


def test_a_gradient_cache_of_anything_else_is_refused_before_any_step(toy, gradients, tmp_path):
    path = gradients("C5").path
    other = copy.deepcopy(toy.teacher)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    hybrid = to_hybrid(toy.teacher, attention_layers=[0])
    for message, condition, given in (
        (f"^{path} was made with content 'gradient', not 'layer_gradient'", "+LD", {}),
        (f"^{path} was made with teacher '", "C5", dict(teacher=other)),
        (f"^{path} was made with layers '.0, 1, 2.', not '.1, 2, 3.'", "C5", dict(student=hybrid)),
        (f"^{toy.path} was made with content 'density', not 'gradient'", "C5", dict(gradient_cache=toy.path)),
        (f"^{path} was made with content 'gradient', not 'density'", "C4", dict(density_cache=path)),
        ("^gradient_cache is .*; to check it, distill needs the teacher's processor", "C5", dict(processor=None)),
        ("^no density cache at ", "C5", dict(gradient_cache=tmp_path / "none")),
    ):
        teacher = given.get("teacher", toy.teacher)
        settings = replace(
            SETTINGS, **{name: str(given.get(name, path)) for name in ("gradient_cache", "density_cache")}
        )
        with pytest.raises(ValueError, match=message):
            trainer.distill(
                given.get("student") or to_hybrid(teacher),
                teacher,
                FewPages(),
                toy.collate,
                CONDITIONS[condition],
                settings,
                tmp_path / "run",
                processor=given.get("processor", toy.processor),
                progress=False,
            )
        assert not (tmp_path / "run").exists()
    with pytest.raises(
        ValueError, match="condition 'C4' has the weights 'density'; a gradient cache is for gradient weights"
    ):
        cached_weights.build_gradient_cache(
            tmp_path / "run", toy.teacher, FewPages(), toy.collate, toy.processor, CONDITIONS["C4"], LAYERS
        )


def test_another_question_or_answer_is_another_record(toy, gradients, tmp_path):
    document = FewPages()[0]
    (question, answer), *rest = document.turns
    changed = [
        replace(document, turns=turns)
        for turns in ([(question, answer + " 1"), *rest], [("So: " + question, answer), *rest], rest)
    ]
    keys = cached_weights.with_cache_keys(
        toy.collate, gradients("C5").identity, [document, *changed, replace(document, key="renamed")]
    )["cache_keys"]
    assert (
        len(set(keys)) == 4
        and keys[0] == keys[4]
        and [key in gradients("C5") for key in keys] == [True, False, False, False, True]
    )
    masked = lambda samples: (
        (batch := toy.collate(samples)) | {"labels": batch["labels"].clamp(max=-100)}
    )  # the same text, asked for no answer
    assert cached_weights.with_cache_keys(masked, gradients("C5").identity, [document])["cache_keys"][
        0
    ] not in gradients("C5")

    class Changed(FewPages):
        def __getitem__(self, i):
            return changed[0]

    settings = replace(SETTINGS, gradient_cache=str(gradients("C5").path))
    with pytest.raises(
        ValueError, match=f"^sample '{document.key}' is not in the cache: .* has no record .* among its 8, at step 1"
    ):
        distilled(toy, tmp_path / "run", "C5", settings, data=Changed())
