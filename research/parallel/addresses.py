"""Addresses of hosts, HOST:PORT, with IPv6 in brackets."""

import ipaddress
import socket

from research.core.errors import UserError


def split_address(address: str, setting: str) -> tuple[str, int]:
  """Splits 'host:port' or '[IPv6 address]:port'.

  Args:
    address: the address of process 0.
    setting: the flag or variable that set it, for messages.

  Raises:
    UserError: it has neither form.
  """
  host, _, port = address.rpartition(':')
  bare = host.removeprefix('[').removesuffix(']')
  if not bare or bare.strip() != bare or '/' in bare:
    raise UserError(f'{setting} must be host:port of process 0.')
  if ':' in bare and (bare == host or not _is_ipv6(bare)):
    raise UserError(f'{setting}: write an IPv6 address in brackets, as in [::1]:8476.')
  if not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
    raise UserError(f'{setting}: the port {port!r} must be a number from 1 to 65535.')
  return bare, int(port)


def _is_ipv6(host: str) -> bool:
  try:
    ipaddress.IPv6Address(host)
  except ValueError:
    return False
  return True


def unknown_name(host: str) -> str:
  """Returns a clause for a message if a host's name has no address, else ''."""
  try:
    socket.getaddrinfo(host, None)
  except OSError as error:
    return f'; {host}: {error.strerror}'
  return ''
