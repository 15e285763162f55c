"""Writes the vocabulary of a run as the tokenizer of a Hugging Face folder: the same ids for the same text.

It puts no special tokens around a text, since training puts none.
"""

import json
import operator
import pathlib
from typing import Any

from research.core.errors import UserError
from research.data import vocabularies
from research.data.conversations import read_template
from research.data.encoding import HuggingFaceEncoding, SentencePieceEncoding

PAD = '<pad>'
SPACE = '\u2581'  # what SentencePiece writes for a space
UNIGRAM, NORMAL = 1, 1  # of a SentencePiece model, and of its pieces
# Texts on which a converted tokenizer must agree with the original.
SAMPLES = (
  'The law of this run', '  two  spaces, a tab\t and\n\na line ', '3.14159 = π', 'naïve façade ﬁne Å',
  '日本語のテキスト 🙂', '', ' ', 'x' * 40,
)  # fmt: skip


def write(folder: pathlib.Path, vocabulary, cache_file: pathlib.Path | None) -> dict[str, Any]:
  """Writes tokenizer.json and tokenizer_config.json.

  Args:
    folder: to write into.
    vocabulary: one of `research.data.vocabularies`.
    cache_file: the SentencePiece model that was trained for the run; None if there is none.

  Returns:
    The special ids.

  Raises:
    UserError: the vocabulary is of another class, or its file is missing or has no equal in tokenizer.json.
  """
  if isinstance(vocabulary, vocabularies.Bytes):
    return _write_bytes(folder, vocabulary)
  if isinstance(vocabulary, vocabularies.HuggingFaceTokenizer):
    return _write_fast(folder, vocabulary)
  if isinstance(vocabulary, vocabularies.SentencePiece):
    file = vocabulary.file or cache_file
    if file is None or not pathlib.Path(file).is_file():
      raise UserError(
        'the SentencePiece model of this run is not in the data cache any more (ISOFLOP_CACHE).'
      )
    return _write_sentencepiece(folder, pathlib.Path(file))
  raise UserError(
    f'{type(vocabulary).__name__} is a vocabulary that Hugging Face has no class for.'
  )


def _write_config(folder: pathlib.Path, config: dict[str, Any]) -> None:
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')


def write_template(folder: pathlib.Path, template: str) -> None:
  """Adds a run's chat template, and the tokens that it names, to tokenizer_config.json.

  Args:
    template: as `research.data.objectives.Conversation` has it.

  Raises:
    UserError: the template is gone, or cannot be read.
  """
  sources, tokens = read_template(template)
  path = folder / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  config['chat_template'] = sources['default']
  if len(sources) > 1:
    config['chat_template'] = [{'name': name, 'template': text} for name, text in sources.items()]
  tokenizer = folder / 'tokenizer.json'
  known = tokenizer.read_text() if tokenizer.is_file() else ''
  for name, token in tokens.items():
    # A token that the tokenizer lacks would become a new one, with an id that the model has no vector for.
    if name not in config and token and json.dumps(token, ensure_ascii=False) in known:
      config[name] = token
  _write_config(folder, config)


def _write_bytes(folder, vocabulary) -> dict[str, Any]:
  # ByT5's tokenizer has the ids of seqio's bytes: 0 padding, 1 EOS, 2 unknown, then the bytes.
  _write_config(folder, {
    'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': vocabulary.extra_ids, 'pad_token': PAD,
    'eos_token': '</s>', 'unk_token': '<unk>',
  })  # fmt: skip
  return {'eos_token_id': 1, 'pad_token_id': 0}


def _write_fast(folder, vocabulary) -> dict[str, Any]:
  encoding = HuggingFaceEncoding(vocabulary)
  settings = json.loads(pathlib.Path(vocabulary.file).read_text())
  if encoding.offset:
    _move_up(settings)
  # Others than ByteLevel, which only changes offsets, put special tokens around a text.
  if (settings.get('post_processor') or {}).get('type') != 'ByteLevel':
    settings['post_processor'] = None
  (folder / 'tokenizer.json').write_text(json.dumps(settings, ensure_ascii=False))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  config['eos_token'] = encoding.tokenizer.id_to_token(encoding.end - encoding.offset)
  if encoding.offset:
    config['pad_token'] = PAD
  _write_config(folder, config)
  return {
    'eos_token_id': encoding.end, 'pad_token_id': 0 if encoding.offset else None,
  }  # fmt: skip


def _move_up(settings: dict) -> None:
  """Makes every id one higher, as it is in the run, which pads rows with 0."""
  model = settings['model']
  if isinstance(model['vocab'], list):  # of a unigram model: [piece, score] by id
    model['vocab'].insert(0, [PAD, 0.0])
    if model.get('unk_id') is not None:
      model['unk_id'] += 1
  else:
    model['vocab'] = {PAD: 0, **{token: i + 1 for token, i in model['vocab'].items()}}
  added = settings.setdefault('added_tokens', [])
  for token in added:
    token['id'] += 1
  kinds = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  added.insert(0, {'id': 0, 'content': PAD, **kinds, 'special': True})


def _write_sentencepiece(folder, file: pathlib.Path) -> dict[str, Any]:
  encoding = SentencePieceEncoding(str(file))
  tokenizer = of_sentencepiece(file)
  for text in SAMPLES:
    if tokenizer.encode(text, add_special_tokens=False).ids != encoding.encode(text):
      raise UserError(
        f'{file} has no equal in tokenizer.json: {text!r} becomes other ids; put the file itself beside the '
        'weights as tokenizer.model.'
      )
  tokenizer.save(str(folder / 'tokenizer.json'))
  names = {'eos': encoding.end, 'unk': encoding.model.unk_id(), 'pad': encoding.model.pad_id()}
  known = {f'{name}_token': encoding.model.id_to_piece(i) for name, i in names.items() if i >= 0}
  _write_config(folder, {'tokenizer_class': 'PreTrainedTokenizerFast', **known})
  pad = names['pad'] if names['pad'] >= 0 else None
  return {'eos_token_id': encoding.end, 'pad_token_id': pad}


def of_sentencepiece(file: pathlib.Path):
  """Returns a `tokenizers.Tokenizer` with the pieces, scores and normalisation of a SentencePiece model."""
  from sentencepiece import sentencepiece_model_pb2
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

  proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
  spec = proto.normalizer_spec
  trainer = proto.trainer_spec
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  if trainer.model_type == UNIGRAM:
    model = models.Unigram(pieces, trainer.unk_id, byte_fallback=trainer.byte_fallback)
  else:
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    model = models.BPE(
      vocab, merges(proto.pieces, vocab), unk_token=pieces[trainer.unk_id][0], fuse_unk=True,
      byte_fallback=trainer.byte_fallback,
    )  # fmt: skip
  tokenizer = Tokenizer(model)
  steps = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend(SPACE))
  steps.append(normalizers.Replace(' ', SPACE))
  tokenizer.normalizer = normalizers.Sequence(steps)
  backwards = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  if spec.add_dummy_prefix:
    backwards.append(decoders.Strip(' ', 1, 0))
  tokenizer.decoder = decoders.Sequence(backwards)
  control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
  tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
  return tokenizer


def merges(pieces, vocab: dict[str, int]) -> list[tuple[str, str]]:
  """Returns the merges of a BPE model in the order of scores: every way to make a piece of two others."""

  def ids(pair: tuple[str, str]) -> tuple[int, int]:
    return vocab[pair[0]], vocab[pair[1]]

  result = []
  for piece in sorted(pieces, key=operator.attrgetter('score'), reverse=True):
    if piece.type != NORMAL:
      continue
    text = piece.piece
    pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
    pairs = [(first, second) for first, second in pairs if first in vocab and second in vocab]
    result += sorted(pairs, key=ids)
  return result
