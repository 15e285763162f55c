"""The loss that rounding adds to every run of a sweep, by bits: the rows of the law of rounding after training.

    python experiments/precision/rounding.py --workdir=runs/quickstart --out=rows.csv

Every matrix of the layers is rounded to nearest, one scale for each output; token vectors, head and norms stay.
With --run only one run's rows are written, so that many can be done at once.
"""

import argparse
import csv
import json
import pathlib

import jax
import numpy as np
from flax import nnx

from research.evaluation import loading
from research.model import counts
from research.parallel.mesh import Mesh
from research.quantisation import calibration, rows
from research.quantisation.formats import format_of
from research.quantisation.quantised import Layout
from research.quantisation.straight_through import StraightThrough
from research.tuning import peft

BITS = (2, 3, 4, 5, 6, 8)
COLUMNS = ('params_non_embedding', 'params_total', 'tokens', 'seed')


def rounded(module: nnx.Module, params: dict, bits: int) -> dict:
  """The parameters with the matrices of the layers rounded to `bits`."""
  form = format_of(bits)
  tree = params
  for path, weight in nnx.iter_modules(module):
    if isinstance(weight, StraightThrough) and path[0] == 'stack':
      tree = _rounded_at(tree, path, weight.layout, form)
  return tree


def _rounded_at(tree: dict, path: tuple, layout: Layout, form) -> dict:
  if path:
    return {**tree, path[0]: _rounded_at(tree[path[0]], path[1:], layout, form)}
  layers = [layout.split(layer) for layer in np.asarray(tree)]
  return np.stack([form.round_trip(x, axes).reshape(layout.shape) for x, axes in layers])


def rows_of_run(path: pathlib.Path) -> list[dict]:
  """A row for each number of bits, and one of 16 for the run as it is."""
  folder = loading.open_folder(path)
  run = json.loads((path / 'run.json').read_text())
  params = peft.params_of(folder.model, folder.params)
  _, batches = rows.of_run(folder.run, 1)
  # The same model with rounding matrices says which parameters are matrices, and how their groups lie.
  module = counts.abstract(_rounding(folder.model))
  with Mesh().use(jax.devices()[:1]):
    trees = [params, *(rounded(module, params, bits) for bits in BITS)]
    losses = calibration.losses_of(folder.model, trees, batches)
  columns = {name: run.get(name) for name in COLUMNS}
  return [
    {
      'run': path.name, **columns, 'bits': bits, 'loss': loss, 'loss_increase': loss - losses[0],
    }
    for bits, loss in zip((16, *BITS), losses, strict=True)
  ]  # fmt: skip


def _rounding(model):
  keywords = {**model.keywords, 'weight': StraightThrough}
  return type(model)(model.func, *model.args, **keywords)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--out', required=True)
  parser.add_argument('--run', help='the name of one run')
  flags = parser.parse_args()
  folder = pathlib.Path(flags.workdir) / 'runs'
  names = [flags.run] if flags.run else sorted(path.name for path in folder.iterdir())
  table = [row for name in names for row in rows_of_run(folder / name)]
  with open(flags.out, 'w', newline='') as file:
    writer = csv.DictWriter(file, list(table[0]))
    writer.writeheader()
    writer.writerows(table)


if __name__ == '__main__':
  main()
