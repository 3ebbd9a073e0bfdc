"""From a YAML file and `key=value` overrides to a checked Recipe that knows where each value came from."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import UserError
from configs.schema import Recipe

Key = tuple[str | int, ...]
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A recipe and where its values came from."""

    recipe: Recipe
    origins: Mapping[Key, str]  # "file:line" or "command line"; what is not in it is a default


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-5 is a number, which YAML 1.1 denies without a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the checked recipe. Raises UserError naming key and line."""
    return load_with_origins(path, overrides).recipe


def load_with_origins(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Return the checked recipe of a YAML file with dotted `key=value` overrides, whose values are YAML.

    Raises UserError naming key and line.
    """
    tree, origins = _read(Path(path))
    for override in overrides:
        key, value = _parse_override(override)
        if key == ("algorithm",) and isinstance(value, str):  # algorithm=rloo keeps what else the recipe says of it
            key = ("algorithm", "name")
        _set(tree, key, value)
        origins = {known: origin for known, origin in origins.items() if known[: len(key)] != key}
        origins |= dict.fromkeys((key, *(key + inner for inner in _keys(value))), COMMAND_LINE)
    try:
        return Loaded(recipe=Recipe.model_validate(tree), origins=origins)
    except ValidationError as error:
        # A typo also makes a required key missing: name the typo.
        first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise UserError(f"{_origin(first['loc'], origins, str(path))}: {_explain(first)}") from None


def render(loaded: Loaded) -> str:
    """Return the resolved recipe as YAML, each value's origin behind it as a comment."""
    lines = list(_render(loaded.recipe.model_dump(mode="json"), (), loaded.origins))
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def json_schema() -> str:
    """Return the JSON schema of a recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False)


def dotted(key: Sequence[str | int]) -> str:
    """Return a key as it is written on the command line."""
    return ".".join(map(str, key))


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        shipped = Path(__file__).parent
        near = get_close_matches(path.name, [p.name for p in shipped.glob("*.yaml")], n=1, cutoff=0.5)
        hint = f"did you mean {shipped.name}/{near[0]}?" if near else f"the shipped recipes are {shipped.name}/*.yaml"
        raise UserError(f"{path}: no such config file; {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a YAML file") from None
    loader = _Loader(text)
    origins: dict[Key, str] = {}
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: a recipe is a YAML mapping of sections such as run, model and data")
        _trace(node, (), str(path), origins)
        return _unshared(loader.construct_document(node)), origins
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line(error)}: not valid YAML ({_problem(error)}); correct it") from None
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    # YAML aliases are one object in many places; an override is meant for one of them.
    if isinstance(value, dict):
        return {name: _unshared(inner) for name, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _trace(node: yaml.Node, key: Key, file: str, origins: dict[Key, str]) -> None:
    """Note the line of every key below `node`. Raises UserError for a key given twice, of which YAML keeps the last."""
    if len(key) > 50:
        raise UserError(f"{file}:{node.start_mark.line + 1}: nested too deeply; does an alias contain itself?")
    children: list[tuple[str | int, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(name.value), value, name.start_mark.line) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(i, value, value.start_mark.line) for i, value in enumerate(node.value)]
    for name, value, line in children:
        inner = (*key, name)
        if inner in origins:
            raise UserError(f"{file}:{line + 1}: {dotted(inner)} is given twice; keep one")
        origins[inner] = f"{file}:{line + 1}"
        _trace(value, inner, file, origins)


def _parse_override(override: str) -> tuple[Key, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"{override!r}: an override is written key=value, for example loop.staleness=0")
    key = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
    try:
        return key, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"{COMMAND_LINE}: {name}: {text!r} is not valid YAML ({_problem(error)}); quote the value"
        ) from None


def _set(tree: Any, key: Key, value: Any) -> None:
    for i, part in enumerate(key):
        if isinstance(tree, list):
            if not isinstance(part, int) or part >= len(tree):
                raise UserError(
                    f"{COMMAND_LINE}: {dotted(key)}: {dotted(key[:i])} is a list of {len(tree)} in the recipe; "
                    f"give a number below {len(tree)}, or the whole list"
                )
        elif not isinstance(tree, dict):
            raise UserError(f"{COMMAND_LINE}: {dotted(key)}: {dotted(key[:i])} is a single value, it has no keys")
        else:
            part = str(part)
        if i == len(key) - 1:
            tree[part] = value
        elif isinstance(tree, dict) and tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]


def _keys(value: Any) -> Iterator[Key]:
    for name, inner in _items(value):
        yield (name,)
        yield from ((name, *rest) for rest in _keys(inner))


def _items(value: Any) -> list[tuple[str | int, Any]]:
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []


def _explain(detail: ErrorDetails) -> str:
    key = detail["loc"]
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted(key)}; {_nearest(key)}"
        case "missing":
            return f"{dotted(key)} is required; add it to the recipe"
        case "model_type":
            return f"{dotted(key)}: expected a section with keys, got {_short(detail['input'])}"
    wanted = detail["msg"].replace("Input should be ", "expected ").split(", unable to")[0].split(", got ")[0]
    return f"{dotted(key)}: {wanted}, got {_short(detail['input'])}"


def _nearest(key: Key) -> str:
    names = _fields(key[:-1])
    wrong = str(key[-1])
    near = get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {dotted((*key[:-1], near[0]))}?"
    elsewhere = [dotted((section, wrong)) for section in Recipe.model_fields if wrong in _fields((section,))]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"valid here: {', '.join(names)}"


def _fields(key: Key) -> list[str]:
    """Return the names that are valid directly below `key`."""
    annotation: Any = Recipe
    for part in key:
        if _is_section(annotation):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        else:  # list[Section], dict[str, Section]
            annotation = get_args(annotation)[-1] if get_args(annotation) else None
        annotation = next((arg for arg in get_args(annotation) if NoneType in get_args(annotation)), annotation)
    return list(annotation.model_fields) if _is_section(annotation) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _origin(key: Key, origins: Mapping[Key, str], file: str) -> str:
    above = (origins[key[:i]] for i in range(len(key), 0, -1) if key[:i] in origins)
    below = (origin for known, origin in origins.items() if known[: len(key)] == key)
    return next(above, next(below, file))


def _render(value: Any, key: Key, origins: Mapping[Key, str], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, inner in _items(value):
        here = (*key, name)
        head = f"{indent}- " if isinstance(name, int) else f"{indent}{name}:"
        nested = isinstance(inner, dict) and inner or any(_items(item) for _, item in _items(inner))
        if not nested:
            yield f"{head.rstrip(' ')} {_flow(inner)}", origins.get(here, "default")
        elif isinstance(name, int):
            (first, origin), *rest = _render(inner, here, origins, indent + "  ")
            yield head + first.strip(), origin
            yield from rest
        else:
            yield head, ""
            yield from _render(inner, here, origins, indent + "  ")


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
