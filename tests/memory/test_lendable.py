"""Extents that are lent one by one, at addresses that stay."""

import ctypes
import fcntl
import os

import pytest

from aqua_jax.errors import ArenaError, ConfigError, StaleHandleError
from aqua_jax.memory import lendable
from aqua_jax.memory.arena import PAGE, SEALS, Arena
from aqua_jax.memory.lendable import LendableMemory
from aqua_jax.memory.local import LocalClient
from tests.memory.leftovers import leftovers


def read(address, size):
    return ctypes.string_at(address, size)


def test_extents_are_neighbours_and_files_of_their_own():
    with leftovers() as left, LendableMemory(3, 2 * PAGE) as memory:
        assert memory.size == 6 * PAGE
        assert len({os.fstat(extent.fd).st_ino for extent in memory.extents}) == 3
        ctypes.memset(memory.base + PAGE, 7, 4 * PAGE)  # across borders
        for index, extent in enumerate(memory.extents):
            assert extent.address == memory.base + index * 2 * PAGE
            assert fcntl.fcntl(extent.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
            assert os.fstat(extent.fd).st_blocks * 512 == os.fstat(extent.fd).st_size == 2 * PAGE
        with Arena.adopt(memory.extents[1].fd, 0, 2 * PAGE) as borrowed:
            assert borrowed.read(0, 2 * PAGE) == bytes([7]) * 2 * PAGE
            borrowed.write(PAGE, b"abc")
            assert read(memory.base + 3 * PAGE, 3) == b"abc"
            memory.extents[1].scrub(0, PAGE)
            assert borrowed.read(0, PAGE) == bytes(PAGE)
    assert memory.closed
    memory.close()
    assert not left()


def test_lent_and_back_at_the_same_address():
    with LocalClient() as client, LendableMemory(2, 4 * PAGE) as memory:
        ctypes.memset(memory.base, 1, memory.size)
        lendings = [client.lend(extent, name="kv") for extent in memory.extents]
        (loan,) = client.borrow(4 * PAGE)
        assert loan.read(0, loan.size) == bytes(loan.size)  # never what we had there
        loan.write(0, b"\xff" * loan.size)
        lent = next(lending for lending in lendings if lending.id == loan.arena)
        assert lent.reclaim(0) == 4 * PAGE and not lent.news
        loan.close()
        assert lent.take_returned() == [(0, 4 * PAGE)]
        other = lendings[1 - lendings.index(lent)]
        assert other.reclaim(0) == 0 and other.take_returned() == [(0, 4 * PAGE)]
        address = memory.extents[lendings.index(lent)].address
        ctypes.memset(address, 3, 4 * PAGE)
        lent.lend(0, 4 * PAGE)
        (again,) = client.borrow(4 * PAGE)
        assert again.read(0, again.size) == bytes(again.size)


def test_a_closed_extent_and_impossible_sizes():
    memory = LendableMemory(1, PAGE)
    memory.close()
    with pytest.raises(StaleHandleError):
        memory.extents[0].fd  # noqa: B018
    with pytest.raises(ArenaError):
        memory.extents[0].scrub(0, PAGE)
    for extents, size in ((0, PAGE), (1, PAGE + 1), (1, 0), (1, -PAGE)):
        with pytest.raises(ConfigError, match="extent_bytes"):
            LendableMemory(extents, size)


def test_memory_that_is_not_there_leaves_nothing(monkeypatch):
    made, original = [], lendable.sealed_file

    def fails_at_the_third(size, name):
        if len(made) == 2:
            raise ConfigError("bytes", size, "less")
        made.append(original(size, name))
        return made[-1]

    monkeypatch.setattr(lendable, "sealed_file", fails_at_the_third)
    with leftovers() as left, pytest.raises(ConfigError):
        LendableMemory(4, PAGE)
    assert len(made) == 2 and not left()


def test_a_forked_child_has_none_of_it():
    with LendableMemory(1, PAGE), open("/proc/self/smaps", encoding="utf-8") as file:
        here = file.read().split("/memfd:aqua-kv")[1]
        flags = next(line for line in here.splitlines() if line.startswith("VmFlags:"))
        assert "dc" in flags.split()
