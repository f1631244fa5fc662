"""What the site adds to pages: the sidebar, and reference sections made from the code."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import click

import featurestore
from pipeline import main
from stages.augment.base import VariantConfig
from stages.commands.options import presets
from stages.commands.params import Params, as_yaml
from stages.common.config import read_params

LINK = re.compile(r"^- \[(.+)\]\((.+)\.md\)", re.MULTILINE)
PUBLIC = [  # names of featurestore but its errors, in the order of the page
    ".. autofunction:: featurestore.open",
    ".. autoclass:: featurestore.FeatureStore",
    ".. autoclass:: featurestore.Sample",
    ".. autoclass:: featurestore.Statistics",
    ".. autoclass:: featurestore.SubsetStore",
    ".. autofunction:: featurestore.create",
    ".. autoclass:: featurestore.StoreWriter",
    ".. autoclass:: featurestore.StoreSpec",
    ".. autoclass:: featurestore.layers.Layer",
    ".. autofunction:: featurestore.fingerprint",
    ".. data:: VOID\n    :module: featurestore\n\n"
    f"    {featurestore.VOID}, the mask value of pixels without a label.",
    ".. data:: FORMAT_VERSION\n    :module: featurestore\n\n"
    f"    {featurestore.FORMAT_VERSION}, version of stores without layer names and native strides.",
]
ERRORS = [name for name in featurestore.__all__ if name.endswith("Error")]
API = {  # directives of autodoc by heading
    "featurestore": [".. automodule:: featurestore\n    :no-members:", *PUBLIC],
    "Errors of featurestore": [f".. autoexception:: featurestore.{name}" for name in ERRORS],
    "stages.use": [
        ".. autoclass:: stages.use.segmenter.Segmenter\n    :special-members: __call__",
        ".. autoclass:: stages.use.segmenter.Segmentation",
        ".. autoclass:: stages.use.windows.View",
    ],
    "stages.training": [
        ".. autofunction:: stages.training.load_decoder",
        ".. autofunction:: stages.training.load_generator",
        ".. autoclass:: stages.models.decoder.Decoder\n    :members: forward",
        ".. autoclass:: stages.models.feature_generator.FeatureGenerator",
    ],
}
PRESETS = {name: read_params(path) for name, path in presets().items()}
LIMITS = {  # of a JSON schema, in words
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
Schema = Mapping[str, Any]


def addition(page: str, text: str) -> str:
    """Return the Markdown that the site adds at the end of a page, such as ``docs/api``."""
    match page:
        case "docs/index":
            return navigation(text)
        case "docs/parameters":
            return parameters()
        case "docs/commands":
            return commands()
        case "docs/api":
            return api()
    return ""


def navigation(index: str) -> str:
    """List the pages that each section of the index links to, for the sidebar."""
    return "".join(
        _directive(
            "toctree",
            "",
            "\n".join(f"{title} <{link}>" for title, link in LINK.findall(section)),
            caption=section.partition("\n")[0],
            hidden="",
        )
        for section in index.split("\n## ")[1:]
    )


def commands() -> str:
    """Describe every command and its options, with the texts that ``--help`` shows."""
    parent = click.Context(main, info_name="python pipeline.py")
    text = []
    for name, command in main.commands.items():
        context = click.Context(command, info_name=name, parent=parent)
        text.append(f"\n## `{name}`\n")
        text.append(_code(command.get_usage(context).removeprefix("Usage: ")))
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            lines = paragraph.removeprefix("\b\n")  # click's mark of lines that are not wrapped
            text.append(f"\n{_prose(lines)}\n" if lines == paragraph else _code(lines))
        text.append(_directive("program", name))
        for option in command.params:
            if isinstance(option, click.Option) and (record := option.get_help_record(context)):
                text.append(_directive("option", record[0], _prose(record[1])))
    return "".join(text)


def api() -> str:
    """Describe what other programs import."""
    return "".join(
        f"\n## {title}\n" + _directive("eval-rst", "", "\n\n".join(directives))
        for title, directives in API.items()
    )


def parameters() -> str:
    """Describe every key of params.yaml: its type or choices, default, meaning and presets."""
    schema = Params.model_json_schema()
    text = []
    for name, section in schema["properties"].items():
        meaning = re.sub(r"docs/(\S+)", r"[\1](\1)", section["description"])
        text.append(f"\n## `{name}`\n\nSection `{name}`: {meaning}.\n")
        if name == "variants":
            text += _variants(schema["$defs"], section)
        else:
            text += _keys(schema["$defs"], section, f"{name}.")
    return "".join(text)


def _keys(definitions: Schema, section: Schema, prefix: str) -> Iterable[str]:
    """Describe the keys of a section, and those of a section inside it."""
    for key, schema in _definition(definitions, section)["properties"].items():
        if "$ref" in schema:
            yield from _keys(definitions, schema, f"{prefix}{key}.")
        else:
            yield _entry(prefix + key, schema)


def _variants(definitions: Schema, section: Schema) -> Iterable[str]:
    """Describe the keys of every variant, those of each augmenter, and the default variants."""
    kinds = section["additionalProperties"]["discriminator"]["mapping"]
    shared = VariantConfig.model_json_schema()["properties"]
    yield "\nAn entry is `NAME: {augmenter: AUGMENTER, key: value}`. The default is:\n\n```yaml\n"
    lines = as_yaml(Params(), "").partition("\nvariants:")[2].partition("\n\n")[0].splitlines()
    yield textwrap.dedent("\n".join(lines[1:]))
    yield "\n```\n\n### Every variant\n\nThe default `null` means: as in section `train_decoder`.\n"
    for key, schema in shared.items():
        choices = {"enum": list(kinds)} if key == "augmenter" else {}
        yield _entry(f"variants.NAME.{key}", {**schema, **choices})
    for augmenter, reference in kinds.items():
        yield f"\n### `augmenter: {augmenter}`\n"
        properties = _definition(definitions, {"$ref": reference})["properties"]
        changed = {k: v for k, v in properties.items() if k != "augmenter" and v != shared.get(k)}
        if not changed:
            yield "\nHas no further keys.\n"
        for key, schema in changed.items():
            yield _entry(f"{key} ({augmenter})", {**shared.get(key, {}), **schema})


def _definition(definitions: Schema, reference: Schema) -> Schema:
    found: Schema = definitions[reference["$ref"].rpartition("/")[2]]
    return found


def _entry(name: str, schema: Schema) -> str:
    """Describe one key."""
    default = _value(schema["default"]) if "default" in schema else "none; the key is required"
    used = [f"`{preset}` {_value(keys[name])}" for preset, keys in PRESETS.items() if name in keys]
    text = schema["description"] + (f"\n\nIn presets: {', '.join(used)}" if used else "")
    return _directive("confval", name, text, type=_kind(schema), default=default)


def _kind(schema: Schema, plural: str = "") -> str:
    """Say in words which values a JSON schema allows."""
    match schema:
        case {"const": value}:
            return _value(value)
        case {"enum": values}:
            return f"one of {', '.join(map(_value, values))}"
        case {"anyOf": kinds}:
            return " or ".join(map(_kind, kinds))
        case {"type": "array", "prefixItems": [first, *more]}:
            return f"list of {1 + len(more)} {_kind(first, 's')}"
        case {"type": "array", "items": {"enum": values}}:
            return f"list of any of {', '.join(map(_value, values))}"
        case {"type": "array", "items": item}:
            return f"list of {_kind(item, 's')}"
        case {"type": "null"}:
            return "`null`"
        case {"type": "boolean"}:
            return "`true` or `false`"
    noun = schema.get("type", "variant").replace("object", "mapping")
    limits = [f"{words} {schema[limit]}" for limit, words in LIMITS.items() if limit in schema]
    return ", ".join(filter(None, [noun + plural, " and ".join(limits)]))


def _value(value: object) -> str:
    """Return a value as params.yaml holds it."""
    plain = isinstance(value, str) and value
    return f"`{value if plain else json.dumps(value, ensure_ascii=False)}`"


def _prose(help_text: str) -> str:
    """Mark names of options as code, whose two dashes the site would join."""
    return re.sub(r"`[^`]*`|(--\w[\w-]*)", lambda m: f"`{m[1]}`" if m[1] else m[0], help_text)


def _code(text: str) -> str:
    return f"\n```text\n{inspect.cleandoc(text)}\n```\n"


def _directive(name: str, argument: str, content: str = "", **options: str) -> str:
    """Return a MyST directive; quotes keep the values of options from being read as YAML."""
    lines = [f":{key}: {json.dumps(value)}" for key, value in options.items()]
    body = ["", content] if content else []
    return "\n".join(["", f"```{{{name}}} {argument}".rstrip(), *lines, *body, "```", ""])
