"""Checks documents against the OpenAPI document."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from ps_server.page.openapi import openapi_json

__all__ = ["check_document"]


def check_document(name: str, document: Any) -> None:
    """Raises unless ``document`` is what the OpenAPI document calls ``name``."""
    described = json.loads(openapi_json())
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    jsonschema.Draft202012Validator(schema).validate(document)
