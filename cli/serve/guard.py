"""Who may ask at all: the Host and the Origin of a request, the key, and how large and slow it may be."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from numoe.cli.serve.fields import Refused
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError

LARGEST_BODY = 32 << 20
"""Bytes of a request: a million tokens are some five megabytes."""
BODY_SECONDS = 60.0
"""In which the whole of it has to come."""
HEAD_SECONDS = 15.0
"""In which its headers have to come."""
_DECIDING = ("host", "origin", "authorization", "x-api-key", "content-encoding")
_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Guard:
    """host: that is listened on. key: "" where none is needed. origins: of web pages that may ask; "*": any."""

    host: str
    key: str = ""
    origins: Collection[str] = ()

    def check(self, headers: dict[str, str], path: str) -> None:
        """Raises Refused for a request that is not to be answered; headers by their small names."""
        if is_loopback(self.host) and (name := _name(headers.get("host", ""))) not in (*_LOCAL, self.host):
            raise Refused(403, f"the Host {name!r:.80} is not this server's; ask by 127.0.0.1 or localhost")
        if (origin := headers.get("origin")) is not None and not self.welcomes(origin):
            raise Refused(403, "web pages of this origin may not ask; `numoe serve` names those that may")
        if self.key and path != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode("utf-8", "replace"), self.key.encode()):
                raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def welcomes(self, origin: str) -> bool:
        """Whether pages of an origin may ask."""
        return origin in self.origins or "*" in self.origins

    def cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of a welcome origin read the reply."""
        if origin is None or not self.welcomes(origin):
            return []
        told = {
            "access-control-allow-origin": origin,
            "access-control-allow-headers": "*, Authorization",
            "access-control-allow-methods": "GET, POST",
            "vary": "Origin",
        }
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in told.items()]


def once(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by their small names. Raises Refused for two of one that decides who may ask, or what is read."""
    found = {}
    for key, value in headers:
        name = key.decode("latin-1").lower()
        if name in found and name in _DECIDING:
            raise Refused(403, f"the request has two headers {name}")
        found[name] = value.decode("latin-1")
    if "content-length" in found and "transfer-encoding" in found:
        raise Refused(403, "the request has both Content-Length and Transfer-Encoding, which say where it ends")
    return found


def _name(host: str) -> str:
    """A Host header without its port, as far as it is one."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::[0-9]*)?", host)
    return (found[1] or found[2]).lower() if found else host


async def read_body(receive: Any, headers: dict[str, str]) -> Any:
    """The JSON of a request.

    Raises:
        Refused: it is packed, larger or slower than any that is meant, or no JSON.
    """
    if (length := headers.get("content-length", "0")).isdecimal() and int(length[:19]) > LARGEST_BODY:
        raise Refused(413, f"the request has more than {LARGEST_BODY >> 20} MiB")
    if (encoding := headers.get("content-encoding", "identity")) != "identity":
        raise Refused(415, f"the Content-Encoding {encoding!r:.40} is not read here; send the request as it is")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the request ended before its end")
                data += message.get("body", b"")
                if len(data) > LARGEST_BODY:
                    raise Refused(413, f"the request has more than {LARGEST_BODY >> 20} MiB")
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise Refused(408, f"the request did not come within {BODY_SECONDS:g} seconds") from None
    try:
        return parse_json(bytes(data), "the request", "send a JSON object", alike=False)
    except InputError as error:
        raise Refused(400, str(error)) from None
