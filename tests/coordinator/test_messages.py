"""The committed message classes are what the .proto says."""

import subprocess
import sys

from aqua_jax.coordinator import messages_pb2
from scripts import messages


def test_the_generated_code_is_up_to_date(tmp_path):
    """Compilers differ in comments and version checks; the descriptor is what counts."""
    messages.make(tmp_path)
    file = tmp_path / messages.SOURCE.replace(".proto", "_pb2.py")
    code = "import runpy, sys; sys.stdout.buffer.write(runpy.run_path(sys.argv[1])"
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}['DESCRIPTOR'].serialized_pb)", str(file)],
        capture_output=True, check=True,
    ).stdout
    assert made == messages_pb2.DESCRIPTOR.serialized_pb, "run scripts/messages.py"


def test_the_stubs_know_every_field():
    stubs = (messages.ROOT / messages.SOURCE.replace(".proto", "_pb2.pyi")).read_text()
    for name, message in messages_pb2.DESCRIPTOR.message_types_by_name.items():
        start = stubs.index(f"class {name}(")
        for field in message.fields_by_name:
            assert f"    {field}: " in stubs[start : stubs.index("def __init__", start)], name
