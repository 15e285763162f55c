"""The head: tied to the token vectors or a matrix of its own, as the flag and the file say together.

A file may hold a head although its config ties it. Where the two matrices are equal nothing is lost; where they
differ the file's head is used, as transformers does.
"""

import dataclasses
from typing import Any

from research.huggingface.fields import Derived, Get, Raw
from research.huggingface.settings import Settings


def is_tied(settings: Settings, table: str, head: str) -> bool:
  """Whether the head is the table of token vectors; the names are those of the two tensors."""
  differs = head in settings.tensors and not settings.same_tensors(table, head)
  return settings['tie_word_embeddings'] and not differs


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


def _read_masked(settings):
  tied = is_tied(
    settings, 'bert.embeddings.word_embeddings.weight', 'cls.predictions.decoder.weight'
  )
  return {'heads.MaskedHead.tied': tied}


MASKED_HEAD = Derived(
  _read_masked, lambda get: {'tie_word_embeddings': get('heads.MaskedHead.tied')}
)


def _t5_head(settings: Settings, scaled: bool, tied: bool = True) -> dict[str, Any]:
  # transformers ties every T5 and mT5 that has no other head in its file, whatever the flag; not a Switch.
  head = 'lm_head.weight'
  differs = head in settings.tensors and not settings.same_tensors('shared.weight', head)
  untied = differs or not tied
  name = 'UntiedHead' if untied else 'TiedHead'
  return {
    'models.EncoderDecoder.head': Raw(f'@heads.{name}'),
    f'heads.{name}.scale': Raw('@embedder.inverse_sqrt') if scaled else 1.0,
  }


def _read_t5(settings):
  # Of `tie_word_embeddings` only `false` says release 1.1: null and an absent key are the first release's.
  scaled = settings.get('tie_word_embeddings') is not False
  if settings.is_given(
    'scale_decoder_outputs'
  ):  # files of transformers 5 say it here, and always tie
    scaled = bool(settings.get('scale_decoder_outputs'))
  return _t5_head(settings, scaled)


def _write_t5(get):
  name = 'TiedHead' if get.is_a('models.EncoderDecoder.head', 'heads.TiedHead') else 'UntiedHead'
  scaled = get(f'heads.{name}.scale') != 1.0
  return {'tie_word_embeddings': scaled, 'scale_decoder_outputs': scaled}


T5_HEAD = Derived(_read_t5, _write_t5)


def _read_unscaled(settings):
  settings.get('tie_word_embeddings')
  return _t5_head(settings, scaled=False)


MT5_HEAD = Derived(_read_unscaled, lambda get: {'tie_word_embeddings': True})


def _read_scaled(settings):
  tied = settings['tie_word_embeddings']
  return _t5_head(settings, scaled=tied, tied=tied)


def _write_scaled(get):
  config = _write_t5(get)
  return {'tie_word_embeddings': config['tie_word_embeddings']}


SWITCH_HEAD = Derived(_read_scaled, _write_scaled)
