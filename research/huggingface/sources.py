"""Where a checkpoint of somebody else's comes from: safetensors, pickles of torch, a GGUF file."""

import pathlib
from typing import Any

from research.core.errors import UserError
from research.huggingface.files import Tensors
from research.huggingface.gguf_files import GGUF, GGUFTensors, is_gguf
from research.huggingface.own_layouts import translated
from research.huggingface.pickles import PickledTensors
from research.huggingface.settings import read_json


def read_source(path: pathlib.Path) -> tuple[dict[str, Any], Any]:
  """What config.json says, and a mapping of the tensors, of a folder or of a GGUF file.

  ChatGLM and Baichuan as they were released come as the families that they are (`own_layouts`).

  Raises:
    UserError: there is no such model, or a file is damaged.
  """
  if is_gguf(path) and path.is_file():
    file = GGUF(path)
    return file.config(), GGUFTensors(file)
  if not (path / 'config.json').is_file():
    raise UserError(f'{path}: no config.json here (a folder of a downloaded model is wanted).')
  config = read_json(path / 'config.json')
  kind = config.get('model_type')
  if not isinstance(kind, str | None):
    raise UserError(f'{path / "config.json"}: model_type = {kind!r} is no name of a family.')
  pickled = not Tensors.are_in(path) and PickledTensors.are_in(path)
  return translated(config, (PickledTensors if pickled else Tensors)(path))
