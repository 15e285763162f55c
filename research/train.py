"""Trains one model: gin file -> Run -> batches -> one jitted step -> rows.

Writes into --workdir: config.gin (re-runnable), config.txt (resolved), metrics.jsonl, tensorboard/,
checkpoints/ and, at the end, run.json with the one row of the run. Started again with the same workdir, it
resumes. On several hosts, start the same command once on each, with a workdir that all of them see. The
processes find each other by the three flags, or by the variables of Slurm, a TPU slice, Ray Train or torchrun.
"""

import json
import pathlib
import sys

from research.core import cli

if __name__ == '__main__':
  _parser = cli.parser('train', __doc__)
  _parser.add_argument(
    '--workdir', default=None, metavar='DIR', help='default: runs/<name of the first gin file>'
  )
  _parser.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0')
  _parser.add_argument('--num_processes', type=int, metavar='N', help='of the job; 1: only this')
  _parser.add_argument('--process_id', type=int, metavar='I', help='which of them this is, from 0')
  FLAGS = cli.parse(_parser)  # before jax: --help and a wrong flag answer at once
  cli.use_huge_pages()


from research.core import configs, storage
from research.parallel import processes
from research.training.interrupt import Interrupted
from research.training.loop import train


def default_workdir(gin_files: list[str]) -> pathlib.Path:
  return pathlib.Path('runs') / pathlib.Path(gin_files[0]).stem


def main(flags) -> int:
  """Trains the run; 1 if it failed, 143 if a signal stopped it."""
  cluster = processes.find(flags.coordinator, flags.num_processes, flags.process_id)
  processes.initialize(cluster)
  config = configs.load(flags.gin_file, flags.gin)
  run = config.build()
  workdir = storage.place(flags.workdir or default_workdir(flags.gin_file))
  try:
    with config.explains():
      row = train(run, workdir, config.text)
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    return 143
  print(json.dumps({'workdir': str(workdir), **row}))
  return 0 if row['status'] == 'finished' else 1


if __name__ == '__main__':
  cli.run(main, FLAGS)
