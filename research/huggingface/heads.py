"""The head of a model: the token vectors, or a matrix of its own. The flag and the file decide together.

A file may hold a head although `tie_word_embeddings` is true. If the two matrices are equal, the head is tied
and nothing is lost. If they differ, the head in the file is used, as transformers does.
"""

import dataclasses
from typing import Any

from research.huggingface.fields import Derived, Get, Raw
from research.huggingface.settings import Settings


def is_tied(settings: Settings, table: str, head: str) -> bool:
  """Whether the head is the table of token vectors.

  Args:
    settings: of the config.json.
    table, head: the names of the two tensors.
  """
  return settings['tie_word_embeddings'] and not _has_other_head(settings, table, head)


def _has_other_head(settings: Settings, table: str, head: str) -> bool:
  """Whether the files hold a head that differs from the table of token vectors."""
  return head in settings.tensors and not settings.same_tensors(table, head)


@dataclasses.dataclass(frozen=True)
class Head:
  """`tie_word_embeddings` of a decoder.

  Attributes:
    table, head: names of the tensors of the token vectors and of the head.
    soft_cap: the key of the logits' soft cap, if the family has one.
  """

  table: str = 'model.embed_tokens.weight'
  head: str = 'lm_head.weight'
  soft_cap: str | None = None

  def read(self, settings: Settings) -> dict[str, Any]:
    name = 'TiedHead' if is_tied(settings, self.table, self.head) else 'UntiedHead'
    bindings = {'models.LanguageModel.head': Raw(f'@heads.{name}')}
    if self.soft_cap:
      bindings[f'heads.{name}.soft_cap'] = settings.get(self.soft_cap)
    return bindings

  def write(self, get: Get) -> dict[str, Any]:
    tied = get.is_a('models.LanguageModel.head', 'heads.TiedHead')
    config = {'tie_word_embeddings': tied}
    if self.soft_cap:
      config[self.soft_cap] = get(f'heads.{"TiedHead" if tied else "UntiedHead"}.soft_cap')
    return config


HEAD = Head()


BERT_TABLE = 'bert.embeddings.word_embeddings.weight'
BERT_HEAD = 'cls.predictions.decoder.weight'


def _read_masked(settings: Settings) -> dict[str, Any]:
  return {'heads.MaskedHead.tied': is_tied(settings, BERT_TABLE, BERT_HEAD)}


def _write_masked(get: Get) -> dict[str, Any]:
  return {'tie_word_embeddings': get('heads.MaskedHead.tied')}


MASKED_HEAD = Derived(_read_masked, _write_masked)


def _t5_head(settings: Settings, scaled: bool, tied: bool = True) -> dict[str, Any]:
  """Bindings of the head of an encoder-decoder; `scaled` divides the features by the root of the width."""
  untied = _has_other_head(settings, 'shared.weight', 'lm_head.weight') or not tied
  name = 'UntiedHead' if untied else 'TiedHead'
  return {
    'models.EncoderDecoder.head': Raw(f'@heads.{name}'),
    f'heads.{name}.scale': Raw('@embedder.inverse_sqrt') if scaled else 1.0,
  }


def _read_t5(settings: Settings) -> dict[str, Any]:
  # Only `false` means release 1.1, whose features are not scaled. Null and an absent key mean release 1.0.
  scaled = settings.get('tie_word_embeddings') is not False
  # Files that transformers 5 writes have a key of their own for it.
  if settings.is_given('scale_decoder_outputs'):
    scaled = bool(settings.get('scale_decoder_outputs'))
  # transformers ties every T5 whose file has no other head, whatever the flag says.
  return _t5_head(settings, scaled)


def _write_t5(get: Get) -> dict[str, Any]:
  name = 'TiedHead' if get.is_a('models.EncoderDecoder.head', 'heads.TiedHead') else 'UntiedHead'
  scaled = get(f'heads.{name}.scale') != 1.0
  return {'tie_word_embeddings': scaled, 'scale_decoder_outputs': scaled}


T5_HEAD = Derived(_read_t5, _write_t5)


def _read_mt5(settings: Settings) -> dict[str, Any]:
  # transformers ties every mT5 whose file has no other head, whatever the flag says, but refuses a null.
  settings.get_or_refuse_null('tie_word_embeddings')
  return _t5_head(settings, scaled=False)


def _write_mt5(get: Get) -> dict[str, Any]:
  return {'tie_word_embeddings': True}


MT5_HEAD = Derived(_read_mt5, _write_mt5)


def _read_switch(settings: Settings) -> dict[str, Any]:
  tied = settings['tie_word_embeddings']
  return _t5_head(settings, scaled=tied, tied=tied)


def _write_switch(get: Get) -> dict[str, Any]:
  config = _write_t5(get)
  return {'tie_word_embeddings': config['tie_word_embeddings']}


SWITCH_HEAD = Derived(_read_switch, _write_switch)
