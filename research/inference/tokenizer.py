"""A model's tokenizer as generation needs it: a prompt's ids with what stands before it, ids to text, the ends.

A run's tokenizer is that of its data. A model of somebody else brings its own files, and its ids are used as
they are.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from research.core.errors import UserError
from research.data.encoding import Encoding


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What generation asks of a tokenizer.

  Attributes:
    encode: text to ids, with the special tokens that a prompt has.
    decode: ids to text, without special tokens.
    size: one more than the highest id.
    ends: ids that end a text.
    start: ids that the decoder starts from, before the prompt; of an encoder-decoder, all that it starts from.
  """

  encode: Callable[[str], list[int]]
  decode: Callable[[list[int]], str]
  size: int
  ends: tuple[int, ...]
  start: tuple[int, ...] = ()


def of_encoding(encoding: Encoding, two_sided: bool) -> Tokenizer:
  """The tokenizer of a run's data. In training a row begins with token 0, and an encoder's text has an end."""
  end = [encoding.end] if two_sided else []
  return Tokenizer(
    encode=lambda text: encoding.encode(text) + end,
    decode=encoding.decode,
    size=encoding.size,
    ends=(encoding.end,),
    start=(0,),
  )


def of_folder(folder: pathlib.Path) -> Tokenizer:
  """The tokenizer beside the weights of a Hugging Face model: tokenizer.json, or a SentencePiece model.

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
  """The tokenizer of one file, a tokenizer.json or a SentencePiece .model."""
  if not path.is_file():
    raise UserError(f'--tokenizer={path}: there is no such file.')
  read = _fast if path.suffix == '.json' else _sentencepiece
  return read(path, _ends(path.parent), _start(path.parent))


def check_belongs(tokenizer: Tokenizer, vocab: int) -> None:
  """Raises where a model of `vocab` logits was not trained with this tokenizer.

  A vocabulary is often padded to a round number, so that a model may have some logits more than there are ids.
  """
  if not vocab / 2 <= tokenizer.size <= vocab:
    raise UserError(
      f'the tokenizer has {tokenizer.size} ids and the model {vocab} logits, so it does not belong to this '
      'checkpoint; name the right one with --tokenizer=FILE.'
    )


def _settings(folder: pathlib.Path) -> dict:
  """What the folder says of special ids; generation_config.json comes first, as in transformers."""
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
  import tokenizers

  try:
    inner = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises a bare Exception
    raise UserError(f'{path} is not a tokenizer.json: {error}.') from error
  return Tokenizer(
    encode=lambda text: inner.encode(text).ids,
    decode=lambda ids: inner.decode(ids, skip_special_tokens=True),
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
  # T5's models have no token of a beginning; their inputs end with one of an end.
  end = [] if begin else [inner.eos_id()]
  return Tokenizer(
    encode=lambda text: begin + inner.encode(text) + end,
    decode=lambda ids: inner.decode([i for i in ids if i < size and not inner.is_control(i)]),
    size=size,
    ends=ends or (inner.eos_id(),),
    start=start,
  )
