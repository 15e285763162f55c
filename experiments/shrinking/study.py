"""Half a model: shrunk from a trained one and healed, or trained from scratch on the healing tokens.

    python experiments/shrinking/study.py --workdir=runs/shrinking

For each seed it trains the large model, shrinks it to half, heals the half with and without the large model as
its teacher, and trains the same half from scratch on as many tokens, at two rates. Started again, it does only
the missing runs. It writes results.csv and healing.png to its own folder.
"""

import argparse
import csv
import json
import pathlib
import statistics

import numpy as np

import research.shrink
from research.core import configs, storage
from research.scaling.report.figure import new_figure
from research.training.loop import train

HERE = pathlib.Path(__file__).resolve().parent
BASE = str(HERE / 'base.gin')
HALF = ('LAYERS=3', 'MLP=56')
HEALING = 100  # steps of 8 x 256 tokens, a quarter of what the large model had
START = 'gin/tuning/start.gin'
HEAL = 'gin/tuning/heal.gin'

# How the half learns: (gin files after its own, learning rate). A model from scratch may need a higher rate.
WAYS = {
  'from scratch at 3e-3': ((), 3e-3),
  'from scratch at 1e-2': ((), 1e-2),
  'healed': ((START,), 3e-3),
  'healed by the large one': ((HEAL,), 3e-3),
}


def finished_run(folder: pathlib.Path, files: list[str], bindings: list[str]) -> dict:
  """The row of a run. The run is trained now if it is not finished."""
  if (folder / 'run.json').is_file():
    return json.loads((folder / 'run.json').read_text())
  config = configs.load(files, bindings)
  return train(config.build(), folder, config.text)


def shrink(large: pathlib.Path, half: pathlib.Path) -> dict:
  """Shrinks the large model if that is not done yet; returns the row of the half before any healing."""
  if not half.exists():
    research.shrink.main(
      argparse.Namespace(
        checkpoint=str(large), gin_file=[str(large / 'config.gin')], gin=list(HALF), out=str(half), batches=4,
      )
    )  # fmt: skip
  before, after = json.loads((half / 'shrunk.json').read_text())['losses']
  return {'way': 'shrunk', 'training_loss_before': before, 'training_loss_after': after}


def study(workdir: pathlib.Path, seed: int) -> list[dict]:
  """The rows of one seed: of the large model, of the half before healing, and of each way to train the half."""
  large = workdir / 'large'
  half = workdir / 'half'
  rows = [{'way': 'large', **finished_run(large, [BASE], [f'Run.seed={seed}'])}]
  rows.append(shrink(large, half))
  folders = {
    START: [f'BASE={str(half)!r}'],
    HEAL: [f'BASE={str(half)!r}', f'TEACHER={str(large)!r}'],
  }
  for way, (files, rate) in WAYS.items():
    bindings = [f'Run.steps={HEALING}', f'LEARNING_RATE={rate}']
    for file in files:
      bindings += folders[file]
    row = finished_run(workdir / folder_of(way), [str(half / 'config.gin'), *files], bindings)
    rows.append({'way': way, **row})
  return [{**row, 'seed': seed} for row in rows]


def folder_of(way: str) -> str:
  return way.replace(' ', '_')


def write_results(rows: list[dict]) -> None:
  columns = (
    'way', 'seed', 'params_total', 'tokens', 'loss', 'training_loss_before', 'training_loss_after', 'seconds',
  )  # fmt: skip
  with (HERE / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def draw(workdirs: list[pathlib.Path]) -> None:
  """The cross-entropy of the training batches of every way, the mean of the seeds."""
  figure, (ax,) = new_figure()
  for way in WAYS:
    if way == 'healed by the large one':
      continue  # its training loss is a divergence
    curves = [storage.read_rows(folder / folder_of(way) / 'metrics.jsonl') for folder in workdirs]
    steps = [row['step'] for row in curves[0] if 'loss' in row]
    losses = [[row['loss'] for row in curve if 'loss' in row] for curve in curves]
    ax.plot(steps, np.mean(losses, 0), marker='.', label=way)
  ax.set_xlabel('steps of 2,048 tokens')
  ax.set_ylabel('training loss, nats per byte')
  ax.legend(frameon=False)
  figure.savefig(HERE / 'healing.png', dpi=120)


def tell(what: str, losses: list[float]) -> None:
  """Prints the mean of the seeds, and each."""
  each = ', '.join(f'{loss:.4f}' for loss in losses)
  print(f'{what}: {statistics.mean(losses):.4f} nats per byte ({each})')


def parse(description: str, workdir: str) -> argparse.Namespace:
  """Parses the flags of a study; `workdir` is the default of --workdir."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path(workdir))
  parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
  return parser.parse_args()


def main(workdir: pathlib.Path, seeds: list[int]) -> None:
  workdirs = [workdir / f'seed{seed}' for seed in seeds]
  rows = [row for seed, folder in zip(seeds, workdirs, strict=True) for row in study(folder, seed)]
  write_results(rows)
  draw(workdirs)
  for way in ('large', *WAYS):
    tell(way, [row['loss'] for row in rows if row['way'] == way])


if __name__ == '__main__':
  flags = parse(__doc__.splitlines()[0], 'runs/shrinking')
  main(flags.workdir, flags.seeds)
