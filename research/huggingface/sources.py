"""Opens a released checkpoint in whichever format it is: safetensors, pickles of torch, or a GGUF file."""

import pathlib
from typing import Any

from research.core.errors import UserError
from research.huggingface.files import Tensors
from research.huggingface.gguf_files import GGUF, GGUFTensors, is_gguf
from research.huggingface.own_layouts import translated
from research.huggingface.pickles import PickledTensors
from research.huggingface.settings import read_json


def read_source(path: pathlib.Path) -> tuple[dict[str, Any], Any]:
  """Returns the config.json and the tensors by name of a folder or a GGUF file.

  ChatGLM and Baichuan, whose releases have layouts of their own, become glm and llama (`own_layouts`).

  Raises:
    UserError: there is no model here, or a file is damaged.
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
