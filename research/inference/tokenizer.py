"""The interface that generation needs of a tokenizer, for runs of this project and for other models.

A run's tokenizer is that of its data. Other models come with tokenizer files, and their ids are used unchanged.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

from research.core.errors import UserError
from research.data.encoding import Encoding, read_tokenizer


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer.

  Attributes:
    encode: maps text to ids, with the special tokens of a prompt.
    decode: maps ids to text, without special tokens.
    size: the highest id plus one.
    ends: ids that end a text.
    start: ids that the decoder reads before the prompt; in an encoder-decoder, all that it starts from.
  """

  encode: Callable[[str], list[int]]
  decode: Callable[[list[int]], str]
  size: int
  ends: tuple[int, ...]
  start: tuple[int, ...] = ()


def of_encoding(encoding: Encoding, two_sided: bool) -> Tokenizer:
  """Returns the tokenizer of a run's data.

  In training a row begins with token 0, and the text of an encoder ends with EOS.

  Args:
    encoding: of the data.
    two_sided: the model is an encoder-decoder.
  """
  end = [encoding.end] if two_sided else []

  def encode(text: str) -> list[int]:
    return encoding.encode(text) + end

  return Tokenizer(
    encode=encode,
    decode=encoding.decode,
    size=encoding.size,
    ends=(encoding.end,),
    start=(0,),
  )


def of_folder(folder: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer in the folder of a Hugging Face model: tokenizer.json, or a SentencePiece model.

  Raises:
    UserError: there is none.
  """
  if (folder / 'tokenizer.json').is_file():
    return _fast(folder / 'tokenizer.json', _ends(folder), _start(folder))
  for name in ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model'):
    if (folder / name).is_file():
      return _sentencepiece(folder / name, _ends(folder), _start(folder))
  raise UserError(
    f'{folder} has no tokenizer.json and no SentencePiece model: give --tokenizer=FILE.'
  )


def of_file(path: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer of a file, a tokenizer.json or a SentencePiece .model."""
  if not path.is_file():
    raise UserError(f'--tokenizer={path}: there is no such file.')
  read = _fast if path.suffix == '.json' else _sentencepiece
  return read(path, _ends(path.parent), _start(path.parent))


def check_belongs(tokenizer: Tokenizer, vocab: int) -> None:
  """Raises UserError if a model of `vocab` logits cannot belong to this tokenizer.

  Vocabularies are often padded to a round number, so a model may have more logits than there are ids.
  """
  if not vocab / 2 <= tokenizer.size <= vocab:
    raise UserError(
      f'the tokenizer has {tokenizer.size} ids and the model {vocab} logits, so it does not belong to this '
      'checkpoint; name the right one with --tokenizer=FILE.'
    )


def _settings(folder: pathlib.Path) -> dict:
  """Returns the settings of special ids in a folder; generation_config.json wins, as in transformers."""
  settings: dict = {}
  for name in ('special_ids.json', 'config.json', 'generation_config.json'):
    path = folder / name
    if path.is_file():
      try:
        settings |= {k: v for k, v in json.loads(path.read_text()).items() if v is not None}
      except (ValueError, AttributeError) as error:
        raise UserError(f'{path} is not a JSON object: {error}.') from error
  return settings


def _ends(folder: pathlib.Path) -> tuple[int, ...]:
  ends = _settings(folder).get('eos_token_id', ())
  return tuple(ends) if isinstance(ends, list | tuple) else (ends,)


def _start(folder: pathlib.Path) -> tuple[int, ...]:
  start = _settings(folder).get('decoder_start_token_id')
  return () if start is None else (start,)


def _fast(path: pathlib.Path, ends, start) -> Tokenizer:
  try:
    inner = read_tokenizer(path)
  except Exception as error:  # the library raises a bare Exception
    raise UserError(f'{path} is not a tokenizer.json: {error}.') from error

  def encode(text: str) -> list[int]:
    return inner.encode(text).ids

  return Tokenizer(
    encode=encode,
    decode=functools.partial(inner.decode, skip_special_tokens=True),
    size=1 + max(inner.get_vocab(with_added_tokens=True).values()),
    ends=ends,
    start=start,
  )


def _sentencepiece(path: pathlib.Path, ends, start) -> Tokenizer:
  import sentencepiece

  inner = sentencepiece.SentencePieceProcessor()
  try:
    inner.load(str(path))
  except (OSError, RuntimeError) as error:
    raise UserError(f'{path} is not a SentencePiece model: {error}.') from error
  size = inner.get_piece_size()
  begin = [inner.bos_id()] if inner.bos_id() >= 0 else []
  # T5's models have no BOS token, and their inputs end with EOS.
  end = [] if begin else [inner.eos_id()]

  def encode(text: str) -> list[int]:
    return begin + inner.encode(text) + end

  def decode(ids: list[int]) -> str:
    # A model may have more logits than the tokenizer has ids.
    return inner.decode([i for i in ids if i < size and not inner.is_control(i)])

  return Tokenizer(
    encode=encode,
    decode=decode,
    size=size,
    ends=ends or (inner.eos_id(),),
    start=start,
  )
