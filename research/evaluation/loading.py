"""Opens a trained model: its definition, its parameters, its tokenizer.

The folder is a run's (config.gin and checkpoints/), a converted one's (model.gin and a checkpoint), or one of
Hugging Face's (config.json and *.safetensors).
"""

import dataclasses
import math
import pathlib

import jax
import numpy as np
from flax import nnx

from research.checkpoints import folders, pretrained, streamed
from research.checkpoints.pretrained import abstract_model
from research.core import configs
from research.core.errors import UserError
from research.data.mixtures import streams_of
from research.data.objectives import Conversation
from research.data.streams import Stream
from research.data.vocabularies import Vocabulary
from research.huggingface import inwards
from research.inference.request_check import positions_of
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.training.experience import Experience
from research.training.run import Run


@dataclasses.dataclass(frozen=True)
class Folder:
  """A model's folder, before the parameters of a checkpoint are read.

  Attributes:
    model: makes the model: `model(rngs=...)`.
    run: the run that trained it; None for a converted model.
    params: the parameters of one checkpoint, still on disk; None for Hugging Face's folder.
    arrays: the parameters of Hugging Face's folder, as nested dicts of host arrays.
  """

  path: pathlib.Path
  model: object
  run: Run | None
  params: streamed.Params | None
  arrays: dict | None = None

  @property
  def step(self) -> int:
    """The step of the checkpoint; 0 for a model that was not trained here."""
    return self.params.step if self.params else 0

  @property
  def tokenizer(self) -> pathlib.Path:
    """The folder of a converted model's tokenizer."""
    return self.path / 'huggingface' if self.params else self.path


def open_folder(
  path: str | pathlib.Path, step: int | None = None, flag: str = '--checkpoint'
) -> Folder:
  """Opens the folder of a run or of a converted model.

  Args:
    step: of the checkpoint; None is the newest.
    flag: that named the folder, for messages.

  Raises:
    UserError: the folder holds no model, or no such checkpoint.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f'{flag}={path}: there is no such folder.')
  if (path / 'config.gin').is_file():
    run = configs.load(str(path / 'config.gin')).build()
    # The parameters stay on disk: the caller decides on which mesh they are read.
    return Folder(path, run.model, run, streamed.Params(path, step))
  if (path / 'model.gin').is_file():
    model = configs.load(str(path / 'model.gin'), root='MODEL').tree()
    return Folder(path, model, None, streamed.Params(path, step))
  raise UserError(
    f'{flag}={path} holds no config.gin (of a run) and no model.gin (of a converted model).'
  )


def open_hf(path: str | pathlib.Path) -> Folder:
  """Opens a folder of Hugging Face, without writing a converted copy.

  Raises:
    UserError: it is no such folder, or its model is not supported.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f'--hf={path}: there is no such folder.')
  if not (path / 'config.json').is_file():
    raise UserError(
      f"--hf={path} holds no config.json: a run's or a converted model's folder is --checkpoint."
    )
  text, arrays = inwards.load(path)
  config = configs.Config('MODEL')
  config._read(text, 'model.gin')
  return Folder(path, config.tree(), None, None, arrays)


def checkpoints_of(workdir: str | pathlib.Path) -> list[tuple[pathlib.Path, int]]:
  """(a run's folder, step) of every checkpoint of a run, or of all runs of a sweep.

  Raises:
    UserError: there is no checkpoint.
  """
  workdir = pathlib.Path(workdir)
  runs = [workdir] if (workdir / 'config.gin').is_file() else sorted(workdir.glob('runs/*'))
  # A run of a sweep that failed before its first step has no config.gin.
  runs = [run for run in runs if (run / 'config.gin').is_file()]
  pairs = [(run, step) for run in runs for step in folders.saved_steps(run / 'checkpoints')]
  if not pairs:
    raise UserError(
      f'--workdir={workdir} holds no checkpoint of a run, nor of the runs of a sweep.'
    )
  return pairs


def read_params(folder: Folder) -> dict:
  """The parameters, on the mesh in use; the optimizer's state is not read.

  Raises:
    UserError: a parameter is missing, has another shape, or does not match its checksum.
  """
  if folder.params is None:
    return on_devices(folder.model, folder.arrays)
  return pretrained.read_params(folder.model, folder.params)


def on_devices(model, arrays: dict) -> dict:
  """A model's parameters on the mesh in use.

  Args:
    arrays: the parameters as nested dicts of host arrays.
  """
  expected = hosts.on_mesh(nnx.to_pure_dict(nnx.state(abstract_model(model))))

  def put(x, leaf):
    return jax.device_put(np.asarray(x).astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(put, arrays, expected)


def vocabulary_of(run: Run | None) -> Vocabulary:
  """The vocabulary that a run trained with.

  Raises:
    UserError: there is no run, or its streams come from a registered seqio task.
  """
  stream = _first_stream(run) if run else None
  if stream is None or stream.registered:
    raise UserError(
      'the checkpoint does not say its tokenizer: bind Suite.vocabulary to evaluate it, or give '
      '--tokenizer=FILE to generate.'
    )
  return stream.vocabulary


def architecture_of(run: Run | None, model: nnx.Module) -> str:
  """One of `rows.ARCHITECTURES`. A decoder that was trained on prefixes is a 'prefix' model.

  Raises:
    UserError: the model is an encoder, which gives no likelihood of a text.
  """
  if 'encoder' in model.inputs:
    return 'encoder_decoder'
  if not model.causal:
    raise UserError(
      'this model sees both ways, so it gives no likelihood of a text: use a decoder or an '
      'encoder-decoder.'
    )
  stream = _first_stream(run) if run else None
  if stream is None or stream.registered or not stream.task.prefixed:
    return 'decoder'
  return 'prefix'


def conversation_template_of(run: Run) -> tuple[bool, str | None]:
  """(whether a run trained on conversations, their chat template or None)."""
  stream = _first_stream(run)
  if stream is None or stream.registered or not isinstance(stream.task, Conversation):
    return False, None
  return True, stream.task.template


def _first_stream(run: Run) -> Stream:
  # A run of reinforcement learning has no training stream. It uses the tokenizer of its validation stream.
  trained_on = run.validation if isinstance(run.train, Experience) else run.train
  return streams_of(trained_on)[0]


def length_of(run: Run | None, model: nnx.Module) -> int:
  """The longest row that a run trained on, in tokens; for a converted model 1024, or its learned positions."""
  if run:
    return max(run.train.lengths.values())
  return min(1024, positions_of(model) or 1024)


def mesh_for(model) -> Mesh:
  """A mesh of all devices: data parallel, or fully sharded where the parameters would fill a device."""
  devices = jax.devices()
  with Mesh().use(devices[:1]):  # parts ask for the mesh even when only shapes are computed
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract_model(model))))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  memory = hosts.device_bytes(devices)
  return Mesh(data=1, fsdp=-1) if memory and size > 0.5 * memory else Mesh()
