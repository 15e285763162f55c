"""What stands beside the weights: the tokenizer and the special ids, which conversion carries both ways.

A converted checkpoint keeps them in its folder `huggingface`. A model that was trained here takes them from the
vocabulary of its run.
"""

import json
import pathlib
import shutil
from typing import Any

from research.huggingface.defaults import SPECIAL_IDS
from research.huggingface.settings import read_json

TOKENIZER = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
  'merges.txt', 'vocab.txt', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model',
  'chat_template.jinja', 'chat_template.json', 'generation_config.json',
)  # fmt: skip
IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
FOLDER, FILE = 'huggingface', 'special_ids.json'


def keep_companions(folder: pathlib.Path, out: pathlib.Path) -> None:
  """Copies the tokenizer of a Hugging Face model beside its converted checkpoint, and notes its special ids."""
  out = out / FOLDER
  out.mkdir(parents=True, exist_ok=True)
  _copy(folder, out)
  config = read_json(folder / 'config.json')
  defaults = dict(zip(IDS, SPECIAL_IDS.get(config['model_type'], (None,) * 3), strict=True))
  ids = {key: config.get(key, default) for key, default in defaults.items()}
  if config.get('decoder_start_token_id') is not None:
    ids['decoder_start_token_id'] = config['decoder_start_token_id']
  (out / FILE).write_text(json.dumps(ids, indent=2) + '\n')


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
    source: a converted checkpoint, a run's folder, or None where nothing is known.
    vocab_size: of the model; an id that is not below it is left out.

  Returns:
    The special ids, for config.json; null where they are not known.
  """
  ids = dict.fromkeys(IDS)
  if source is not None and (source / FOLDER / FILE).is_file():
    _copy(source / FOLDER, folder)
    ids |= read_json(source / FOLDER / FILE)
  elif source is not None and (source / 'config.gin').is_file():
    ids |= _of_run(folder, source)
  # transformers builds no embedding whose padding id is outside of it.
  inside = lambda value: all(
    i < vocab_size for i in (value if isinstance(value, list) else [value])
  )
  ids = {key: value if value is None or inside(value) else None for key, value in ids.items()}
  if ids.get('eos_token_id') is not None and not (folder / 'generation_config.json').is_file():
    known = {key: value for key, value in ids.items() if value is not None}
    (folder / 'generation_config.json').write_text(json.dumps(known, indent=2) + '\n')
  return ids


def _of_run(folder: pathlib.Path, source: pathlib.Path) -> dict[str, Any]:
  """The tokenizer of the vocabulary that a run was trained with, and its ids."""
  from research.core import configs
  from research.data import vocabularies

  run = configs.load([str(source / 'config.gin')], root='RUN').tree()
  vocabulary = getattr(run.keywords.get('train'), 'vocabulary', None)
  if isinstance(vocabulary, vocabularies.Bytes):
    # ByT5's tokenizer has the ids of seqio's bytes: 0 padding, 1 EOS, 2 unknown, then the bytes.
    config = {
      'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': vocabulary.extra_ids, 'pad_token': '<pad>',
      'eos_token': '</s>', 'unk_token': '<unk>',
    }  # fmt: skip
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
    return {'eos_token_id': 1, 'pad_token_id': 0}
  print(
    f'note: the vocabulary of {source} is {type(vocabulary).__name__}; its tokenizer and special ids are not '
    'written, add them to the folder.'
  )
  return {}
