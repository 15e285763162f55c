"""Evaluates checkpoints: a suite of tasks, one JSON of results and one row for each checkpoint.

    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --checkpoint=runs/tiny
    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --hf=FOLDER --out=results
    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --workdir=sweeps/quickstart

--checkpoint is a run's workdir (config.gin and checkpoints/) or a converted model's folder (model.gin). --hf
reads a Hugging Face folder as it is. --workdir takes every checkpoint of a run, or of all runs of a sweep, and
adds rows.jsonl, a row of each. Started again the command asks only what was not answered.
"""

import json
import pathlib
import sys

from research.core import cli


def _flags():
  parser = cli.parser('evaluate', __doc__)
  parser.add_argument('--checkpoint', metavar='DIR', help="a run's or a converted model's folder")
  parser.add_argument('--hf', metavar='FOLDER', help='config.json, *.safetensors and a tokenizer')
  parser.add_argument('--workdir', metavar='DIR', help='of a run or a sweep: all its checkpoints')
  parser.add_argument('--step', type=int, help='of --checkpoint; default: the newest')
  where = '<folder>/evaluation/<name of the first gin file>'
  parser.add_argument('--out', metavar='DIR', help=f'default: {where}')
  flags = cli.parse(parser)
  if sum(map(bool, (flags.checkpoint, flags.hf, flags.workdir))) != 1:
    parser.error('give one of --checkpoint, --hf and --workdir.')
  if flags.step is not None and not flags.checkpoint:
    parser.error('--step goes with --checkpoint.')
  return flags


if __name__ == '__main__':
  FLAGS = _flags()
  cli.use_huge_pages()

from research.core import configs, storage
from research.core.errors import UserError
from research.evaluation import loading
from research.evaluation.suite import Suite, make_engine, run_suite


def show_progress(task: str, done: int, of: int) -> None:
  """A line that is written over, on a terminal."""
  if sys.stderr.isatty():
    end = '\r' if done < of else '\r\033[K'
    print(f'{task}: {done:,} of {of:,} rows', end=end, file=sys.stderr, flush=True)


def evaluate(suite: Suite, folder: loading.Folder, out: pathlib.Path) -> dict:
  """What `run_suite` gives for a model."""
  import jax

  with loading.mesh_for(folder.model).use(jax.devices()):
    model = loading.abstract_model(folder.model)
    engine, identity = make_engine(
      suite, model, lambda: loading.read_params(folder), folder.run, folder.tokenizer
    )
    identity = {'checkpoint': str(folder.path), 'step': folder.step, **identity}
    return run_suite(suite, engine, out, identity, progress=show_progress)


def evaluate_all(suite: Suite, workdir: pathlib.Path, out: pathlib.Path) -> list[dict]:
  """The summaries of every checkpoint of a run or a sweep; one that cannot be read is told, and left out."""
  pairs, summaries = loading.checkpoints_of(workdir), []
  for run, step in pairs:
    label = f'{run.name}-step-{step}'
    print(f'{label}:')
    try:
      summary = evaluate(suite, loading.open_folder(run, step), out / label)
    except UserError as error:
      print(f'  not evaluated: {error}')
      continue
    trained = run / 'run.json'
    facts = json.loads(trained.read_text()) if trained.is_file() else {}
    # N, tokens and FLOPs of the run, so that a law can be fitted to the rows. They are of its end.
    facts = facts if facts.get('steps') == step else {}
    summary['row'] = {'run': run.name, **facts, **summary['row']}
    summaries.append(summary)
    rows = ''.join(json.dumps(summary['row']) + '\n' for summary in summaries)
    storage.write_atomic(out / 'rows.jsonl', rows)
  if not summaries:
    raise UserError(f'none of the {len(pairs)} checkpoints of {workdir} could be evaluated.')
  print(f'{len(summaries)} of {len(pairs)} checkpoints: {out / "rows.jsonl"}')
  return summaries


def main(flags) -> int:
  import logging

  from research.training.program import keep_compiled

  config = configs.load(flags.gin_file, flags.gin, root='EVALUATION')
  suite = config.build()
  logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax tells what it does when it only reads
  keep_compiled()
  with config.explains():
    place = pathlib.Path(flags.checkpoint or flags.hf or flags.workdir)
    out = pathlib.Path(flags.out or place / 'evaluation' / pathlib.Path(flags.gin_file[0]).stem)
    if flags.workdir:
      summaries = evaluate_all(suite, place, out)
    else:
      folder = loading.open_hf(place) if flags.hf else loading.open_folder(place, flags.step)
      summaries = [evaluate(suite, folder, out)]
      print(f'results: {out / "results.json"}')
  results = [result for summary in summaries for result in summary['tasks'].values()]
  return 1 if all('error' in result for result in results) else 0


if __name__ == '__main__':
  cli.run(main, FLAGS)
