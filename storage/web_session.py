"""A session of `requests` that does not read ~/.netrc and can be restricted to public addresses."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import unquote, urlsplit

from requests import PreparedRequest, Response, Session
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth
from requests.exceptions import InvalidURL
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection


class PrivateAddressError(ValueError):
    """A host has an address of this machine, of a private network or of the link."""


class _OwnCredentials(AuthBase):
    """Takes credentials from the URL only; by default `requests` also looks them up in ~/.netrc."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        parts = urlsplit(request.url or "")
        if parts.username is None or "Authorization" in request.headers:
            return request
        basic = HTTPBasicAuth(unquote(parts.username), unquote(parts.password or ""))
        signed: PreparedRequest = basic(request)
        return signed


class WebSession(Session):
    """A session that never reads ~/.netrc; proxies and certificates still come from the environment.

    Args:
        public_only: connect only to addresses of the public internet, also behind a redirect. A host name
            is resolved and checked before the connection is made; the address that was reached is checked
            again before a byte is sent, as the name may have changed its address. A proxy resolves the name
            itself, and decides itself what to allow.
    """

    def __init__(self, public_only: bool) -> None:
        super().__init__()
        self.auth = _OwnCredentials()
        self.public_only = public_only
        if public_only:
            self.mount("http://", _PublicAdapter())
            self.mount("https://", _PublicAdapter())

    def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
        """Drop the credentials on a redirect to another host."""
        assert response.request.url is not None
        assert prepared_request.url is not None
        if self.should_strip_auth(response.request.url, prepared_request.url):  # type: ignore[no-untyped-call]
            prepared_request.headers.pop("Authorization", None)


class _PublicAdapter(HTTPAdapter):
    """Connects only to public addresses."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Use connections that check their addresses."""
        super().init_poolmanager(*arguments, **options)
        manager: PoolManager = self.poolmanager
        manager.pool_classes_by_scheme = {"http": _PublicPool, "https": _PublicSecurePool}

    def send(self, request: PreparedRequest, *arguments: Any, **options: Any) -> Response:
        """Check the host name if a proxy makes the connection, as its address cannot be seen then."""
        host = urlsplit(request.url or "").hostname
        if not host:
            raise InvalidURL("no host")
        if options.get("proxies"):
            _check_name(host)
        return super().send(request, *arguments, **options)


class _PublicConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        _check_name(self.host)
        return _check_address(super()._new_conn())


class _PublicSecureConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        _check_name(self.host)
        return _check_address(super()._new_conn())


class _PublicPool(HTTPConnectionPool):
    ConnectionCls = _PublicConnection


class _PublicSecurePool(HTTPSConnectionPool):
    ConnectionCls = _PublicSecureConnection


def _check_name(host: str) -> None:
    """Raise PrivateAddressError if `host` is or resolves to an address that is not public."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return  # it cannot be reached either, except by a proxy
    for *_, address in found:
        if not is_public(str(address[0])):
            raise PrivateAddressError(host)


def _check_address(connection: socket.socket) -> socket.socket:
    address = str(connection.getpeername()[0])
    if not is_public(address):
        connection.close()
        raise PrivateAddressError(address)
    return connection


def is_public(address: str) -> bool:
    """Return whether an IP address is public; so must be an IPv4 address embedded in an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        embedded = [ip.sixtofour, ip.teredo[1] if ip.teredo else None]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
            embedded.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
        if any(v4 is not None and not is_public(str(v4)) for v4 in embedded):
            return False
    return ip.is_global and not ip.is_multicast
