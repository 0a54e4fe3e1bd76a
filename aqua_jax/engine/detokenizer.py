"""Tokens to text as they come: whole characters only, ended by stop strings wherever tokens split.

Three layers. A *decoder* (token_text.py) turns token ids into settled text: text that no later
token can change. A *matcher* per stop string (Knuth, Morris and Pratt's automaton) sees that text
character by character, so the answer doesn't depend on how the text was cut into tokens.
`Detokenizer` joins them and holds back what may yet turn out to be the beginning of a stop string.
Work per token is constant, amortised; the text of all deltas together equals
`tokenizer.decode(all tokens)`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from aqua_jax.config import SamplingParams
from aqua_jax.engine.token_text import make_decoder


@functools.lru_cache(maxsize=4096)
def _failures(pattern: str) -> tuple[int, ...]:
    """For each length of matched prefix, the next shorter prefix that also ends there."""
    table = [0] * (len(pattern) + 1)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = table[length]
        if pattern[position] == pattern[length]:
            length += 1
        table[position + 1] = length
    return tuple(table)


class StopMatcher:
    """Finds whichever of several strings is completed first in a stream of characters.

    Of strings completed by the same character the longest wins. Constant time per character and
    string (amortised), no text kept.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _failures(stop)) for stop in dict.fromkeys(stops)]
        self._states = [0] * len(self._stops)

    @property
    def pending(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(self._states, default=0)

    def feed(self, text: str, armed: bool = True) -> tuple[int, str] | None:
        """Reads on.

        Args:
          text: the next characters.
          armed: whether a string completed within `text` counts.

        Returns:
          (characters of `text` up to the end of the match, the string matched), or None.
        """
        for position, character in enumerate(text):
            found = None
            for index, (stop, failures) in enumerate(self._stops):
                state = self._states[index]
                while state and (state == len(stop) or stop[state] != character):
                    state = failures[state]
                if stop[state] == character:
                    state += 1
                if state == len(stop) and (found is None or len(stop) > len(found)):
                    found = stop
                self._states[index] = state
            if found is not None and armed:
                return position + 1, found
        if not armed:
            # A completed string that didn't count is no beginning of one any more.
            self._states = [
                failures[state] if state == len(stop) else state
                for state, (stop, failures) in zip(self._states, self._stops, strict=True)
            ]
        return None


class Detokenizer:
    """The text of one sample, growing token by token.

    Attributes:
      text: what may be shown: settled, free of stop strings and of their possible beginnings.
      stop_reason: the stop string that ended the text, or None.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams):
        """
        Args:
          tokenizer: the model's (see `aqua_jax.loading.Tokenizer`).
          params: uses `stop`, `include_stop_str_in_output`, `min_tokens`, `skip_special_tokens`.
        """
        self.text = ""
        self.stop_reason: str | None = None
        self._decoder = make_decoder(tokenizer, params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = ""  # settled, but maybe the beginning of a stop string

    def append(self, token_id: int) -> str | None:
        """Adds one token.

        A stop string counts when the token that completes it is not among the first `min_tokens`
        (vLLM's rule).

        Returns:
          The stop string this token completed (the text then ends before it, or with it if
          `include_stop_str_in_output`; further tokens are ignored), or None.
        """
        if self.stop_reason is not None:
            return self.stop_reason
        self._num_tokens += 1
        return self._extend(self._decoder.push(token_id), self._num_tokens > self._min_tokens)

    def finish(self) -> str | None:
        """No token follows: shows what was held back.

        Returns:
          The stop string completed by the very last characters (an unfinished character becomes
          U+FFFD only now), or None.
        """
        if self.stop_reason is not None:
            return self.stop_reason
        stop = self._extend(self._decoder.flush(), self._num_tokens > self._min_tokens)
        if stop is None:
            self.text += self._held
            self._held = ""
        return stop

    def _extend(self, new: str, armed: bool) -> str | None:
        if self._matcher is None:
            self.text += new
            return None
        match = self._matcher.feed(new, armed)
        unshown = self._held + new
        if match is not None:
            end, stop = match
            end += len(self._held)
            self.text += unshown[: end if self._include_stop else end - len(stop)]
            self._held = ""
            self.stop_reason = stop
            return stop
        # A stop string that will be shown anyway needs no holding back.
        shown = len(unshown) - (0 if self._include_stop else self._matcher.pending)
        self.text += unshown[:shown]
        self._held = unshown[shown:]
        return None
