"""Writes docs/configuration.md from the schema: `python -m configs.reference > docs/configuration.md`."""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.schema import Recipe

HEAD = """# Configuration

A recipe is a YAML file; every key can be overridden on the command line: `headroom train CONFIG loop.staleness=0
reward.components.0.weight=2`. `headroom config CONFIG` prints the resolved recipe with the origin of each value,
`headroom config --schema` a JSON schema for editors. Unknown keys are errors.

Written from `configs/schema.py` by `python -m configs.reference > docs/configuration.md`; do not edit.
"""


def markdown() -> str:
    """Return one table for every section of a recipe, in the order of the schema."""
    return "\n".join([HEAD, *_section(Recipe, "Recipe", set())])


def _section(model: type[BaseModel], title: str, done: set[type[BaseModel]]) -> Iterator[str]:
    done.add(model)
    yield f"## {title}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        text = " ".join((field.description or "").split())
        kind = _choices(field) or _type(field.annotation)
        yield f"| `{name}` | {kind}{_bounds(field)} | {_default(field)} | {_cell(text)} |"
    yield ""
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            if inner not in done:
                yield from _section(inner, inner.__name__, done)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for arg in get_args(annotation):
        yield from _models(arg)


def _choices(field: FieldInfo) -> str:
    """Return the values that a field takes beside those of its type, which are settled when it is read."""
    schemas = [item.json_schema for item in field.metadata if isinstance(item, WithJsonSchema) and item.json_schema]
    return " \\| ".join(f"`{value}`" for schema in schemas for value in schema["enum"])


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is types.NoneType:
        return "none"
    if annotation is Any:
        return "any"
    if origin is Literal:
        return " \\| ".join(f"`{arg}`" for arg in args)
    if origin in (Union, types.UnionType):
        return " \\| ".join(map(_type, args))
    if origin is dict:
        return f"map of {_type(args[1])}"
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_type, args))}]"
    if issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return str(annotation.__name__)


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return f" {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        changed = field.default.model_dump(exclude_defaults=True, mode="json")
        return f"`{changed}`" if changed else ""
    return "none" if field.default is None else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
