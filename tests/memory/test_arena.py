"""Arenas: what a borrower refuses to map, and that nothing is left."""

import fcntl
import os
import subprocess
import sys

import pytest

from aqua_jax.errors import ArenaError, ConfigError, StaleHandleError
from aqua_jax.memory import arena as arena_module
from aqua_jax.memory.arena import PAGE, SEALS, Arena
from tests.memory.leftovers import leftovers


def test_what_one_writes_the_other_reads():
    with leftovers() as left, Arena.create(3 * PAGE + 1) as lent:
        assert lent.size == 4 * PAGE
        with Arena.adopt(lent.fd, PAGE, 2 * PAGE) as part:
            part.write(5, b"abc")
            assert lent.read(PAGE + 5, 3) == b"abc"
            lent.scrub(PAGE, PAGE)
            assert part.read(0, PAGE) == bytes(PAGE)
            part.view(7, 1)[:] = b"x"
            assert lent.read(PAGE + 7, 1) == b"x"
    assert not left()


def test_memory_is_really_allocated_and_sealed():
    with Arena.create(1 << 20) as lent:
        assert os.fstat(lent.fd).st_blocks * 512 >= 1 << 20
        assert fcntl.fcntl(lent.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        for size in (PAGE, 2 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(lent.fd, size)
        assert os.get_inheritable(lent.fd) is False


def test_use_after_close_is_an_error_and_closing_again_is_not():
    with leftovers() as left:
        for memory in (Arena.create(PAGE), Arena.anonymous(PAGE)):
            memory.close()
            memory.close()
            for use in (
                lambda m: m.address, lambda m: m.fd, lambda m: m.read(0, 1),
                lambda m: m.write(0, b"x"), lambda m: m.view(0, 1), lambda m: m.scrub(0, 1),
                lambda m: m.disconnect(0, PAGE),
            ):
                with pytest.raises(StaleHandleError):
                    use(memory)
    assert not left()


def test_a_view_keeps_its_memory_until_it_goes():
    with leftovers() as left:
        memory = Arena.create(PAGE)
        view = memory.view(0, 4)
        memory.close()
        view[:] = b"abcd"
        assert bytes(view) == b"abcd"
        del view, memory
    assert not left()


def _memfd(size, seals=0, sparse=False):
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, size)
    if not sparse:
        os.posix_fallocate(fd, 0, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("fd", "size", "words"),
    [
        (lambda: _memfd(PAGE), PAGE, "seals"),
        (lambda: _memfd(PAGE, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), PAGE, "seals"),
        (lambda: _memfd(PAGE, SEALS), 2 * PAGE, "has 4096 bytes"),
        (lambda: _memfd(PAGE, SEALS | fcntl.F_SEAL_WRITE), PAGE, "cannot map"),
        (lambda: _memfd(PAGE, SEALS, sparse=True), PAGE, "not all there"),
        (lambda: os.open("/dev/null", os.O_RDWR), PAGE, "not shared memory"),
        (lambda: os.pipe2(os.O_CLOEXEC)[0], PAGE, "not shared memory"),
        (lambda: _memfd(PAGE, SEALS), 100, "whole pages"),
        (lambda: _memfd(PAGE, SEALS), 0, "whole pages"),
    ],
)
def test_untrustworthy_descriptors_are_refused(fd, size, words):
    with leftovers() as left:
        received = fd()
        with pytest.raises(ArenaError, match=words):
            Arena.adopt(received, 0, size)
        os.close(received)
    # The other end of the pipe, which nobody asked about.
    assert all("pipe" in line for line in left())


@pytest.mark.parametrize("make", [Arena.create, Arena.anonymous])
@pytest.mark.parametrize("size", [0, -1, 2**62, True, 1.5])
def test_sizes_that_do_not_fit_are_refused(make, size):
    with leftovers() as left:
        with pytest.raises(ConfigError) as caught:
            make(size)
        assert caught.value.field == "bytes" and caught.value.value == size
        assert "memory available" in caught.value.allowed
    assert not left()


@pytest.mark.parametrize("make", [Arena.create, Arena.anonymous])
def test_memory_that_others_take_meanwhile_is_the_same_error(monkeypatch, make):
    """Simulated: really running out would make the kernel end somebody's process."""
    answers = iter([1 << 40, 1 << 40, 0])
    monkeypatch.setattr(arena_module, "available_memory", lambda: next(answers))
    monkeypatch.setattr(arena_module, "STEP", PAGE)
    with leftovers() as left, pytest.raises(ConfigError, match="no longer fit"):
        make(4 * PAGE)
    assert not left()


def test_disconnected_pages_are_private_and_the_rest_is_not():
    with Arena.create(4 * PAGE) as lent, Arena.adopt(lent.fd, 0, 4 * PAGE) as part:
        lent.write(0, b"a" * 4 * PAGE)
        part.disconnect(2 * PAGE, 2 * PAGE)
        part.write(3 * PAGE, b"late")
        assert part.read(2 * PAGE, 4) == bytes(4)
        assert lent.read(3 * PAGE, 4) == b"aaaa"
        part.write(0, b"kept")
        assert lent.read(0, 4) == b"kept"


def test_vacated_pages_go_back_to_the_system_and_come_again_empty():
    with Arena.create(8 * PAGE) as lent:
        lent.write(0, b"a" * 8 * PAGE)
        before = os.fstat(lent.fd).st_blocks
        lent.vacate(4 * PAGE, 4 * PAGE)
        assert os.fstat(lent.fd).st_blocks == before // 2
        lent.occupy(4 * PAGE, 4 * PAGE)
        assert os.fstat(lent.fd).st_blocks == before
        assert lent.read(0, 8 * PAGE) == b"a" * 4 * PAGE + bytes(4 * PAGE)
        with pytest.raises(ArenaError, match="whole pages"):
            lent.vacate(1, PAGE)


def test_a_forked_child_has_no_lent_memory():
    """A child that outlives a borrower must not go on writing to what is somebody else's then."""
    code = (
        "import os, signal\n"
        "from aqua_jax.memory.arena import Arena\n"
        "lent = Arena.create(4096)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    lent.write(0, b'x')\n"
        "    os._exit(0)\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "print(os.WTERMSIG(status) == signal.SIGSEGV, lent.read(0, 1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == r"True b'\x00'", done.stderr




def test_memory_is_imported_quickly_and_without_jax():
    code = (
        "import sys, aqua_jax.memory.lender, aqua_jax.memory.borrower, aqua_jax.memory.stores;"
        "bad = {'jax', 'numpy', 'flax', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
