"""The folder of a quantised model, and the report on its losses, size and errors."""

import collections
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
from flax import nnx

from research.checkpoints import streamed
from research.core import configs
from research.huggingface import companions, inwards
from research.inference import tokenizer
from research.model import counts
from research.model.parameters import stored_bytes
from research.quantisation.post_training import Error
from research.quantisation.quantised import Quantised, bits_per_number

# The quantised model of a run starts from no checkpoint, and nothing of it learns until a gin file says so.
STANDS_ALONE = """from __gin__ import dynamic_registration
from research.training import run
run.Run.init = None
run.Run.learns = None
"""
WORST = 5  # how many matrices are shown


def config_of(path: pathlib.Path, kind: str, files: Iterable[str], bindings) -> configs.Config:
  """The gin of a model, with the files over it that say what is quantised.

  Args:
    path: the model's folder.
    kind: 'run', 'converted' or 'hf'.
    files, bindings: gin files and bindings, in order.
  """
  config = configs.Config('RUN' if kind == 'run' else 'MODEL')
  if kind == 'hf':
    config._read(inwards.open_folder(path)[0], 'model.gin')
  else:
    config.read_file(str(path / ('config.gin' if kind == 'run' else 'model.gin')))
  for file in files:
    config.read_file(file)
  if kind == 'run':
    config._read(STANDS_ALONE, 'research.quantise')
  for binding in bindings:
    config.read_binding(binding)
  return config


def tokenizer_of(path: pathlib.Path, kind: str) -> tokenizer.Tokenizer:
  """The tokenizer beside the weights of a model that was not trained here."""
  return tokenizer.of_folder(path if kind == 'hf' else path / companions.FOLDER)


def write(
  out: pathlib.Path, path: pathlib.Path, kind: str, config: configs.Config, model, params: Mapping
) -> None:
  """Writes the folder of a quantised model, which every command opens like the folder of the original.

  Args:
    out: the folder to write.
    path, kind: the original's folder and kind, as in `config_of`.
    config: the gin of the quantised model.
    model: makes the quantised model.
    params: its parameters.
  """
  out.mkdir(parents=True, exist_ok=True)
  state = nnx.to_flat_state(nnx.state(counts.abstract(model)))
  arrays = {}
  for key, value in state:
    node = params
    for name in key:
      node = node[name]
    arrays[key] = np.asarray(node, value.dtype)

  def pieces():
    return ((key, (), x) for key, x in arrays.items())

  streamed.write_params(
    out / 'checkpoints' if kind == 'run' else out,
    {key: x.shape for key, x in arrays.items()},
    dict.fromkeys(arrays, 0),
    pieces,
    {key: x.dtype for key, x in arrays.items()},
  )
  (out / ('config.gin' if kind == 'run' else 'model.gin')).write_text(config.text)
  if kind == 'hf':
    companions.keep_companions(path, out)
  else:
    companions.copy_companions(path, out)


def sizes(model) -> dict:
  """The bytes of the whole model as stored, and the bits of a number in its quantised matrices."""
  module = counts.abstract(model)
  weights = [m for _, m in nnx.iter_modules(module) if isinstance(m, Quantised)]
  numbers = [np.prod(m.packed.shape) * m.form.per_byte for m in weights]
  bits = sum(bits_per_number(m) * n for m, n in zip(weights, numbers, strict=True)) / sum(numbers)
  return {'bytes': stored_bytes(module), 'bits_per_number': float(bits)}


def show(facts: Mapping, errors: list[Error]) -> str:
  """The losses, the size, and the matrices with the largest errors, as text."""
  before, after = facts['loss_before'], facts['loss_after']
  methods = collections.Counter(error.method for error in errors)
  by = ', '.join(f'{count} by {method}' for method, count in methods.most_common())
  lines = [
    f'loss {after:.4f} by {facts["method"]}: {100 * (after / before - 1):+.2f}%',
    f'{facts["bytes"] / 1e6:.1f} MB, {facts["bits_per_number"]:.2f} bits for a number of a quantised matrix; '
    f'{len(errors)} matrices: {by}',
  ]
  worst = sorted(errors, key=lambda error: -(error.outputs or error.weights))[:WORST]
  lines.append('largest squared errors, of the matrix and of its outputs:')
  for error in worst:
    outputs = '(inputs not recorded)' if error.outputs is None else f'{error.outputs:.2e}'
    place = ' '.join(map(str, error.index))
    lines.append(f'  {error.name} [{place}]  {error.weights:.2e}  {outputs}')
  return '\n'.join(lines)
