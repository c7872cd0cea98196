"""Options of a recipe: the fields of one frozen dataclass, checked before any work is done.

Each field says its default, what it is and its unit; its annotation says what is allowed. The command line,
the help, the stored configuration and the refusals all come from here; pydantic reads and checks the values.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError

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
        return _adapter(spec).validate_python(value)
    except ValidationError as error:
        told = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(told, BadInput):  # a budget tells its units itself
            raise BadInput(spec.name, value, told.remedy) from None
        unit = f" ({spec.unit})" if spec.unit else ""
        verb = "use" if get_origin(spec.kind) is Literal else "give"
        raise BadInput(spec.name, value, f"{verb} {spec.allowed}{unit}") from None


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


@functools.lru_cache(maxsize=256)
def _adapter(spec: OptionSpec) -> TypeAdapter[Any]:
    return TypeAdapter(_validated(spec, spec.kind))


def _validated(spec: OptionSpec, kind: Any) -> Any:
    """The annotation that pydantic checks: the option's own, which text fits as well."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(arm for arm in get_args(kind) if arm is not type(None))
        return Annotated[_validated(spec, inner) | None, BeforeValidator(_nothing)]
    if get_origin(kind) is Literal:
        known = {str(choice): choice for choice in get_args(kind)}
        return Annotated[kind, BeforeValidator(lambda value: known.get(str(value), value))]
    if get_origin(kind) is tuple:
        arms = tuple(arm if arm is Ellipsis else _validated(spec, arm) for arm in get_args(kind))
        least = int(
            arms[-1] is Ellipsis and bool(spec.default)
        )  # where the default has items, none is a slip
        return Annotated[tuple[arms], BeforeValidator(_split), Field(min_length=least)]  # type: ignore[valid-type]
    if kind is Budget:
        return Annotated[Any, PlainValidator(Budget.parse)]
    if kind is Path:
        return Annotated[Path, BeforeValidator(_not_blank), AfterValidator(Path.expanduser)]
    if kind is int or kind is float:
        bounds = Field(ge=spec.minimum, le=spec.maximum, allow_inf_nan=False)
        return Annotated[kind, BeforeValidator(_not_yes_or_no), bounds]
    return kind


def _nothing(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _split(value: Any) -> Any:
    return [item for item in value.split(",") if item or "," in value] if isinstance(value, str) else value


def _not_blank(value: Any) -> Any:
    if not str(value).strip():
        raise ValueError("it is blank")
    return value


def _not_yes_or_no(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("it is no number")
    return value


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
