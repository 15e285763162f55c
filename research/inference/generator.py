"""A model with its tokenizer: text in, text out.

model = research.generate.load(checkpoint='runs/tiny')
for answer in model(['def f(x):'], max_tokens=40, sampling=Sampling(temperature=0.8)):
  print(answer.text)
"""

import dataclasses
from collections.abc import Iterator, Sequence

from flax import nnx

from research.core.errors import Invalid, UserError
from research.inference.answering import Answering
from research.inference.engine import Engine
from research.inference.one_by_one import Beams, OneByOne, Speculation
from research.inference.request import Completion, Request
from research.inference.sampling import Sampling
from research.inference.tokenizer import Tokenizer, check_belongs


class Generator:
  """Generates text.

  Args:
    engine: answers requests, with this tokenizer's `decode`.
    tokenizer: of the model.
    source: where the parameters are from, in words.
  """

  def __init__(self, engine: Answering, tokenizer: Tokenizer, source: str = ''):
    self.engine, self.tokenizer, self.source = engine, tokenizer, source

  def request(self, prompt: str, **settings) -> Request:
    """The request of a prompt; `settings` are `Request`'s.

    Raises:
      UserError: the prompt is empty.
    """
    if not prompt:
      raise UserError('the prompt is empty: give some text to go on from.')
    ids = tuple(self.encode(prompt))
    if self.engine.encoder_room:
      tokens = {'encoder': ids, 'prompt': self.tokenizer.start or (0,)}
    else:
      tokens = {'prompt': ids}
    return Request(**{'stop_tokens': self.tokenizer.ends, **tokens, **settings})

  def encode(self, text: str) -> list[int]:
    """The ids of a prompt: of what the decoder reads, or of what the encoder reads."""
    ids = list(self.tokenizer.encode(text))
    return ids if self.engine.encoder_room else [*self.tokenizer.start, *ids]

  def requests(self, prompt: str, samples: int = 1, **settings) -> list[Request]:
    """As many requests of one prompt, with seeds of their own."""
    if samples < 1:
      raise UserError(f'{samples} samples: ask for 1 or more.')
    request = self.request(prompt, **settings)
    return [
      dataclasses.replace(request, sampling=with_seed(request.sampling, number))
      for number in range(samples)
    ]

  def __call__(
    self, prompts: Sequence[str] | str, *, samples: int = 1, **settings
  ) -> list[Completion]:
    """The completions of all prompts in their order, the samples of one prompt side by side.

    Raises:
      UserError: a prompt is empty or does not fit, or the model's logits are not numbers.
    """
    if isinstance(prompts, str):
      raise Invalid(Generator, 'prompts', 'it is one string; give a list of them.')
    completions = self.engine.run(
      [r for prompt in prompts for r in self.requests(prompt, samples, **settings)]
    )
    for completion in completions:
      if completion.error:
        raise UserError(completion.error)
    return completions

  def stream(self, prompt: str, **settings) -> Iterator[str]:
    """The text of one prompt as it comes."""
    yield from self.engine.stream(self.request(prompt, **settings))


def with_seed(sampling: Sampling, number: int) -> Sampling:
  """A seed of its own for each sample. The first has the request's, so that one sample is as without."""
  # A large odd step, so that neighbouring seeds of prompts do not share their samples.
  return dataclasses.replace(sampling, seed=(sampling.seed + number * 1_000_003) % 2**31)


def make_generator(
  model: nnx.Module,
  params: dict,
  tokenizer: Tokenizer,
  architecture: str,
  *,
  room: int,
  slots: int = 8,
  int8: bool = False,
  pieces: int | None = None,
  kept: int = 0,
  beams: Beams | None = None,
  speculation: Speculation | None = None,
  source: str = '',
) -> Generator:
  """A generator of a model and its tokenizer.

  Args:
    model: with shapes in place of arrays.
    params: its parameters.
    architecture: 'decoder', 'prefix' (the prompt sees itself both ways) or 'encoder_decoder'.
    room, slots, int8, pieces, kept: as of `Engine`.
    beams, speculation: answers one request at a time in this way, without slots.
    source: where the parameters are from, in words.

  Raises:
    UserError: the tokenizer does not belong to the model.
  """
  check_belongs(tokenizer, model.vocab)
  knobs = {
    'decode': tokenizer.decode, 'room': room,
    'encoder_room': room if architecture == 'encoder_decoder' else 0, 'prefix': architecture == 'prefix',
  }  # fmt: skip
  method = beams or speculation
  if method:
    engine = OneByOne(method, **knobs)
  else:
    slotted = {'slots': slots, 'int8': int8, 'pieces': pieces, 'kept': kept}
    engine = Engine(nnx.graphdef(model), params, **slotted, **knobs)
  return Generator(engine, tokenizer, source)
