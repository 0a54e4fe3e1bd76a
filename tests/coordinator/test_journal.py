"""What a coordinator writes down is what the next one reads, however the first one ended."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.coordinator.journal import Journal, room_for
from aqua_jax.coordinator.records import PAGE, Entry
from aqua_jax.errors import LedgerError

SIZE = 64 * PAGE
NUMBERS = st.integers(0, 2**62)
NAMES = st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=40)
ENTRIES = st.lists(
    st.builds(
        Entry, NUMBERS, NUMBERS, NUMBERS, NAMES.filter(str.isprintable),
        st.tuples(NUMBERS, NUMBERS), NUMBERS, NUMBERS,
        st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(tuple), st.integers(-9, 9),
        st.floats(0, 1e9),
    ),
    max_size=8,
)


def read(journal):
    return Journal.adopt(journal.fd, SIZE)[1]


@given(st.lists(ENTRIES, min_size=1, max_size=4))
def test_the_last_that_was_written_is_read(histories):
    journal = Journal.create(SIZE)
    assert read(journal) == []
    for entries in histories:
        journal.write(entries)
        assert read(journal) == entries
        journal, _ = Journal.adopt(journal.fd, SIZE)  # by another coordinator
    journal.close()
    journal.close()


@given(ENTRIES, ENTRIES, st.integers(0, 400), st.data())
def test_a_torn_write_leaves_what_was_before(before, after, cut, data):
    journal = Journal.create(SIZE)
    journal.write(before)
    half = room_for(SIZE)
    whole = [os.pread(journal.fd, half, index * half) for index in (0, 1)]
    journal.write(after)
    (index,) = [
        n for n in (0, 1) if os.pread(journal.fd, half, n * half) != whole[n]
    ] or [None]
    assert index is not None, "each write has a number"
    new = os.pread(journal.fd, half, index * half)
    torn = new[:cut] + whole[index][cut:]
    os.pwrite(journal.fd, torn, index * half)
    assert read(journal) in (before, after)
    if torn != new:
        assert read(journal) == before
    journal.close()


def test_it_always_has_room(tmp_path):
    journal = Journal.create(SIZE)
    name = "é" * 200
    worst = [
        Entry(2**62, 2**62, 2**63, name, (2**31, 2**62), 0, PAGE, ((0, PAGE),), 0, 1e9)
        for _ in range(SIZE // PAGE)
    ]
    journal.write(worst)
    assert len(read(journal)) == len(worst)
    alternating = tuple((2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(SIZE // PAGE // 2))
    journal.write([Entry(1, 1, 1, name, (1, 1), 0, SIZE, alternating, 0, 0.0)])
    assert read(journal)[0].held == alternating
    journal.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"\xff" * 5000, b"aquajrn1" * 900])
def test_what_is_no_journal_is_refused(content):
    fd = os.memfd_create("test")
    os.pwrite(fd, content, 0)
    with pytest.raises(LedgerError):
        Journal.adopt(fd, SIZE)
    os.close(fd)
    with pytest.raises(LedgerError):
        Journal.adopt(fd, SIZE)
