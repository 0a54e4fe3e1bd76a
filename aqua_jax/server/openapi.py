"""The server's own OpenAPI document, from the tables that check requests."""

from __future__ import annotations

from typing import Any

from aqua_jax.server import fields

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_REFUSALS = {
    "400": "a field is invalid; `param` names it",
    "401": "no key, or an unknown one",
    "404": "no such model",
    "408": "the body didn't arrive in time",
    "413": "the body is too long",
    "415": "the body isn't declared as JSON",
    "429": "the queue is full; `Retry-After` says when to come back",
    "500": "the engine failed",
    "503": "the server is shutting down",
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _body(known: dict[str, Any], required: str) -> dict[str, Any]:
    properties = {
        name: schema if name == required else _nullable(schema) for name, schema in known.items()
    }
    for name, values in fields.NEUTRAL.items():
        properties[name] = _nullable({"enum": list(values)})
    for name in sorted(fields.IGNORED):
        properties[name] = {}
    properties[fields.USER_ALIAS] = _nullable({"type": "string"})
    return {
        "type": "object", "properties": properties, "required": [required],
        "additionalProperties": False,
    }


def _post(summary: str, known: dict[str, Any], required: str) -> dict[str, Any]:
    refusals = {
        status: {"description": text, "content": _json({"$ref": "#/components/schemas/Error"})}
        for status, text in _REFUSALS.items()
    }
    answer = {"type": "object", "required": ["id", "object", "created", "model", "choices"]}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_body(known, required))},
        "responses": {
            "200": {
                "description": "the answer; with stream: true, server-sent events",
                "content": {
                    **_json(answer), "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **refusals,
        },
    }


def _get(summary: str, kind: str = "application/json") -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": {kind: {}}},
            "400": {"description": _REFUSALS["400"]},
            "401": {"description": _REFUSALS["401"]},
            "404": {"description": "not found"},
            "503": {"description": "the engine has stopped, or the server is shutting down"},
        },
    }


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of every endpoint."""
    model = _get("One model")
    model["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    state = _get("Live requests, and where their pages are")
    state["parameters"] = [{
        "name": "since", "in": "query", "schema": {"type": "integer", "minimum": 0},
        "description": "the version seen last: only what has changed since is sent",
    }]
    return {
        "openapi": "3.1.0",
        "info": {"title": "aqua-jax", "version": version},
        "paths": {
            "/v1/completions": {
                "post": _post("Completes prompts", fields.COMPLETION, "prompt")
            },
            "/v1/chat/completions": {
                "post": _post("Answers a conversation", fields.CHAT, "messages")
            },
            "/v1/models": {"get": _get("The models served: one")},
            "/v1/models/{model}": {"get": model},
            "/health": {"get": _get("Whether requests are answered")},
            "/metrics": {"get": _get("Prometheus metrics", "text/plain")},
            "/debug/state": {"get": state},
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
