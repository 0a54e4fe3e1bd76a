"""Writes answers to standard output, as text or JSON lines, finished or as they grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from aqua_jax.batch.lines import json_line
from aqua_jax.batch.records import logprobs_json, metrics_json, sample_json
from aqua_jax.engine.outputs import RequestOutput


def answer_records(index: int, output: RequestOutput) -> list[dict[str, Any]]:
    """The JSON objects of one answered prompt: one for each sample.

    Args:
      index: of the prompt.
      output: finished.
    """
    records = []
    for sample in output.outputs:
        said = sample_json(sample)
        record = {
            "index": index,
            "prompt": output.prompt,
            "prompt_token_ids": list(output.prompt_token_ids),
            **said,
            "metrics": metrics_json(output.metrics),
        }
        if len(output.outputs) > 1:
            record["sample"] = sample.index
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = logprobs_json(output.prompt_logprobs)
        if output.error is not None:
            record["error"] = output.error
        records.append(record)
    return records


class JsonSink:
    """One object a line; in the prompts' order, or as they finish."""

    def __init__(self, file: TextIO, count: int, ordered: bool):
        self._file, self._ordered = file, ordered
        self._waiting: dict[int, RequestOutput] = {}
        self._next, self._count = 0, count

    def update(self, index: int, output: RequestOutput) -> None:
        """Takes in the state of prompt `index`."""
        if not output.finished:
            return
        if not self._ordered:
            self._write(index, output)
            return
        self._waiting[index] = output
        while self._next in self._waiting:
            self._write(self._next, self._waiting.pop(self._next))
            self._next += 1

    def _write(self, index: int, output: RequestOutput) -> None:
        for record in answer_records(index, output):
            self._file.write(json_line(record))
        self._file.flush()

    def close(self) -> None:
        """Everything has been written already."""


class TextSink:
    """Text for people. One prompt: its answer alone. Several: a heading before each."""

    def __init__(self, file: TextIO, labels: Sequence[str], samples: int, stream: bool):
        """
        Args:
          file: where to.
          labels: the prompts, shortened, for headings.
          samples: answers per prompt.
          stream: write text as it grows (of the first unfinished prompt; later ones wait).
        """
        self._file, self._labels, self._stream = file, labels, stream
        self._samples = samples
        self._state: dict[int, RequestOutput] = {}
        self._head = 0  # the prompt being written
        self._sample = 0  # its sample being written
        self._written = 0  # characters of that
        self._headed = False

    def update(self, index: int, output: RequestOutput) -> None:
        """Takes in the state of prompt `index` and writes what can be written in order."""
        self._state[index] = output
        while self._head in self._state and self._advance(self._state[self._head]):
            del self._state[self._head]
            self._head += 1

    def _advance(self, output: RequestOutput) -> bool:
        """Writes what is new of the head; returns whether it is complete."""
        while self._sample < len(output.outputs):
            sample = output.outputs[self._sample]
            if not (self._stream or sample.finished):
                return False
            self._heading()
            self._file.write(sample.text[self._written :])
            self._written = len(sample.text)
            if not sample.finished:
                self._file.flush()
                return False
            self._file.write("\n")
            self._sample, self._written, self._headed = self._sample + 1, 0, False
        if not output.finished:
            return False
        self._file.flush()
        self._sample = 0
        return True

    def _heading(self) -> None:
        if self._headed or len(self._labels) * self._samples == 1:
            return
        self._headed = True
        first = self._head == 0 and self._sample == 0
        name = f"[{self._head + 1}/{len(self._labels)}] {self._labels[self._head]}"
        if self._samples > 1:
            name += f" (answer {self._sample + 1} of {self._samples})"
        self._file.write(("" if first else "\n") + name + "\n")

    def close(self) -> None:
        """Everything has been written already."""
