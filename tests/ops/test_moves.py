"""Page moves that ride with steps: exact, stale, broken, late, and gone at exit."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import StaleHandleError
from aqua_jax.ops import moves, moves_reference
from aqua_jax.ops.moves import MoveBatch, MovePool, Part, Segment, Status
from tests.scale import scaled

SHAPE = (24, 2, 2, 4, 2, 32)  # pages of 4 KiB
PAGE = 4096
CAPACITY = 16


@pytest.fixture(autouse=True)
def quiet():
    """No test leaves moves or delays behind."""
    yield
    moves.set_delay(0, 0)
    assert moves.drain(30)


def step(kv, batch, head, weight, pages):
    """What a step does with the pool: moves at the head, then matmuls, then writes to `pages`."""
    kv = moves.enqueue_moves(kv, batch, head)
    value = weight
    for _ in range(3):
        value = jnp.tanh(value @ weight)
    fresh = jnp.broadcast_to(value[: pages.shape[0], :1], (pages.shape[0], SHAPE[3] * 2 * 32))
    fresh = fresh.reshape(pages.shape[0], 1, 1, *SHAPE[3:])
    return kv.at[pages].set(jnp.broadcast_to(fresh, (pages.shape[0], *SHAPE[1:]))), value[:, 0]


def compiled(shape=SHAPE, size=256):
    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((CAPACITY, moves.MOVE_WORDS), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((size, size), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile()


def only_moves(kv, batch: MoveBatch):
    """One dispatch of nothing but the moves."""
    run = jax.jit(moves.enqueue_moves, donate_argnums=0)
    return jax.block_until_ready(run(kv, batch.moves(), batch.head()))


def as_bytes(kv) -> np.ndarray:
    return np.array(kv).view(np.uint8).reshape(kv.shape[0], -1)


def full_pool(seed=0):
    return jnp.array(np.random.default_rng(seed).standard_normal(SHAPE, np.float32))


@pytest.mark.parametrize("delay_us", [0, 400])
def test_exact_over_many_steps(delay_us):
    """Rotating pages leave, come back elsewhere, and are compared, while steps write others."""
    rng = np.random.default_rng(delay_us)
    program = compiled()
    weight = jnp.array(rng.standard_normal((256, 256), np.float32) / 16)
    kv = full_pool()
    address = kv.unsafe_buffer_pointer()
    memory = np.zeros(SHAPE[0] * PAGE, np.uint8)
    mirror, stored = as_bytes(kv), {}
    moves.set_delay(7, delay_us)
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        for _ in range(scaled(40)):
            order = rng.permutation(SHAPE[0])
            slots = rng.permutation(SHAPE[0]).tolist()
            batch = MoveBatch(CAPACITY, pool)
            out, written = order[:6], order[6:10]
            # What comes in was stored by an earlier step; its page is of no use until it is there.
            known = [slot for slot in slots if slot in stored][:6]
            free = [slot for slot in slots if slot not in known][:6]
            into = order[10 : 10 + len(known)]
            tickets = batch.copy_out(out, segment, np.multiply(free, PAGE), checksum=True)
            sums = np.array([stored[slot][1] for slot in known], np.uint64)
            arriving = batch.copy_in(into, segment, np.multiply(known, PAGE), checksums=sums)
            kv, value = program(
                kv, batch.moves(), batch.head(), weight, jnp.array(written, jnp.int32)
            )
            stored |= {slot: [mirror[page].copy(), 0]
                       for slot, page in zip(free, out, strict=True)}
            for page, slot in zip(into, known, strict=True):
                mirror[page] = stored[slot][0]
            filled = np.asarray(value)[:4].astype(np.float32).view(np.uint8).reshape(4, 4)
            mirror[written] = np.tile(filled, (1, PAGE // 4))
            assert kv.unsafe_buffer_pointer() == address
            jax.block_until_ready(kv)
            assert moves.drain(30)
            statuses, sums = moves.poll(np.concatenate([tickets, arriving]))
            assert (statuses == Status.DONE).all()
            for slot, found in zip(free, sums[:6], strict=True):
                stored[slot][1] = found
                content = memory[slot * PAGE : (slot + 1) * PAGE]
                np.testing.assert_array_equal(content, stored[slot][0])
            np.testing.assert_array_equal(as_bytes(kv), mirror)


def test_steps_follow_each_other_without_waiting_for_copies():
    """Rule 1 and 2 are all there is to keep: nothing is drained between the steps."""
    program, weight = compiled(), jnp.eye(256)
    kv = full_pool(1)
    before = as_bytes(kv)
    memory = np.zeros(8 * PAGE, np.uint8)
    moves.set_delay(1, 30_000)
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        tickets = []
        for i in range(8):
            batch = MoveBatch(CAPACITY, pool)
            tickets.append(batch.copy_out([i], segment, [i * PAGE]))
            kv, _ = program(kv, batch.moves(), batch.head(), weight, jnp.arange(20, 24))
        jax.block_until_ready(kv)
        assert (moves.poll(np.concatenate(tickets))[0] == Status.PENDING).any()
        assert moves.drain(30)
        assert (moves.poll(np.concatenate(tickets))[0] == Status.DONE).all()
        np.testing.assert_array_equal(memory.reshape(8, PAGE), before[:8])


def test_a_broken_rule_shows_under_delays():
    """Sources that the same step overwrites (rule 1): with copies held up, the copy is wrong."""
    program, weight = compiled(), jnp.eye(256)
    kv = full_pool(2)
    before = as_bytes(kv)
    memory = np.zeros(4 * PAGE, np.uint8)
    moves.set_delay(3, 50_000)
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        batch = MoveBatch(CAPACITY, pool)
        batch.copy_out([23, 22, 21, 20], segment, np.arange(4) * PAGE)
        kv, _ = program(kv, batch.moves(), batch.head(), weight, jnp.arange(20, 24))
        jax.block_until_ready(kv)
        assert moves.drain(30)
    assert not np.array_equal(memory.reshape(4, PAGE), before[23:19:-1])


def test_a_ticket_says_nothing_before_its_step_has_run():
    """`drain` knows nothing of a step to come. Who closes the pool before that loses its moves, but
    no byte: memory that goes afterwards is not touched."""
    kv = full_pool(12)
    before = as_bytes(kv)
    memory = np.zeros(2 * PAGE, np.uint8)
    with Segment(memory) as segment:
        pool = MovePool.of(kv)
        early, late = MoveBatch(1, pool), MoveBatch(2, pool)
        seen = early.copy_out([1], segment, [0])
        lost = late.copy_out([2], segment, [PAGE])
        lost = np.concatenate([lost, late.copy_in([3], segment, [0])])
        assert moves.drain(30) and moves.poll(seen)[0] == Status.PENDING
        kv = only_moves(kv, early)
        assert moves.drain(30) and moves.poll(seen)[0] == Status.DONE
        assert (moves.poll(lost)[0] == Status.PENDING).all()
        pool.close()
        kv = only_moves(kv, late)
        assert moves.drain(30) and (moves.poll(lost)[0] == Status.POOL_STALE).all()
    np.testing.assert_array_equal(memory.reshape(2, PAGE)[0], before[1])
    assert not memory[PAGE:].any()
    np.testing.assert_array_equal(as_bytes(kv), before)


def test_in_place():
    """Nothing of the pool's size beside it: the temporaries don't depend on the pool."""
    temporary = []
    for pages in (24, 20_000):
        memory = compiled((pages, *SHAPE[1:])).memory_analysis()
        assert memory.alias_size_in_bytes >= pages * PAGE
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[0] == temporary[1] < 1 << 20


def test_a_pool_out_of_place_is_an_error():
    kv = full_pool()
    with MovePool.of(kv) as pool:
        batch = MoveBatch(1, pool)

        def keeps_reading(kv, words, head):
            after = moves.enqueue_moves(kv, words, head)
            return after, kv + 1

        # XLA copies the pool to keep the old one: the address differs at the next step.
        run = jax.jit(keeps_reading)
        with Segment(np.zeros(PAGE, np.uint8)) as segment:
            first = batch.copy_out([0], segment, [0])
            one = run(kv, batch.moves(), batch.head())
            jax.block_until_ready(one)
            again = MoveBatch(1, pool)
            second = again.copy_out([0], segment, [0])
            two = run(one[1], again.moves(), again.head())
            jax.block_until_ready(two)
            assert moves.drain(30)
            assert one[0].unsafe_buffer_pointer() != two[0].unsafe_buffer_pointer()
            assert moves.poll(first)[0] == Status.DONE
            assert moves.poll(second)[0] == Status.POOL_STALE


def test_agrees_with_the_reference_on_anything():
    """Random records, many of them nonsense, one by one: statuses, checksums, every byte."""
    rng = np.random.default_rng(5)
    kv = full_pool(3)
    mirror = as_bytes(kv)
    memory = rng.integers(0, 256, 6 * PAGE, np.uint8)
    copied = memory.copy()
    run = jax.jit(moves.enqueue_moves, donate_argnums=0)
    seen = set()
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        live = {(segment.id, segment.generation): copied}
        for _ in range(scaled(150)):
            record = np.zeros(1, moves.MOVE)
            odd = rng.integers(0, 30)  # which field is nonsense, if any
            record["flags"] = rng.integers(0, 4)
            record["page"] = rng.choice([-1, 24, 2**31 - 1]) if odd == 0 else rng.integers(0, 24)
            record["segment"] = rng.choice([-1, 4096, 3000]) if odd == 1 else segment.id
            record["generation"] = segment.generation + (odd == 2)
            record["offset"] = 2**64 - 5 if odd == 3 else rng.integers(0, 5 * PAGE + 600)
            record["runs"] = rng.choice([0, -3]) if odd == 4 else rng.choice([1, 1, 3, 5])
            record["bytes"] = rng.choice([0, -8]) if odd == 5 else rng.integers(1, 900)
            record["stride"] = rng.integers(0, 1100)
            record["begin"] = rng.choice([-1, 5000]) if odd == 6 else rng.integers(0, 300)
            if rng.integers(0, 2) and odd > 6:
                record["begin"], record["runs"], record["bytes"] = 0, 1, PAGE
            record["ticket"] = moves.new_tickets(1)
            if record["flags"] == 3 and rng.integers(0, 4):  # the right one, mostly
                rehearsal = record.copy()
                record["checksum"] = moves_reference.apply(
                    mirror.copy(), rehearsal, {key: copied.copy() for key in live}
                )[1]
            wanted, sums = moves_reference.apply(mirror, record, live)
            words = record.view(np.int32).reshape(1, -1)
            kv = run(kv, words, np.array([1, pool.id, pool.generation], np.int32))
            jax.block_until_ready(kv)
            assert moves.drain(30)
            statuses, found = moves.poll(record["ticket"])
            assert statuses == wanted and found == sums, record
            seen.add(int(wanted[0]))
            np.testing.assert_array_equal(memory, copied)
        np.testing.assert_array_equal(as_bytes(kv), mirror)
    assert {Status.DONE, Status.OUT_OF_BOUNDS, Status.SEGMENT_STALE, Status.MISMATCH} <= seen


def test_parts_of_pages_by_tokens():
    kv = full_pool(4)
    before = np.array(kv)
    memory = np.zeros(2 * PAGE, np.uint8)
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        batch = MoveBatch(4, pool)
        # First one token of the page, later the two after it: a delta.
        batch.copy_out([5], segment, [PAGE], part=Part.of_tokens(kv, 0, 1))
        batch.copy_out([5], segment, [PAGE], part=Part.of_tokens(kv, 1, 2))
        kv = only_moves(kv, batch)
        assert moves.drain(30)
        stored = memory[PAGE:].view(np.float32).reshape(SHAPE[1:])
        np.testing.assert_array_equal(stored[:, :, :3], before[5, :, :, :3])
        assert not stored[:, :, 3].any() and not memory[:PAGE].any()
    assert Part.of_tokens(kv, 0, 4) == Part(0, PAGE)
    for start, count in ((0, 5), (-1, 2), (2, 0)):
        with pytest.raises(ValueError, match="allowed"):
            Part.of_tokens(kv, start, count)


def test_corruption_is_caught():
    kv = full_pool(5)
    memory = np.zeros(3 * PAGE, np.uint8)
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        offsets = np.arange(3) * PAGE
        batch = MoveBatch(4, pool)
        tickets = batch.copy_out([1, 2, 3], segment, offsets, checksum=True)
        kv = only_moves(kv, batch)
        assert moves.drain(30)
        sums = moves.poll(tickets)[1]
        assert len(set(sums.tolist())) == 3
        memory[PAGE + 1234] ^= 16
        batch = MoveBatch(4, pool)
        tickets = batch.copy_in([7, 8, 9], segment, offsets, checksums=sums)
        kv = only_moves(kv, batch)
        assert moves.drain(30)
        statuses = moves.poll(tickets)[0].tolist()
        assert statuses == [Status.DONE, Status.MISMATCH, Status.DONE]
        pages = as_bytes(kv)
        np.testing.assert_array_equal(pages[[7, 9]], pages[[1, 3]])


def test_stale_segments():
    kv = full_pool(6)
    before = as_bytes(kv)
    with MovePool.of(kv) as pool:
        segment = Segment(np.zeros(PAGE, np.uint8))
        batch = MoveBatch(2, pool)
        ticket = batch.copy_in([1], segment, [0])
        segment.retire()
        assert not segment.live
        for use in (segment.retire, segment.check, lambda: batch.copy_in([1], segment, [0])):
            with pytest.raises(StaleHandleError, match="retired"):
                use()
        # The id lives on with another generation; the old one names nothing.
        with Segment(np.ones(PAGE, np.uint8)) as heir:
            assert heir.id == segment.id and heir.generation == segment.generation + 1
            kv = only_moves(kv, batch)
            assert moves.drain(30)
            assert moves.poll(ticket)[0] == Status.SEGMENT_STALE
        np.testing.assert_array_equal(as_bytes(kv), before)
    with pytest.raises(StaleHandleError, match="closed"):
        pool.check()


def test_waiting_for_some_moves_and_counting_all_that_ended():
    kv = full_pool(8)
    with MovePool.of(kv) as pool, Segment(bytearray(8 * PAGE)) as segment:
        batch = MoveBatch(8, pool)
        tickets = batch.copy_out(range(8), segment, np.arange(8) * PAGE)
        before = moves.finished()
        assert not moves.wait(tickets, 0.01) and moves.finished() == before  # not dispatched
        assert moves.wait(tickets[:0], 0.0)
        moves.set_delay(3, 3000)
        kv = only_moves(kv, batch)
        assert moves.wait(tickets[:2], 30)
        assert (moves.poll(tickets[:2])[0] == Status.DONE).all()
        assert moves.wait(tickets, 30) and moves.drain(30)
        assert moves.finished() == before + 8
        assert (moves.poll(tickets)[0] == Status.DONE).all()


def test_a_forgotten_segment_keeps_its_memory_until_copies_end():
    kv = full_pool(7)
    with MovePool.of(kv) as pool:
        memory = bytearray(8 * PAGE)
        segment = Segment(memory)
        batch = MoveBatch(8, pool)
        tickets = batch.copy_out(range(8), segment, np.arange(8) * PAGE)
        moves.set_delay(2, 3000)
        kv = only_moves(kv, batch)
        del segment
        gc.collect()  # waits, as `retire` does
        assert (moves.poll(tickets)[0] == Status.DONE).all()
        assert bytes(memory) == as_bytes(kv)[:8].tobytes()


@pytest.mark.parametrize("abandon", [False, True])
def test_retiring_waits_for_copies_in_flight(abandon):
    kv = full_pool(8)
    memory = np.zeros(16 * PAGE, np.uint8)
    moves.set_delay(4, 20_000)
    with MovePool.of(kv) as pool:
        segment = Segment(memory)
        batch = MoveBatch(16, pool)
        tickets = batch.copy_out(np.arange(16)[::-1], segment, np.arange(16) * PAGE)
        kv = only_moves(kv, batch)
        assert (moves.poll(tickets)[0] == Status.PENDING).any()
        ticking = threading.Event()
        threading.Timer(0.001, ticking.set).start()
        segment.retire(abandon=abandon)
        assert ticking.is_set() or abandon  # the interpreter goes on meanwhile
        content = memory.copy()
        assert moves.drain(30)
        np.testing.assert_array_equal(memory, content)  # nobody writes after `retire`
        statuses = moves.poll(tickets)[0]
        if abandon:
            assert (statuses == Status.SEGMENT_STALE).any()
        else:
            assert (statuses == Status.DONE).all()


def test_more_tickets_than_results():
    kv = full_pool(9)
    memory = np.zeros(PAGE, np.uint8)
    run = jax.jit(moves.enqueue_moves, donate_argnums=0)
    lap = 4096
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        firsts = []
        for _ in range(moves.RESULTS // lap + 1):
            batch = MoveBatch(lap, pool)
            part = Part(0, 8)
            tickets = batch.copy_out(np.zeros(lap, int), segment, np.zeros(lap, int), part=part)
            firsts.append(tickets[0])
            kv = run(kv, batch.moves(), batch.head())
        jax.block_until_ready(kv)
        assert moves.drain(30)
        statuses, _ = moves.poll(np.array(firsts))
        assert statuses[0] == Status.FORGOTTEN
        assert (statuses[1:] == Status.DONE).all()
        assert moves.poll(tickets)[0].tolist() == [Status.DONE] * lap
        assert moves.poll(moves.new_tickets(3))[0].tolist() == [Status.PENDING] * 3


def test_two_pools_at_once():
    kvs = [full_pool(10), full_pool(11)]
    before = [as_bytes(kv) for kv in kvs]
    memory = np.zeros(SHAPE[0] * PAGE, np.uint8)
    program, weight = compiled(), jnp.eye(256)
    moves.set_delay(5, 500)
    with Segment(memory) as segment, MovePool.of(kvs[0]) as a, MovePool.of(kvs[1]) as b:
        for i in range(8):
            for which, pool in enumerate((a, b)):
                batch = MoveBatch(CAPACITY, pool)
                batch.copy_out([i], segment, [(i + 8 * which) * PAGE])
                kvs[which], _ = program(
                    kvs[which], batch.moves(), batch.head(), weight, jnp.arange(20, 24)
                )
        jax.block_until_ready(kvs)
        a.close()  # waits for its own
        np.testing.assert_array_equal(memory[: 8 * PAGE].reshape(8, PAGE), before[0][:8])
        late = MoveBatch(CAPACITY, b)
        swapped = late.copy_in([0], segment, [0])
        head = np.array([1, a.id, a.generation], np.int32)
        kvs[0], _ = program(kvs[0], late.moves(), head, weight, jnp.arange(20, 24))
        jax.block_until_ready(kvs)
        assert moves.drain(30)
        assert moves.poll(swapped)[0] == Status.POOL_STALE
    np.testing.assert_array_equal(memory[8 * PAGE : 16 * PAGE].reshape(8, PAGE), before[1][:8])


def test_misuse_is_refused_on_the_host():
    with MovePool(4, 100) as pool, Segment(np.zeros(250, np.uint8)) as segment:
        batch = MoveBatch(3, pool)
        for pages, offsets, part in (
            ([4], [0], None), ([-1], [0], None), ([0], [151], None), ([0], [-1], None),
            ([0, 1], [0], None), ([0] * 4, [0] * 4, None), ([0], [0], Part(1, 100)),
            ([0], [0], Part(0, 0)), ([0], [0], Part(0, 10, 2, 9)), ([0], [0], Part(-1, 10)),
            ([0], [0], Part(0, 10, 0)), ([0], [0], Part(0, 51, 2, 51)),
        ):
            with pytest.raises(ValueError, match="allowed"):
                batch.copy_out(pages, segment, offsets, part=part)
        assert batch.count == 0 and batch.room == 3
        assert len(batch.copy_out([], segment, [])) == 0
        assert len(batch.copy_out([3], segment, [200], part=Part(0, 10, 5, 10))) == 1
        words, head = batch.moves(), batch.head()
        assert words.shape == (3, moves.MOVE_WORDS) and head[0] == batch.count == 1
        with pytest.raises(ValueError, match="allowed"):
            moves.enqueue_moves(jnp.zeros((4, 25)), words[:, 1:], head)
    for buffer in (b"read only", bytearray()):
        with pytest.raises(ValueError, match="allowed"):
            Segment(buffer)


EXIT = """
import sys, time, numpy as np, jax, jax.numpy as jnp
from aqua_jax.ops import moves
kv = jnp.zeros((64, 2, 2, 4, 2, 32))
pool, segment = moves.MovePool.of(kv), moves.Segment(np.zeros(64 * 4096, np.uint8))
batch = moves.MoveBatch(64, pool)
tickets = batch.copy_out(np.arange(64)[::-1], segment, np.arange(64) * 4096)
moves.set_delay(1, 300_000)
kv = jax.block_until_ready(
    jax.jit(moves.enqueue_moves, donate_argnums=0)(kv, batch.moves(), batch.head()))
assert (moves.poll(tickets)[0] == moves.Status.PENDING).any()
if sys.argv[1] == "raise":
    raise SystemExit(3)
if sys.argv[1] == "drop":  # what must be waited for is waited for, then memory goes
    moves.set_delay(0, 0)
    pool.close()
    kv.delete()
    assert (moves.poll(tickets)[0] == moves.Status.DONE).all()
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 3), ("drop", 0)])
def test_a_process_ends_with_copies_pending(how, code):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", EXIT, how], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and done.stderr == "", done.stderr
    # 64 copies held up by 2 * 150 ms each, were they waited for, are 19 s.
    assert time.monotonic() - start < 15


def test_counters():
    before = moves.counters()
    kv = full_pool(12)
    with Segment(np.zeros(PAGE, np.uint8)) as segment, MovePool.of(kv) as pool:
        batch = MoveBatch(4, pool)
        batch.copy_out([0], segment, [0])
        batch.copy_in([1], segment, [0], part=Part(0, 100))
        batch.copy_in([1], segment, [0], checksums=np.array([1], np.uint64))
        kv = only_moves(kv, batch)  # kept: a pool must outlive its copies
        assert moves.drain(30)
    after = moves.counters()
    assert after.handed_over - before.handed_over == after.finished - before.finished == 3
    assert after.failed - before.failed == 1
    assert after.bytes_out - before.bytes_out == PAGE
    assert after.bytes_in - before.bytes_in == PAGE + 100
    assert after.busy_ns > before.busy_ns and after.cpu_ns > before.cpu_ns
