"""API keys: a file with one a line, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac

from aqua_jax.errors import ConfigError


class Keys:
    """Bearer tokens that are let in.

    Args:
      keys: as clients send them; without any, everybody is let in.
    """

    def __init__(self, keys: list[str]) -> None:
        # Digests have one length, so comparing them tells nothing about the keys'.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: str) -> Keys:
        """Keys from a file: one a line; empty lines and lines that start with # don't count.

        Raises:
          ConfigError: the file can't be read or has no key.
        """
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api_key_file", path, f"a readable text file ({error})") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError("api_key_file", path, "a file with at least one key")
        return cls(keys)

    def owner(self, authorization: str | None) -> str | None:
        """Whose key an Authorization header holds.

        Returns:
          The fairness key of requests without a `user` ("" when no keys are asked for), or None:
          not let in.
        """
        if not self._digests:
            return ""
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for number, known in enumerate(self._digests):  # all of them, wherever the match is
            if hmac.compare_digest(digest, known):
                found = f"key-{number}"
        return found if scheme.lower() == "bearer" else None
