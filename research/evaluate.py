"""Evaluates a checkpoint: a suite of tasks, one JSON of results and one row.

    python -m research.evaluate --gin_file=gin/evaluation/quickstart.gin --checkpoint=runs/tiny

The checkpoint is a run's workdir (config.gin and checkpoints/) or a converted model's folder (model.gin).
Writes into --out a file for each task, results.json and row.json. Started again it does only what is missing.
"""

import pathlib
import sys

from research.core import cli

if __name__ == '__main__':
  _parser = cli.parser('evaluate', __doc__)
  _parser.add_argument(
    '--checkpoint', required=True, metavar='DIR', help="a run's or a model's folder"
  )
  _parser.add_argument(
    '--out', metavar='DIR', help='default: <checkpoint>/evaluation/<name of the first gin file>'
  )
  FLAGS = cli.parse(_parser)
  cli.use_huge_pages()

from research.core import configs
from research.core.errors import Invalid
from research.data.encoding import make_encoding
from research.evaluation import loading
from research.evaluation.engine import Engine
from research.evaluation.rows import Settings
from research.evaluation.suite import Suite, run_suite


def make_settings(suite: Suite, folder: loading.Folder, model) -> Settings:
  """How requests become rows of this model."""
  return Settings(
    length=suite.length or loading.length_of(folder.run),
    architecture=loading.architecture_of(folder.run, model),
    begin=suite.begin,
    too_long=suite.too_long,
    stride=suite.stride,
  )


def show_progress(task: str, done: int, of: int) -> None:
  """A line that is written over, on a terminal."""
  if sys.stderr.isatty():
    end = '\r' if done < of else '\r\033[K'
    print(f'{task}: {done:,} of {of:,} rows', end=end, file=sys.stderr, flush=True)


def main(flags) -> int:
  import jax
  from flax import nnx

  from research.parallel.axes import axis_size
  from research.training.program import keep_compiled

  config = configs.load(flags.gin_file, flags.gin, root='EVALUATION')
  suite = config.build()
  folder = loading.open_folder(flags.checkpoint)
  keep_compiled()
  with config.explains(), loading.mesh_for(folder.model).use(jax.devices()):
    model = loading.abstract_model(folder.model)
    vocabulary = suite.vocabulary or loading.vocabulary_of(folder.run)
    encoding = make_encoding(vocabulary)
    if encoding.size > model.vocab:
      why = f'it has ids up to {encoding.size - 1}, and the model has {model.vocab} logits.'
      raise Invalid(Suite, 'vocabulary', why)
    if suite.batch_size % axis_size('batch'):
      why = f'{suite.batch_size} rows cannot be divided by the {axis_size("batch")} devices.'
      raise Invalid(Suite, 'batch_size', why)
    settings = make_settings(suite, folder, model)
    params = loading.read_params(folder)
    engine = Engine(nnx.graphdef(model), params, encoding, settings, suite.batch_size)
    identity = {
      'checkpoint': str(folder.path),
      'step': folder.step,
      'vocabulary': type(vocabulary).__name__,
      'chat_template': None,
      **vars(settings),
    }
    out = pathlib.Path(
      flags.out or folder.path / 'evaluation' / pathlib.Path(flags.gin_file[0]).stem
    )
    summary = run_suite(suite, engine, out, identity, progress=show_progress)
  print(f'results: {out / "results.json"}')
  return 1 if all('error' in result for result in summary['tasks'].values()) else 0


if __name__ == '__main__':
  cli.run(main, FLAGS)
