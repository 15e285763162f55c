"""What a body asks of the engine: prompts as tokens, settings, grammars."""

import dataclasses
import secrets
from collections.abc import Sequence

from research.core.errors import Invalid
from research.data import conversations
from research.inference.generator import with_seed
from research.inference.request import Request
from research.inference.request_check import check_request
from research.inference.sampling import Sampling
from research.serving import bodies, grammar, tools
from research.serving.refusals import Refused
from research.serving.served import Served

COMPLETION_TOKENS = 16  # the protocol's own default of /v1/completions
NEARLY_GREEDY = 1e-4  # a lower temperature would overflow; it draws the likeliest token
# How many likely tokens the engine tells: few numbers, so few compiled programs.
TOPS = (0, 1, 5, 20)


@dataclasses.dataclass(frozen=True)
class Asked:
  """Requests of one body.

  Attributes:
    requests: `answers` of each prompt, side by side.
    answers: how many of each prompt.
    top: how many likely tokens the client wants to see; None where it wants no log-probabilities.
    tools: the names of tools that the answer may call.
  """

  requests: list[Request]
  answers: int
  top: int | None
  tools: tuple[str, ...] = ()

  @property
  def prompt_tokens(self) -> int:
    """Of all prompts, each counted once."""
    return sum(len(r.encoder or r.prompt) for r in self.requests[:: self.answers])


def sampling_of(body: bodies.Generate) -> Sampling:
  """The settings of a body; without a seed a new one is drawn."""
  temperature = 1.0 if body.temperature is None else body.temperature
  given = {
    'temperature': 0.0 if temperature < NEARLY_GREEDY else temperature,
    'seed': secrets.randbelow(2**31) if body.seed is None else body.seed % 2**31,
    'logit_bias': {int(token): bias for token, bias in (body.logit_bias or {}).items()},
  }
  same = (
    'top_p', 'top_k', 'min_p', 'typical', 'presence_penalty', 'frequency_penalty', 'repetition_penalty',
  )  # fmt: skip
  given |= {name: getattr(body, name) for name in same if getattr(body, name) is not None}
  return Sampling(**given)


def of_completion(body: bodies.Completion, served: Served) -> Asked:
  """The requests of /v1/completions.

  Raises:
    Refused: a prompt does not fit, or names a token that the model does not have.
  """
  _check_generates(served)
  if body.echo and served.two_sided:
    raise Refused('an encoder-decoder does not echo its prompt.', param='echo')
  most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
  prompts = [_sides(tokens, served) for tokens in _prompts(body.prompt, served)]
  settings = _settings(body, served, body.logprobs)
  requests = []
  for sides in prompts:
    # To score an echo the engine generates nothing, but a request has one token at least.
    request = _request({**settings, **sides, 'max_tokens': max(1, most)}, served, 'prompt')
    requests += _samples(request, body.n or 1)
  return Asked(requests, body.n or 1, body.logprobs)


def of_chat(body: bodies.Chat, served: Served) -> Asked:
  """The requests of /v1/chat/completions. It may take long: `Vocabulary.tokens`.

  Raises:
    Refused: the model has no template, or the template or the grammar refuses what is asked.
  """
  _check_generates(served)
  if served.render is None:
    raise Refused(served.cannot_chat, code='no_chat_template')
  offered = [] if body.tool_choice == 'none' else body.tools or []
  if isinstance(body.tool_choice, bodies.NamedTool):
    named = body.tool_choice.function.name
    offered = [tool for tool in offered if tool.function.name == named]
  prompt = served.vocabulary.of_conversation(_parts(body, offered, served))
  room = served.room - len(prompt)
  most = body.max_completion_tokens or body.max_tokens
  if most is None and room < 1:
    raise _too_long(len(prompt), 1, served, 'messages')
  top = (body.top_logprobs or 0) if body.logprobs else None
  settings = _settings(body, served, top) | {'prompt': prompt, 'max_tokens': most or room}
  request = _request(settings, served, 'messages')
  rules = _grammar(body, offered)
  requests = []
  for one in _samples(request, body.n or 1):
    if rules:
      one = dataclasses.replace(one, mask=grammar.Mask(rules, served.vocabulary, served.size))
    requests.append(one)
  return Asked(requests, body.n or 1, top, tuple(tool.function.name for tool in offered))


def of_embedding(body: bodies.Embed, served: Served) -> list[list[int]]:
  """The tokens of every text of /v1/embeddings.

  Raises:
    Refused: the model gives no embeddings, or a text is too long.
  """
  if served.two_sided:
    raise Refused(f'{served.name} is an encoder-decoder, and gives no embeddings.')
  texts = _prompts(body.input, served, 'input')
  for tokens in texts:
    if len(tokens) > served.room:
      raise _too_long(len(tokens), 0, served, 'input')
    _check_ids(tokens, served, 'input')
  return texts


def _check_generates(served: Served) -> None:
  if served.generator is None:
    raise Refused(served.cannot_generate, code='model_does_not_generate')


def _prompts(given, served: Served, param: str = 'prompt') -> list[list[int]]:
  """The tokens of one or more texts, which may be tokens already."""
  several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
  encode = served.encode
  prompts = [encode(one) if isinstance(one, str) else list(one) for one in several]
  if not all(prompts):
    raise Refused(f'{param}: a text has no tokens.', param=param)
  return prompts


def _sides(tokens: list[int], served: Served) -> dict:
  if not served.two_sided:
    return {'prompt': tuple(tokens)}
  return {'encoder': tuple(tokens), 'prompt': served.generator.tokenizer.start or (0,)}


def _settings(body: bodies.Generate, served: Served, top: int | None) -> dict:
  stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
  return {
    'sampling': sampling_of(body),
    'stop': stop,
    'stop_tokens': served.vocabulary.ends,
    'top': min(next(size for size in TOPS if size >= (top or 0)), served.size),
  }


def _request(settings: dict, served: Served, param: str) -> Request:
  """A request that the engine can answer."""
  request = Request(**settings)
  engine = served.generator.engine
  length = len(request.prompt)
  if length + request.max_tokens > engine.room:
    raise _too_long(length, request.max_tokens, served, param)
  if len(request.encoder) > engine.encoder_room:
    raise _too_long(len(request.encoder), 0, served, param)
  _check_ids(request.encoder or request.prompt, served, param)
  try:
    check_request(request, served.size, engine.room, engine.encoder_room, True)
  except Invalid as error:
    raise Refused(f'{error.field}: {error.why}', param=error.field) from error
  return request


def _too_long(length: int, more: int, served: Served, param: str) -> Refused:
  message = (
    f'{length} tokens are more than the {served.room} that this model takes; shorten {param}.'
  )
  if more:
    message = (
      f'{length} tokens of {param} and {more} of the answer are more than the {served.room} that this model '
      'takes; shorten the text, or ask for fewer tokens.'
    )
  return Refused(message, param=param, code='context_length_exceeded')


def _check_ids(tokens: Sequence[int], served: Served, param: str) -> None:
  wrong = next((token for token in tokens if token >= served.size), None)
  if wrong is not None:
    raise Refused(f'{param}: the model has no token {wrong}.', param=param)


def _samples(request: Request, count: int) -> list[Request]:
  """So many of one request, with seeds of their own (`generator.with_seed`)."""
  return [
    dataclasses.replace(request, sampling=with_seed(request.sampling, number))
    for number in range(count)
  ]


def _parts(body: bodies.Chat, offered: list[bodies.Tool], served: Served) -> list[str]:
  """The text of a conversation up to where the answer begins; where its turns count, what each is made of."""
  render = served.render
  knows_tools = getattr(render, 'knows_tools', False)
  if knows_tools:
    turns, more = tools.for_template(body.messages), {'tools': tools.as_json(offered) or None}
  else:
    turns, more = tools.as_plain_turns(body.messages, offered), {}
  try:
    whole = render(turns, add_generation_prompt=True, **more)
    return [whole] if served.vocabulary.whole else _by_turn(turns, render, whole)
  except conversations.Unsuitable as error:
    raise Refused(f'messages: the conversation {error}.', param='messages') from error


def _by_turn(turns: list[dict], render, whole: str) -> list[str]:
  """A text cut as `conversations.segments` cuts it, so that its tokens are those of training."""
  parts, done = [], ''
  for number, turn in enumerate(turns):
    if turn['role'] == 'assistant':
      before = render(turns[:number], add_generation_prompt=True)
      after = render(turns[: number + 1])
      # The newline behind a turn that is not the last belongs to what follows.
      if not (whole.startswith(after) and after.startswith(before) and before.startswith(done)):
        return [whole]
      parts += [before[len(done) :], after[len(before) :]]
      done = after
  return [*parts, whole[len(done) :]]


def _grammar(body: bodies.Chat, offered: list[bodies.Tool]) -> str:
  """What the answer must look like; '' for any text."""
  if offered:
    forced = body.tool_choice == 'required' or isinstance(body.tool_choice, bodies.NamedTool)
    return grammar.of_calls(offered, forced=forced, parallel=body.parallel_tool_calls is not False)
  if not body.constrains:
    return ''
  if isinstance(body.response_format, bodies.SchemaFormat):
    schema = body.response_format.json_schema.json_schema
    return grammar.of_schema(schema, 'response_format.json_schema.schema')
  return grammar.of_schema({'type': 'object'}, 'response_format')
