"""The tokenizer and the special ids beside the weights, which conversion keeps in both directions.

A converted checkpoint has them in its folder `huggingface`. A model that was trained here takes them from the
vocabulary of its run.
"""

import json
import pathlib
import shutil
from typing import Any

from research.core.errors import UserError
from research.huggingface import gguf_tokenizer, run_tokenizer
from research.huggingface.defaults import SPECIAL_IDS
from research.huggingface.gguf_files import GGUF, is_gguf
from research.huggingface.settings import read_json

TOKENIZER = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
  'merges.txt', 'vocab.txt', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model',
  'chat_template.jinja', 'chat_template.json', 'generation_config.json',
)  # fmt: skip
IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
FOLDER, FILE = 'huggingface', 'special_ids.json'


def keep_companions(folder: pathlib.Path, out: pathlib.Path) -> None:
  """Keeps the tokenizer and the special ids of a Hugging Face model beside its converted checkpoint.

  The tokenizer of a GGUF file is written anew. If it is of an unknown kind, a line says so.
  """
  out = out / FOLDER
  out.mkdir(parents=True, exist_ok=True)
  if is_gguf(folder):
    file = GGUF(folder)
    try:
      gguf_tokenizer.write(file, out)
    except UserError as error:
      print(f'note: the tokenizer is not written: {error}')
    ids = dict.fromkeys(IDS) | file.special_ids()
    (out / FILE).write_text(json.dumps(ids, indent=2) + '\n')
    return
  _copy(folder, out)
  config = read_json(folder / 'config.json')
  defaults = dict(zip(IDS, SPECIAL_IDS.get(config['model_type'], (None,) * 3), strict=True))
  ids = {key: config.get(key, default) for key, default in defaults.items()}
  if config.get('decoder_start_token_id') is not None:
    ids['decoder_start_token_id'] = config['decoder_start_token_id']
  (out / FILE).write_text(json.dumps(ids, indent=2) + '\n')


def copy_companions(source: pathlib.Path, out: pathlib.Path) -> None:
  """Copies the tokenizer of a converted checkpoint to a checkpoint that was made from it.

  The folder of a run has none, and then nothing is copied.
  """
  if (source / FOLDER).is_dir():
    shutil.copytree(source / FOLDER, out / FOLDER, dirs_exist_ok=True)


def _copy(folder: pathlib.Path, out: pathlib.Path) -> None:
  for name in TOKENIZER:
    if (folder / name).is_file():
      shutil.copyfile(folder / name, out / name)


def write_companions(
  folder: pathlib.Path, source: pathlib.Path | None, vocab_size: int
) -> dict[str, Any]:
  """Writes the tokenizer of a model into a Hugging Face folder.

  Args:
    folder: to write into.
    source: a converted checkpoint, a run's folder, or None if the model has neither.
    vocab_size: of the model; an id that is not below it is left out.

  Returns:
    The special ids for config.json, None where they are not known.
  """
  ids = dict.fromkeys(IDS)
  if source is not None and (source / FOLDER / FILE).is_file():
    _copy(source / FOLDER, folder)
    ids |= read_json(source / FOLDER / FILE)
  elif source is not None and (source / 'config.gin').is_file():
    ids |= _of_run(folder, source)
  # transformers builds no table of token vectors whose padding id is outside of it.
  ids = {key: value if _is_below(value, vocab_size) else None for key, value in ids.items()}
  generation = folder / 'generation_config.json'
  if ids.get('eos_token_id') is not None and not generation.is_file():
    text = json.dumps({key: value for key, value in ids.items() if value is not None}, indent=2)
    generation.write_text(text + '\n')
  return ids


def _is_below(ids: int | list[int] | None, size: int) -> bool:
  """Whether an id, or all of a list, are below a size; None counts as below."""
  if ids is None:
    return True
  return all(i < size for i in (ids if isinstance(ids, list) else [ids]))


def _of_run(folder: pathlib.Path, source: pathlib.Path) -> dict[str, Any]:
  """Writes the tokenizer of a run's vocabulary and returns its ids. If it has none, a line says so."""
  from research.core import configs

  run = configs.load([str(source / 'config.gin')], root='RUN').tree()
  stream = run.keywords.get('train')
  vocabulary = getattr(stream, 'vocabulary', None)
  template = getattr(getattr(stream, 'task', None), 'template', None)
  try:
    ids = run_tokenizer.write(folder, vocabulary, _trained_model(stream))
  except UserError as error:
    print(f'note: the tokenizer of {source} is not written; add it to the folder yourself: {error}')
    return {}
  if template is not None:
    try:
      run_tokenizer.write_template(folder, template)
    except UserError as error:  # the tokenizer is written, and its ids are known
      print(
        f'note: the chat template of {source} is not written; add chat_template.jinja to the folder '
        f'yourself: {error}'
      )
  return ids


def _trained_model(stream) -> pathlib.Path | None:
  """The SentencePiece model that freezing trained for a stream, None if the cache has none."""
  from research.data import cache, vocabularies

  vocabulary = getattr(stream, 'vocabulary', None)
  if not isinstance(vocabulary, vocabularies.SentencePiece) or vocabulary.file:
    return None
  folder = cache.default_cache()
  header = folder / 'streams' / stream.key() / 'header.json'
  if not header.is_file():
    return None
  return vocabularies.trained_file(vocabulary, folder, read_json(header)['corpus']['fingerprint'])
