"""This module reads a TOML file and ``--set`` overrides into one frozen, closed settings object."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date
from datetime import time as dtime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from store.errors import MissingError, SettingsError


class Settings(BaseModel):
    """The base of every settings tree: frozen, an unknown key is an error, and so is what is no finite number.

    Settings are kept beside what was made with them, as JSON, which has no other numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def load_settings(model: type[S], path: str | Path | None = None, overrides: Sequence[str] = ()) -> S:
    """Read ``path`` (TOML; none means all defaults) and lay ``overrides`` (``a.b=value``) over it.

    A value is read as TOML where it parses as such (``0.1``, ``true``, ``["a", "b"]``) and as plain text otherwise.

    Raises:
        MissingError: ``path`` does not exist.
        SettingsError: The file is not TOML, or a key or value does not fit; the message names every such key.
    """
    return parse_settings(model, _overlay(_read_toml(path), overrides), where=str(path or "--set"))


def parse_settings(model: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Validate ``values`` as ``model``; ``where`` says in messages where they came from.

    Raises:
        SettingsError: One line for each bad key, with the nearest known key as a remedy.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(model, item, where) for item in error.errors())) from None


def _read_toml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found: dict[str, Any] = _texts(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        return found
    except FileNotFoundError:
        raise MissingError(f"{path}: no such settings file; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None


def _overlay(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set {override!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise SettingsError(f"--set {key}: {parent!r} is a value, not a section")
        node[leaf] = _toml_value(text)
    return values


def _toml_value(text: str) -> Any:
    try:
        return _texts(tomllib.loads(f"value = {text}")["value"])
    except tomllib.TOMLDecodeError:
        return text


def _texts(value: Any) -> Any:
    """Return what TOML says, days and times as the texts that settings have them as."""
    if isinstance(value, dict):
        return {key: _texts(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_texts(part) for part in value]
    return value.isoformat() if isinstance(value, date | dtime) else value


def _explain(model: type[BaseModel], item: Any, where: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{where}: {key or 'settings'}: {item['msg']} (got {item['input']!r})"
    known = _known_keys(model, item["loc"][:-1])
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{where}: unknown key {key!r}; {remedy}"


def _known_keys(model: type[BaseModel], parents: tuple[int | str, ...]) -> list[str]:
    node: Any = model
    for parent in parents:
        field = getattr(node, "model_fields", {}).get(str(parent))
        if field is None:
            return []
        node = field.annotation
    return list(getattr(node, "model_fields", {}))
