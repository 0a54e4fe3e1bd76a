"""The page at /: one file without outside resources, and a policy that lets it load none."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from starlette.responses import Response


def page() -> Response:
    """The page. It shows what `/debug/state` says, with the reader's own key where one is asked
    for, so it is open to everybody itself."""
    text = importlib.resources.files("aqua_jax.server").joinpath("page.html").read_text("utf-8")
    found = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert found is not None
    script = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    )
    return Response(text, media_type="text/html", headers={
        "content-security-policy": policy, "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    })
