import resource
import struct

import numpy as np
import pytest

from policymix.data import tfrecord
from tests.data import rlds_support as support


@pytest.fixture
def file(tmp_path):
    return support.shard(support.copied("bridge_tiny", tmp_path))


def _offsets(path):
    return [record.offset - 12 for record in tfrecord.read(path)]


def _damage(path, place, flip=1):
    data = bytearray(path.read_bytes())
    data[place] ^= flip
    path.write_bytes(data)


def test_records_are_those_that_tensorflow_wrote(file):
    records = list(tfrecord.read(file))
    assert [record.number for record in records] == [0, 1]
    size = sum(len(record.data) + tfrecord.OVERHEAD for record in records)
    assert size == file.stat().st_size
    raw = file.read_bytes()
    for record in records:
        assert raw[record.offset : record.offset + len(record.data)] == record.data


def test_what_is_written_is_what_tensorflow_wrote(file, tmp_path):
    copy = tmp_path / "copy.tfrecord"
    with tfrecord.writing(copy) as writer:
        for record in tfrecord.read(file):
            writer.write(record.data)
    assert copy.read_bytes() == file.read_bytes()
    assert writer.num_bytes == file.stat().st_size - 2 * tfrecord.OVERHEAD


def test_known_checksum():
    # RFC 3720, B.4: CRC-32C of 32 zero bytes is 0x8A9136AA.
    crc = 0x8A9136AA
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert tfrecord.masked_crc(bytes(32)) == tfrecord.masked_crc(memoryview(bytes(32))) == masked


@pytest.mark.parametrize("flip", [1, 0x80])
def test_flipped_bit_is_found(file, flip):
    second = _offsets(file)[1]
    _damage(file, second + 500, flip)
    with pytest.raises(tfrecord.DamagedRecord, match=rf"record 1 \(from byte {second} on\)") as e:
        list(tfrecord.read(file))
    assert str(file) in str(e.value)
    assert "checksum" in str(e.value)
    assert len(list(tfrecord.read(file, check=False))) == 2


def test_wrong_length_ends_the_file(file):
    _damage(file, 1)
    with pytest.raises(tfrecord.DamagedRecord, match="checksum of its length"):
        list(tfrecord.read(file))
    bad = []
    assert list(tfrecord.read_on(file, bad)) == []
    assert [(error.number, error.go_on) for error in bad] == [(0, False)]


@pytest.mark.parametrize("cut", [1, 4, 100, 5000])
def test_cut_off_file_is_found(file, cut):
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(tfrecord.DamagedRecord, match="record 1 .* cut off, expected"):
        list(tfrecord.read(file))


def test_file_cut_within_a_header_is_found(file):
    second = _offsets(file)[1]
    file.write_bytes(file.read_bytes()[: second + 5])
    with pytest.raises(tfrecord.DamagedRecord, match="expected 12 bytes, found 5"):
        list(tfrecord.read(file))


def test_length_beyond_memory_is_no_allocation(tmp_path):
    header = struct.pack("<Q", 1 << 60)
    file = tmp_path / "huge.tfrecord"
    file.write_bytes(header + struct.pack("<I", tfrecord.masked_crc(header)) + bytes(100))
    with pytest.raises(tfrecord.DamagedRecord, match="cut off"):
        list(tfrecord.read(file))


def test_damaged_records_are_passed_over_when_asked(file):
    first = next(tfrecord.read(file))
    _damage(file, first.offset + 10)
    bad = []
    found = list(tfrecord.read_on(file, bad))
    assert [record.number for record in found] == [1]
    assert [(error.number, error.go_on) for error in bad] == [(0, True)]


def test_empty_file_has_no_records_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "empty").touch()
    assert list(tfrecord.read(tmp_path / "empty")) == []
    with pytest.raises(FileNotFoundError, match="absent"):
        list(tfrecord.read(tmp_path / "absent"))


def _write(path, records, stop=None):
    with tfrecord.writing(path) as writer:
        for record in records:
            writer.write(record)
        if stop:
            raise stop


def test_writer_leaves_nothing_behind_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        _write(tmp_path / "x", [b"data"], RuntimeError("stop"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_the_file(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = [np.random.default_rng(0).bytes(1 << 19)] * 8
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
        with pytest.raises(OSError, match="cannot write .*big"):
            _write(tmp_path / "big", records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []
