"""Parameters: plain values of YAML files, and the frozen, typed objects that they become."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import ConfigError

Plain = dict[str, Any]  # values of a YAML file
Parsed = TypeVar("Parsed")
Value = TypeVar("Value")


class Config(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversion ("12" is no number)."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: object) -> object:
        """Refuse an unknown key before any other check: a misspelt one explains the rest."""
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                known = list(cls.model_fields)
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                context = {"key": key, "hint": hint}
                raise PydanticCustomError("unknown_key", "unknown key; {hint}", context)
        return values


def _once(values: tuple[Value, ...]) -> tuple[Value, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is listed twice")
    return values


Once = AfterValidator(_once)  # a list without repeated values
Listed = Field(strict=False)  # a tuple that YAML writes as a list
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
# Layers are names; params.yaml gives the blocks of a ViT as numbers.
LayerName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # of Adam


def read_params(path: Path) -> Plain:
    """Read a YAML file of named sections (YAML 1.2: ``5e-4`` is a number) as plain values.

    Raises
    ------
    ConfigError
        When the file is missing or is not YAML with sections.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = "there is no such file; `python pipeline.py init` writes one"
        raise ConfigError(str(path), message) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})") from error
    except YAMLError as error:
        message = f"is not valid YAML: {' '.join(str(error).split())}"
        raise ConfigError(str(path), message) from error
    if not isinstance(values, dict):
        message = "must hold named sections; `python pipeline.py init` writes a whole file"
        raise ConfigError(str(path), message)
    return values


def with_settings(params: Mapping[str, Any], changes: Mapping[str, Any]) -> Plain:
    """Return a copy of plain parameters with each ``section.key: value`` changed.

    Raises
    ------
    ConfigError
        For a key that the parameters do not have; new names are allowed only in ``variants``.
    """
    changed = copy.deepcopy(dict(params))
    for key, value in changes.items():
        *way, last = key.split(".")
        place: Any = changed
        for name in way:
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict) or (last not in place and way[0] != "variants"):
            raise ConfigError(key, "there is no such parameter; params.yaml lists them all")
        place[last] = value
    return changed


def parse(kind: TypeAdapter[Parsed], values: object, name: str = "") -> Parsed:
    """Turn plain values into an object of a type.

    Parameters
    ----------
    kind
        Adapter of the type.
    values
        As YAML holds them.
    name
        Section of the values, for error messages. Default: the values are sections.

    Raises
    ------
    ConfigError
        For the first wrong key: its name, what is wrong, and what is allowed.
    """
    try:
        return kind.validate_python(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more wrong keys)" if len(problems) > 1 else ""
        keys, message = _explain(problems[0], values)
        key = ".".join(map(str, [name, *keys] if name else keys))
        raise ConfigError(key, f"{message}{more}", actual=problems[0]["input"]) from error


def _explain(problem: ErrorDetails, values: object) -> tuple[list[int | str], str]:
    """Return the keys that lead to a wrong value, and what is wrong with it."""
    keys, context = _way(values, problem["loc"]), problem.get("ctx", {})
    text = reason(problem)
    match problem["type"]:
        case "unknown_key":
            return [*keys, context["key"]], text
        case "missing":
            return keys, "this key is missing"
        case "union_tag_not_found":
            return [*keys, context["discriminator"].strip("'")], "this key is missing"
        case "union_tag_invalid":
            key, allowed = context["discriminator"].strip("'"), context["expected_tags"]
            return [*keys, key], f"should be {allowed}, found {context['tag']!r}"
        case _:
            return keys, f"{text}, found {problem['input']!r}"


def reason(problem: ErrorDetails) -> str:
    """Say what pydantic found wrong, as it is written in an error message."""
    text = problem["msg"].removeprefix("Value error, ")
    return f"{text[0].lower()}{text[1:]}"


def _way(values: object, location: tuple[int | str, ...]) -> list[int | str]:
    """Drop the tags of unions from a location: pydantic adds them, and no file holds them."""
    keys: list[int | str] = []
    place: Any = values
    for name in location:
        if isinstance(place, dict) and name not in place and name in place.values():
            continue  # such as featuregan in {augmenter: featuregan}
        keys.append(name)
        inside = isinstance(place, list) or (isinstance(place, dict) and name in place)
        place = place[name] if inside else None
    return keys
