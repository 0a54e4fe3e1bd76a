"""The CUDA library as far as it can be tested without a GPU: it loads, and steps lower to it.

Not collected where there is neither nvcc nor a library (tests/conftest.py), unless
AQUA_REQUIRE_CUDA=1 asks for one.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import glob
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.engine.buckets import BucketTable
from aqua_jax.engine.programs import Programs, StepSpec
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.parameters import abstract_decoder
from aqua_jax.ops import library
from aqua_jax.ops.attention import paged_attention
from aqua_jax.ops.pages import copy_pages
from aqua_jax.ops.spaces import SPACE_WORDS, Spaces
from aqua_jax.parallel.shards import HEADS, Shards
from tests.ops.attention_data import BF16, make_case

LIBRARY = pathlib.Path(library.__file__).parents[1] / "_lib" / "libaqua_cuda.so"
ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGETS = ("aqua_attention", "aqua_copy_pages", "aqua_enqueue_moves")
FUNCTIONS = (
    "AquaAttention", "AquaCopyPages", "AquaEnqueueMoves", "aqua_attention_workspace",
    "aqua_segment_register", "aqua_segment_retire", "aqua_segment_address", "aqua_pool_register",
    "aqua_pool_close", "aqua_moves_poll", "aqua_moves_finished", "aqua_moves_wait",
    "aqua_moves_drain", "aqua_moves_stop", "aqua_moves_set_delay", "aqua_moves_counters",
    "aqua_moves_set_device", "aqua_arena_create",
    "aqua_arena_import", "aqua_arena_close", "aqua_arena_scrub", "aqua_arena_checksum",
    "aqua_arena_topology", "aqua_arena_memory", "aqua_host_pin", "aqua_host_unpin",
    "aqua_host_pinned", "aqua_host_copy", "aqua_arena_way", "aqua_arena_devices",
    "aqua_arena_identity", "aqua_kernels_preload", "aqua_arena_unit", "aqua_arena_create_row",
)
LAYERS, TOKENS, SEQUENCES, MOVES = 3, 64, 8, 4
LOAD = """
import ctypes, sys
handle = ctypes.CDLL(sys.argv[1])
assert all(hasattr(handle, name) for name in sys.argv[2:])
"""
ARENAS = """
from aqua_jax.errors import ArenaError
from aqua_jax.ops.device_arena import DeviceArena, count, identity, link, ways
assert ways() == {}
for what in (lambda: DeviceArena.create(1 << 20), lambda: DeviceArena.map(0, 1 << 20),
             lambda: link(0, 0), lambda: link(0, 1), count, lambda: identity(0)):
    try:
        print("no error", what())
    except ArenaError as error:
        print(error)
"""


@pytest.fixture
def for_cuda():
    """What the test traces is for CUDA."""
    with library.lowering_for("cuda"):
        yield


def exported(function, *args, donate=0) -> str:
    """StableHLO of a function for CUDA."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in TARGETS]
    jitted = jax.jit(function, donate_argnums=donate)
    return jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)(
        *args
    ).mlir_module()


def calls(module: str) -> list[str]:
    """The lines of custom calls of ours, in order."""
    return [line for line in module.splitlines() if re.search(r"custom_call @aqua_", line)]


def is_in_place(line: str) -> bool:
    """Whether a custom call's first operand is its first result."""
    alias = re.search(r"output_tuple_indices = \[0?\], operand_index = 0", line)
    return alias is not None


def test_it_loads_without_a_driver():
    """In a process that has loaded nothing else of CUDA or jax."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(LIBRARY), *FUNCTIONS], capture_output=True, text=True,
        env=environment, timeout=60,
    )
    assert done.returncode == 0, done.stderr
    needed = subprocess.run(
        ["readelf", "--dynamic", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"NEEDED.*(libcuda|libnv|libstdc)", needed), needed


def test_arenas_say_that_there_is_no_gpu():
    done = subprocess.run(
        [sys.executable, "-c", ARENAS], capture_output=True, text=True, timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}, check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(re.search(r"GPUs?.*: .*CUDA", line) for line in lines), done.stdout


def test_every_kernel_is_loaded_before_it_is_captured():
    """`aqua_kernels_preload` names each kernel there is, and says why it can't load them here."""
    sources = "".join(
        path.read_text() for path in sorted((ROOT / "ffi" / "cuda").iterdir())
        if path.suffix in (".cu", ".cuh")
    )
    there = set(re.findall(r"__global__ __launch_bounds__\(\w+\) void (\w+)\(", sources))
    loaded = set(re.findall(r"\bpreload\((\w+)", sources))
    assert len(there) == sources.count("__global__ ") == 8 and there == loaded
    names = " ".join(machine_code("sm_90"))
    assert all(name in names for name in there)
    with library.lowering_for("cuda"):
        native = library.symbols()
    native.aqua_kernels_preload.restype = ctypes.c_char_p
    assert b"CUDA" in native.aqua_kernels_preload(0)


def test_only_the_copy_worker_keeps_a_device():
    """Whoever else sets one gives its thread back the context it had (OnDevice): restoring a device
    by its number would make a context on a GPU that is somebody else's."""
    calls = {
        path.name: path.read_text().count("cudaSetDevice(")
        for path in (ROOT / "ffi" / "cuda").iterdir() if "cudaSetDevice(" in path.read_text()
    }
    assert set(calls) == {"device.cc", "move_streams.cc"} and calls["device.cc"] == 2, calls


def cuobjdump(*arguments: str) -> str:
    """What it prints about the library; from pip or a toolkit, with nvdisasm beside it."""
    folders = [*glob.glob(f"{sysconfig.get_path('purelib')}/nvidia/cu*/bin"), os.environ["PATH"]]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    assert tool, "no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return subprocess.run(
        [tool, *arguments, str(LIBRARY)], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PATH": path},
    ).stdout


@functools.cache
def machine_code(architecture: str) -> dict[str, collections.Counter[str]]:
    """Instructions with their number, by kernel."""
    text = cuobjdump("--dump-sass", "--gpu-architecture", architecture)
    found: dict[str, collections.Counter[str]] = {}
    for function in text.split("Function : ")[1:]:
        name, _, body = function.partition("\n")
        found[name] = collections.Counter(
            re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", body)
        )
    return found


def kernels(architecture: str, *parts: str) -> dict[str, collections.Counter[str]]:
    """Kernels whose mangled names have all of these parts."""
    found = {
        name: code for name, code in machine_code(architecture).items()
        if all(part in name for part in parts)
    }
    assert found, parts
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_moves_16_bytes_at_a_time(architecture):
    copies = kernels(architecture, "copy_pages_kernel", "Vec16") | kernels(
        architecture, "copy_pieces_kernel") | kernels(architecture, "copy_checked_kernel")
    assert len(copies) == 3
    for name, code in copies.items():
        assert code["LDG.E.128"] >= 4 and code["STG.E.128"] >= 4, (name, code)
    matrix = kernels(architecture, "attend_matrix")
    assert len(matrix) == 12
    for name, code in matrix.items():
        # All keys and values arrive by asynchronous copies, and go through the matrix units.
        assert code["LDGSTS.E.BYPASS.128"] >= 12, (name, code)
        products = sum(n for op, n in code.items() if op.startswith("HMMA.16816.F32"))
        loads = sum(n for op, n in code.items() if op.startswith("LDSM.16.M"))
        assert products >= 16 and loads >= 12, (name, code)
    rows = kernels(architecture, "attend_row")
    assert len(rows) == 3 and all(code["LDG.E.128"] >= 8 for code in rows.values())
    for name, code in machine_code(architecture).items():
        spilled = [op for op in code if re.match(r"(LDL|STL)\b", op)]
        assert not spilled, f"{name} keeps registers in memory: {spilled}"


def test_code_for_later_gpus_is_there():
    """PTX, which their drivers compile."""
    text = cuobjdump("--list-ptx")
    assert text.count("sm_90.ptx") >= 6, text


def test_it_is_what_operations_use_on_cuda(for_cuda):
    assert library.platform() == "cuda"
    assert library.reason() == "" and all(library.available(name) for name in TARGETS)
    assert library.implementations() == {
        "attention": "ffi", "copy_pages": "ffi", "linear": "xla", "sample_tokens": "reference"
    }


def test_other_platforms_are_not_mixed_up():
    assert library.platform() == "cpu" and library.available("aqua_linear")
    with library.lowering_for("cuda"):
        assert not library.available("aqua_linear")
    with pytest.raises(ValueError, match=r"got 'tpu'; allowed: cpu, cuda"):
        with library.lowering_for("tpu"):
            pass
    assert library.platform() == "cpu"


@pytest.mark.parametrize("spaces", [None, Spaces(np.zeros((2, SPACE_WORDS), np.int32))])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_forward_step_lowers(deterministic, spaces, for_cuda):
    """Embedding to last norm, with moves at its head: our calls in a chain, the pool in place."""
    model = ModelConfig("llama", 512, 256, 512, LAYERS, 4, 2, 64, 1024)
    graphdef, params = abstract_decoder(model, jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((32, LAYERS, 2, 16, 2, 64), jnp.bfloat16)
    spec = StepSpec(
        sequences=SEQUENCES, table_width=64,
        buckets=BucketTable.build(
            TOKENS, SEQUENCES, deterministic=deterministic, skips_padding=False
        ),
        history_width=1024, deterministic=deterministic, counts_rows=False, attention="ffi",
        head_dim=64, max_moves=MOVES,
    )
    programs = Programs(graphdef, params, kv, spec, spaces)
    vector = jax.ShapeDtypeStruct((spec.forward_layout(TOKENS).size,), jnp.int32)
    last_tokens = jax.ShapeDtypeStruct((SEQUENCES,), jnp.int32)
    module = exported(
        programs._forward, tuple(params.values()), kv, vector, last_tokens, spaces, donate=1
    )
    pool = "tensor<32x3x2x16x2x64xbf16>"
    assert re.search(re.escape(pool) + r" \{tf\.aliasing_output = 0 : i32\}", module)
    found = calls(module)
    names = [re.search(r"@(aqua_\w+)", line)[1] for line in found]
    assert names == ["aqua_enqueue_moves", "aqua_copy_pages", *["aqua_attention"] * LAYERS]
    assert all(is_in_place(line) for line in found)
    # Each takes the pool of the one before, and nobody copies it in between.
    for before, after in zip(found, found[1:], strict=False):
        result = re.search(r"(%\d+)", before)[1]
        assert re.search(rf"@aqua_\w+\({result}(#0)?,", after), (before, after)
    table = "tensor<2x8xi32>"
    assert all((table in line) == (spaces is not None) for line in found)
    assert "layer = 2 : i64" in found[-1]
    assert f"deterministic = {str(deterministic).lower()}" in found[-1]


def test_the_step_of_several_devices_lowers(for_cuda):
    """The same calls on each one's heads; sums meet twice a layer and once for the embedding."""
    model = ModelConfig("llama", 512, 256, 512, LAYERS, 4, 2, 64, 1024)
    shards = Shards(model, 2)
    graphdef, shapes = abstract_decoder(shards.part, jnp.bfloat16)
    params = {
        name: jax.ShapeDtypeStruct(
            shape.shape if shards.cuts(name) is None else (2 * shape.shape[0], *shape.shape[1:]),
            shape.dtype, sharding=shards.sharding(shards.spec(name)),
        )
        for name, shape in shapes.items()
    }
    kv = jax.ShapeDtypeStruct(
        (32, LAYERS, 2, 16, 2, 64), jnp.bfloat16, sharding=shards.sharding(HEADS)
    )
    buckets = BucketTable.build(TOKENS, SEQUENCES, deterministic=False, skips_padding=False)
    spec = StepSpec(SEQUENCES, 64, buckets, 1024, False, False, "ffi", 64, MOVES)
    function, args, donated = Programs(graphdef, params, kv, spec, shards=shards)._program(
        ("forward", TOKENS)
    )
    module = exported(function, *args, donate=donated)
    found = calls(module)
    names = [re.search(r"@(aqua_\w+)", line)[1] for line in found]
    assert names == ["aqua_enqueue_moves", "aqua_copy_pages", *["aqua_attention"] * LAYERS]
    assert all(is_in_place(line) and "tensor<32x3x2x16x1x64xbf16>" in line for line in found)
    assert module.count("all_reduce") >= 2 * LAYERS + 1


def test_shapes_without_a_kernel_fall_back(for_cuda):
    def attention(dim, dtype, implementation=None):
        case = make_case(np.random.default_rng(0), [1], [20], dim=dim, kv_dtype=dtype)

        def step(kv, q, k, v, meta):
            return paged_attention(
                kv, q, k, v, meta, layer=0, scale=1.0, implementation=implementation
            )

        return exported(step, case.kv, case.q, case.k, case.v, case.meta)

    assert len(calls(attention(64, BF16))) == 1
    assert len(calls(attention(8, np.float16))) == 1
    assert len(calls(attention(20, np.float32))) == 1
    for dim, dtype in ((20, BF16), (5, np.float32), (320, BF16)):
        assert not calls(attention(dim, dtype))
        with pytest.raises(RuntimeError, match="no kernel for a pool"):
            attention(dim, dtype, "ffi")
    kv = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    for copies, found in ((4096, 1), (4097, 0)):
        ids = jax.ShapeDtypeStruct((copies,), jnp.int32)
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        assert len(calls(exported(copy_pages, kv, ids, ids, count))) == found


def test_the_workspace_does_not_grow_with_the_context(for_cuda):
    """It is bounded by sequences and heads: long tables cost nothing, nor does a larger pool."""
    sizes = {}
    for length in (100, 5000):
        case = make_case(np.random.default_rng(0), [1, 1], [length, 30], kv_dtype=BF16)

        def step(kv, q, k, v, meta):
            return paged_attention(kv, q, k, v, meta, layer=0, scale=1.0)

        (line,) = calls(exported(step, case.kv, case.q, case.k, case.v, case.meta))
        sizes[length] = int(re.findall(r"tensor<(\d+)xui8>", line)[0])
    assert sizes[100] == sizes[5000] < 16 << 20
