"""Secrets in URLs: ${NAME} stands for a variable of the environment, and what is written down has no password."""

import base64
import os
import re
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from fastppo.checks import InputError
from fastppo.config_inputs import HIDDEN

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def redacted(url: str) -> str:
    """`url` without its user and password and the values of its query, but for ${NAME}, which is no secret."""
    if not url.lower().startswith(("http://", "https://")):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL at all: who knows where its secret is
        return url.partition("//")[0] + "//" + HIDDEN
    user, at, host = parts.netloc.rpartition("@")
    user = ":".join(map(_hidden, user.split(":")))
    pairs = (pair.partition("=") for pair in parts.query.split("&"))
    query = "&".join(f"{name}{equals}{_hidden(value)}" if equals else _hidden(name) for name, equals, value in pairs)
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query=query))


def filled(text: str, quoted: Callable[[str], str] = str) -> str:
    """`text` with the environment's values for ${NAME}, each through `quoted`.

    Raises:
        ValueError: the environment has no such variable.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(f"rewards.target needs {match[1]} in the environment, which is not set: export it")
        return quoted(os.environ[match[1]])

    return _VARIABLE.sub(value, text)


def request_parts(url: str) -> tuple[str, dict[str, str]]:
    """The URL to ask, and the headers that say who asks: user and password are not a part of what is asked for."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    who = base64.b64encode(filled(unquote(user)).encode()).decode()
    path, query = (filled(x, quote) for x in (parts.path, parts.query))
    asked = urlunsplit(parts._replace(netloc=filled(host), path=path, query=query))
    return asked, {"Authorization": f"Basic {who}"} if at else {}


def _hidden(value: str) -> str:
    return value if not value or _VARIABLE.fullmatch(value) else HIDDEN
