"""Makes aqua_jax/coordinator/messages_pb2.py and .pyi from messages.proto.

Needs grpcio-tools (the extra `test`). Code made by an older release runs with newer runtimes, not
the other way round: use the oldest that should be supported.
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Its whole path is its name among all messages of a process.
SOURCE = "aqua_jax/coordinator/messages.proto"


def make(root: pathlib.Path) -> None:
    """Writes both files below `root`, an existing folder.

    Raises:
      RuntimeError: the compiler has found errors, which it has printed.
    """
    from grpc_tools import protoc

    status = protoc.main([
        "protoc", f"--proto_path={ROOT}", f"--python_out={root}", f"--pyi_out={root}", SOURCE,
    ])
    if status:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    make(ROOT)
    sys.exit(0)
