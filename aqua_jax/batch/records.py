"""Answers as JSON records: our own dialect's, and what every error record says. No jax."""

from __future__ import annotations

from typing import Any

from aqua_jax.batch import dialect, openai
from aqua_jax.batch.requests import OWN, BatchRequest, RequestId
from aqua_jax.engine.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from aqua_jax.errors import RequestError

_LONGEST_VALUE = 200  # characters of a bad value that an error record repeats


def logprobs_json(tables: list[TokenLogprobs] | list[TokenLogprobs | None] | None) -> Any:
    """Log probabilities as vLLM's server writes them: per token, {id: {logprob, rank, token}}."""
    if tables is None:
        return None
    return [
        None if table is None else {
            str(token): {
                "logprob": dialect.finite(one.logprob), "rank": one.rank,
                "decoded_token": one.decoded_token,
            }
            for token, one in table.items()
        }
        for table in tables
    ]


def metrics_json(metrics: RequestMetrics) -> dict[str, float | None]:
    """Time to first token, mean time per later token, and whole time, in seconds."""
    return {"ttft_s": metrics.ttft_s, "tpot_s": metrics.tpot_s, "e2e_s": metrics.e2e_s}


def sample_json(sample: CompletionOutput) -> dict[str, Any]:
    """What one sample says."""
    return {
        "token_ids": list(sample.token_ids),
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "logprobs": logprobs_json(sample.logprobs),
    }


def success_record(request: BatchRequest, output: RequestOutput, model: str) -> dict[str, Any]:
    """The record of an answered request, in its own dialect.

    Our dialect: the first sample's fields stand in the record itself; with n > 1 `outputs` has all.
    """
    if request.dialect != OWN:
        return openai.success_record(request, output, model)
    record: dict[str, Any] = {"id": request.id, **sample_json(output.outputs[0])}
    if len(output.outputs) > 1:
        record["outputs"] = [
            {"index": sample.index, **sample_json(sample)} for sample in output.outputs
        ]
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = logprobs_json(output.prompt_logprobs)
    record["usage"] = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(sample.token_ids) for sample in output.outputs),
    }
    record["metrics"] = metrics_json(output.metrics)
    return record


def _json_value(value: Any) -> Any:
    """A bad value, short and certainly writable as JSON."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def error_record(
    key: RequestId | None, line: int, error: RequestError, openai_dialect: bool
) -> dict[str, Any]:
    """The record of a bad line.

    Args:
      key: its id; None when it has none of its own (unreadable, or a duplicate).
      line: its number in the input.
      error: what is wrong.
      openai_dialect: which dialect to answer in.
    """
    details = {
        "line": line, "field": error.field, "value": _json_value(error.value),
        "allowed": error.allowed,
    }
    details["message"] = (
        f"line {line}, {error.field}: got {details['value']!r}; allowed: {error.allowed}"
    )
    if openai_dialect:
        return openai.error_record(key, line, details, 400)
    return {"id": key, "error": details}


def failure_record(request: BatchRequest, reason: str) -> dict[str, Any]:
    """The record of a good request that the engine couldn't answer."""
    details = {
        "line": request.line, "field": None, "value": None, "allowed": None,
        "message": f"line {request.line}: {reason}",
    }
    if request.dialect != OWN:
        return openai.error_record(request.id, request.line, details, 500)
    return {"id": request.id, "error": details}
