"""Rounds a trained model to few bits.

    python -m research.quantise --checkpoint=runs/tiny --gin_file=gin/quantisation/int4.gin --out=runs/tiny-int4
    python -m research.quantise --hf=FOLDER --gin_file=gin/quantisation/int4.gin --method=gptq --out=OUT \\
      --calibration=some.txt --validation=other.txt

The gin files say what every matrix becomes, and the method how it is rounded: nearest, gptq, awq or smooth.
keep finds the codes of a model that was packed before, and rounds nothing. A run is calibrated on its own
training stream and validated on its own validation stream; any other model needs two texts. The result is a
folder that generates, evaluates and converts like every checkpoint. Its quantisation.json has the loss before
and after, and the error of every matrix.
"""

import json
import pathlib

from research.core import cli, text
from research.core.errors import UserError

CALIBRATED = ('gptq', 'awq', 'smooth')
METHODS = ('nearest', 'keep', *CALIBRATED)


def _flags():
  parser = cli.parser('quantise', __doc__)
  parser.add_argument('--checkpoint', metavar='DIR', help="a run's or a converted model's folder")
  parser.add_argument('--hf', metavar='FOLDER', help='config.json, *.safetensors and a tokenizer')
  parser.add_argument('--step', type=int, help='of --checkpoint; default: the newest')
  parser.add_argument('--out', metavar='DIR', required=True, help='a new folder to write')
  parser.add_argument('--method', default='nearest', choices=METHODS)
  parser.add_argument('--calibration', metavar='FILE', help='a text that the methods look at')
  parser.add_argument('--validation', metavar='FILE', help='a text for the loss before and after')
  parser.add_argument('--tokenizer', metavar='FILE', help='of the texts, where the folder has none')
  parser.add_argument('--rows', type=int, default=128, help='of calibration, at most (default 128)')
  parser.add_argument('--length', type=int, default=512, help='tokens of a row (default 512)')
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
from research.inference.tokenizer import check_belongs, of_file
from research.model import counts
from research.parallel.mesh import Mesh
from research.quantisation import calibration, post_training, report, rows
from research.tuning import merge, peft


def main(flags) -> None:
  """Rounds the model as the flags say, on the first device."""
  place, out = pathlib.Path(flags.checkpoint or flags.hf), pathlib.Path(flags.out)
  _check(flags, place, out)
  folder = loading.open_hf(place) if flags.hf else loading.open_folder(place, flags.step)
  kind = 'hf' if flags.hf else 'run' if folder.run else 'converted'
  config = report.config_of(place, kind, flags.gin_file, flags.gin)
  tree = config.tree()
  model = tree.keywords['model'] if folder.run else tree
  with config.explains(), Mesh().use(jax.devices()[:1]):
    weights = post_training.weights_to_fill(model, flags.method)
    calibration_batches, validation_batches = _batches(folder, kind, flags)
    source, params = _plain(folder)
    before = calibration.loss_of(source, params, validation_batches)
    print(f'loss {before:.4f} before rounding', flush=True)
    params, errors = post_training.quantise(
      model, weights, params, flags.method, calibration_batches
    )
    after = calibration.loss_of(model, params, validation_batches)
  facts = {'method': flags.method, 'loss_before': before, 'loss_after': after}
  facts |= report.sizes(model)
  report.write(out, place, kind, config, model, params)
  matrices = [vars(error) for error in errors]
  (out / 'quantisation.json').write_text(
    json.dumps({**facts, 'matrices': matrices}, indent=1) + '\n'
  )
  print(report.show(facts, errors))
  print(f'wrote {out}')


def _check(flags, place: pathlib.Path, out: pathlib.Path) -> None:
  """Refuses what the flags alone show to be wrong, before a model is read."""
  if out.is_file() or (out.exists() and any(out.iterdir())):
    raise UserError(f'--out={out} is not an empty folder; name a new one.')
  texts = {'--calibration': flags.calibration, '--validation': flags.validation}
  if flags.checkpoint and (place / 'config.gin').is_file():
    if any(texts.values()) or flags.tokenizer:
      raise UserError(
        'a run is calibrated and validated on its own streams; leave --calibration, --validation and '
        '--tokenizer.'
      )
    return
  if not flags.validation or (flags.method in CALIBRATED and not flags.calibration):
    raise UserError(
      'this model brings no stream: give --validation=FILE, and for gptq, awq and smooth --calibration=FILE.'
    )
  for flag, file in texts.items():
    if file and not pathlib.Path(file).is_file():
      raise UserError(f'{flag}={file}: there is no such file.')
  if flags.calibration and pathlib.Path(flags.calibration).samefile(flags.validation):
    raise UserError(
      f'--calibration and --validation are the same file; take another text than {flags.validation}'
      ' for one of them.'
    )


def _plain(folder) -> tuple:
  """The model with plain matrices, and its parameters in the host's memory."""
  if folder.params is None:
    return folder.model, folder.arrays
  params = peft.params_of(folder.model, folder.params)
  if not merge.has_weights(folder.model):
    return folder.model, params
  text.tell('the matrices of this model are not plain: what they stand for is rounded')
  return merge.merged(folder.model, params)


def _batches(folder, kind: str, flags) -> tuple[list, list]:
  """Batches to calibrate on, and batches to validate on."""
  if folder.run:
    return rows.of_run(folder.run, flags.rows if flags.method in CALIBRATED else 0)
  module = counts.abstract(folder.model)
  if 'encoder' in module.inputs or not module.causal:
    raise UserError(
      'this model is no decoder, and only decoders are calibrated and validated on texts; quantise the folder '
      'of the run that trained it.'
    )
  file = pathlib.Path(flags.tokenizer) if flags.tokenizer else None
  tokenizer = of_file(file) if file else report.tokenizer_of(folder.path, kind)
  check_belongs(tokenizer, module.vocab)
  validation = rows.of_text(flags.validation, tokenizer, flags.length, None)
  if flags.method not in CALIBRATED:
    return [], validation
  return rows.of_text(flags.calibration, tokenizer, flags.length, flags.rows), validation


if __name__ == '__main__':
  cli.run(main, FLAGS)
