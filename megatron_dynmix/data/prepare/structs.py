"""Objects out of Arrow tables: a column has every key that any row has, so most nulls only fill it.

A null in the arguments of a call may have been given. Where the schema of the tool tells, it is believed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dynmix.data.prepare.notices import Notice


class Struct(dict[str, Any]):
    """An object without its nulls, and which keys those have."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        super().__init__({key: value for key, value in members.items() if value is not None})
        self.nulls = tuple(key for key, value in members.items() if value is None)


def without_nulls(value: Any) -> Any:
    """Return a value of Arrow with all objects in it, itself too, as `Struct`."""
    if isinstance(value, dict):
        return Struct({key: without_nulls(member) for key, member in value.items()})
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def settle_nulls(
    call: dict[str, Any], tools: Sequence[Mapping[str, Any]], notices: list[Notice]
) -> dict[str, Any]:
    """Return a call with those nulls of its arguments that were given.

    A required argument was given, and one that the tool has not fills the column; of an optional one nobody
    can tell, which is a ValueError. Where no schema says what is required nulls are left out, and noted.
    """
    function = call["function"]
    arguments, name = function.get("arguments"), function["name"]
    if not isinstance(arguments, Struct):
        return call
    if any(map(_has_nulls, arguments.values())):
        notices.append(Notice("null left out", f"inside of arguments of {name}"))
    if not arguments.nulls:
        return call
    schemas = [tool.get("function", tool) for tool in tools]
    schema = next((one.get("parameters") for one in schemas if one.get("name") == name), None)
    if not isinstance(schema, Mapping) or "properties" not in schema:
        notices.append(Notice("null left out", f"in the arguments of {name}"))
        return call
    given = {key: None for key in arguments.nulls if key in (schema.get("required") or ())}
    unclear = [key for key in arguments.nulls if key in schema["properties"] and key not in given]
    if unclear:
        raise ValueError(
            f"the argument {unclear[0]!r} of a call of {name!r} is null, and a column of structs cannot tell "
            "whether it was given; keep arguments as JSON in a string"
        )
    return {**call, "function": {**function, "arguments": {**arguments, **given}}}


def _has_nulls(value: object) -> bool:
    if isinstance(value, Struct):
        return bool(value.nulls) or any(map(_has_nulls, value.values()))
    return isinstance(value, list) and any(map(_has_nulls, value))
