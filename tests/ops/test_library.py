"""What happens with and without the compiled handlers."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from aqua_jax.ops import library

PROBE = """
import json, logging
logging.basicConfig(format="%(levelname)s %(message)s")
import jax.numpy as jnp
from aqua_jax.ops import library
from aqua_jax.ops.pages import copy_pages
kv, ids = jnp.arange(6.0).reshape(3, 2), jnp.array([1], jnp.int32)
copied = copy_pages(kv, ids, ids + 1, ids)
try:
    copy_pages(kv, ids, ids + 1, ids, implementation="ffi")
    forced = ""
except RuntimeError as error:
    forced = str(error)
print(json.dumps({
    "available": library.available(), "reason": library.reason(), "set": library.instruction_set(),
    "implementations": library.implementations(),
    "copied": copied.tolist(), "forced": forced,
}))
"""


THREADS = """
import json, pathlib
import jax, jax.numpy as jnp, numpy as np
from aqua_jax.ops import moves
from aqua_jax.ops.activation import swiglu
kv = jnp.zeros((4, 1024))
with moves.MovePool.of(kv) as pool, moves.Segment(np.zeros(4096, np.uint8)) as segment:
    batch = moves.MoveBatch(1, pool)
    batch.copy_out([0], segment, [0])
    kv = jax.jit(moves.enqueue_moves, donate_argnums=0)(kv, batch.moves(), batch.head())
    swiglu(jnp.ones((256, 2048))).block_until_ready()
    assert moves.drain(30)
    tasks = pathlib.Path("/proc/self/task").glob("*/comm")
    print(json.dumps([path.read_text().strip() for path in tasks]))
"""


def probe(folder: pathlib.Path | None, **environment: str) -> tuple[dict, str]:
    """What a fresh process sees, and what it logged."""
    variables = {**os.environ, **environment, "JAX_PLATFORMS": "cpu"}
    if folder is not None:
        variables["AQUA_LIBRARY_PATH"] = str(folder)
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=variables, capture_output=True, text=True, timeout=120,
        check=True,
    )
    return json.loads(run.stdout), run.stderr


def test_all_handlers_are_there():
    assert library.available(), library.reason()
    assert library.reason() == ""
    assert set(library.implementations().values()) == {"ffi"}
    assert not library.available("no_such_target")


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "broken"])
def test_without_a_usable_library(content, tmp_path):
    if content is not None:
        (tmp_path / "libaqua_cpu.so").write_bytes(content)
    seen, log = probe(tmp_path)
    assert not seen["available"] and str(tmp_path) in seen["reason"]
    assert seen["set"] == "none"
    assert "ffi" not in seen["implementations"].values()
    assert seen["copied"] == [[0, 1], [2, 3], [2, 3]]  # the reference did it
    assert seen["reason"] in seen["forced"]
    assert log.count("compiled handlers are missing") == 1


def test_another_library_under_our_name_is_refused(tmp_path):
    maths = next(pathlib.Path(sys.prefix).rglob("_multiarray_umath*.so"))
    (tmp_path / "libaqua_cpu.so").symlink_to(maths)
    seen, _ = probe(tmp_path)
    assert not seen["available"] and "cannot be used" in seen["reason"]


def test_threads_have_names():
    """By which operating systems, debuggers and the server's metrics tell them apart."""
    run = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "AQUA_THREADS": "3", "AQUA_COPY_THREADS": "2"},
    )
    names = json.loads(run.stdout)
    assert names.count("aqua-compute") == 2  # and whoever calls takes part
    assert names.count("aqua-copies") == 2


def test_instruction_set_is_clamped_and_names_are_checked(monkeypatch):
    monkeypatch.delenv("AQUA_ISA", raising=False)
    best = library.instruction_set()
    monkeypatch.setenv("AQUA_ISA", "generic")
    assert library.instruction_set() == "generic"
    monkeypatch.setenv("AQUA_ISA", "no_such_set")
    assert library.instruction_set() == best
