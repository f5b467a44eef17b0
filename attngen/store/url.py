"""URLs of database servers: which driver they take, and how they are shown. A password is never printed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from attngen.errors import StoreError

SCHEMES = ("postgresql", "postgres")
DRIVERS = ("psycopg", "psycopg2")  # the first that is installed serves a URL that names none
FLEET = "pip install 'attngen[fleet]'"
NO_SQLALCHEMY = f"needs SQLAlchemy, which is not installed: {FLEET}"


def is_url(place: object) -> bool:
    """Whether a text is a server's URL; anything else is a file's path."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.]*://", place) is not None


def shown(place: object) -> str:
    """A path as it is, a URL with *** for its password, wherever in the URL that stands."""
    if not is_url(place):
        return str(place)
    text = str(place)
    try:
        parts = urlsplit(text)
        user, at, host = parts.netloc.rpartition("@")
        name, colon, _ = user.partition(":")
        query = [(key, "***" if "pass" in key.lower() else value) for key, value in parse_qsl(parts.query)]
    except ValueError:
        return f"{text.partition('://')[0]}://***"
    netloc = f"{name}{colon and ':***'}{at}{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, urlencode(query, safe="*/"), ""))


def engine_url(text: str) -> Any:
    """SQLAlchemy's URL with a driver that is installed: by itself SQLAlchemy 2.0 takes `postgresql://` to mean psycopg2, and 2.1
    to mean psycopg 3. Raises StoreError that names what is missing or wrong, and the fix.
    """
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ModuleNotFoundError as problem:
        raise StoreError(f"{shown(text)}: {NO_SQLALCHEMY}") from problem
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as problem:
        raise StoreError(f"{shown(text)}: is no URL; expected postgresql://USER:PASSWORD@HOST/DATABASE") from problem
    scheme, _, driver = url.drivername.partition("+")
    if scheme not in SCHEMES:
        return url
    found = next((name for name in ([driver] if driver else DRIVERS) if find_spec(name)), None)
    if found is None:
        raise StoreError(f"{shown(text)}: needs the driver {driver or DRIVERS[0]}, which is not installed: {FLEET}")
    return url.set(drivername=f"postgresql+{found}")
