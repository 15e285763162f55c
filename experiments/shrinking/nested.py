"""Three sizes from one run (Mlp.nested), or each size trained alone on the same tokens?

    python experiments/shrinking/nested.py --workdir=runs/nested

For each seed it trains the large model of base.gin as it is and with nested sizes, cuts the nested one to half
and to a quarter of its MLP units, and trains models of these sizes alone. Started again, it does only the
missing runs. It writes nested.csv to its own folder.
"""

import argparse
import csv
import pathlib

from study import BASE, HERE, START, finished_run, parse, tell

import research.shrink

NESTED = 'gin/tuning/nested.gin'
SIZES = {'all units': 192, 'half': 96, 'quarter': 48}


def cut(nested: pathlib.Path, units: int) -> dict:
  """The row of the nested model's first units. One step at no rate gives it a validation loss."""
  out = nested.parent / f'cut-{units}'
  if not out.exists():
    flags = {'gin_file': [str(nested / 'config.gin')], 'gin': [f'MLP={units}'], 'batches': 1}
    research.shrink.main(argparse.Namespace(checkpoint=str(nested), out=str(out), **flags))
  bindings = [f'BASE={str(out)!r}', 'Run.steps=1', 'LEARNING_RATE=1e-12']
  return finished_run(nested.parent / f'loss-{units}', [str(out / 'config.gin'), START], bindings)


def study(workdir: pathlib.Path, seed: int) -> list[dict]:
  """The rows of one seed: (size, way, validation loss)."""
  nested = workdir / 'nested'
  rows = []
  of_nested = finished_run(nested, [BASE, NESTED], [f'Run.seed={seed}'])
  for size, units in SIZES.items():
    folder = workdir / f'alone-{units}'
    alone = finished_run(folder, [BASE], [f'Run.seed={seed}', f'MLP={units}'])
    one_run = of_nested if units == SIZES['all units'] else cut(nested, units)
    for way, row in (('one run', one_run), ('alone', alone)):
      rows.append({'size': size, 'way': way, 'seed': seed, 'loss': row['loss']})
  return rows


def main(workdir: pathlib.Path, seeds: list[int]) -> None:
  rows = [row for seed in seeds for row in study(workdir / f'seed{seed}', seed)]
  with (HERE / 'nested.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, ['size', 'way', 'seed', 'loss'], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  for size in SIZES:
    for way in ('one run', 'alone'):
      losses = [row['loss'] for row in rows if (row['size'], row['way']) == (size, way)]
      tell(f'{size}, {way}', losses)


if __name__ == '__main__':
  flags = parse(__doc__.splitlines()[0], 'runs/nested')
  main(flags.workdir, flags.seeds)
