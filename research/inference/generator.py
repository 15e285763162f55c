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

MAX_TOKENS = 128  # of an answer, unless a request says otherwise
EMPTY = 'the prompt is empty: give some text to continue.'


class Generator:
  """Generates text.

  Args:
    engine: answers requests, with the `decode` of this tokenizer.
    tokenizer: the model's tokenizer.
    source: where the parameters come from, in words.
  """

  def __init__(self, engine: Answering, tokenizer: Tokenizer, source: str = ''):
    self.engine = engine
    self.tokenizer = tokenizer
    self.source = source

  def request(self, prompt: str, *, max_tokens: int | None = None, **settings) -> Request:
    """Returns the request of a prompt; `settings` are fields of `Request`.

    Without `max_tokens` an answer has at most `MAX_TOKENS`, or as many as the room leaves.

    Raises:
      UserError: the prompt is empty, or is not a text.
    """
    if not prompt:
      raise UserError(EMPTY)
    try:
      prompt.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f'the prompt is not a text: character {error.start} is half of a pair (a surrogate), or a byte that is '
        'not UTF-8.'
      ) from None
    ids = tuple(self.encode(prompt))
    if self.engine.encoder_room:
      tokens = {'encoder': ids, 'prompt': self.tokenizer.start or (0,)}
    else:
      tokens = {'prompt': ids}
    if max_tokens is None:
      max_tokens = max(1, min(MAX_TOKENS, self.engine.room - len(tokens['prompt'])))
    settings = {'stop_tokens': self.tokenizer.ends, 'max_tokens': max_tokens, **settings}
    return Request(**tokens, **settings)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a prompt, for the decoder or, in an encoder-decoder, for the encoder."""
    ids = list(self.tokenizer.encode(text))
    return ids if self.engine.encoder_room else [*self.tokenizer.start, *ids]

  def requests(self, prompt: str, samples: int = 1, **settings) -> list[Request]:
    """Returns `samples` requests of one prompt, with different seeds."""
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
    """Returns the completions of all prompts in order, the samples of a prompt side by side.

    Raises:
      UserError: a prompt is empty or does not fit, or the model's logits are not numbers.
    """
    if isinstance(prompts, str):
      raise Invalid(Generator, 'prompts', 'it is a single string; give a list of strings.')
    requests = [r for prompt in prompts for r in self.requests(prompt, samples, **settings)]
    completions = self.engine.run(requests)
    for completion in completions:
      if completion.error:
        raise UserError(completion.error)
    return completions

  def stream(self, prompt: str, **settings) -> Iterator[str]:
    """Yields the text of one prompt as it is generated."""
    yield from self.engine.stream(self.request(prompt, **settings))


def with_seed(sampling: Sampling, number: int) -> Sampling:
  """Returns the settings with the seed of sample `number`. Sample 0 has the seed of the request."""
  # A large odd step, so that requests with consecutive seeds do not share samples.
  return dataclasses.replace(sampling, seed=(sampling.seed + number * 1_000_003) % 2**31)


def make_generator(
  model: nnx.Module,
  params: dict,
  tokenizer: Tokenizer,
  architecture: str,
  *,
  room: int,
  slots: int = 8,
  together: int = 1,
  int8: bool = False,
  pieces: int | None = None,
  kept: int = 0,
  beams: Beams | None = None,
  speculation: Speculation | None = None,
  source: str = '',
) -> Generator:
  """Returns a generator of a model and its tokenizer.

  Args:
    model: the model, with shapes in place of arrays.
    params: its parameters.
    tokenizer: its tokenizer.
    architecture: 'decoder', 'prefix' (the prompt sees itself both ways) or 'encoder_decoder'.
    room, slots, together, int8, pieces, kept: as for `Engine`.
    beams, speculation: answers one request at a time by this method, without slots.
    source: where the parameters come from, in words.

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
    engine = Engine(
      nnx.graphdef(model), params, slots=slots, together=together, int8=int8, pieces=pieces, kept=kept,
      **knobs,
    )  # fmt: skip
  return Generator(engine, tokenizer, source)
