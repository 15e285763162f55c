"""seqio vocabularies for `research.data.vocabularies`, and the bytes of text of each token."""

import hashlib
import io
import os
import pathlib
import re

import numpy as np
import seqio

from research.core.errors import Invalid, UserError
from research.data import vocabularies
from research.data.spec import digest, outside_code, to_spec
from tasks.tokenizers import TokenizerVocabulary


def build(vocabulary, cache: pathlib.Path, store, log=print) -> seqio.Vocabulary:
  """The seqio vocabulary of a description.

  It trains a SentencePiece model on the text of `store` where the description names no file.
  A description from outside the project has a method `build`.

  Raises:
    Invalid: the file is not a vocabulary of this kind, or it has no token that ends a document.
  """
  kind = type(vocabulary)
  if hasattr(vocabulary, 'build'):
    built = vocabulary.build()
  elif isinstance(vocabulary, vocabularies.Bytes):
    built = seqio.ByteVocabulary(vocabulary.extra_ids)
  elif isinstance(vocabulary, vocabularies.HuggingFaceTokenizer):
    built = TokenizerVocabulary(vocabulary.file, vocabulary.eos, vocabulary.extra_ids)
  elif isinstance(vocabulary, vocabularies.SentencePiece):
    path = vocabulary.file or _trained(vocabulary, cache, store, log)
    built = seqio.SentencePieceVocabulary(str(path), extra_ids=vocabulary.extra_ids)
    _check_sentencepiece(built, path)
  else:
    raise UserError(f'{kind.__name__} needs a method build(): see docs/data.md.')
  if not isinstance(built, seqio.Vocabulary):
    raise UserError(
      f'{kind.__name__}.build() must return a seqio.Vocabulary, and not {built!r:.80}.'
    )
  return built


def _check_sentencepiece(vocabulary: seqio.SentencePieceVocabulary, path):
  try:
    eos = vocabulary.eos_id
  except Exception as e:  # protobuf and SentencePiece document no class of errors
    raise Invalid(vocabularies.SentencePiece, 'file', f'{path} is no SentencePiece model.') from e
  if eos is None or eos < 0:
    why = f'{path} has no token that ends a document (eos_id is {eos}): train it with one.'
    raise Invalid(vocabularies.SentencePiece, 'file', why)


def _trained(vocabulary, cache: pathlib.Path, store, log) -> pathlib.Path:
  path = vocabularies.trained_file(vocabulary, cache, store.fingerprint('train'))
  if not path.exists():
    log(f'training a SentencePiece model: {vocabulary.model_type}, {vocabulary.size} ids')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial')
    partial.write_bytes(train(vocabulary, _sample(store, vocabulary.train_bytes)))
    partial.rename(path)
  return path


def _sample(store, size: int):
  """Lines of the first pieces of the training text, `size` bytes in all."""
  for piece in range(store.pieces('train')):
    for document in store.documents('train', piece):
      if size <= 0:
        return
      size -= len(document)
      yield from filter(None, document.decode().split('\n'))


def train(vocabulary, lines) -> bytes:
  """A serialised SentencePiece model trained on `lines`, without the extra ids (seqio adds those)."""
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=vocabulary.size - vocabulary.extra_ids,
      model_type=vocabulary.model_type,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      character_coverage=0.9995,
      max_sentence_length=1 << 16,
      num_threads=4,
      minloglevel=2,
    )
  except RuntimeError as e:
    raise Invalid(vocabularies.SentencePiece, 'size', _why_not_learned(vocabulary, str(e))) from e
  return model.getvalue()


def _why_not_learned(vocabulary, error: str) -> str:
  """SentencePiece's error about a size, in ids that count the extra ids as `size` does."""
  extra = vocabulary.extra_ids
  counted = f'the {extra} extra ids included'
  if limit := re.search(r'too high.*<= *(\d+)', error, re.DOTALL):
    most = int(limit[1]) + extra
    return f'{vocabulary.size} is too many for this corpus, which gives at most {most}, {counted}.'
  if limit := re.search(r'smaller than required_chars\D*\d+\D+(\d+)', error):
    least = int(limit[1]) + extra
    return (
      f'{vocabulary.size} is too few for the characters of this corpus: {least} or more, {counted}.'
    )
  return ' '.join(f'{vocabulary.size} ids cannot be learned from this corpus: {error}'.split())


def identity(vocabulary: seqio.Vocabulary, description=None) -> str:
  """Equal for two vocabularies that give equal tokens, wherever their files lie.

  Args:
    vocabulary: what tokenises.
    description: what it was built from; of a class from outside the project, its fields and code count.
  """
  content = ''
  if code := outside_code(spec := to_spec(description)):
    content = digest([spec, code, description.signature()])
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    content = hashlib.sha256(vocabulary.sp_model).hexdigest()[:16]
  elif isinstance(vocabulary, TokenizerVocabulary):
    file = hashlib.sha256(pathlib.Path(vocabulary.file).read_bytes()).hexdigest()[:16]
    content = f'{file}, offset={vocabulary.offset}'
  parts = [content] if content else []
  parts += [f'{vocabulary.vocab_size} ids', f'{vocabulary.extra_ids} extra']
  return f'{type(vocabulary).__name__}({", ".join(parts)}, eos={vocabulary.eos_id})'


def encode(vocabulary: seqio.Vocabulary, documents: list[bytes], pairs=False) -> list[dict]:
  """Token ids (int32, no EOS) of every UTF-8 document: {'targets'}, or of a pair {'inputs', 'targets'}.

  The two texts of a pair lie in one document, with a NUL byte between them.
  """
  if pairs:
    parts = [d.split(b'\0', 1) for d in documents]
    sides = [encode_texts(vocabulary, [p[i] for p in parts]) for i in (0, 1)]
    return [{'inputs': a, 'targets': b} for a, b in zip(*sides, strict=True)]
  return [{'targets': ids} for ids in encode_texts(vocabulary, documents)]


def encoded(vocabulary, store, split: str, piece: int, folder: pathlib.Path, pairs=False) -> list:
  """`encode` of a piece of a store. The result of a slow tokenizer is stored under `folder`."""
  if isinstance(vocabulary, seqio.ByteVocabulary) or pairs:
    return encode(vocabulary, store.documents(split, piece), pairs)
  path = folder / f'{split}-{piece:05d}.npz'
  if path.exists():
    with np.load(path) as stored:
      parts = np.split(stored['tokens'].astype(np.int32), stored['ends'][:-1])
      return [{'targets': p} for p in parts] if len(stored['ends']) else []
  documents = encode(vocabulary, store.documents(split, piece))
  small = np.uint16 if vocabulary.vocab_size <= 1 << 16 else np.uint32
  folder.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f'.{os.getpid()}.npz')
  np.savez(
    partial,
    tokens=np.concatenate([*(d['targets'] for d in documents), np.zeros(0, np.int32)]).astype(
      small
    ),
    ends=np.cumsum([len(d['targets']) for d in documents]),
  )
  os.replace(partial, path)
  return documents


def encode_texts(vocabulary, texts: list[bytes]) -> list[np.ndarray]:
  """Token ids (int32, no EOS) of UTF-8 texts."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return [np.frombuffer(t, np.uint8).astype(np.int32) + 3 for t in texts]
  texts = [t.decode() for t in texts]
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    encoded = vocabulary.tokenizer.encode(texts, num_threads=2)
  elif isinstance(vocabulary, TokenizerVocabulary):
    encoded = vocabulary.encode_batch(texts)
  else:
    encoded = [vocabulary.encode(t) for t in texts]
  return [np.asarray(e, np.int32) for e in encoded]


def token_bytes(vocabulary: seqio.Vocabulary) -> np.ndarray:
  """(vocab_size,) int64: UTF-8 bytes of text that each id stands for; 0 for special ids.

  Summed over tokens it gives the true bytes of a text, for a byte vocabulary and for a lossless
  SentencePiece model exactly; for a normalising one, the bytes of the normalised text.
  """
  n = vocabulary.vocab_size
  sizes = np.zeros(n, np.int64)
  if isinstance(vocabulary, seqio.ByteVocabulary):
    sizes[3 : 3 + 256] = 1
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    model = vocabulary.tokenizer
    for i in range(n - vocabulary.extra_ids):
      if model.is_byte(i):
        sizes[i] = 1
      elif not model.is_control(i) and not model.is_unknown(i):
        sizes[i] = len(model.id_to_piece(i).replace('▁', ' ').encode())
  elif hasattr(vocabulary, 'token_bytes'):
    sizes[:] = vocabulary.token_bytes()
  else:
    sizes[:] = [len(str(vocabulary.decode([i])).encode()) for i in range(n)]
    for special in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id):
      if special is not None:
        sizes[special] = 0
    sizes[n - vocabulary.extra_ids :] = 0
  return sizes
