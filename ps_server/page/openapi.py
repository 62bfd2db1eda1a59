"""The description of /api: an OpenAPI 3.1 document, and a small page that shows it. Pure.

`tests/page` checks that the documents that the page serves are as described here.
"""

from __future__ import annotations

import html
import json
from functools import cache
from typing import Any

from modelaverage import __version__
from ps_server.page.documents import COLUMNS
from ps_server.seen.marks import MarkKind

__all__ = ["api_page", "openapi_json"]

_Schema = dict[str, Any]


def _of(kind: str, meaning: str, **more: Any) -> _Schema:
    return {"type": kind, "description": meaning, **more}


def _maybe(schema: _Schema) -> _Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _object(meaning: str, optional: tuple[str, ...] = (), **fields: _Schema) -> _Schema:
    required = [name for name in fields if name not in optional]
    return _of("object", meaning, properties=fields, required=required, additionalProperties=False)


def _list(meaning: str, items: _Schema) -> _Schema:
    return _of("array", meaning, items=items)


def _at(meaning: str) -> _Schema:
    return _of("number", f"{meaning}; Unix time, in seconds")


def _s(meaning: str) -> _Schema:
    return _of("number", f"{meaning}; in seconds")


def _count(meaning: str) -> _Schema:
    return _of("integer", meaning, minimum=0)


def _loss(meaning: str) -> _Schema:
    words = f'{meaning}; "NaN", "Infinity" or "-Infinity" if it is none of the numbers that JSON has; null: none'
    return {"type": ["number", "string", "null"], "description": words}


_WORKER_ID = _of("string", "of a worker; any text, chosen by the worker")
_STATUS = _object(
    "The state of the server.",
    now_at=_at("when this was true"),
    server=_object(
        "The server.",
        version=_of("string", "of the program"),
        address=_of("string", "where workers reach it"),
        started_at=_at("when its process started"),
        first_step=_maybe(_count("the global_step at which this process began; null: there is no center yet")),
        restored=_of("boolean", "whether it began from a checkpoint"),
        shard=_object("Which part of the model it keeps.", index=_count("from 0"), count=_count("how many servers")),
    ),
    status=_of("object", "what `ps-server status --json` prints; docs/protocol.md, GetStatusResponse"),
    waiting=_list(
        "The workers that the round in progress waits for; at most 16.",
        _object(
            "One of them.",
            worker_id=_WORKER_ID,
            for_s=_s("since the first push of the round"),
            is_late=_of("boolean", "whether that is more than 5 s"),
        ),
    ),
    traffic=_object(
        "Bytes of fragments since the start, received and sent.",
        by_transport=_object(
            "By the way they took.",
            messages=_count("in messages of calls"),
            data_connection=_count("over data connections"),
            shared_memory=_count("in shared memory"),
        ),
    ),
    shards=_list(
        "This server and those of --page-shard, side by side; empty without any.",
        _object(
            "One of them.",
            address=_of("string", "where it is"),
            problem=_of("string", "why it does not answer; empty if it does"),
            away_s=_s("for how long it has not answered; 0 if it answers"),
            status={
                "type": ["object", "null"],
                "description": "as `status`, without `workers`; null: it has not answered yet, or not lately",
            },
        ),
    ),
    events=_list(
        "The last lines of the log, the newest last; at most 100.",
        _object(
            "One of them.",
            id=_count("ascending"),
            at=_at("when"),
            level=_of("string", "info, warning, error or critical"),
            name=_of("string", "of the event, as in docs/observability.md"),
            text=_of("string", "the message"),
        ),
    ),
)
_ROUND = _object(
    "One round, or `count` older rounds together.",
    ("workers", "workers_omitted", "without", "without_omitted"),
    step=_count("the global_step that the first of them started from"),
    count=_count("how many rounds"),
    began_at=_at("when the first push was admitted"),
    committed_at=_at("when the last of them committed"),
    took_s=_s("from the first push to the commit, on average"),
    waiting_s=_s("of that, waiting for pushes"),
    receiving_s=_s("of that, receiving fragments"),
    averaging_s=_s("of that, averaging"),
    received_bytes=_count("of fragments, since the round before; the sum"),
    received_raw_bytes=_count("the same before coding"),
    sent_bytes=_count("of fragments, since the round before; the sum"),
    sent_raw_bytes=_count("the same before coding"),
    loss=_loss("the mean of the losses that workers reported"),
    loss_min=_loss("the lowest"),
    loss_max=_loss("the highest"),
    nonfinite_values=_count("how many pushed values were not finite"),
    workers=_list(
        "Its workers, by length and text of their names; at most 64. Only from `detailed_from` on, like what follows.",
        _object(
            "One of them.",
            worker_id=_WORKER_ID,
            pushed_s=_s("from began_at to the admission of its push"),
            whole_s=_s("from began_at to its last fragment"),
            loss=_loss("that it reported"),
            local_step=_count("that it reported"),
            nonfinite_values=_count("how many of its values were not finite"),
        ),
    ),
    workers_omitted=_count("how many more took part"),
    without=_list("The workers that the round gave up; at most 64.", _WORKER_ID),
    without_omitted=_count("how many more it gave up"),
)
_ROUNDS = _object(
    "Past rounds. The newest 200 are kept each by itself, some 10,000 before them in groups of 2, 4, 8, 16 and 32.",
    first_step=_maybe(_count("the global_step at which this process began; null: there is no center yet")),
    next_step=_count("the global_step now"),
    detailed_from=_count("the step of the first round that is kept by itself"),
    kept_from=_count("the step of the first round that is kept at all"),
    whole=_of("boolean", "whether this is all that is kept, not only what is new"),
    rounds=_list("Ascending by step.", _ROUND),
    marks=_list(
        "Single events, in their order; the newest 200 of each kind.",
        _object(
            "One of them.",
            id=_count("ascending"),
            at=_at("when"),
            step=_count("the global_step then; of a checkpoint, its own"),
            kind=_of("string", "what happened", enum=[kind.value for kind in MarkKind]),
            worker_id=_maybe(_WORKER_ID),
        ),
    ),
)
_ERROR = _object("A refusal.", error=_of("string", "what is wrong"), hint=_of("string", "what to do"))
_REFUSALS = {
    "400": "the request is malformed",
    "401": "there is no token that the server knows",
    "403": "the token does not allow this, or another site's page asks",
    "404": "there is nothing under this path",
    "405": "the method is not GET",
    "421": "the Host header has a name that is not the server's",
    "503": "the server does not answer, or too many streams are open",
}


def _get(summary: str, kind: str, schema: _Schema, parameters: list[_Schema] | None = None) -> _Schema:
    refused = {
        status: {
            "description": meaning,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, meaning in _REFUSALS.items()
    }
    answer = {"description": summary, "content": {kind: {"schema": schema}}}
    return {"get": {"summary": summary, "parameters": parameters or [], "responses": {"200": answer, **refused}}}


def _document() -> _Schema:
    status, rounds = ({"$ref": f"#/components/schemas/{name}"} for name in ("Status", "Rounds"))
    since = {
        "name": "since",
        "in": "query",
        "description": "only rounds and marks from this step on",
        "schema": {"type": "integer", "minimum": 0, "default": 0},
    }
    stream = (
        'Server-sent events, at most a pair a second: "status" with a Status, "rounds" with the Rounds that are new'
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ps-server",
            "version": __version__,
            "description": "The life of a run of model averaging. Read-only.",
        },
        "paths": {
            "/api/status": _get("The state of the server", "application/json", status),
            "/api/rounds": _get("Past rounds", "application/json", rounds, [since]),
            "/api/rounds.csv": _get(f"Past rounds as a table: {', '.join(COLUMNS)}", "text/csv", {"type": "string"}),
            "/api/stream": _get(stream, "text/event-stream", {"type": "string"}),
            "/api/openapi.json": _get("This document", "application/json", {"type": "object"}),
        },
        "components": {
            "schemas": {"Status": _STATUS, "Rounds": _ROUNDS, "Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # Only a server with --token-file requires one.
        "security": [{}, {"token": []}],
    }


@cache
def openapi_json() -> str:
    """The document."""
    return json.dumps(_document(), indent=1)


@cache
def api_page() -> str:
    """The document for people."""
    document = _document()
    rows = [
        f"<h2><a href='{path}'>GET {path}</a></h2>\n<p>{html.escape(item['get']['summary'])}.</p>"
        for path, item in document["paths"].items()
    ]
    rows += [f"<h2>{name}</h2>\n{_fields(schema)}" for name, schema in document["components"]["schemas"].items()]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n<title>ps-server: API</title>\n"
        "<link rel='stylesheet' href='/static/page.css'>\n</head>\n<body>\n<main>\n<h1>API</h1>\n"
        "<p><a href='/'>The page</a> is made of these. Requests with a token: <code>Authorization: Bearer TOKEN</code>."
        f"</p>\n{chr(10).join(rows)}\n</main>\n</body>\n</html>\n"
    )


def _fields(schema: _Schema) -> str:
    """The fields of an object, as nested lists."""
    found = []
    for name, field in schema["properties"].items():
        kind = field["type"]
        words = html.escape(f"{kind if isinstance(kind, str) else ' or '.join(kind)}: {field['description']}")
        inner = field["items"] if kind == "array" else field
        below = _fields(inner) if "properties" in inner else ""
        found.append(f"<li><code>{name}</code> {words}{below}</li>")
    return f"<ul>\n{chr(10).join(found)}\n</ul>"
