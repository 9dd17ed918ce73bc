"""The way to the Hugging Face hub: requests that no answer can stall or flood, patience, and what the user has set.

Whatever fails is one sentence with the next step: that of the hub, of the network, or of a variable of the environment.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from numoe.quant.errors import InputError

_RETRY_WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try; any progress begins the row anew
_FIRST_TRIES = 3  # so many of them when the hub has not answered at all yet
# There is no network, or nobody at that address: that seldom passes while one waits.
_NOBODY = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
_LONGEST_WAIT = 300  # seconds that the hub may ask for at a time: the window of its rate limits
_SLOW_S, _SLOW_RATE = 60, 1000  # an answer that gives fewer bytes a second for so long is cut
_REDIRECTS = 10
_HUB = "https://huggingface.co"

Wait = Callable[[float, str], object]
"""Called with the seconds to let pass before another try, and what to tell of that."""
_Answer = TypeVar("_Answer")


class HubError(InputError):
    """The hub cannot be asked, or does not give what it is asked for; nothing that is wrong with a model."""


class NoSuchRevision(HubError):
    """A repository does not have a branch, tag or commit, or no longer."""


def sleep(seconds: float, telling: str) -> None:
    """A `Wait` that tells nothing."""
    time.sleep(seconds)


@dataclass
class Passing(Exception):
    """What goes wrong and may be over soon."""

    problem: str
    """What it is, in a few words."""
    remedy: str
    asked: float = 0
    """Seconds that the hub asks to wait."""
    tries: int = len(_RETRY_WAITS)
    first_tries: int = len(_RETRY_WAITS)
    """When the hub has not given anything yet."""


def patiently(
    attempt: Callable[[], _Answer], wait: Wait, progress: Callable[[], int] = lambda: 0, known: bool = True
) -> _Answer:
    """attempt(), tried again while it fails in a way that passes.

    progress: bytes that are there; once they grow, patience is new.
    known: whether the hub has answered earlier.

    Raises:
        HubError: it fails in another way or for too long.
    """
    tries, before = 0, progress()
    while True:
        try:
            return attempt()
        except Passing as error:
            if progress() > before:
                tries, before = 0, progress()
            if tries >= (error.tries if known else min(error.tries, error.first_tries)):
                raise HubError(f"{error.problem}; {error.remedy}") from error
            seconds = max(_RETRY_WAITS[tries], error.asked)
            wait(seconds, f"{error.problem}; trying again in {seconds:.0f} s")
            tries += 1


@contextmanager
def ask(path: str, repo_id: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The response of httpx or httpx2, as the version of huggingface_hub has it; its status is 200, 206 or 416.

    416 only where a Range was asked for. Redirects are followed here, as httpx would read the whole body of each.

    Raises:
        HubError: the hub refuses, or it cannot be asked.
        Passing: that may be over soon.
    """
    endpoint, hf = _endpoint(), library()
    headers = _headers() | dict(headers or {})
    client = _client()
    http = __import__(hf.errors.HTTPError.__module__)
    try:
        request = client.build_request(
            "GET",
            endpoint + path,
            headers=headers,
            timeout=min(max(0.01, hf.constants.HF_HUB_DOWNLOAD_TIMEOUT), 600),
        )
        for _ in range(_REDIRECTS):
            with closing(client.send(request, stream=True, follow_redirects=False)) as response:
                if response.next_request is not None:
                    request = response.next_request
                    if request.url.scheme not in ("http", "https"):
                        raise HubError(f"{hub_name()} sends on to {said(request.url.scheme)}://; {CHECK_HUB}")
                    continue
                if response.status_code not in (200, 206) and not (response.status_code == 416 and "Range" in headers):
                    raise _refusal(response, repo_id)
                packed = response.headers.get("Content-Encoding", "identity").strip().lower()
                if packed not in ("", "identity", "gzip", "deflate"):  # one layer of these is unpacked piece by piece
                    raise HubError(
                        f"{hub_name()} sends its files packed ({said(packed)}), which it was asked not to; {CHECK_HUB}"
                    )
                yield response
                return
        raise HubError(f"{hub_name()} sends on from address to address without an end; {CHECK_HUB}")
    except hf.errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"the hub is not asked about {repo_id}, as HF_HUB_OFFLINE is set; unset it and try again"
        ) from error
    except http.DecodingError as error:
        raise foreign(path.rpartition("/")[2], said(error)) from error
    except (http.HTTPError, http.InvalidURL, http.CookieConflict, UnicodeError) as error:
        raise _trouble(error, http) from error


def blocks(response: Any) -> Iterator[bytes]:
    """The body of a response, unless it comes so slowly that it would take for ever."""
    began, count = time.monotonic(), 0
    for block in response.iter_bytes():
        yield block
        count += len(block)
        seconds = time.monotonic() - began
        if seconds > _SLOW_S and count < seconds * _SLOW_RATE:
            raise cut(f"{count} bytes came in {seconds:.0f} seconds")


CHECK_HUB = "check the network and HF_ENDPOINT"


def foreign(name: str, reason: str) -> Passing:
    """What answers is something else: a page to log in, a broken proxy or mirror."""
    return Passing(
        f"what answers at {hub_name()} for {said(name)} is not that file ({reason})",
        "log in to the network if a browser shows that it wants that, check HF_ENDPOINT, and try again: what is here "
        "is kept",
        tries=1,
    )


def cut(reason: str, **patience: int) -> Passing:
    """There is no connection, or no longer."""
    variable = _proxy_variable()
    by, check = (f" by the proxy of {variable}", f"check {variable}, or ") if variable else ("", "")
    return Passing(
        f"the connection to {hub_name()}{by} fails ({reason})",
        f"{or_endpoint()}{check}check the network and try again: what is here is kept",
        **patience,
    )


def _trouble(error: Exception, http: ModuleType) -> HubError | Passing:
    """What stops a request on its way."""
    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    passing = isinstance(error, http.TransportError) and not isinstance(
        error, http.UnsupportedProtocol | http.LocalProtocolError
    )
    if isinstance(error, http.ProxyError):
        passing = re.match(r"(5\d\d|429)\b", str(error)) is not None
    tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return HubError(
            f"the certificate of {hub_name()} is not trusted ({said(tls.verify_message)}); if your network has one of "
            "its own, give its file in SSL_CERT_FILE"
        )
    if tls is not None and tls.reason in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST"):
        passing = False
    trouble = cut(said(error) or "it is cut", first_tries=_FIRST_TRIES)
    nameless = any(isinstance(cause, socket.gaierror) for cause in causes)
    if nameless or any(isinstance(cause, OSError) and cause.errno in _NOBODY for cause in causes):
        trouble.first_tries = 0 if nameless and os.environ.get("HF_ENDPOINT") else 1
    return trouble if passing else HubError(f"{trouble.problem}; {trouble.remedy}")


def _refusal(response: Any, repo_id: str) -> HubError | Passing:
    """An answer without content as a sentence with the next step."""
    host, status = hub_name(), response.status_code
    code, reason = (said(response.headers.get(f"X-Error-{key}", "")) for key in ("Code", "Message"))
    signed = "authorization" in response.request.headers
    if status == 511:
        return HubError(f"the network wants you to log in before it lets {host} through; do so in a browser")
    if status == 407:
        return HubError(
            f"the proxy of {_proxy_variable() or 'the system'} wants a name and password; write them into it as "
            "http://NAME:PASSWORD@HOST:PORT"
        )
    if status in (408, 425, 429) or status >= 500:
        return Passing(
            f"{host} answers {repo_id} with status {status}",
            "try again later: what is here is kept",
            _asked_wait(response.headers),
        )
    if code == "GatedRepo" and not (signed and status == 401):
        return HubError(
            f"{repo_id} is gated: accept its licence at {host}/{repo_id}, log in with `hf auth login` and try again"
        )
    if code == "RevisionNotFound" and "/resolve/" in response.url.path:
        return NoSuchRevision(f"{repo_id} was changed meanwhile, and its commit of before is gone; repeat the command")
    if code == "RevisionNotFound":
        return NoSuchRevision(f"{repo_id} has no such revision; see {host}/{repo_id}/tree/main for those it has")
    if code == "EntryNotFound":
        return HubError(f"{repo_id} lacks a file that it lists; try again later")
    if signed and status == 401:
        return HubError(
            f"{host} does not accept {_token_source()}{f' ({reason})' if reason else ''}; remove it, or log in anew "
            "with `hf auth login`"
        )
    if code == "RepoNotFound" or status in (401, 404):
        return HubError(
            f'{host} has no repository "{repo_id}", or it is private; {or_endpoint()}check the spelling, or log in '
            "with `hf auth login` if you may see it"
        )
    if status == 403:
        way = f" with {_token_source()}; take one that may" if signed else "; log in with `hf auth login`"
        return HubError(f"{host} does not let you read {repo_id}{way} and try again")
    return HubError(
        f"{host} answers {repo_id} with status {status}{f' ({reason})' if reason else ''}; "
        f"{or_endpoint()}try again later: what is here is kept"
    )


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that the hub asks to wait, in any way there is of saying so; 0: it does not."""
    after = headers.get("Retry-After", "").strip()
    seconds = 0.0
    if limit := re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", "")):
        seconds = float(limit[1]) + 1
    elif after.isdecimal():
        seconds = float(after)
    elif after:
        try:
            seconds = parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0  # no date either
    return max(0.0, min(seconds, _LONGEST_WAIT))


# ------------------------------------------------------------------------------------- what the user has set


def _endpoint() -> str:
    """The address of the hub. Raises HubError when HF_ENDPOINT is none."""
    # huggingface_hub reads it once, when it is imported.
    address = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    if not address:
        return _HUB
    fault = None
    try:
        parts = urlsplit(address)
        labels = (parts.hostname or "").rstrip(".").split(".")
        if parts.port == 0 or "@" in parts.path + parts.query + parts.fragment:
            fault = "has a wrong port, or signs in its password that must be written as %XX"
        elif any(mark in address for mark in "\"'`“”‘’<>") or not address.isprintable() or " " in address:
            fault = "has quotes or spaces in it"
        elif "://" not in address:
            fault = "lacks the https:// before it"
        elif parts.scheme not in ("http", "https"):
            fault = "begins neither with https:// nor with http://"
        elif ":" not in (parts.hostname or "") and not all(0 < len(label) < 64 for label in labels):
            fault = "names no host"
        elif parts.query or parts.fragment or "?" in address or "#" in address:
            fault = "has more after the host"
    except ValueError:  # which may tell the password
        fault = "is no address"
    if fault:
        before, _, shown = address.rpartition("@")
        shown = re.sub("[?#].*", "?...", shown)  # where some put a token
        if (fault == "is no address" and not before) or re.search("[?#]", before):
            shown = "..."  # what is in place of the port, or before the name of the host, may be a password
        raise HubError(f'HF_ENDPOINT ("{said(shown)}") {fault}; write it as https://HOST, or unset it')
    return address


def hub_name() -> str:
    """The address of the hub to show, without a name and password."""
    return said(_endpoint())


def or_endpoint() -> str:
    """The beginning of a next step where HF_ENDPOINT may be to blame."""
    return "check HF_ENDPOINT, or " if os.environ.get("HF_ENDPOINT") else ""


def library() -> ModuleType:
    """huggingface_hub, which reads a dozen variables of the environment when it is imported."""
    _endpoint()
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ValueError as error:
        raise HubError(
            f"huggingface_hub does not start ({said(error)}); correct or unset the variables HF_* of the environment"
        ) from error
    return huggingface_hub


def _headers() -> dict[str, str]:
    """Who asks. (`build_hf_headers` of huggingface_hub would ask the hub for something else before.)"""
    hf = library()
    headers = {"User-Agent": f"numoe; hf_hub/{hf.__version__}", "Accept-Encoding": "identity"}
    try:
        token = None if hf.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else hf.get_token()
    except Exception as error:
        raise HubError(
            f"{_token_source()} cannot be read ({type(error).__name__}: {said(error)}); remove it, or log in anew "
            "with `hf auth login`"
        ) from error
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise HubError(
            f"{_token_source()} has characters that no token has; copy it anew, or log in anew with `hf auth login`"
        )
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _token_source() -> str:
    """What proves to the hub who asks, and where that is from."""
    if urlsplit(_endpoint()).username:
        return "the name and password of HF_ENDPOINT"
    for variable in ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable, "").strip():
            return f"the token of {variable}"
    return f"the token in {library().constants.HF_TOKEN_PATH}"


_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def _client() -> Any:
    """The one client of the process, which is made from all variables for proxies and certificates."""
    try:
        return library().utils.get_session()
    except Exception as error:
        for name, value in os.environ.items():
            if name.lower() in _PROXIES and (fault := _proxy_fault(value)):
                raise HubError(f"{name} cannot be used as a proxy: {fault}, or unset it") from error
        of_certificates = "ssl_cert_file", "ssl_cert_dir", "sslkeylogfile"
        names = of_certificates if isinstance(error, OSError) else (*_PROXIES, "no_proxy")
        known = [name for name in os.environ if name.lower() in names]
        raise HubError(
            f"there is no way to the network ({type(error).__name__}: {said(error)}); correct or unset "
            f"{', '.join(known) or 'the proxy in the settings of the system'}"
        ) from error


def _proxy_fault(address: str) -> str | None:
    """What is wrong with a proxy, and what to do."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host = parts.hostname if parts.port != 0 else None
        if " " in address or not (address.isascii() and address.isprintable()):
            raise ValueError
    except ValueError:
        return "it is no address; write it as http://HOST:PORT"
    if parts.scheme not in ("http", "https", "socks5", "socks5h"):
        return f"proxies of the kind {said(parts.scheme)}:// are not known; write it as http:// or socks5://HOST:PORT"
    if not host:
        return "it names no host; write it as http://HOST:PORT"
    if parts.scheme.startswith("socks") and find_spec("socksio") is None:
        return "SOCKS takes the package socksio; `pip install socksio`"
    return None


def _proxy_variable() -> str | None:
    """The variable of the proxy by which the hub is asked, if there is one."""
    parts = urlsplit(_endpoint())
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    proxies = getproxies()
    used = next((kind for kind in (parts.scheme, "all") if proxies.get(kind)), None)
    return next((name for name in os.environ if name.lower() == f"{used}_proxy"), None)


def said(text: object) -> str:
    """What others wrote, in a sentence of ours: on one line, not too long, without names and passwords of addresses."""
    line = re.sub(r"://[^/\s]*@", "://", " ".join(str(text).split()))
    return line if len(line) <= 200 else f"{line[:200]}..."
