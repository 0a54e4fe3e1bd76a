"""Calls across languages, against the headers that declare them: what only a GPU would execute.

A wrong number, size or type there shows on a machine with a GPU and nowhere else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from aqua_jax.ops import device_arena, library, pinning, segments

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADERS = ("ffi/cuda/arena.h", "ffi/cuda/pinned.h", "ffi/cuda/preload.h")
BODIES = ("ffi/common/moves_api.cc", "ffi/cuda/moves.cc")
POINTER, TEXT = "pointer", "text"
C_TYPES = {
    "void": None, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
}


def kind(declared: str) -> object:
    """A C type as compared: a number's, or that it is a pointer."""
    words = declared.replace("const", " ").split()
    if "*" in declared or "[" in declared:
        return TEXT if words[0].startswith("char") else POINTER
    return C_TYPES[words[0]]


def python_kind(declared: object) -> object:
    """A ctypes type as compared."""
    if declared is ctypes.c_char_p:
        return TEXT
    points = declared is ctypes.c_void_p or (
        isinstance(declared, type) and issubclass(declared, ctypes._Pointer)
    )
    return POINTER if points else declared


def declared_in_c() -> dict[str, tuple[object, list[object]]]:
    """Our functions that Python may call: result, arguments."""
    found = {}
    for name in (*HEADERS, *BODIES):
        text = re.sub(r"//[^\n]*", "", (ROOT / name).read_text())
        text = text[text.index('extern "C"'):]
        for result, function, inside in re.findall(
            r"((?:const )?\w+\*?)\s+(aqua_\w+)\(([^)]*)\)\s*[;{]", text
        ):
            arguments = [part.strip() for part in inside.split(",") if part.strip()]
            found[function] = (kind(result), [kind(one) for one in arguments])
    return found


@pytest.fixture(scope="module")
def bound() -> ctypes.CDLL:
    """The CUDA library with every function declared to ctypes; no driver is needed."""
    with library.lowering_for("cuda"):
        symbols = library.symbols()
        assert symbols is not None, library.reason()
        segments.declare(symbols)
        pinning._native.__wrapped__()
    device_arena._native()
    return symbols


def test_python_calls_our_functions_as_c_has_them(bound):
    text = "\n".join(path.read_text() for path in (ROOT / "aqua_jax").rglob("*.py"))
    called = set(re.findall(r"\.(aqua_\w+)\(", text)) - {"aqua_isa"}  # the CPU's alone
    declared = declared_in_c()
    assert len(called) > 20 and called <= set(declared)
    for name in sorted(called):
        function = getattr(bound, name)
        assert function.argtypes is not None, f"{name}: ctypes would guess"
        result = function.restype
        shown = (python_kind(result), [python_kind(one) for one in function.argtypes])
        assert shown == declared[name], name


def cxx(folder: pathlib.Path, text: str, *includes: pathlib.Path) -> str:
    """What a C++ program prints."""
    source, program = folder / "program.cc", folder / "program"
    source.write_text(text)
    flags = [flag for path in includes for flag in ("-isystem", str(path))]
    compiler = os.environ.get("CXX", "c++")
    done = subprocess.run(
        [compiler, "-std=c++17", "-I", str(ROOT), *flags, str(source), "-o", str(program)],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout


def cuda_headers() -> pathlib.Path:
    """Where the compiler's cuda.h is."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    assert compiler is not None, "there is no nvcc"
    said = subprocess.run(
        [compiler, "-E", "-x", "cu", "-", "--dryrun"], input="", capture_output=True, text=True
    ).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    assert found is not None, said
    return pathlib.Path(found[1].strip()) / "include"


def driver_calls() -> dict[str, list[type]]:
    """Those of scripts/gpu_driver.py."""
    spec = importlib.util.spec_from_file_location("gpu_driver", ROOT / "scripts/gpu_driver.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CALLS


def test_the_driver_is_called_as_cuda_h_has_it(tmp_path):
    """Number of arguments, and of each its size and whether it is a pointer."""
    calls = driver_calls()
    source = (ROOT / "scripts/gpu_driver.py").read_text()
    used = set(re.findall(r'_call\("(\w+)"', source)) | set(re.findall(r"_lib\.(\w+)\(", source))
    assert used == set(calls)
    shows = "\n".join(f'  show("{name}", static_cast<decltype(&{name})>(nullptr));'
                      for name in calls)
    said = cxx(tmp_path, f"""
        #include <cuda.h>
        #include <cstdio>
        #include <type_traits>
        template <typename R, typename... A> void show(const char* name, R (*)(A...)) {{
          std::printf("%s %zu", name, sizeof(R));
          (std::printf(" %zu%s", sizeof(A), std::is_pointer_v<A> ? "*" : ""), ...);
          std::puts("");
        }}
        int main() {{ {shows} }}
    """, cuda_headers())
    pointers = (ctypes._Pointer, ctypes.c_void_p, ctypes.c_char_p)
    for line in said.splitlines():
        name, result, *arguments = line.split()
        assert int(result) == ctypes.sizeof(ctypes.c_int)
        assert arguments == [
            f"{ctypes.sizeof(one)}{'*' if issubclass(one, pointers) else ''}"
            for one in calls[name]
        ], name
    assert len(said.splitlines()) == len(calls)


def nvml_headers() -> pathlib.Path:
    """Where nvml.h is: PyPI's nvidia-nvml-dev, for it doesn't come with the compiler."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for folder in folders for path in pathlib.Path(folder).rglob("nvml.h")]
    assert found, f"{sys.executable} has no nvml.h: pip install nvidia-nvml-dev"
    return found[0].parent


def test_what_we_know_of_nvml_is_what_its_header_says(tmp_path):
    source = (ROOT / "ffi/cuda/topology.cc").read_text()
    used = re.findall(r"int \(\*(\w+)\)\(([^)]*)\)", source)
    by_field = {
        field: name for name, field in re.findall(r'"(nvml\w+)", &n\.(\w+)\)', source)
    }
    assert len(used) == len(by_field) == 10
    asserts = []
    for field, inside in used:
        count = len([part for part in inside.split(",") if part.strip()])
        asserts.append(f"  same<{count}>(static_cast<decltype(&{by_field[field]})>(nullptr), "
                       f"static_cast<int (*)({inside})>(nullptr));")
    same = "\n".join(asserts)
    cxx(tmp_path, f"""
        #include <nvml.h>
        #include <cstddef>
        #include <type_traits>
        #include "ffi/cuda/nvml.h"
        using namespace aqua::cuda;
        using Device = NvmlDevice;
        using Pci = NvmlPci;
        template <typename T, typename = void> constexpr size_t size = 0;  // not known
        template <typename T>
        constexpr size_t size<T, std::void_t<decltype(sizeof(T))>> = sizeof(T);
        template <typename T, typename U> constexpr bool alike() {{
          return sizeof(T) == sizeof(U) && std::is_pointer_v<T> == std::is_pointer_v<U> &&
                 size<std::remove_pointer_t<T>> == size<std::remove_pointer_t<U>>;
        }}
        template <int N, typename R, typename... A, typename... B>
        void same(R (*)(A...), int (*)(B...)) {{
          static_assert(sizeof...(A) == N && sizeof...(B) == N && sizeof(R) == sizeof(int));
          static_assert((alike<A, B>() && ...));
        }}
        static_assert(sizeof(NvmlPci) == sizeof(nvmlPciInfo_t));
        static_assert(offsetof(NvmlPci, domain) == offsetof(nvmlPciInfo_t, domain));
        static_assert(offsetof(NvmlPci, bus) == offsetof(nvmlPciInfo_t, bus));
        static_assert(offsetof(NvmlPci, device) == offsetof(nvmlPciInfo_t, device));
        static_assert(offsetof(NvmlPci, name) == offsetof(nvmlPciInfo_t, busId));
        static_assert(kNvmlSuccess == NVML_SUCCESS && kMostLinks == NVML_NVLINK_MAX_LINKS);
        static_assert(int(kP2pNvlink) == int(NVML_P2P_CAPS_INDEX_NVLINK));
        static_assert(int(kP2pOk) == int(NVML_P2P_STATUS_OK));
        static_assert(int(kRemoteGpu) == int(NVML_NVLINK_DEVICE_TYPE_GPU));
        static_assert(int(kNvlink20) == int(NVML_NVLINK_VERSION_2_0));
        static_assert(int(kNvlink50) == int(NVML_NVLINK_VERSION_5_0));
        void check() {{ {same} }}
        int main() {{}}
    """, nvml_headers())


@pytest.mark.parametrize(("version", "mb_s"), [
    (1, 20_000), (2, 25_000), (3, 25_000), (4, 25_000), (5, 25_000),  # Pascal to Ampere
    (6, 25_000),  # 4.0, Hopper: 18 of them are the 450 GB/s one way of its data sheet
    (7, 50_000),  # 5.0, Blackwell
])
def test_speed_of_a_link_by_nvmls_number_of_its_version(bound, version, mb_s):
    bound.aqua_nvlink_speed.restype = ctypes.c_int64
    bound.aqua_nvlink_speed.argtypes = [ctypes.c_uint32]
    assert bound.aqua_nvlink_speed(version) == mb_s
