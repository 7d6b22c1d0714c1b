"""A server in this process with a scripted engine, for every test of this floor."""

from __future__ import annotations

from makers.api_fixtures import address as address
from makers.api_fixtures import engine as engine
from makers.api_fixtures import http as http
from makers.api_fixtures import settings as settings
