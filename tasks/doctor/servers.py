"""Checks of the servers that a run may use: the hub, Prefect, Ray. nothing is started, no answer long awaited.

What is refused is told apart: an address without a server, a server that says nothing, another kind of server, and a
password or token that is missing or not the right one. Passwords and tokens are never shown.
"""

import os
import re
import ssl
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import httpx
from pydantic import ValidationError

from negcore.errors import RunError, one_line
from negcore.findings import Finding
from tasks.pool.ray_session import check_reachable

ANSWER_S = 3.0
"""Limit for every step of an answer: to connect, to send, to receive."""
_VERSION = re.compile(r"\d+\.\d+[0-9A-Za-z.+-]*")


# The hub


def check_hub() -> Iterator[Finding]:
    """Ask the hub, through the proxy if one is set, and let it look at the token if there is one."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to fetch models and datasets"
        yield Finding("hub", "good", "HF_HUB_OFFLINE is set: only models that are here can be used", advice)
        return
    where = f"{constants.ENDPOINT}{_through(constants.ENDPOINT)}"
    offline = "HF_HUB_OFFLINE=1 says so at once; otherwise set HTTPS_PROXY or HF_ENDPOINT, or fetch models elsewhere"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(timeout=ANSWER_S, follow_redirects=True) as client:
            answer = client.get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:
        yield Finding("hub", "look", f"{where} {_silence(error)}: only models that are here can be used", offline)
        return
    if answer.status_code == 407 or answer.status_code >= 500:
        yield Finding("hub", "look", f"{where} answers {answer.status_code} {answer.reason_phrase}", offline)
    elif token and answer.status_code == 401:
        advice = "hf auth login, or set HF_TOKEN; without any token, public models can be had"
        yield Finding("hub", "bad", f"{where} answers, but does not know your token", advice)
    else:
        yield Finding("hub", "good", f"{where} answers{', and knows your token' if token else ''}")


def _through(url: str) -> str:
    """Name the proxy that an address is asked through, without the password that may be in it."""
    host = urlsplit(url).hostname or ""
    proxies = getproxies_environment()
    proxy = proxies.get(urlsplit(url).scheme) or proxies.get("all")
    if not proxy or proxy_bypass(host):
        return ""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return f" (through the proxy {parts.hostname}:{parts.port})"


def _silence(error: Exception) -> str:
    """Tell how a server did not answer."""
    if isinstance(error, httpx.ConnectTimeout):
        return f"cannot be reached within {ANSWER_S:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"takes the connection, but says nothing within {ANSWER_S:g} s"
    return f"cannot be reached ({one_line(error):.120})"


# Prefect


def check_prefect() -> Iterator[Finding]:
    """Ask the configured Prefect server; without one, every run starts a private server."""
    try:
        from prefect.settings import PREFECT_API_URL

        url = PREFECT_API_URL.value()
    except ValidationError as error:  # of a variable or the profile
        advice = "mend the PREFECT_ variables or the profile (prefect config view)"
        yield Finding("Prefect", "bad", f"its settings cannot be read: {error.errors()[0]['msg']}", advice)
        return
    if not url:
        yield Finding("Prefect", "good", "no server is configured: every run starts a private one, and ends it")
        return
    yield _prefect(url.rstrip("/"))


def _prefect(url: str) -> Finding:
    instead = "start that server, or unset PREFECT_API_URL (prefect config unset PREFECT_API_URL) for a private one"
    try:
        with _prefect_client() as client:
            # Health is told to everybody; these are told to those who may ask.
            answer = (
                client.post(f"{url}/flows/count", json={}) if _is_cloud(url) else client.get(f"{url}/admin/version")
            )
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        return Finding("Prefect", "bad", f"{url} {_silence(error)}", instead)
    if answer.status_code in (401, 403):
        return Finding("Prefect", "bad", f"{url} {_refusal()}", f"{_secret()}, as the server's own setting says")
    there, here = answer.text.strip().strip('"'), version("prefect")
    if not answer.is_success or not (_is_cloud(url) or _VERSION.fullmatch(there)):
        advice = "the address ends in /api" if not url.endswith("/api") else instead
        found = f"{url} answers {answer.status_code} {answer.reason_phrase}: no Prefect API is there"
        return Finding("Prefect", "bad", found, advice)
    if not _is_cloud(url) and there != here:
        return Finding(
            "Prefect", "look", f"{url} answers; it is {there}, and here is {here}", "use one version of both"
        )
    return Finding("Prefect", "good", f"{url} answers, {here}{'' if _is_secret_set() else ', without a password'}")


def _prefect_client() -> httpx.Client:
    """Return a client that asks as Prefect's own does, but gives up soon."""
    from prefect import settings

    headers = dict(settings.PREFECT_CLIENT_CUSTOM_HEADERS.value() or {})
    auth = None
    if password := settings.PREFECT_API_AUTH_STRING.value():
        user, _, word = _plain(password).partition(":")
        auth = httpx.BasicAuth(user, word)
    elif key := settings.PREFECT_API_KEY.value():
        headers["Authorization"] = f"Bearer {_plain(key)}"
    unchecked = settings.PREFECT_API_TLS_INSECURE_SKIP_VERIFY.value()
    verify = not unchecked and ssl.create_default_context(cafile=settings.PREFECT_API_SSL_CERT_FILE.value())
    return httpx.Client(headers=headers, auth=auth, verify=verify, timeout=ANSWER_S, follow_redirects=True)


def _plain(secret: Any) -> str:
    return str(secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret)


def _is_cloud(url: str) -> bool:
    from prefect.settings import PREFECT_CLOUD_API_URL

    return url.startswith(PREFECT_CLOUD_API_URL.value())


def _is_secret_set() -> bool:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    return bool(PREFECT_API_AUTH_STRING.value() or PREFECT_API_KEY.value())


def _secret() -> str:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    uses_key = PREFECT_API_KEY.value() and not PREFECT_API_AUTH_STRING.value()
    return f"set PREFECT_API_{'KEY' if uses_key else 'AUTH_STRING (user:password)'}"


def _refusal() -> str:
    if _is_secret_set():
        return "answers, but does not take the password or key that is set here"
    return "answers, but asks for a password, and none is set here"


# Ray


def check_ray() -> Iterator[Finding]:
    """Ask the head of the configured Ray cluster; without one, every run starts a private Ray."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        yield Finding("Ray", "good", "no cluster is configured: every run starts a private one, and ends it")
        return
    known = _started_here() if address == "auto" else address
    if known is None:
        advice = "ray start --head, or unset RAY_ADDRESS for a private one"
        yield Finding("Ray", "bad", "RAY_ADDRESS is 'auto', but no cluster was started on this machine", advice)
        return
    yield _ray(known)


def _started_here() -> str | None:
    """Return the address that the last `ray start` on this machine left."""
    try:
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _ray(address: str) -> Finding:
    instead = "start the cluster, or unset RAY_ADDRESS for a private one"
    try:
        check_reachable(address, ANSWER_S)
    except RunError as error:
        return Finding("Ray", "bad", str(error), instead)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return Finding("Ray", "look", f"{address} takes connections; with RAY_USE_TLS no more is asked here")
    token = _ray_token()
    if _asks_token() and token is None:
        advice = "set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_TOKEN"
        return Finding("Ray", "bad", "RAY_AUTH_MODE is 'token', but there is no token here", advice)
    return _answer_of_head(address, token if _asks_token() else None)


def _answer_of_head(address: str, token: str | None) -> Finding:
    """Ask a head whether it lives, as a node of its cluster does, without importing Ray."""
    import grpc

    said = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply: bytes = channel.unary_unary(_CHECK_ALIVE)(b"", timeout=ANSWER_S, metadata=said)
        except grpc.RpcError as error:
            is_refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            return _refused_token(address, token) if is_refused else _no_head(address, error)
    there, here = _version_in(reply), version("ray")
    if there != here:
        return Finding(
            "Ray", "bad", f"{address} is Ray {there}, and here is {here}", "install the same version on both"
        )
    if token is None:
        advice = "set RAY_AUTH_MODE=token on every side: everybody who reaches the head can run programs there"
        return Finding("Ray", "look", f"{address} answers, Ray {there}, and asks for no token", advice)
    return Finding("Ray", "good", f"{address} answers, Ray {there}, and takes the token")


_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def _refused_token(address: str, token: str | None) -> Finding:
    if token is None:
        advice = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        return Finding("Ray", "bad", f"{address} asks for a token, and RAY_AUTH_MODE is not 'token' here", advice)
    advice = "take the token of the head: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token"
    return Finding("Ray", "bad", f"{address} does not take the token that is set here", advice)


def _no_head(address: str, error: Any) -> Finding:
    import grpc

    silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    how = (
        f"says nothing within {ANSWER_S:g} s"
        if silent
        else f"is no head of Ray ({' '.join(error.details().split()):.80})"
    )
    advice = "RAY_ADDRESS is host:port of the head, 6379 if it was told no other (not the dashboard's 8265)"
    return Finding("Ray", "bad", f"{address} takes connections, but {how}", advice)


def _version_in(reply: bytes) -> str:
    """Return field 2, a string, of the reply to `CheckAlive`."""
    found = re.search(rb"\x12." + b"(" + _VERSION.pattern.encode() + b")", reply, re.DOTALL)
    return found[1].decode() if found else "of an unknown version"


def _asks_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _ray_token() -> str | None:
    """Return the token that Ray would send, looked for where Ray looks."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    try:
        file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        return Path(file).expanduser().read_text().strip() or None
    except (OSError, RuntimeError, ValueError):
        return None
