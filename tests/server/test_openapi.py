"""Requests made up from the server's own OpenAPI document, valid and invalid: never a 5xx."""

from __future__ import annotations

import json

import hypothesis
import jsonschema_rs
import pytest
import schemathesis

from aqua_jax.server import openapi
from tests.scale import scaled
from tests.server.serving import get, serving, text_engine_config

DOCUMENT = openapi.document("0")
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A server whose model is so short that no made-up request takes long."""
    folder = tmp_path_factory.mktemp("short")
    with serving(text_engine_config(folder, max_model_len=48)) as running:
        yield running


@SCHEMA.parametrize()
@hypothesis.settings(
    max_examples=scaled(25), deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_no_request_makes_the_server_fail(case, short):
    response = case.call(base_url=short.url, timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}


def test_nothing_is_left_of_them(short):
    assert short.idle()
    assert not short.engine.stats()["requests_failed"]


def test_the_document_is_served_and_its_schemas_are_valid(short):
    served = json.loads(get(short.port, "/openapi.json")[2])
    assert served["paths"] == DOCUMENT["paths"] and served["openapi"] == "3.1.0"
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = served["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        jsonschema_rs.meta.validate(body["schema"])
        required = body["schema"]["required"][0]
        good = {"prompt": "x"} if required == "prompt" else {
            "messages": [{"role": "user", "content": "x"}]
        }
        validator = jsonschema_rs.validator_for(body["schema"])
        assert validator.is_valid({**good, "temperature": None, "n": 2})
        assert not validator.is_valid({**good, "temprature": 1})
        assert not validator.is_valid({})
