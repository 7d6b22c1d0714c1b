"""The schemas that code generators write, from small sources of ours -> tests/data/schemas/.

Usage: python scripts/generate_schemas.py. zod's need node and npm, which install zod 3 and 4 in a
folder of their own; where there is no npm, only pydantic's are made again. Tests read the data.
"""

from __future__ import annotations

import enum
import json
import shutil
import subprocess
import tempfile
import warnings
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import pydantic
import pydantic.v1 as v1
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

HERE = Path(__file__).parent
DATA = HERE.parent / "tests" / "data" / "schemas"
PACKAGES = ["zod@4.6.7", "zod3@npm:zod@3.25.76", "zod-to-json-schema@3.25.2"]


class Color(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(BaseModel):
    """A point."""

    x: float
    y: float = 0.0


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Node(BaseModel):
    value: str
    children: list[Node] = []


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: str
    b: int | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: str


class Person(TypedDict):
    name: str
    age: int


class Pair(NamedTuple):
    first: str
    second: int


class Everyday(BaseModel):
    title: Annotated[str, Field(min_length=1, max_length=100, description="A title")]
    summary: Annotated[str, Field(max_length=500)]
    url: pydantic.HttpUrl | None = None
    score: Annotated[float, Field(ge=0, le=10)]
    tags: Annotated[list[Annotated[str, Field(max_length=30)]], Field(max_length=5)] = []
    when: datetime
    status: Color = Color.RED
    counts: dict[str, int] = {}


S = Annotated[str, Field()]
TYPES: dict[str, Any] = {
    "str": str,
    "str_min": Annotated[str, Field(min_length=1)],
    "str_max": Annotated[str, Field(max_length=255)],
    "str_both": Annotated[str, Field(min_length=2, max_length=10)],
    "str_pattern": Annotated[str, Field(pattern=r"^[A-Z]{2}\d{4}$")],
    "str_pattern_max": Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=32)],
    "str_strict": pydantic.StrictStr,
    "int": int,
    "int_range": Annotated[int, Field(ge=1, le=100)],
    "int_exclusive": Annotated[int, Field(gt=0, lt=10)],
    "int_positive": pydantic.PositiveInt,
    "int_negative": pydantic.NegativeInt,
    "int_nonnegative": pydantic.NonNegativeInt,
    "int_multiple": Annotated[int, Field(multiple_of=3)],
    "int_multiple_range": Annotated[int, Field(multiple_of=5, ge=0, le=100)],
    "int64": Annotated[int, Field(ge=-(2**63), le=2**63 - 1)],
    "float": float,
    "float_range": Annotated[float, Field(ge=0, le=1)],
    "float_positive": pydantic.PositiveFloat,
    "float_exclusive": Annotated[float, Field(gt=0.0, lt=1e-3)],
    "float_multiple": Annotated[float, Field(multiple_of=0.5)],
    "float_finite": pydantic.FiniteFloat,
    "decimal": Decimal,
    "decimal_places": Annotated[Decimal, Field(max_digits=6, decimal_places=2)],
    "bool": bool,
    "none": None,
    "bytes": bytes,
    "date": date,
    "datetime": datetime,
    "datetime_aware": pydantic.AwareDatetime,
    "time": time,
    "timedelta": timedelta,
    "uuid": UUID,
    "uuid4": pydantic.UUID4,
    "path": Path,
    "any_url": pydantic.AnyUrl,
    "http_url": pydantic.HttpUrl,
    "postgres": pydantic.PostgresDsn,
    "ipv4": pydantic.IPvAnyAddress,
    "json": pydantic.Json,
    "secret": pydantic.SecretStr,
    "literal": Literal["a", "b"],
    "literal_one": Literal["a"],
    "literal_mixed": Literal["a", 1, True, None],
    "enum": Color,
    "enum_int": Level,
    "optional": str | None,
    "optional_bounded": Annotated[str, Field(max_length=20)] | None,
    "union": int | str,
    "union_models": Point | Dog,
    "discriminated": Annotated[Cat | Dog, Field(discriminator="kind")],
    "list": list[int],
    "list_bounds": Annotated[list[str], Field(min_length=1, max_length=3)],
    "list_models": list[Point],
    "set": set[str],
    "frozenset": frozenset[int],
    "tuple": tuple[int, str],
    "tuple_any": tuple[int, ...],
    "tuple_empty": tuple[()],
    "named_tuple": Pair,
    "dict": dict[str, int],
    "dict_any": dict[str, Any],
    "dict_enum": dict[Color, int],
    "dict_pattern": dict[Annotated[str, Field(pattern="^[a-z]+$")], int],
    "dict_uuid": dict[UUID, str],
    "dict_bounds": Annotated[dict[str, int], Field(min_length=1)],
    "dict_literal": dict[Literal["x", "y"], float],
    "typed_dict": Person,
    "model": Point,
    "model_closed": Closed,
    "model_open": Open,
    "model_recursive": Node,
    "model_everyday": Everyday,
    "any": Any,
    "object_any": dict,
    "list_any": list,
    "nested": dict[str, list[dict[str, Point | None]]],
    "with_examples": Annotated[
        str, Field(examples=["a"], title="T", json_schema_extra={"x-ui": 1})
    ],
    "deprecated": Annotated[int, Field(deprecated=True)],
}


class OldPoint(v1.BaseModel):
    x: float
    y: float = 0.0


class OldClosed(v1.BaseModel):
    a: str

    class Config:
        extra = "forbid"


class OldNode(v1.BaseModel):
    value: int
    next: OldNode | None = None


OldNode.update_forward_refs()

OLD: dict[str, Any] = {
    "str": (str, ...),
    "str_bounds": (str, v1.Field(..., min_length=1, max_length=80)),
    "str_regex": (str, v1.Field(..., regex="^[a-z]+$")),
    "int_bounds": (int, v1.Field(..., gt=0, le=10)),
    "float_bounds": (float, v1.Field(..., ge=0.5)),
    "literal": (Literal["cat"], ...),
    "enum": (Color, ...),
    "enum_default": (Color, Color.RED),
    "optional": (int | None, None),
    "model": (OldPoint, ...),
    "model_described": (OldPoint, v1.Field(..., description="where")),
    "model_closed": (OldClosed, ...),
    "list": (list[OldPoint], v1.Field(..., min_items=1, max_items=3)),
    "set": (set[int], ...),
    "tuple": (tuple[int, str], ...),
    "dict": (dict[str, OldPoint], ...),
    "dict_enum": (dict[Color, int], ...),
    "url": (v1.HttpUrl, ...),
    "uuid": (UUID, ...),
    "datetime": (datetime, ...),
    "timedelta": (timedelta, ...),
    "recursive": (OldNode, ...),
    "union": (int | OldPoint, ...),
    "extra": (int, v1.Field(..., widget="slider")),
}


def pydantic_schemas() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {name: TypeAdapter(kind).json_schema() for name, kind in TYPES.items()}
        for name, field in OLD.items():
            made[f"v1_{name}"] = v1.create_model("Answer", value=field).schema()
    return made


def zod_schemas(npm: str) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([npm, "install", "--silent", *PACKAGES], cwd=folder, check=True)
        script = shutil.copy(HERE / "generate_schemas.mjs", folder)
        text = subprocess.run(["node", script], capture_output=True, check=True).stdout
    written: dict[str, dict[str, Any]] = json.loads(text)
    return written


def main() -> None:
    written = {"pydantic": pydantic_schemas()}
    npm = shutil.which("npm")
    if npm is None:
        print("there is no npm here: zod's schemas stay as they are")
    else:
        written |= zod_schemas(npm)
    DATA.mkdir(parents=True, exist_ok=True)
    for name, schemas in written.items():
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in schemas.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (DATA / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(schemas)} schemas")


if __name__ == "__main__":
    main()
