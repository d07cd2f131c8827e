"""Options: what a plugin or a part of the core can be told, typed and described by its owner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


def kebab(name: str) -> str:
    """The spelling of a field on the command line, in YAML and in errors: `every_epochs` → `every-epochs`."""
    return name.replace("_", "-")


def comma_separated(value: Any) -> Any:
    """What a list is made of: `a,b` in YAML, a variable or a flag, or several of them where a flag is repeated.

    >>> comma_separated("a, b"), comma_separated(["a,b", "c"])
    (['a', 'b'], ['a', 'b', 'c'])
    """
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, list | tuple):
        parts = [comma_separated(item) if isinstance(item, str) else [item] for item in value]
        return [item for part in parts for item in part]
    return value


class Options(BaseModel):
    """Base of all options: frozen, unknown keys are errors, every field has a description.

    A field `every_epochs` is written `every-epochs` everywhere outside of Python.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=kebab,
        validate_by_alias=True,
        validate_by_name=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        allowed = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in allowed and "Any" not in allowed:
            raise ValueError("true and false are no value for this option")
        return value

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if not field.description:
                raise TypeError(
                    f"{cls.__module__}.{cls.__qualname__}.{name} needs a description: it is the flag's help"
                )


def leaves(options_type: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every settable value of an options type as (dotted path, field), nested options opened.

    >>> from pydantic import Field
    >>> class O(Options):
    ...     every_epochs: int = Field(1, description="d")
    >>> [path for path, _ in leaves(O, "checkpoint")]
    ['checkpoint.every-epochs']
    """
    for name, field in options_type.model_fields.items():
        path = f"{prefix}.{kebab(name)}" if prefix else kebab(name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from leaves(kind, path)
        else:
            yield path, field
