"""The OpenAPI document of the ingress: its own routes, its errors, and the main fields of engine requests. Pure."""

from __future__ import annotations

from typing import Any

from sllm_vllm import __version__
from sllm_vllm.router.http.admission import MODEL_CHARS_MAX
from sllm_vllm.router.http.errors import is_anthropic

Schema = dict[str, Any]

_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MODEL_CHARS_MAX}
_NAME_OR_NONE: Schema = {
    "anyOf": [_NAME, {"type": "null"}],
    "description": "may be omitted if exactly one model is served",
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {
                    "type": ["string", "integer", "null"],
                    "description": "a number in errors of the engines themselves",
                },
            },
        }
    },
}
_MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "root", "max_model_len"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "root": {
            "type": "string",
            "description": "the model's source; if that is a path, its name instead, unless `server.show_paths` is set",
        },
        "max_model_len": {"type": ["integer", "null"], "description": "null until an engine of the model has run"},
    },
}
_ANTHROPIC_ERROR: Schema = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_MODELS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}
_READY: Schema = {"type": "object", "required": ["ready"], "properties": {"ready": {"type": "boolean"}}}
_ERRORS = {
    "400": "the request is malformed",
    "401": "the key is missing or wrong",
    "404": "there is no such model or path",
    "405": "the method is not allowed",
    "408": "the body took too long",
    "413": "the body is too large",
    "415": "the content type of the body is not supported",
    "429": "the queue is full",
    "500": "the router failed",
    "502": "the engine failed",
    "503": "no replica is available",
    "504": "the request timed out",
}
_PROMPTS: dict[str, Schema] = {
    "/v1/chat/completions": {"messages": {"type": "array", "items": {"type": "object"}}},
    "/v1/completions": {"prompt": {}},
    "/v1/embeddings": {"input": {}},
    "/v1/messages": {"messages": {"type": "array", "items": {"type": "object"}}, "max_tokens": {"type": "integer"}},
    "/v1/responses": {"input": {}},
    "/v1/rerank": {"query": {}, "documents": {}},
    "/v1/score": {"text_1": {}, "text_2": {}},
    "/classify": {"input": {}},
    "/detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
    "/pooling": {"input": {}},
    "/rerank": {"query": {}, "documents": {}},
    "/score": {"text_1": {}, "text_2": {}},
    "/tokenize": {"prompt": {}},
    "/v2/rerank": {"query": {}, "documents": {}},
}
"""The engine paths that are documented, with fields of their bodies. More paths below /v1/ are passed on."""


def openapi_document() -> Schema:
    """Build the whole document."""
    model_parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    own = {
        "/health": _get("Whether this process is healthy", {}, is_open=True),
        "/ready": _get(
            "Whether the router is ready for requests", _READY, is_open=True, extra={"503": _json("not yet", _READY)}
        ),
        "/openapi.json": _get("This document", {"type": "object"}, is_open=True),
        "/v1/models": _get("The models that are served", {"$ref": "#/components/schemas/Models"}),
        "/v1/models/{model}": {
            **_get("One model", {"$ref": "#/components/schemas/Model"}),
            "parameters": [model_parameter],
        },
    }
    engines = {path: _post(path, properties) for path, properties in _PROMPTS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sllm-vllm", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": own | engines,
        "components": {
            "schemas": {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR, "Model": _MODEL, "Models": _MODELS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _get(summary: str, schema: Schema, *, is_open: bool = False, extra: Schema | None = None) -> Schema:
    refusals = {} if is_open else _errors("401", "404")
    operation: Schema = {"summary": summary, "responses": {"200": _json(summary, schema), **refusals, **(extra or {})}}
    if is_open:
        operation["security"] = []
    return {"get": operation}


def _post(path: str, properties: Schema) -> Schema:
    body = {
        "type": "object",
        "properties": {"model": _NAME_OR_NONE, "stream": {"type": "boolean"}, **properties},
    }
    answer = {
        "description": "the engine's answer, unchanged",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
    return {
        "post": {
            "summary": "Ask an engine that serves the model",
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": answer, **_errors(*_ERRORS, name=_error_name(path))},
        }
    }


def _error_name(path: str) -> str:
    return "AnthropicError" if is_anthropic(path) else "Error"


def _errors(*statuses: str, name: str = "Error") -> Schema:
    return {status: _json(_ERRORS[status], {"$ref": f"#/components/schemas/{name}"}) for status in statuses}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
