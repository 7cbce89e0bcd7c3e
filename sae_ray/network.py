"""Who may be talked to without a token: only this machine. For the Ray that a run joins and for dashboards alike.

And by which interface of this machine others reach it.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import sys
from pathlib import Path

import psutil

from sae_ray.errors import UserError, printable

# As Ray looks for it.
TOKEN_FILE = Path("~/.ray/auth_token")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IP address; None: none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None


def check_token(host: str, where: str, trust: bool, how_to_trust: str) -> None:
    """Refuses to talk to another machine's Ray without a token: Ray runs what it is sent, whoever sends it.

    Args:
        where: key or option and its value, for errors.
        trust: talk to it nevertheless; `how_to_trust` says how to ask for that.
    Raises:
        UserError: `host` is not loopback and there is no token to send.
    """
    if is_loopback(host):
        return
    has_mode = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if not (has_mode or trust):
        raise UserError(
            f"{where}: whoever reaches a Ray cluster without tokens can run code on it; set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN, or say {how_to_trust} if nobody else reaches it"
        )
    if not has_mode:
        _warn_of_trust(where)
    elif not has_token():
        raise UserError(
            f"{where}: RAY_AUTH_MODE is token and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it "
            f"into {TOKEN_FILE}"
        )


@functools.cache
def _warn_of_trust(where: str) -> None:
    """Once, however often it is looked at."""
    warning = f"warning: {where}: without a token, whoever reaches this cluster can run code on it"
    print(f"sae-ray: {printable(warning)}", file=sys.stderr)


def has_token() -> bool:
    """Whether Ray would find a token here."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else TOKEN_FILE.expanduser()
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
