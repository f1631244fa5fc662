"""params.yaml: one section a stage, each read into a frozen, typed object with exact errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import ConfigError


class Config(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversion ("12" is no number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands twice")
    return values


Once = AfterValidator(_once)  # of a list: no value stands in it twice
Section = TypeVar("Section")
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # of Adam


def read_params(path: Path) -> dict[str, Any]:
    """params.yaml (YAML 1.2, so ``5e-4`` is a number) as plain values.

    Raises
    ------
    ConfigError
        When the file is missing or is not YAML with sections.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            str(path), "there is no such file; `python pipeline.py init` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})") from error
    except YAMLError as error:
        raise ConfigError(
            str(path), f"is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            str(path), "must hold one section a stage; `python pipeline.py init` writes a whole one"
        )
    return values


def parse_section(params: Mapping[str, Any], name: str, kind: type[Section] | Any) -> Any:
    """Section ``name`` of the parameters as an object of type ``kind``.

    Raises
    ------
    ConfigError
        For the first wrong key: its name, what is wrong with it, and what would be right.
    """
    if name not in params:
        raise ConfigError(
            name,
            "this section is missing from the parameters; `python pipeline.py init` writes a whole file",
        )
    try:
        return TypeAdapter(kind).validate_python(params[name])
    except ValidationError as error:
        raise _first_error(name, kind, params[name], error) from error


def _first_error(section: str, kind: Any, value: Any, error: ValidationError) -> ConfigError:
    problems = error.errors(include_url=False)
    # A misspelt key is both unknown and missing; the former says more.
    first = next(
        (problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0]
    )
    key = ".".join([section, *(str(part) for part in _place(value, first["loc"]))])
    more = f" (and {len(problems) - 1} more wrong keys)" if len(problems) > 1 else ""
    found = first["input"]
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(kind, first["loc"][:-1]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return ConfigError(key, f"unknown key; {hint}{more}", expected=known, actual=found)
    if first["type"] == "missing":
        return ConfigError(key, f"this key is missing{more}")
    if first["type"].startswith("union_tag"):
        context = first["ctx"]
        key = f"{key}.{context['discriminator'].strip(chr(39))}"
        if first["type"] == "union_tag_not_found":
            return ConfigError(key, f"this key is missing{more}")
        return ConfigError(
            key,
            f"should be {context['expected_tags']}, found {context['tag']!r}{more}",
            actual=context["tag"],
        )
    return ConfigError(
        key, f"{reason(first)}, found {found!r}{more}", expected=first["msg"], actual=found
    )


def reason(problem: ErrorDetails) -> str:
    """Say what pydantic found wrong, as it is written in an error message."""
    text = problem["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _place(value: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """The keys on the way to a wrong one: pydantic names the chosen kind of a union among them, which no file holds."""
    keys: list[int | str] = []
    for part in location:
        if isinstance(value, dict) and part not in value and part in value.values():
            continue  # such as featuregan in {augmenter: featuregan}
        keys.append(part)
        inside = (
            isinstance(part, int)
            if isinstance(value, list)
            else isinstance(value, dict) and part in value
        )
        value = value[part] if inside else None
    return keys


def _fields_at(kind: Any, location: tuple[int | str, ...]) -> set[str]:
    """Names of the keys that are allowed at a place inside a section."""
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[str(part)].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            inside = list(_configs(kind))
            kind = next(
                (item for item in inside if part in _names(item)),
                inside[0] if len(inside) == 1 else kind,
            )
    return (
        set(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else set()
    )


def _configs(kind: Any) -> Iterator[type[Config]]:
    """The sections' types that a container or a union of them holds."""
    if isinstance(kind, type) and issubclass(kind, Config):
        yield kind
    for item in get_args(kind):
        yield from _configs(item)


def _names(kind: type[Config]) -> set[Any]:
    """Values by which a union tells this type from the others."""
    return {
        name
        for field in kind.model_fields.values()
        if get_origin(field.annotation) is Literal
        for name in get_args(field.annotation)
    }
