"""The code in docs/aquatensor.md runs beside a lender, that of docs/coordinator.md beside both."""

import os
import re
import subprocess
import sys

from tests.coordinator.running import coordinator
from tests.faults.coordinated import lender
from tests.memory.lending import lending, new_name
from tests.packaging.test_architecture import ROOT


def test_the_code_of_the_document_runs(tmp_path):
    path = new_name()  # others may run this test now
    text = (ROOT / "docs" / "aquatensor.md").read_text(encoding="utf-8")
    text = text.replace("@aqua-docs", path)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5
    # Each in a namespace of its own: every block can be pasted alone.
    program = f"for code in {blocks!r}:\n    exec(compile(code, code[:40], 'exec'), {{}})\n"
    with lending(256 << 20, path):
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", program],
            capture_output=True, text=True, timeout=200, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not freed" not in done.stderr and "{'peer': 4000000}" in done.stdout
    was, now = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert now < was / 2
    assert "0 700 " in done.stdout


def test_the_code_about_the_coordinator_runs():
    path = new_name()
    text = (ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "/tmp/aqua.sock" in code
    with coordinator(path), lender(path, "48MiB"):
        found = {}
        exec(compile(code.replace("/tmp/aqua.sock", path), "coordinator.md", "exec"), found)
        assert found["left"] == 0 and found["loans"][0].size >= 1 << 20
        assert all(loan.closed for loan in found["loans"])
