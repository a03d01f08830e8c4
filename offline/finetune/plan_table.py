"""Plans whose keys pydantic checks: from a parsed TOML table, with every complaint under its key's name.

Owns the words of the refusal. Knows no plan.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from offline.errors import PlanError
from offline.finetune.plan import SourcePlan, source_from_table

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Of a plan's dataclass: unknown keys are refused, and no text becomes a number."""

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Momentum, Momentum]

_P = TypeVar("_P")


def _source(entry: Any) -> Any:
    """`source_from_table` as a validator."""
    try:
        return entry if isinstance(entry, SourcePlan) else source_from_table(entry)
    except (PlanError, TypeError) as error:
        raise ValueError(str(error)) from error


Source = Annotated[SourcePlan, BeforeValidator(_source)]


def plan_of(kind: type[_P], table: Mapping[str, Any], what: str) -> _P:
    """Build a plan of some kind.

    Args:
        kind: a pydantic dataclass, of the configuration `STRICT`.
        what: the plan's name for messages, such as 'tuning plan'.

    Raises:
        PlanError: a key is unknown or missing, or a value has the wrong type or is impossible; names all of them.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(dict(table)))
    except ValidationError as error:
        reasons = []
        for part in error.errors(include_url=False):
            at = ".".join(str(key) for key in part["loc"])
            said = part["msg"].removeprefix("Value error, ")
            given = "" if part["type"] in ("missing", "value_error") else f", got {part['input']!r}"
            reasons.append(f"{at}: {said}{given}" if at else said)
        raise PlanError(f"{what}: " + "; ".join(reasons)) from error
    except (TypeError, ValueError) as error:
        raise PlanError(f"{what}: {error}") from error
