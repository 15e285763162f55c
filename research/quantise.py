"""Rounds a trained model to few bits.

    python -m research.quantise --checkpoint=runs/tiny --gin_file=gin/quantisation/int4.gin --out=runs/tiny-int4
    python -m research.quantise --hf=FOLDER --gin_file=gin/quantisation/int4.gin --method=gptq --out=OUT \\
      --calibration=some.txt --validation=other.txt

The gin files say which matrices become what; the method, how they are rounded: nearest, gptq, awq or smooth. A
run is calibrated on its own training stream and judged on its validation stream; another model needs two texts.
The result is a folder that generates, evaluates and converts as every checkpoint, with quantisation.json: the
loss before and after, and the error of every matrix.
"""

import json
import pathlib

from research.core import cli
from research.core.errors import UserError

METHODS = ('nearest', 'gptq', 'awq', 'smooth')


def _flags():
  parser = cli.parser('quantise', __doc__)
  parser.add_argument('--checkpoint', metavar='DIR', help="a run's or a converted model's folder")
  parser.add_argument('--hf', metavar='FOLDER', help='config.json, *.safetensors and a tokenizer')
  parser.add_argument('--step', type=int, help='of --checkpoint; default: the newest')
  parser.add_argument('--out', metavar='DIR', required=True, help='to write')
  parser.add_argument('--method', default='nearest', choices=METHODS)
  parser.add_argument('--calibration', metavar='FILE', help='a text that the methods look at')
  parser.add_argument('--validation', metavar='FILE', help='a text for the loss before and after')
  parser.add_argument('--rows', type=int, default=128, help='of calibration (default 128)')
  parser.add_argument('--length', type=int, default=512, help='tokens of a row of text')
  flags = cli.parse(parser)
  if bool(flags.checkpoint) == bool(flags.hf):
    parser.error('give one of --checkpoint and --hf.')
  if flags.step is not None and not flags.checkpoint:
    parser.error('--step goes with --checkpoint.')
  if flags.rows < 1 or flags.length < 2:
    parser.error('--rows is 1 or more and --length 2 or more.')
  return flags


if __name__ == '__main__':
  FLAGS = _flags()
  cli.use_huge_pages()

import jax

from research.evaluation import loading
from research.parallel.mesh import Mesh
from research.quantisation import calibration, post_training, report, rows
from research.tuning import merge, peft


def main(flags) -> None:
  """Rounds as the flags say, on the first device."""
  place, out = pathlib.Path(flags.checkpoint or flags.hf), pathlib.Path(flags.out)
  if out.exists() and any(out.iterdir()):
    raise UserError(f'--out={out} is not empty; name a new folder.')
  folder = loading.open_hf(place) if flags.hf else loading.open_folder(place, flags.step)
  kind = 'hf' if flags.hf else 'run' if folder.run else 'converted'
  config = report.config_of(place, kind, flags.gin_file, flags.gin)
  tree = config.tree()
  model = tree.keywords['model'] if folder.run else tree
  with config.explains(), Mesh().use(jax.devices()[:1]):
    source, params = _plain(folder)
    seen, judged = _rows(folder, kind, flags)
    before = calibration.loss_of(source, params, judged)
    print(f'loss {before:.4f} as it is', flush=True)
    params, errors = post_training.quantise(model, params, flags.method, seen)
    after = calibration.loss_of(model, params, judged)
  facts = {'method': flags.method, 'loss_before': before, 'loss_after': after}
  facts |= report.sizes(model)
  report.write(out, place, kind, config, model, params)
  rows_of_errors = [vars(error) for error in errors]
  (out / 'quantisation.json').write_text(
    json.dumps({**facts, 'matrices': rows_of_errors}, indent=1) + '\n'
  )
  print(report.show(facts, errors))
  print(f'wrote {out}')


def _plain(folder) -> tuple:
  """The model with plain matrices, and its parameters in the host's memory."""
  if folder.params is None:
    return folder.model, folder.arrays
  params = peft.params_of(folder.model, folder.params)
  return (
    merge.merged(folder.model, params)
    if merge.has_weights(folder.model)
    else (folder.model, params)
  )


def _rows(folder, kind: str, flags) -> tuple[list, list]:
  """Batches to calibrate on, and to validate on."""
  if folder.run and not (flags.calibration or flags.validation):
    return rows.of_run(folder.run, flags.rows)
  if folder.run:
    raise UserError(
      'a run is calibrated and judged on its own streams; leave --calibration and --validation.'
    )
  if not flags.validation or (flags.method != 'nearest' and not flags.calibration):
    raise UserError(
      'this model brings no stream: give --validation=FILE, and --calibration=FILE for all but nearest.'
    )
  tokenizer = report.tokenizer_of(folder.path, kind)
  seen = []
  if flags.calibration:
    seen = rows.of_text(flags.calibration, tokenizer, flags.length, flags.rows)
  return seen, rows.of_text(flags.validation, tokenizer, flags.length, None)


if __name__ == '__main__':
  cli.run(main, FLAGS)
