"""A model that is served: it generates if it can, embeds and scores texts, and writes conversations as text."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from research.data import conversations
from research.data.encoding import make_encoding
from research.evaluation import loading
from research.evaluation.folder_encoding import FolderEncoding
from research.evaluation.generators import Opened, open_model, tokenizer_of
from research.inference.generator import Generator, make_generator
from research.serving import scoring
from research.serving.vocabulary import Vocabulary

PLAIN = 'plain'  # names `conversations.render_plain` in place of a template's file


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model as the endpoint uses it, under the mesh of its parameters.

  Attributes:
    name: its name in requests.
    vocabulary: its tokenizer.
    encode: returns a text's ids, with the special tokens that a prompt of this model has.
    graphdef: its structure.
    params: its parameters.
    size: how many logits it has.
    room: the most tokens of a text, with its answer.
    generator: generates text; None for an encoder, and then `cannot_generate` says why.
    cannot_generate: a sentence for the client.
    render: its chat template; None if it has none, and then `cannot_chat` says why.
    cannot_chat: a sentence for the client.
  """

  name: str
  vocabulary: Vocabulary
  encode: Callable[[str], list[int]]
  graphdef: nnx.GraphDef
  params: dict
  size: int
  room: int
  generator: Generator | None = None
  cannot_generate: str = ''
  render: Callable[..., str] | None = None
  cannot_chat: str = ''

  @property
  def two_sided(self) -> bool:
    """Whether it is an encoder-decoder."""
    return bool(self.generator and self.generator.engine.encoder_room)

  def embed(self, tokens: Sequence[int]) -> np.ndarray:
    """Returns a text's embedding, float32 [embed] of length 1 (`scoring.embed`)."""
    return scoring.embed(self.graphdef, self.params, tokens, self.room)

  def score(self, tokens: Sequence[int], top: int) -> scoring.Scores:
    """Returns the log-probability of each token of a text after those before it."""
    return scoring.score(self.graphdef, self.params, tokens, top, self.room)


def open_served(
  checkpoint: str | None,
  hf: str | None,
  *,
  name: str = '',
  template: str | None = None,
  room: int = 0,
  slots: int = 8,
  int8: bool = False,
  kept: int = 4,
) -> ServedModel:
  """Opens a model to serve it, under the mesh in use.

  Args:
    checkpoint: the folder of a run or of a converted model; None if `hf` is given.
    hf: a Hugging Face folder; None if `checkpoint` is given.
    name: the model's name in requests; '' for the folder's name.
    template: the file of a chat template, or 'plain'; None for the model's own.
    room: the most tokens of a text with its answer; 0 for the length that the model was trained on.
    slots: how many requests are active at once.
    int8: stores keys and values in int8.
    kept: how many prompts stay in the cache (`inference.engine.Engine`).

  Raises:
    UserError: the model does not exist, or its tokenizer does not fit it.
  """
  opened = open_model(checkpoint, hf)
  name = name or pathlib.Path(checkpoint or hf).resolve().name
  room = room or loading.length_of(opened.run, opened.model)
  if not getattr(opened.model, 'causal', True):
    return _encoder(opened, name, room)
  architecture = loading.architecture_of(opened.run, opened.model)
  generator = make_generator(
    opened.model, opened.params, tokenizer_of(opened, None, architecture), architecture,
    room=room, slots=slots, int8=int8, source=opened.source, pieces=1, kept=kept,
  )  # fmt: skip
  engine = generator.engine
  render, cannot_chat = _template_of(opened, template, name, architecture)
  return ServedModel(
    name,
    vocabulary=_vocabulary_of(opened, architecture == 'encoder_decoder'),
    encode=generator.encode,
    # The engine may have changed the parameters' form. With its own there is a single copy.
    graphdef=engine.graphdef.graphdef,
    params=engine.params,
    size=opened.model.vocab,
    room=room,
    generator=generator,
    render=render,
    cannot_chat=cannot_chat,
  )


def _encoder(opened: Opened, name: str, room: int) -> ServedModel:
  """Returns an encoder, which gives embeddings alone."""
  why = f'{name} sees both ways, so it does not generate text: ask it for embeddings.'
  return ServedModel(
    name,
    vocabulary=_vocabulary_of(opened, two_sided=False),
    encode=tokenizer_of(opened, None, 'decoder').encode,
    graphdef=nnx.graphdef(opened.model),
    params=opened.params,
    size=opened.model.vocab,
    room=room,
    cannot_generate=why,
    cannot_chat=why,
  )


def _vocabulary_of(opened: Opened, two_sided: bool) -> Vocabulary:
  if opened.run:
    encoding = make_encoding(loading.vocabulary_of(opened.run))
    return Vocabulary(encoding, () if two_sided else (0,), (encoding.end,), whole=False)
  encoding = FolderEncoding(opened.tokenizer_folder)
  return Vocabulary(encoding, (), tuple(encoding.ends) or (encoding.end,), whole=True)


def _template_of(
  opened: Opened, template: str | None, name: str, architecture: str
) -> tuple[Callable[..., str] | None, str]:
  """Returns the chat template, or None and the reason why there is none."""
  if architecture == 'encoder_decoder':
    return None, f'{name} is an encoder-decoder: use /v1/completions.'
  if template:
    return conversations.template(None if template == PLAIN else template), ''
  if opened.run:
    converses, own = loading.conversation_template_of(opened.run)
    if converses:
      return conversations.template(own), ''
    why = 'was not trained on conversations'
  else:
    own = FolderEncoding(opened.tokenizer_folder).template
    if own:
      return conversations.template(own), ''
    why = 'has no chat template'
  return None, f'{name} {why}: use /v1/completions, or start the server with --template.'
