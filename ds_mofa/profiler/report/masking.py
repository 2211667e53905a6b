"""Secrets of a command line, which reports show: they are handed on, and attached to issues."""

import re
from collections.abc import Sequence

__all__ = ["MASK", "masked"]

MASK = "***"

_SECRET = {
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd", "credential", "credentials", "bearer",
}  # fmt: skip
_SECRET_AT_THE_END = {"token", "key", "apikey", "accesskey", "auth", "pass"}  # --num_key_value_heads is none
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_IN_A_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password
_BY_SHAPE = re.compile(r"\b(hf_|ghp_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{16,}")  # tokens that say what they are


def masked(words: Sequence[str]) -> list[str]:
    """A command line with the values of options masked whose names hold token, key, secret, password and the like.

    The values of ``--hub_token X``, ``--hub-token=X`` and ``hubToken=X``, every word up to the next option; besides
    them user and password of a URL, and what has the shape of a token, wherever it stands.
    """
    result, secret = [], False
    for word in map(str, words):
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            secret = _is_secret(name) and not equals
            result.append(f"{name}={MASK}" if equals and _is_secret(name) else _without(word))
        elif secret:
            result.append(MASK)
        else:
            result.append(f"{name}={MASK}" if equals and _is_secret(name) else _without(word))
    return result


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    return bool(words) and (words[-1] in _SECRET_AT_THE_END or not _SECRET.isdisjoint(words))


def _without(word: str) -> str:
    return _BY_SHAPE.sub(rf"\1{MASK}", _IN_A_URL.sub(MASK, word))
