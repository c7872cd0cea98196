"""Options of a recipe: the fields of one frozen dataclass, checked before any work is done.

Each field says its default, what it is and its unit; its annotation says what is allowed. The command line,
the help, the stored configuration and the refusals all come from here.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from memspan.base import BadInput, nearest, refuse
from memspan.ledger.bytes import Budget

__all__ = ["RESERVED", "OptionSpec", "as_json", "changed", "checked", "option", "parse", "specs"]

RESERVED = frozenset(
    {
        "budget",
        "check",
        "debug",
        "device",
        "full",
        "help",
        "out",
        "quick",
        "quiet",
        "resume",
        "seeds",
        "threads",
    }
)
"""Names that every recipe's command line has already."""

O = TypeVar("O")  # noqa: E741
_SCALARS = (bool, int, float, str, Path, Budget)
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    minimum: float | None = 0,
    maximum: float | None = None,
) -> Any:
    """Declare one option: a field of a recipe's frozen dataclass.

    Args:
        default: what quick mode uses unless the recipe says otherwise; text is read as on the command line.
        help: what it is, in a few words.
        unit: of the value, such as ``"epochs"`` or ``"bytes"``.
        minimum: least number allowed; None allows any.
        maximum: greatest number allowed; None allows any.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     epochs: int = option(8, "passes over each task's data", unit="epochs", minimum=1)
        >>> Options().epochs
        8
    """
    if isinstance(default, list):
        default = tuple(default)
    metadata = {"help": help, "unit": unit, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata={"memspan": metadata})


@dataclass(frozen=True)
class OptionSpec:
    """One option as the command line sees it."""

    name: str
    kind: Any
    default: Any
    help: str
    unit: str
    minimum: float | None
    maximum: float | None

    @property
    def flag(self) -> str:
        """``--kebab-case``."""
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        return _words(self)


def specs(options: type) -> tuple[OptionSpec, ...]:
    """The options that a dataclass declares.

    Raises:
        BadInput: not a frozen dataclass, a field without :func:`option`, a type no option can have, a taken
            name.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     sizes: tuple[int, ...] = option((1, 2), "layer sizes")
        >>> specs(Options)[0].flag, specs(Options)[0].allowed
        ('--sizes', 'whole numbers, 0 or more, separated by commas')
    """
    if not dataclasses.is_dataclass(options) or not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        refuse("options", options, "declare options as a class with @dataclass(frozen=True)")
    hints = typing.get_type_hints(options)
    found = []
    for field in dataclasses.fields(options):
        told = field.metadata.get("memspan")
        if told is None or field.default is dataclasses.MISSING:
            refuse(field.name, field.default, "declare it with option(default, help, unit=...)")
        if field.name in RESERVED:
            refuse("options", field.name, f"every recipe has --{field.name} already; choose another name")
        spec = OptionSpec(field.name, hints[field.name], field.default, **told)
        _refuse_kind(spec)
        found.append(spec)
    return tuple(found)


def parse(spec: OptionSpec, value: Any) -> Any:
    """A value of the option's type, from text or from a value of nearly that type.

    Raises:
        BadInput: with the option's name, the value and what is allowed.

    Example:
        >>> spec = OptionSpec("budgets", tuple[Budget, ...], (), "", "bytes", 0, None)
        >>> parse(spec, "1KiB,2KiB")
        (Budget(bytes=1024), Budget(bytes=2048))
        >>> parse(OptionSpec("epochs", int, 8, "", "epochs", 1, None), "-3")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: epochs='-3': give a whole number, 1 or more (epochs)
    """
    try:
        return _parse(spec, spec.kind, value)
    except BadInput as error:
        if spec.kind is Budget and error.argument != spec.name:
            raise BadInput(spec.name, value, error.remedy) from None
        raise
    except (ValueError, TypeError, OverflowError):
        unit = f" ({spec.unit})" if spec.unit else ""
        raise BadInput(spec.name, value, f"give {spec.allowed}{unit}") from None


def checked(options: O) -> O:
    """The same options with every value of its declared type (``"1MiB"`` becomes a Budget), or a refusal."""
    values = {spec.name: parse(spec, getattr(options, spec.name)) for spec in specs(type(options))}
    return dataclasses.replace(options, **values)  # type: ignore[type-var]


def changed(options: O, values: typing.Mapping[str, Any]) -> O:
    """The options with some values replaced; unknown names are refused with the nearest ones.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     epochs: int = option(8, "passes", unit="epochs")
        >>> changed(Options(), {"epochs": "3"}), changed(Options(), {"epoch": 3})
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: option='epoch': did you mean epochs? Known: epochs
    """
    known = {spec.name: spec for spec in specs(type(options))}
    for name in values:
        if name not in known:
            refuse("option", name, nearest(name, known))
    return dataclasses.replace(  # type: ignore[type-var]
        options, **{name: parse(known[name], value) for name, value in values.items()}
    )


def as_json(options: object, *, whole_paths: bool = True) -> dict[str, Any]:
    """Options as JSON values: budgets as bytes, paths as text.

    Args:
        options: a dataclass of options, checked.
        whole_paths: False keeps only the last part of a path, for documents that people pass on.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Budget):
            return value.bytes
        if isinstance(value, Path):
            return str(value) if whole_paths else value.name
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return {spec.name: plain(getattr(options, spec.name)) for spec in specs(type(options))}


def _parse(spec: OptionSpec, kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
            return None
        return _parse(spec, next(arm for arm in get_args(kind) if arm is not type(None)), value)
    if origin is Literal:
        match = [choice for choice in get_args(kind) if value == choice or value == str(choice)]
        if not match:
            raise BadInput(spec.name, value, f"use {' or '.join(map(str, get_args(kind)))}")
        return match[0]
    if origin is tuple:
        items = list(value.split(",") if isinstance(value, str) else value)
        items = [] if items == [""] else items
        arms = get_args(kind)
        if arms[-1] is Ellipsis:
            if not items and spec.default:
                raise ValueError
            return tuple(_parse(spec, arms[0], item) for item in items)
        if len(items) != len(arms):
            raise ValueError
        return tuple(_parse(spec, arm, item) for arm, item in zip(arms, items, strict=True))
    if kind is bool:
        if isinstance(value, str) and value.strip().lower() in _YES + _NO:
            return value.strip().lower() in _YES
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind is int or kind is float:
        return _number(spec, kind, value)
    if kind is Budget:
        try:
            return Budget.parse(value)
        except BadInput as error:
            raise BadInput(spec.name, value, error.remedy) from None
    if kind is Path:
        if not str(value).strip():
            raise ValueError
        return Path(value).expanduser()
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(spec: OptionSpec, kind: type[int] | type[float], value: Any) -> int | float:
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise TypeError
    number = kind(value)
    if not math.isfinite(number):
        raise ValueError
    if spec.minimum is not None and number < spec.minimum:
        raise ValueError
    if spec.maximum is not None and number > spec.maximum:
        raise ValueError
    return number


def _refuse_kind(spec: OptionSpec) -> None:
    kinds = [spec.kind]
    if get_origin(spec.kind) in (Union, types.UnionType):
        kinds = [arm for arm in get_args(spec.kind) if arm is not type(None)]
        if len(kinds) != 1 or len(get_args(spec.kind)) != 2:
            refuse(spec.name, spec.kind, "the only union an option may have is TYPE | None")
    if get_origin(kinds[0]) is tuple:
        kinds = [arm for arm in get_args(kinds[0]) if arm is not Ellipsis]
    for kind in kinds:
        if kind not in _SCALARS and get_origin(kind) is not Literal:
            refuse(
                spec.name,
                kind,
                "an option is bool, int, float, str, Path, Budget, Literal, or a tuple of such",
            )


def _words(spec: OptionSpec) -> str:
    kind, end = spec.kind, ""
    if get_origin(kind) in (Union, types.UnionType):
        kind, end = next(arm for arm in get_args(kind) if arm is not type(None)), ", or none"
    many = get_origin(kind) is tuple
    if many:
        arms = get_args(kind)
        kind = arms[0]
        end = ", separated by commas" + end
        if arms[-1] is not Ellipsis:
            end = f", {len(arms)} of them" + end
    return _word(spec, kind, many) + end


def _word(spec: OptionSpec, kind: Any, many: bool) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if kind in (int, float):
        word = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}[kind][many]
        if spec.minimum is not None and spec.maximum is not None:
            return f"{word} from {spec.minimum:g} to {spec.maximum:g}"
        if spec.minimum is not None:
            return f"{word}, {spec.minimum:g} or more"
        return f"{word}, {spec.maximum:g} or less" if spec.maximum is not None else word
    words = {
        bool: ("yes or no", "yes or no"),
        str: ("text", "texts"),
        Path: ("a path", "paths"),
        Budget: ("bytes with a unit, such as 2MiB", "bytes with units, such as 1MiB"),
    }
    return words[kind][many]
