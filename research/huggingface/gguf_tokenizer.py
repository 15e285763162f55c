"""Writes the tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json."""

import json
import pathlib

import numpy as np

from research.core.errors import UserError
from research.huggingface.gguf_files import GGUF

NORMAL, CONTROL, USER = 1, 3, 4  # kinds of tokens
SPACE = '\u2581'  # what SentencePiece writes for a space
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_THREE_DIGITS = _WORDS.replace('DIGITS', r'\p{N}{1,3}')
_ONE_DIGIT = _WORDS.replace('DIGITS', r'\p{N}')
# The pattern by which a byte-level tokenizer cuts text before it merges, by llama.cpp's name; None is GPT-2's.
CUTS = {
  'gpt-2': None, 'default': None, 'smollm': None, 'llama-bpe': _THREE_DIGITS, 'qwen2': _ONE_DIGIT,
}  # fmt: skip
DIGIT_BY_DIGIT = ('smollm',)


def write(file: GGUF, folder: pathlib.Path) -> None:
  """Writes the tokenizer of a GGUF file with its special tokens and its chat template.

  Raises:
    UserError: it is of an unknown kind, or its merges are damaged.
  """
  from tokenizers import AddedToken

  kind = file.value('tokenizer.ggml.model')
  if kind not in READERS:
    raise UserError(f'{file.path}: a tokenizer of kind {kind!r} is not known.')
  tokenizer = READERS[kind](file)
  tokens = file.value('tokenizer.ggml.tokens')
  kinds = file.value('tokenizer.ggml.token_type') or [NORMAL] * len(tokens)
  special = [t for t, k in zip(tokens, kinds, strict=True) if k == CONTROL]
  tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
  users = [t for t, k in zip(tokens, kinds, strict=True) if k == USER]
  tokenizer.add_tokens([AddedToken(t, normalized=False) for t in users])
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  for name, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'), ('unk', 'unknown')):
    index = file.value(f'tokenizer.ggml.{key}_token_id')
    if index is not None:
      config[f'{name}_token'] = tokens[index]
  if template := file.value('tokenizer.chat_template'):
    config['chat_template'] = template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')


def _byte_level(file: GGUF):
  """A tokenizer that merges pairs of bytes (GPT-2, Llama 3, Qwen, SmolLM)."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

  cut = file.value('tokenizer.ggml.pre', 'default')
  if cut not in CUTS:
    raise UserError(
      f'{file.path}: text is cut by {cut!r} (tokenizer.ggml.pre), which is not known.'
    )
  vocab = {token: i for i, token in enumerate(file.value('tokenizer.ggml.tokens'))}
  merges = [tuple(merge.split(' ')) for merge in file.value('tokenizer.ggml.merges')]
  if strange := [pair for pair in merges if ''.join(pair) not in vocab]:
    raise UserError(f'{file.path} is damaged: its merge of {strange[0]} makes no token.')
  tokenizer = Tokenizer(models.BPE(vocab, merges))
  steps = []
  if cut in DIGIT_BY_DIGIT:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if CUTS[cut] is not None:
    steps.append(pre_tokenizers.Split(Regex(CUTS[cut]), behavior='isolated'))
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[cut] is None))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
  tokenizer.decoder = decoders.ByteLevel()
  _add_start(tokenizer, file, vocab, default=False)
  return tokenizer


def _sentencepiece(file: GGUF):
  """A tokenizer of SentencePiece's pieces, merged in the order of their scores (Llama 2, Gemma)."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  tokens = file.value('tokenizer.ggml.tokens')
  vocab = {token: i for i, token in enumerate(tokens)}
  unknown = tokens[file.value('tokenizer.ggml.unknown_token_id', 0)]
  tokenizer = Tokenizer(
    models.BPE(vocab, _merges(file, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
  )
  steps, back = [normalizers.Replace(' ', SPACE)], [decoders.Replace(SPACE, ' ')]
  back += [decoders.ByteFallback(), decoders.Fuse()]
  if file.value('tokenizer.ggml.add_space_prefix', True):
    steps.insert(0, normalizers.Prepend(SPACE))
    back.append(decoders.Strip(' ', 1, 0))
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.decoder = decoders.Sequence(back)
  _add_start(tokenizer, file, vocab, default=True)
  return tokenizer


def _merges(file: GGUF, vocab: dict[str, int]) -> list[tuple[str, str]]:
  """Every way to make a piece of two others, with the pieces in the order of their scores."""
  tokens = file.value('tokenizer.ggml.tokens')
  scores = file.value('tokenizer.ggml.scores')
  kinds = file.value('tokenizer.ggml.token_type')

  def ids(pair: tuple[str, str]) -> tuple[int, int]:
    return vocab[pair[0]], vocab[pair[1]]

  merges = []
  for i in np.argsort(np.negative(scores), kind='stable'):
    if kinds[i] == NORMAL:
      pairs = [(tokens[i][:k], tokens[i][k:]) for k in range(1, len(tokens[i]))]
      pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
      merges += sorted(pairs, key=ids)
  return merges


def _add_start(tokenizer, file: GGUF, vocab: dict[str, int], default: bool) -> None:
  """Puts the token for a beginning before every text, if the file asks for it."""
  from tokenizers import processors

  index = file.value('tokenizer.ggml.bos_token_id')
  if index is None or not file.value('tokenizer.ggml.add_bos_token', default):
    return
  start = file.value('tokenizer.ggml.tokens')[index]
  tokenizer.post_processor = processors.TemplateProcessing(f'{start} $A', None, [(start, index)])


# By GGUF's names of the kinds, which are those of the first models that had them.
READERS = {'gpt2': _byte_level, 'llama': _sentencepiece}
