"""A real Slurm of one node, from Debian's packages, in a folder of its own; the system is not touched."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

PACKAGES = (
  'slurmctld', 'slurmd', 'slurm-client', 'slurm-wlm-basic-plugins', 'munge', 'libmunge2', 'libhwloc15',
  'liblua5.3-0',
)  # fmt: skip
CONF = """
ClusterName=isoflop
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ReturnToService=2
KillWait=5
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
  """Why there is no Slurm here."""


def unpack(folder: pathlib.Path) -> pathlib.Path:
  """The packages' files, as they would lie under /."""
  if not shutil.which('apt-get') or os.geteuid() != 0:
    raise Unavailable('no apt-get, or not root')
  debs, root = folder / 'debs', folder / 'root'
  debs.mkdir()
  done = subprocess.run(
    ['apt-get', 'download', *PACKAGES], cwd=debs, capture_output=True, text=True
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['']
    raise Unavailable(f'apt-get download: {lines[-1]}')
  for deb in debs.glob('*.deb'):
    subprocess.run(['dpkg', '-x', deb, root], check=True)
  return root


def _free_ports(n: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
    for s in sockets:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def started(folder: pathlib.Path):
  """A cluster that takes jobs; yields the environment in which its commands are found."""
  root = unpack(folder)
  (library,) = root.glob('usr/lib/*-linux-gnu')
  plugins = library / 'slurm-wlm'
  host = socket.gethostname().split('.')[0]
  for name in ('state', 'spool'):
    (folder / name).mkdir()
  conf = folder / 'slurm.conf'
  conf.write_text(CONF.format(folder=folder, plugins=plugins, host=host, ports=_free_ports(2)))
  environment = {
    **os.environ,
    'SLURM_CONF': str(conf),
    'LD_LIBRARY_PATH': f'{library}:{plugins}',
    'PATH': f'{root}/usr/bin:{os.environ["PATH"]}',
  }
  sbin = root / 'usr' / 'sbin'
  daemons = [
    [sbin / 'slurmctld-wlm', '-D', '-f', conf],
    [sbin / 'slurmd-wlm', '-D', '-f', conf, '-d', sbin / 'slurmstepd-wlm', '-N', host],
  ]
  quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
  running = [subprocess.Popen(list(map(str, d)), env=environment, **quiet) for d in daemons]
  try:
    for _ in range(120):
      found = subprocess.run(
        ['sinfo', '-h', '-o', '%t'], env=environment, capture_output=True, text=True
      )
      if found.stdout.strip() == 'idle':
        break
      time.sleep(0.5)
    else:
      log = (folder / 'slurmd.log').read_text() if (folder / 'slurmd.log').exists() else ''
      raise Unavailable(f'Slurm did not start: {found.stdout}{found.stderr} {log[-300:]}')
    yield environment
  finally:
    subprocess.run(['scancel', '-u', 'root'], env=environment, **quiet)
    time.sleep(1)
    for process in running[::-1]:
      process.terminate()
    for process in running:
      try:
        process.wait(timeout=30)
      except subprocess.TimeoutExpired:  # it waits for a job's epilogue
        process.kill()
        process.wait()
