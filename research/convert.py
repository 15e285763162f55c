"""Converts Hugging Face checkpoints to ours and back.

    python -m research.convert --from_hf=FOLDER --out=FOLDER
    python -m research.convert --to_hf=FOLDER --checkpoint=FOLDER --gin_file=FOLDER/model.gin

The first reads config.json and *.safetensors, and writes a checkpoint with model.gin beside it. The second
writes config.json and *.safetensors. Tensors are read and written one at a time; names that are unknown or
missing are an error that lists them. Nothing is downloaded.
"""

import importlib.util
import inspect
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from research import cli
from research.errors import UserError, did_you_mean

if TYPE_CHECKING:
  import numpy as np

  from research.model.hf_config import Family
  from research.model.hf_names import Tensor

# The heavy imports stand inside functions: `--help` must not cost seconds.

DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


# The safetensors format: eight bytes of length, a JSON header, the tensors.


def read_tensors(folder: pathlib.Path) -> dict[str, 'np.ndarray']:
  """Every tensor of the folder's safetensors files by name, mapped from the file and not read yet."""
  import ml_dtypes  # noqa: F401  gives numpy its bfloat16
  import numpy as np

  files = sorted(folder.glob('*.safetensors'))
  if not files:
    raise UserError(f'{folder}: no *.safetensors here (a folder of a downloaded model is wanted).')
  tensors = {}
  for file in files:
    with file.open('rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      header = json.loads(f.read(length))
    header.pop('__metadata__', None)
    for name, entry in header.items():
      if entry['dtype'] not in DTYPES:
        raise UserError(
          f'{file}: {name} is {entry["dtype"]}; only floating point can be converted.'
        )
      start, _ = entry['data_offsets']
      tensors[name] = np.memmap(
        file, DTYPES[entry['dtype']], 'r', 8 + length + start, tuple(entry['shape'])
      )
  return tensors


def write_tensors(
  folder: pathlib.Path,
  tensors: Iterator[tuple[str, 'np.ndarray']],
  sizes: dict[str, tuple],
  dtype: str,
) -> None:
  """Writes one safetensors file of tensors that come in the order of `sizes` (name to shape)."""
  import ml_dtypes  # noqa: F401
  import numpy as np

  dtype = np.dtype(dtype)
  label = {v: k for k, v in DTYPES.items()}[dtype.name]
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in sizes.items():
    end = offset + int(np.prod(shape)) * dtype.itemsize
    header[name] = {'dtype': label, 'shape': list(shape), 'data_offsets': [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with (folder / 'model.safetensors').open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for _, x in tensors:
      f.write(np.ascontiguousarray(x.astype(dtype)).tobytes())


# config.json and gin.


def family_of(config: dict[str, Any]) -> 'Family':
  """The row for this config.json.

  Raises:
    UserError: no such family, or one of its options that is not supported, by name.
  """
  from research.model.hf_families import FAMILIES

  kind = config.get('model_type', '')
  rows = [family for family in FAMILIES if family.model_type == kind]
  if not rows:
    known = {family.model_type for family in FAMILIES}
    raise UserError(f'config.json: no family for model_type {kind!r}.{did_you_mean(kind, known)}')
  for family in rows:
    wrong = {k: v for k, v in family.when.items() if k in config and config[k] != v}
    if not wrong:
      return family
  key, value = next(iter(wrong.items()))
  raise UserError(
    f'config.json: {kind} with {key} = {config[key]!r} is not supported, only {value!r}.'
  )


def gin_text(family: 'Family', config: dict[str, Any]) -> str:
  """A gin file for the model of a config.json: the family's, and the values."""
  from research.model.hf_config import Raw

  bindings = {}
  for field in family.fields:
    bindings.update(field.read(config))
  mentions = ' '.join(f'{k} {v if isinstance(v, Raw) else ""}' for k, v in bindings.items())
  named = re.findall(r'(?:^|[@/( ])(\w+)\.', mentions)
  modules = sorted({name for name in named if importlib.util.find_spec(f'research.model.{name}')})
  lines = [f'# {family.model_type}, from config.json.', 'from __gin__ import dynamic_registration']
  lines += ['import jax.nn'] + [f'from research.model import {name}' for name in modules]
  lines += [f"include '{family.gin}'", '']
  lines += [f'{k} = {v if isinstance(v, Raw) else repr(v)}' for k, v in bindings.items()]
  return '\n'.join(lines) + '\n'


def config_json(family: 'Family', gin, dtype: str) -> dict[str, Any]:
  """The config.json of a gin configuration (`configs.Config`) of this family."""
  config = {'model_type': family.model_type, 'architectures': [family.architecture], 'dtype': dtype}
  for field in family.fields:
    config.update(field.write(lambda name: _value(gin, name)))
  return {**config, **family.when}


def _value(gin, name: str):
  """What a macro or a binding 'scope/module.Class.argument' is, or the argument's default."""
  from research import configs

  if '.' not in name:
    value = gin.macros[name].value if name in gin.macros else None
  else:
    scope, _, selector = name.rpartition('/')
    module, owner, argument = selector.split('.')
    target = getattr(importlib.import_module(f'research.model.{module}'), owner)
    bound = gin.bindings.get((scope, target, argument)) or gin.bindings.get(('', target, argument))
    if bound is None:
      default = inspect.signature(
        getattr(target, '__init__', target) if inspect.isclass(target) else target
      )
      default = default.parameters[argument].default
      return None if default is inspect.Parameter.empty else default
    value = bound.value
  if isinstance(value, configs._Macro):
    return _value(gin, value.name)
  return value.selector if isinstance(value, configs._Reference) else value


def _family_to_write(gin, model_type: str) -> tuple[list['Tensor'], dict[str, Any]]:
  """The tensors and config.json of the row that names every parameter of the model and says all that it is."""
  from research import configs
  from research.model.hf_families import FAMILIES

  rows = [family for family in FAMILIES if family.model_type == model_type]
  if not rows:
    known = {family.model_type for family in FAMILIES}
    raise UserError(f'--model_type: no family {model_type!r}.{did_you_mean(model_type, known)}')
  tree, error = gin.tree(), None
  for family in rows:
    try:
      wanted = table(tree, family)
      config = config_json(family, gin, 'float32')
      back = configs.Config('MODEL')
      back._read(
        gin_text(family, {**config, 'tensors': tuple(t.name for t in wanted)}), 'config.json'
      )
      _check_same(model_type, tree, back.tree())
      return wanted, config
    except UserError as e:
      error = e
  raise error


# What a config.json does not say, and inference does not need.
TRAINING_ONLY = (
  'dtype',
  'init',
  'scan',
  'remat',
  'chunk',
  'balance',
  'z_loss',
  'selection_bias',
  'capacity',
)


# Sizes that a part may compute: the shapes of the parameters are compared instead.
FROM_SHAPES = ('inner', 'rank', 'heads')


def _check_same(model_type: str, ours, theirs) -> None:
  from flax import nnx

  from research import configs
  from research.model import counts

  shapes = [
    {path: x.shape for path, x in nnx.to_flat_state(nnx.state(counts.abstract(tree)))}
    for tree in (ours, theirs)
  ]
  for path, shape in shapes[0].items():
    if shapes[1].get(path) != shape:
      name = '.'.join(map(str, path))
      raise UserError(
        f'config.json of {model_type} cannot say that {name} is {shape}, only {shapes[1].get(path)}.'
      )

  lines = [
    [
      line.strip()
      for line in configs.describe(tree).splitlines()
      if line.split()[0] not in (*TRAINING_ONLY, *FROM_SHAPES)
    ]
    for tree in (ours, theirs)
  ]
  for a, b in zip(*lines, strict=False):
    numbers = [re.split(r' = ', line)[-1] for line in (a, b)]
    try:
      if a != b and abs(float(numbers[0]) / float(numbers[1]) - 1) > 1e-6:
        raise ValueError
    except (ValueError, ZeroDivisionError):
      raise UserError(
        f'config.json of {model_type} cannot say {a!r} of this model, only {b!r}.'
      ) from None


# Parameters.


def table(model, family: 'Family') -> list['Tensor']:
  """The tensors of this family for a model (a partial that needs only `rngs`).

  Raises:
    UserError: the table leaves a parameter out, by name.
  """
  import math

  from flax import nnx

  from research.model import counts, hf_names

  module = counts.abstract(model)
  tensors = hf_names.tensors(module, family.trees, family.top)
  covered: dict[tuple, int] = {}
  for tensor in tensors:
    for piece in tensor.pieces:
      covered[piece.path] = covered.get(piece.path, 0) + math.prod(piece.shape)
  for path, param in nnx.to_flat_state(nnx.state(module)):
    if covered.get(path, 0) != math.prod(param.shape):
      name = '.'.join(map(str, path))
      raise UserError(
        f'{family.model_type} has no tensor for {name}: this model is not of that family.'
      )
  return tensors


def load(folder: str | pathlib.Path, buffers: str | pathlib.Path | None = None) -> tuple[str, dict]:
  """The gin text and parameters of a Hugging Face checkpoint.

  Args:
    folder: with config.json and *.safetensors.
    buffers: a folder to map the parameters to files in, so that memory holds one tensor at a time.

  Raises:
    UserError: an unknown family or option; tensors that are unknown, missing or misshapen, listed.
  """
  import numpy as np

  from research import configs

  folder = pathlib.Path(folder)
  if not (folder / 'config.json').is_file():
    raise UserError(f'{folder}: no config.json here (a folder of a downloaded model is wanted).')
  config = json.loads((folder / 'config.json').read_text())
  given = read_tensors(folder)
  family = family_of(config)
  text = gin_text(family, {**config, 'tensors': tuple(given)})
  gin = configs.Config('MODEL')
  gin._read(text, 'model.gin')
  wanted = table(gin.tree(), family)
  _check_names(folder, wanted, given, family.ignore)
  arrays: dict[tuple, np.ndarray] = {}
  for tensor in wanted:
    for piece, value in zip(tensor.pieces, tensor.split(given[tensor.name]), strict=True):
      if piece.path not in arrays:
        arrays[piece.path] = _buffer(wanted, piece, buffers)
      arrays[piece.path][piece.index] = value
  return text, _nested(arrays)


def _buffer(wanted, piece, folder):
  import numpy as np

  indices = [p.index for tensor in wanted for p in tensor.pieces if p.path == piece.path]
  lead = tuple(max(i) + 1 for i in zip(*indices, strict=True))
  shape = (*lead, *piece.shape)
  if folder is None:
    return np.empty(shape, np.float32)
  return np.memmap(
    pathlib.Path(folder) / '.'.join(map(str, piece.path)), np.float32, 'w+', shape=shape
  )


def _check_names(folder, wanted, given, ignore):
  names = {tensor.name for tensor in wanted}
  unknown = [n for n in given if n not in names and not any(re.fullmatch(i, n) for i in ignore)]
  # A tied head that was saved all the same says nothing new.
  unknown = [n for n in unknown if n != 'lm_head.weight']
  problems = [f'{name} is missing' for name in sorted(names - given.keys())]
  problems += [f'{name} is unknown' for name in sorted(unknown)]
  problems += [
    f'{t.name} is {given[t.name].shape} and should be {t.shape}'
    for t in wanted
    if t.name in given and given[t.name].shape != t.shape
  ]
  if problems:
    raise UserError(f'{folder}: the tensors do not fit config.json: {"; ".join(problems)}.')


def _nested(arrays: dict[tuple, Any]) -> dict:
  tree: dict = {}
  for path, value in arrays.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def save(
  folder: str | pathlib.Path, gin, params: dict, model_type: str, dtype: str = 'float32'
) -> None:
  """Writes config.json and model.safetensors of a model.

  Args:
    gin: the `configs.Config` whose MODEL it is.
    params: its parameters, nested dicts.
    model_type: the Hugging Face family to write.

  Raises:
    UserError: the family is unknown, or the model is something that its config.json cannot say.
  """
  import numpy as np

  wanted, config = _family_to_write(gin, model_type)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)

  def value(piece):
    node = params
    for key in piece.path:
      node = node[key] if key in node else node[str(key)]
    return np.asarray(node[piece.index])

  tensors = ((t.name, t.join([value(p) for p in t.pieces])) for t in wanted)
  write_tensors(folder, tensors, {t.name: t.shape for t in wanted}, dtype)
  text = json.dumps({**config, 'dtype': dtype}, indent=2) + '\n'
  (folder / 'config.json').write_text(text)


def read_params(folder: str | pathlib.Path) -> dict:
  """The parameters in the newest checkpoint of a folder, on the host, without its optimizer state."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  folder = pathlib.Path(folder).absolute()
  # A run's checkpoints stand in its folder 'checkpoints'.
  folder = next((f for f in (folder / 'checkpoints', folder) if f.is_dir()), folder)
  with ocp.CheckpointManager(
    folder, options=ocp.CheckpointManagerOptions(read_only=True)
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f'--checkpoint: no checkpoint in {folder}.')
  with ocp.PyTreeCheckpointer() as checkpointer:
    saved = checkpointer.metadata(folder / str(step) / 'state').item_metadata.tree
    wanted = {
      'params': jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), saved['params'])
    }
    args = ocp.args.PyTreeRestore(
      item={'params': jax.tree.map(lambda x: 0, saved['params'])},
      restore_args=wanted,
      partial_restore=True,
    )
    return checkpointer.restore(folder / str(step) / 'state', args=args)['params']


def main(flags) -> None:
  """Converts in the direction that the flags say."""
  out = pathlib.Path(flags.out or flags.to_hf)
  if flags.from_hf:
    from research.sharding import Mesh
    from research.training import checkpoints

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as buffers, Mesh().use():
      text, params = load(flags.from_hf, buffers)
      checkpoints.save_params(out, params)
    (out / 'model.gin').write_text(text)
  else:
    from research import configs

    gin = configs.load(flags.gin_file, flags.gin, root='MODEL')
    save(out, gin, read_params(flags.checkpoint), flags.model_type, flags.dtype)
  print(f'wrote {out}')


def _flags():
  parser = cli.parser('convert', __doc__, gin=False)
  parser.add_argument('--from_hf', metavar='FOLDER', help='config.json and *.safetensors to read')
  parser.add_argument('--out', metavar='FOLDER', help='our checkpoint to write, with --from_hf')
  parser.add_argument(
    '--to_hf', metavar='FOLDER', help='config.json and model.safetensors to write'
  )
  parser.add_argument('--checkpoint', metavar='FOLDER', help='our checkpoint to read, with --to_hf')
  parser.add_argument('--gin_file', action='append', metavar='FILE', help='its MODEL, with --to_hf')
  parser.add_argument(
    '--model_type', help='the Hugging Face family to write, as llama, with --to_hf'
  )
  parser.add_argument('--dtype', default='float32', choices=list(DTYPES.values()), help='to write')
  flags = cli.parse(parser)
  if bool(flags.from_hf) == bool(flags.to_hf):
    parser.error('give one of --from_hf and --to_hf.')
  needed = ('out',) if flags.from_hf else ('checkpoint', 'gin_file', 'model_type')
  for name in needed:
    if not getattr(flags, name):
      parser.error(f'--{name} is needed with --{"from_hf" if flags.from_hf else "to_hf"}.')
  return flags


if __name__ == '__main__':
  cli.run(main, _flags())
