"""Evaluates checkpoints on a suite of tasks, and writes a JSON of results and a row for each checkpoint.

    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --checkpoint=runs/tiny
    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --hf=FOLDER --out=results
    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --workdir=sweeps/quickstart

--checkpoint is a run's workdir (config.gin and checkpoints/) or a converted model's folder (model.gin). --hf
reads a Hugging Face folder without converting it. --workdir takes every checkpoint of a run, or of all runs of
a sweep, and adds rows.jsonl with a row of each. Started again, the command makes only the requests that have no
answer yet.
"""

import pathlib
import sys

from research.core import cli


def _flags():
  parser = cli.parser('evaluate', __doc__)
  parser.add_argument('--checkpoint', metavar='DIR', help="a run's or a converted model's folder")
  parser.add_argument('--hf', metavar='FOLDER', help='config.json, *.safetensors and a tokenizer')
  parser.add_argument('--workdir', metavar='DIR', help='of a run or a sweep: all its checkpoints')
  parser.add_argument('--step', type=int, help='of --checkpoint; default: the newest')
  what = 'default: <folder>/evaluation/<name of the first gin file>'
  parser.add_argument('--out', metavar='DIR', help=what)
  parser.add_argument(
    '--engine', choices=('local', 'ray'), default='local',
    help='ray: the checkpoints of --workdir on a cluster whose hosts share it, a task of the suite at a time',
  )  # fmt: skip
  parser.add_argument('--address', metavar='HOST:PORT', help="of the Ray cluster's head")
  parser.add_argument(
    '--gpus', type=float, default=0, metavar='N', help='of --engine=ray: for each task'
  )
  flags = cli.parse(parser)
  if sum(map(bool, (flags.checkpoint, flags.hf, flags.workdir))) != 1:
    parser.error('give one of --checkpoint, --hf and --workdir.')
  if flags.step is not None and not flags.checkpoint:
    parser.error('--step goes with --checkpoint.')
  if flags.engine == 'ray' and not flags.workdir:
    parser.error('--engine=ray goes with --workdir: it divides checkpoints and tasks among hosts.')
  if flags.engine == 'local' and (flags.address or flags.gpus):
    parser.error('--address and --gpus go with --engine=ray.')
  return flags


if __name__ == '__main__':
  FLAGS = _flags()
  cli.use_huge_pages()

from research.core import configs
from research.evaluation import checkpoints, loading
from research.parallel import ray_cluster


def show_progress(task: str, done: int, total: int) -> None:
  """Shows a line that the next one overwrites, on a terminal."""
  if sys.stderr.isatty():
    # The last line is cleared, so that the result takes its place.
    end = '\r' if done < total else '\r\033[K'
    print(f'{task}: {done:,} of {total:,} rows', end=end, file=sys.stderr, flush=True)


def main(flags) -> int:
  """Evaluates as the flags say; 1 if no task of any checkpoint could run."""
  from research.training.program import keep_compiled

  config = configs.load(flags.gin_file, flags.gin, root='EVALUATION')
  suite = config.build()
  keep_compiled()
  with config.explains():
    path = pathlib.Path(flags.checkpoint or flags.hf or flags.workdir)
    out = pathlib.Path(flags.out or path / 'evaluation' / pathlib.Path(flags.gin_file[0]).stem)
    if flags.engine == 'ray':
      ray_cluster.connect(flags.address, '--engine=ray')
      needs = ray_cluster.Needs(cpus=1, gpus=flags.gpus)
      gin = tuple(flags.gin_file), tuple(flags.gin)
      summaries = checkpoints.evaluate_on_cluster(suite, gin, path, out, needs)
    elif flags.workdir:
      summaries = checkpoints.evaluate_all(suite, path, out, show_progress)
    else:
      folder = loading.open_hf(path) if flags.hf else loading.open_folder(path, flags.step)
      summaries = [checkpoints.evaluate(suite, folder, out, show_progress)]
      print(f'results: {out / "results.json"}')
  results = [result for summary in summaries for result in summary['tasks'].values()]
  return 1 if all('error' in result for result in results) else 0


if __name__ == '__main__':
  cli.run(main, FLAGS)
