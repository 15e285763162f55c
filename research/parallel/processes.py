"""Joins several processes to one job: they find each other, wait for each other, and compare their devices.

Call `initialize` before any code that uses jax's devices. Every wait has a time limit, after which an error
names the missing processes.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import os
import socket
import time
from collections.abc import Mapping

from research.core.errors import UserError, first_line
from research.core.text import tell
from research.parallel.addresses import split_address, unknown_name

TIMEOUT = 300.0  # seconds that hosts wait for each other at start-up
_count = itertools.count()  # makes every key unique: jax's store can set a key only once


@dataclasses.dataclass(frozen=True)
class Cluster:
  """How the processes of a job find each other.

  Without a coordinator jax gets the rest from the cluster (Slurm, TPU VM, GKE).

  Attributes:
    source: where these settings come from, for messages.
    coordinator: host:port of process 0.
    processes: the number of processes.
    process: the number of this process.
  """

  source: str
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


def find(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  env: Mapping[str, str] | None = None,
) -> Cluster | None:
  """Returns the cluster that flags or the environment describe; None for a single process.

  Flags come first (`--num_processes=1` means a single process), then the variables of Ray Train and torchrun
  (MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK), then a Slurm step of several tasks, then a TPU.

  Raises:
    UserError: some of the flags or variables are missing, or contradict each other.
  """
  env = os.environ if env is None else env
  flags = {'coordinator': coordinator, 'num_processes': processes, 'process_id': process}
  if any(value is not None for value in flags.values()):
    if processes == 1:
      return None
    missing = [f'--{name}' for name, value in flags.items() if value is None]
    if missing:
      raise UserError(f'{missing[0]} is missing: a job of several processes needs all of --coordinator, '
                      '--num_processes and --process_id.')  # fmt: skip
    if processes < 1:
      raise UserError(f'--num_processes={processes} must be 1 or more.')
    if not 0 <= process < processes:
      raise UserError(f'--process_id={process} must be from 0 to {processes - 1}.')
    split_address(coordinator, f'--coordinator={coordinator}')
    return Cluster('flags', coordinator, processes, process)
  if _whole(env, 'WORLD_SIZE', 1) > 1:
    return _of_torchrun(env)
  if _whole(env, 'SLURM_STEP_NUM_TASKS', 1) > 1:
    return Cluster('Slurm')
  if env.get('JAX_PLATFORMS', 'tpu').startswith('tpu') and _has_tpu():
    return Cluster('TPU')
  return None


def _of_torchrun(env: Mapping[str, str]) -> Cluster:
  """Returns the cluster that the variables of Ray Train and torchrun describe."""
  count = _whole(env, 'WORLD_SIZE', 1)
  missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT', 'RANK') if not env.get(name)]
  if missing:
    raise UserError(
      f'WORLD_SIZE={count} is set without {missing[0]}: unset it, or set all of MASTER_ADDR, MASTER_PORT, '
      'WORLD_SIZE and RANK.'
    )
  rank = _whole(env, 'RANK', 0, least=0)
  if rank >= count:
    raise UserError(f'RANK={rank} must be from 0 to {count - 1}, for WORLD_SIZE={count}.')
  host = env['MASTER_ADDR']
  port = env['MASTER_PORT']
  # torchrun sets a bare IPv6 address; in host:port it needs brackets.
  address = f'[{host}]:{port}' if ':' in host and not host.startswith('[') else f'{host}:{port}'
  split_address(address, f'MASTER_ADDR={host}, MASTER_PORT={port}')
  return Cluster('WORLD_SIZE and RANK', address, count, rank)


def _whole(env: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
  """Returns a variable that must be a whole number; `default` if it is not set."""
  text = env.get(name) or str(default)
  if not text.strip().isascii() or not text.strip().isdigit() or int(text) < least:
    raise UserError(
      f'{name}={text} must be a whole number, {least} or more; unset it if there is no cluster.'
    )
  return int(text)


def _has_tpu() -> bool:
  chips = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and importlib.util.find_spec('libtpu') is not None


def initialize(cluster: Cluster | None, timeout: float = TIMEOUT, log=tell) -> None:
  """Joins the job, and checks that all processes have joined and have equal devices.

  Args:
    cluster: from `find`; None only checks the devices of this process.
    timeout: seconds to wait for the others.
    log: called with a line about the job.

  Raises:
    UserError: a process is missing, or a host has other devices. The message names it.
  """
  import jax

  from research.parallel.dispatch import run_one_program_at_once

  run_one_program_at_once()
  if cluster is not None:
    _join(cluster, timeout)

  kind = jax.devices()[0].device_kind
  check_platform(jax.default_backend())
  if jax.process_count() > 1:
    mine = f'{jax.local_device_count()} x {kind}'
    hosts = exchange('devices', f'{socket.gethostname()}|{mine}', timeout)
    names, devices = zip(*(host.split('|') for host in hosts), strict=True)
    for i, theirs in enumerate(devices):
      if theirs != devices[0]:
        raise UserError(
          f'process {i} on {names[i]} has {theirs} and process 0 on {names[0]} has {devices[0]}: every host '
          'must have the same devices.'
        )
    log(f'{len(hosts)} processes, {mine} each ({cluster.source}): {", ".join(sorted(set(names)))}')


def _join(cluster: Cluster, timeout: float) -> None:
  import jax

  if jax.distributed.is_initialized():
    return
  arguments = {
    'coordinator_address': cluster.coordinator,
    'num_processes': cluster.processes,
    'process_id': cluster.process,
  }
  if cluster.coordinator is not None:
    meet(cluster, timeout)
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=int(timeout))
  except (RuntimeError, ValueError) as error:
    place = cluster.coordinator or 'the coordinator'
    raise UserError(
      f'not all {cluster.processes or ""} processes met at {place} within {timeout:.0f} s '
      f'({cluster.source}): {first_line(error)[:300]}'
    ) from error


def joined() -> bool:
  """Returns whether this process has joined a job."""
  import jax

  return jax.distributed.is_initialized()


def leave() -> None:
  """Leaves the job. It returns when all processes leave, so that the first does not end before the others."""
  import jax

  if joined():
    jax.distributed.shutdown()


def meet(cluster: Cluster, timeout: float = TIMEOUT) -> None:
  """Waits until all processes have connected to the coordinator.

  jax would wait too, but it aborts without naming the missing processes.

  Raises:
    UserError: in every process that has connected. It names those that have not.
  """
  host, port = split_address(cluster.coordinator, f'--coordinator={cluster.coordinator}')
  wait = _wait_for_others if cluster.process == 0 else _go_to_first
  missing = wait(cluster, host, port, time.monotonic() + timeout)
  if missing:
    name = unknown_name(host)
    raise UserError(
      f'process {missing} of {cluster.processes} did not come to {cluster.coordinator} within '
      f'{timeout:.0f} s ({cluster.source}{name}): look at its log.'
    )


def _wait_for_others(cluster: Cluster, host: str, port: int, end: float) -> str:
  others = {*range(1, cluster.processes)}
  came = {}  # process number -> its connection
  try:
    server = _listen(port)
  except OSError as error:
    raise UserError(
      f'--coordinator={cluster.coordinator}: could not bind port {port} on this host ({error.strerror}); '
      'choose another.'
    ) from None
  with server, contextlib.ExitStack() as stack:
    while others - {*came} and time.monotonic() < end:
      server.settimeout(max(end - time.monotonic(), 0.1))
      with contextlib.suppress(OSError, ValueError):  # a timeout, or another program's connection
        connection, _ = server.accept()
        stack.enter_context(connection).settimeout(5)
        came[int(connection.recv(16))] = connection
    missing = ', '.join(map(str, sorted(others - {*came})))
    for connection in came.values():
      with contextlib.suppress(OSError):  # the process died, and jax will report it
        connection.sendall(f'{missing}.'.encode())
        connection.recv(1)  # the other side closes first, so that the port is free for jax
  return missing


def _listen(port: int) -> socket.socket:
  """Opens a server on every address of this host, IPv6 included if the host has it."""
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):  # a kernel without IPv6
      return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _go_to_first(cluster: Cluster, host: str, port: int, end: float) -> str:
  while time.monotonic() < end + 5:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as first:
      first.settimeout(max(end + 5 - time.monotonic(), 0.1))
      first.sendall(str(cluster.process).encode())
      answer = first.recv(4096).decode()
      if answer.endswith('.'):
        return answer[:-1]
    time.sleep(0.2)
  return '0'


def check_platform(backend: str, env: Mapping[str, str] | None = None) -> None:
  """Raises UserError if jax does not use the accelerator of this machine."""
  env = os.environ if env is None else env
  if backend != 'cpu' or env.get('JAX_PLATFORMS'):
    return
  for device, extra in (('/dev/nvidia0', 'cuda'), ('/dev/accel0', 'tpu'), ('/dev/vfio/0', 'tpu')):
    if os.path.exists(device):
      raise UserError(
        f'this machine has {device} and jax found only CPUs: install the {extra} extra (uv sync --extra '
        f'{extra}), or set JAX_PLATFORMS=cpu to use the CPU.'
      )


def exchange(name: str, value: str, timeout: float = TIMEOUT) -> list[str]:
  """Sends a value to all processes; returns the values of all, in order. It is a barrier too.

  All processes must make the same exchanges in the same order. A single process gets [value].

  Raises:
    UserError: some processes did not arrive in time. The message names them.
  """
  import jax

  if jax.process_count() == 1:
    return [value]
  # Orbax uses this module as well: jax has no public barrier with a time limit.
  from jax._src import distributed

  client = distributed.global_state.client
  key = f'isoflop/{name}/{next(_count)}'
  client.key_value_set(f'{key}/{jax.process_index()}', value)
  end = time.monotonic() + timeout
  values = []
  missing = []
  for i in range(jax.process_count()):
    wait = max(int(1000 * (end - time.monotonic())), 100)
    try:
      values.append(client.blocking_key_value_get(f'{key}/{i}', wait))
    except jax.errors.JaxRuntimeError:
      missing.append(str(i))
  if missing:
    raise UserError(
      f'process {", ".join(missing)} of {jax.process_count()} did not come to {name!r} within '
      f'{timeout:.0f} s: look at its log.'
    )
  return values
