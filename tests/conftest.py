"""What every test shares: a CPU backend, fixed seeds, and the choice of what can be collected."""

from __future__ import annotations

import gc
import importlib.util
import os
import pathlib
import random
import shutil
import signal

# Before jax is first imported: tests run on the CPU wherever they are, and never write to
# the user's compile cache. A shared one halves a second run.
ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XDG_CACHE_HOME", str(ROOT / ".pytest_cache" / "xdg"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For tests of several devices. The others use the first one and run as fast.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

# A shell's background jobs ignore Ctrl-C, and so would every process that a test sends one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.scale import scaled  # noqa: E402
from tests.tiny import write_config  # noqa: E402

SCALE = scaled(1)
HAVE_TORCH = importlib.util.find_spec("torch") is not None
# Whether the CUDA library is there or should be; `AQUA_REQUIRE_CUDA=1` insists.
HAVE_CUDA_BUILD = (
    os.environ.get("AQUA_REQUIRE_CUDA") == "1" or shutil.which("nvcc") is not None
    or (ROOT / "aqua_jax" / "_lib" / "libaqua_cuda.so").exists()
)

# Seeded in the ordinary suite, so that a red run is red again; free to search in the long one.
hypothesis.settings.register_profile(
    "aqua",
    max_examples=scaled(50),
    deadline=None,
    derandomize=SCALE == 1,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("aqua")


def pytest_report_header() -> list[str]:
    """Say what was left out, and how to have it in."""
    if HAVE_TORCH:
        lines = [f"aqua_jax: parity tests on (torch found), scale {SCALE}"]
    else:
        lines = [
            f"aqua_jax: scale {SCALE}; parity tests NOT collected, for torch is not installed "
            "(pip install torch==2.13.0)"
        ]
    if not HAVE_CUDA_BUILD:
        lines.append(
            "aqua_jax: tests of the CUDA build NOT collected, for nvcc was not found "
            "(AQUA_REQUIRE_CUDA=1 makes that an error)"
        )
    return lines


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """Leave tests/parity out where torch is missing (its modules import it at the top).

    And the tests of the CUDA build where there is no CUDA compiler.
    """
    parity = ROOT / "tests" / "parity"
    if not HAVE_TORCH and (collection_path == parity or parity in collection_path.parents):
        return True
    needs_build = ("test_cuda_build.py", "test_cuda_interfaces.py", "test_cuda_traits.py")
    if not HAVE_CUDA_BUILD and collection_path.name in needs_build:
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What lies in tests/parity carries the marker `parity`, the rest only where it says so."""
    parity = ROOT / "tests" / "parity"
    for item in items:
        if parity in item.path.parents:
            item.add_marker("parity")
    if HAVE_TORCH:
        return
    left_out = [item for item in items if item.get_closest_marker("parity")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("parity")]


def pytest_collection_finish() -> None:
    """What was imported for the tests lives as long as they do; the garbage collector needn't look
    at it again. With torch and jax there, every full collection took 0.4 s, and each test that
    proves that nothing is left asks for two."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The global generators start the same for every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of the test's own."""
    return np.random.default_rng(0)


@pytest.fixture
def tiny_model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory that `EngineConfig(model=..., load_format="dummy")` takes: 2 layers of 48."""
    return write_config(tmp_path / "tiny")
