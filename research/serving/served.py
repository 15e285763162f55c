"""A model that is served: it generates, where it can, embeds, scores, and writes conversations."""

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

PLAIN = 'plain'  # the name of `conversations.render_plain` where a file is expected


@dataclasses.dataclass(frozen=True)
class Served:
  """A model as the endpoint uses it, under the mesh on which its parameters lie.

  Attributes:
    name: of the model in requests.
    vocabulary: its tokenizer.
    encode: a text to ids, with the special tokens that a prompt of this model has.
    graphdef, params: the model.
    size: how many logits it has.
    room: the most tokens of a text, its answer included.
    generator: what generates; None for an encoder, and `cannot_generate` says why.
    render: its chat template; None where it has none, and `cannot_chat` says why.
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
    """The mean of the last features [embed] over a text's tokens, of length 1."""
    return scoring.embed(self.graphdef, self.params, tokens, self.room)

  def score(self, tokens: Sequence[int], top: int) -> scoring.Scores:
    """How likely each token of a text is after those before it."""
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
) -> Served:
  """Opens a model to serve it. Under a mesh.

  Args:
    checkpoint, hf: one of a run's or a converted model's folder, and a Hugging Face folder.
    name: of the model in requests; '' is the folder's.
    template: a file of a chat template, or 'plain'; None is the model's own.
    room, slots, int8, kept: as of `inference.engine.Engine`; a room of 0 is what the model was trained with.

  Raises:
    UserError: there is no such model, or its tokenizer is not its own.
  """
  opened = open_model(checkpoint, hf)
  name = name or pathlib.Path(checkpoint or hf).resolve().name
  room = room or loading.length_of(opened.run)
  graphdef = nnx.graphdef(opened.model)
  if not getattr(opened.model, 'causal', True):
    why = f'{name} sees both ways, so it does not generate text: ask it for embeddings.'
    vocabulary = _vocabulary_of(opened, two_sided=False)
    encode = tokenizer_of(opened, None, 'decoder').encode
    facts = {'cannot_generate': why, 'cannot_chat': why}
    sizes = {'size': opened.model.vocab, 'room': room}
    return Served(name, vocabulary, encode, graphdef, opened.params, **sizes, **facts)
  architecture = loading.architecture_of(opened.run, opened.model)
  vocabulary = _vocabulary_of(opened, architecture == 'encoder_decoder')
  generator = make_generator(
    opened.model, opened.params, tokenizer_of(opened, None, architecture), architecture,
    room=room, slots=slots, int8=int8, source=opened.source, pieces=1, kept=kept,
  )  # fmt: skip
  engine = generator.engine
  render, cannot_chat = _render_of(opened, template, name, architecture)
  return Served(
    # The engine's own copy of the parameters, so that there is no other.
    name, vocabulary, generator.encode, engine.graphdef.graphdef, engine.params, opened.model.vocab, room,
    generator=generator, render=render, cannot_chat=cannot_chat,
  )  # fmt: skip


def _vocabulary_of(opened: Opened, two_sided: bool) -> Vocabulary:
  if opened.run:
    encoding = make_encoding(loading.vocabulary_of(opened.run))
    return Vocabulary(encoding, () if two_sided else (0,), (encoding.end,), whole=False)
  encoding = FolderEncoding(opened.tokenizer_folder)
  return Vocabulary(encoding, (), tuple(encoding.ends) or (encoding.end,), whole=True)


def _render_of(
  opened: Opened, template: str | None, name: str, architecture: str
) -> tuple[Callable[..., str] | None, str]:
  """(the chat template, why there is none)."""
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
