"""What the CUDA handlers tell XLA about themselves: which may be part of a command buffer."""

from __future__ import annotations

import os
import shutil
import subprocess

import jax
import pytest

from tests.ops.test_cuda_build import LIBRARY

# Asks as XLA does when it decides what to capture: a call that only carries a metadata extension.
ASK = r"""
#include <dlfcn.h>
#include <cstdio>
#include <cstring>
#include "xla/ffi/api/c_api.h"

int main(int argc, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  for (int i = 2; i < argc; ++i) {
    auto* handler = reinterpret_cast<XLA_FFI_Error* (*)(XLA_FFI_CallFrame*)>(
        dlsym(library, argv[i]));
    if (handler == nullptr) return std::fprintf(stderr, "no %s\n", argv[i]), 1;
    XLA_FFI_Metadata metadata;
    XLA_FFI_Metadata_Extension extension;
    XLA_FFI_CallFrame frame;
    std::memset(&metadata, 0, sizeof(metadata));
    std::memset(&extension, 0, sizeof(extension));
    std::memset(&frame, 0, sizeof(frame));
    metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
    metadata.api_version.struct_size = sizeof(metadata.api_version);
    extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
    extension.extension_base.type = XLA_FFI_Extension_Metadata;
    extension.metadata = &metadata;
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.extension_start = &extension.extension_base;
    if (handler(&frame) != nullptr) return std::fprintf(stderr, "%s failed\n", argv[i]), 1;
    std::printf("%s %d\n", argv[i],
                (metadata.traits & XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE) != 0);
  }
}
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """The program, compiled."""
    folder = tmp_path_factory.mktemp("traits")
    (folder / "ask.cc").write_text(ASK)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    subprocess.run(
        [compiler, "-std=c++17", "-isystem", jax.ffi.include_dir(), str(folder / "ask.cc"),
         "-ldl", "-o", str(folder / "ask")],
        check=True, timeout=120,
    )
    return folder / "ask"


def test_what_may_be_captured(ask):
    """Attention and page copies, which are the decode step's own; not the hand-over of moves."""
    done = subprocess.run(
        [ask, LIBRARY, "AquaAttention", "AquaCopyPages", "AquaEnqueueMoves"],
        capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "AquaAttention", "1", "AquaCopyPages", "1", "AquaEnqueueMoves", "0"
    ]
