"""The object that clients with structured answers ask for."""

from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=16)
    country: str = Field(max_length=16)
