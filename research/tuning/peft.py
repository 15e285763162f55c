"""LoRA adapters in the folders of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

peft names a tensor after the base model's: the A and B of 'model.layers.0.self_attn.q_proj.weight' are
'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' [rank, inputs] and '...lora_B.weight'
[outputs, rank].
"""

import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from research.checkpoints import streamed
from research.core import configs
from research.core.errors import UserError
from research.huggingface import companions
from research.huggingface.files import Tensors, write_tensors
from research.huggingface.names import Piece, Tensor
from research.huggingface.outwards import family_to_write
from research.huggingface.settings import read_json
from research.model import counts
from research.tuning.lora import DoRA, LoRA
from research.tuning.merge import Tree, without_weights

PREFIX = 'base_model.model.'
MAGNITUDE = 'lora_magnitude_vector'
ADAPTER = 'adapter_model.safetensors'
# Keys of adapter_config.json that `read_config` reads, and keys that do not change what the adapters compute.
READ = ('peft_type', 'r', 'lora_alpha', 'use_rslora', 'use_dora', 'bias')
IDLE = (
  'auto_mapping', 'base_model_name_or_path', 'exclude_modules', 'fan_in_fan_out', 'inference_mode',
  'init_lora_weights', 'layers_pattern', 'layers_to_transform', 'lora_dropout', 'megatron_core',
  'peft_version', 'qalora_group_size', 'revision', 'target_modules', 'task_type',
)  # fmt: skip


def save(
  folder: str | pathlib.Path, model, params: Mapping, model_type: str, base: str = ''
) -> None:
  """Writes the adapters of a model.

  Args:
    folder: the folder to write.
    model: a partial that needs only `rngs`, whose `weight` is a LoRA or a DoRA.
    params: its parameters, nested dicts of arrays.
    model_type: the Hugging Face family of the base, such as 'llama'.
    base: where the base model is, for the readers of the folder.

  Raises:
    UserError: the model has no adapters, or adapters that peft's format cannot describe.
  """
  folder = pathlib.Path(folder)
  wanted, _ = family_to_write(Tree(without_weights(model)), model_type)
  module = counts.abstract(model)
  tensors = {}
  kinds = set()
  targets = set()
  for tensor, piece, weight in _adapted(module, wanted):
    values = {k: np.asarray(v) for k, v in _leaves(params, piece.path).items()}
    lora = {name: values[name][piece.index] for name in _members(weight)}
    if not lora['lora_b'].any() and np.all(lora.get('magnitude', 1) == 1):
      continue  # peft's models have no adapter where nothing was learned
    _check(tensor, weight)
    kernel = values['base'][piece.index]
    name = PREFIX + tensor.name.removesuffix('.weight')
    tensors |= {f'{name}.{key}': x for key, x in _to_peft(lora, kernel, piece).items()}
    kinds.add((type(weight), weight.rank, weight.alpha, weight.rank_stabilized))
    targets.add(tensor.name.removesuffix('.weight').rpartition('.')[2])
  if len(kinds) != 1:
    many = f'has {len(kinds)} kinds of them' if kinds else 'has none that learned anything'
    raise UserError(f'adapter_config.json describes one kind of adapters, and this model {many}.')
  ((kind, rank, alpha, stabilized),) = kinds
  config = {
    'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': rank,
    'lora_alpha': alpha, 'lora_dropout': 0.0, 'bias': 'none', 'target_modules': sorted(targets),
    'use_rslora': stabilized, 'use_dora': kind is DoRA, 'inference_mode': True,
  }  # fmt: skip
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder, tensors.items(), {k: v.shape for k, v in tensors.items()}, 'float32', 1e15)
  (folder / 'model.safetensors').rename(folder / ADAPTER)
  (folder / 'adapter_config.json').write_text(json.dumps(config, indent=2) + '\n')


def read_config(folder: pathlib.Path) -> dict:
  """The knobs of `lora.LoRA` in an adapter_config.json, and 'kind', 'LoRA' or 'DoRA'.

  Raises:
    UserError: it is of another method, or has an option that is not supported here.
  """
  path = folder / 'adapter_config.json'
  if not path.is_file():
    raise UserError(f'{folder}: no adapter_config.json here (a folder that peft wrote is wanted).')
  config = read_json(path)
  if config.get('peft_type') != 'LORA':
    raise UserError(f'{path}: peft_type {config.get("peft_type")!r} is not read; only LORA is.')
  if config.get('bias', 'none') != 'none':
    raise UserError(f'{path}: bias = {config["bias"]!r} is not read; only none is.')
  for key, value in config.items():
    if value and key not in (*READ, *IDLE):
      raise UserError(f'{path}: {key} = {value!r} is not supported; train the adapter without it.')
  if config.get('init_lora_weights') not in (None, True, False, 'gaussian', 'orthogonal', 'eva'):
    # PiSSA, OLoRA, CorDA and LoftQ change the base as well, which the folder does not hold.
    how = config['init_lora_weights']
    raise UserError(f'{path}: init_lora_weights = {how!r} changes the base, and is not supported.')
  rank = config.get('r')
  alpha = config.get('lora_alpha')
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
    raise UserError(f'{path}: r = {rank!r} and lora_alpha = {alpha!r} must be positive numbers.')
  kind = 'DoRA' if config.get('use_dora') else 'LoRA'
  knobs = {'rank': rank, 'alpha': float(alpha)}
  return {'kind': kind, 'rank_stabilized': bool(config.get('use_rslora')), **knobs}


def load(
  folder: str | pathlib.Path, base: str | pathlib.Path, out: str | pathlib.Path, model_type: str
) -> None:
  """Writes a checkpoint and the model.gin of a base model with the adapters of a folder of peft.

  Args:
    folder: the folder that peft wrote.
    base: the folder of the base model that `research.convert` wrote.
    out: the folder to write.
    model_type: the Hugging Face family of the base, such as 'llama'.

  Raises:
    UserError: the folder belongs to another base, or has an option that is not supported here.
  """
  folder = pathlib.Path(folder)
  base = pathlib.Path(base)
  out = pathlib.Path(out)
  knobs = read_config(folder)
  text = _gin_text(base, knobs)
  config = configs.Config('MODEL')
  config._read(text, 'model.gin')
  module = counts.abstract(config.tree())
  wanted, _ = family_to_write(Tree(without_weights(config.tree())), model_type)
  given = Tensors(folder, ADAPTER)
  params = streamed.Params(base)
  arrays = _plain_start(module, params)
  used: set[str] = set()
  for tensor, piece, weight in _adapted(module, wanted):
    name = PREFIX + tensor.name.removesuffix('.weight') + '.'
    mine = {key.removeprefix(name): key for key in given if key.startswith(name)}
    if not mine:
      continue
    _check(tensor, weight)
    used |= set(mine.values())
    kernel = arrays[(*piece.path, 'base')][piece.index]
    read = {key: np.asarray(given[full]) for key, full in mine.items()}
    for member, value in _from_peft(read, kernel, weight, folder, tensor.name).items():
      arrays[(*piece.path, member)][piece.index] = value
  if left := sorted(set(given) - used):
    more = f' (and {len(left) - 1} more)' if len(left) > 1 else ''
    raise UserError(f'{folder}: {left[0]}{more} has no place in the model of {base}.')
  out.mkdir(parents=True, exist_ok=True)
  shapes = {path: x.shape for path, x in arrays.items()}
  pieces = functools.partial(_whole_pieces, arrays)
  streamed.write_params(out, shapes, dict.fromkeys(shapes, 0), pieces)
  (out / 'model.gin').write_text(text)
  companions.copy_companions(base, out)  # the tokenizer, for whoever converts it further


def _whole_pieces(arrays: Mapping) -> streamed.Pieces:
  return ((path, (), x) for path, x in arrays.items())


def _gin_text(base: pathlib.Path, knobs: dict) -> str:
  path = base / 'model.gin'
  if not path.is_file():
    raise UserError(f'{base}: no model.gin here (a folder that research.convert wrote is wanted).')
  kind = knobs['kind']
  lines = [
    path.read_text().rstrip('\n'),
    '',
    'from research.model import embedder',
    'from research.model import models',
    'from research.model import weights',
    'from research.tuning import lora',
    f'models.LanguageModel.weight = @lora.{kind}',
    'embedder.Embedder.weight = @weights.plain',
  ]
  lines += [f'lora.{kind}.{k} = {v!r}' for k, v in knobs.items() if k != 'kind']
  return '\n'.join(lines) + '\n'


def _plain_start(module: nnx.Module, params: streamed.Params) -> dict[tuple, np.ndarray]:
  """Every parameter by path: those of the base, and adapters that change nothing yet."""
  arrays = {}
  for path, value in nnx.to_flat_state(nnx.state(module)):
    if path[-1] in ('lora_a', 'lora_b'):
      arrays[path] = np.zeros(value.shape, np.float32)
    elif path[-1] == 'magnitude':
      arrays[path] = np.ones(value.shape, np.float32)
    else:
      source = path[:-1] if path[-1] == 'base' else path
      arrays[path] = np.array(params.piece(source, ()), np.float32)
      params.forget()
  return arrays


def _adapted(module: nnx.Module, wanted: list[Tensor]) -> Iterator[tuple[Tensor, Piece, LoRA]]:
  """The tensors of the base model whose parameter has an adapter."""
  adapters = {path: m for path, m in nnx.iter_modules(module) if isinstance(m, LoRA)}
  for tensor in wanted:
    for piece in tensor.pieces:
      if piece.path in adapters:
        yield tensor, piece, adapters[piece.path]


def _check(tensor: Tensor, weight: LoRA) -> None:
  """Raises a UserError where peft has no equivalent of an adapter."""
  if len(tensor.pieces) > 1:
    raise UserError(
      f'{tensor.name} holds several matrices, and peft has one adapter for all of it; merge the adapters '
      'instead (--to_hf).'
    )
  if 'vocab' in weight.axes:
    raise UserError(
      f'{tensor.name} is of the vocabulary, whose adapters peft reads otherwise; merge them instead (--to_hf).'
    )


def _members(weight: LoRA) -> tuple[str, ...]:
  return ('lora_a', 'lora_b', 'magnitude') if isinstance(weight, DoRA) else ('lora_a', 'lora_b')


def _leaves(params: Mapping, path: tuple) -> Mapping:
  for key in path:
    params = params[key]
  return params


def _lengths(kernel: np.ndarray, inputs: int) -> np.ndarray:
  """The length of every column of a kernel [inputs..., outputs...], float64 [outputs]."""
  matrix = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
  return np.linalg.norm(matrix.astype(np.float64), axis=0)


def _to_peft(lora: Mapping, kernel: np.ndarray, piece: Piece) -> dict[str, np.ndarray]:
  """peft's arrays of one matrix."""
  rank = lora['lora_a'].shape[-1]
  arrays = {
    'lora_A.weight': lora['lora_a'].reshape(-1, rank).T,
    'lora_B.weight': lora['lora_b'].reshape(rank, -1).T,
  }
  if 'magnitude' in lora:
    arrays[MAGNITUDE] = lora['magnitude'].reshape(-1) * _lengths(kernel, piece.inputs)
  return {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}


def _from_peft(read: Mapping, kernel, weight: LoRA, folder, name: str) -> dict[str, np.ndarray]:
  """Our arrays of one matrix.

  Raises:
    UserError: an array is missing, unknown or misshapen.
  """
  inputs = math.prod(kernel.shape[: weight.inputs])
  outputs = kernel.size // inputs
  expected = {'lora_A.weight': (weight.rank, inputs), 'lora_B.weight': (outputs, weight.rank)}
  if isinstance(weight, DoRA):
    expected[MAGNITUDE] = (outputs,)
  shapes = {key: x.shape for key, x in read.items()}
  if shapes != expected:
    raise UserError(f'{folder}: the adapter of {name} has {shapes}, and {expected} is expected.')
  start = weight.inputs
  end = kernel.ndim
  lora = {
    'lora_a': read['lora_A.weight'].T.reshape(*kernel.shape[:start], weight.rank),
    'lora_b': read['lora_B.weight'].T.reshape(weight.rank, *kernel.shape[start:end]),
  }
  if isinstance(weight, DoRA):
    magnitude = read[MAGNITUDE] / _lengths(kernel, weight.inputs)
    lora['magnitude'] = magnitude.reshape(kernel.shape[start:])
  return lora


def params_of(model, params: streamed.Params) -> dict:
  """All parameters of a model, in the host's memory, nested dicts as in the model."""
  abstract = nnx.to_pure_dict(nnx.state(counts.abstract(model)))

  def read(path, _):
    value = np.array(params.piece(tuple(key.key for key in path), ()))
    params.forget()
    return value

  return jax.tree.map_with_path(read, abstract)
