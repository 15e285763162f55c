"""Turns bodies into requests of the engine: prompts as tokens, settings, grammars."""

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
from research.serving.api_errors import ApiError
from research.serving.served_model import ServedModel

COMPLETION_TOKENS = 16  # the protocol's default of /v1/completions
NEARLY_GREEDY = 1e-4  # a lower temperature is greedy: the logits divided by it would overflow
# The numbers of likely tokens that the engine reports. Every number compiles a program, so they are few.
TOPS = (0, 1, 5, 20)


@dataclasses.dataclass(frozen=True)
class EngineRequests:
  """The engine's requests of one body.

  Attributes:
    requests: `answers` requests for each prompt, side by side.
    answers: how many answers each prompt gets.
    top: how many likely tokens the client wants to see; None if it wants no log-probabilities.
    tools: the names of the tools that the answer may call.
  """

  requests: list[Request]
  answers: int
  top: int | None
  tools: tuple[str, ...] = ()

  @property
  def prompt_tokens(self) -> int:
    """The number of tokens of all prompts, each counted once."""
    return sum(len(r.encoder or r.prompt) for r in self.requests[:: self.answers])


def sampling_of(body: bodies.Generate) -> Sampling:
  """Returns the settings of a body, with a random seed if it has none."""
  temperature = 1.0 if body.temperature is None else body.temperature
  settings = {
    'temperature': 0.0 if temperature < NEARLY_GREEDY else temperature,
    'seed': secrets.randbelow(2**31) if body.seed is None else body.seed % 2**31,
    'logit_bias': {int(token): bias for token, bias in (body.logit_bias or {}).items()},
  }
  equal_names = (
    'top_p', 'top_k', 'min_p', 'typical', 'presence_penalty', 'frequency_penalty', 'repetition_penalty',
  )  # fmt: skip
  for name in equal_names:
    if getattr(body, name) is not None:
      settings[name] = getattr(body, name)
  return Sampling(**settings)


def of_completion(body: bodies.Completion, model: ServedModel) -> EngineRequests:
  """Returns the requests of /v1/completions.

  Raises:
    ApiError: a prompt is too long, or has a token that the model lacks.
  """
  _check_generates(model)
  if body.echo and model.two_sided:
    raise ApiError('an encoder-decoder does not echo its prompt.', param='echo')
  max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
  # With max_tokens 0 the engine generates nothing, but a request must have one token at least.
  settings = _settings(body, model, body.logprobs) | {'max_tokens': max(1, max_tokens)}
  answers = body.n or 1
  requests = []
  for tokens in _prompts(body.prompt, model):
    request = _checked({**settings, **_sides(tokens, model)}, model, 'prompt')
    requests += _samples(request, answers)
  return EngineRequests(requests, answers, body.logprobs)


def of_chat(body: bodies.Chat, model: ServedModel) -> EngineRequests:
  """Returns the requests of /v1/chat/completions. The first use of a grammar may take seconds
  (`Vocabulary.tokens`).

  Raises:
    ApiError: the model has no template, or the template or the grammar cannot express the request.
  """
  _check_generates(model)
  if model.render is None:
    raise ApiError(model.cannot_chat, code='no_chat_template')
  # Every turn has a token at least, and a template takes long for a million turns.
  if len(body.messages) > model.room:
    why = (
      f'{len(body.messages):,} turns are more than the {model.room} tokens that this model takes'
    )
    raise ApiError(
      f'messages: {why}; leave out the first ones.',
      param='messages',
      code='context_length_exceeded',
    )
  offered = _offered_tools(body)
  prompt = model.vocabulary.of_conversation(_parts(body, offered, model))
  room = model.room - len(prompt)
  max_tokens = body.max_completion_tokens or body.max_tokens
  if max_tokens is None and room < 1:
    raise _too_long(len(prompt), 1, model, 'messages')
  top = (body.top_logprobs or 0) if body.logprobs else None
  settings = _settings(body, model, top) | {'prompt': prompt, 'max_tokens': max_tokens or room}
  request = _checked(settings, model, 'messages')
  rules = _grammar(body, offered)
  answers = body.n or 1
  requests = _samples(request, answers)
  if rules:
    # A mask keeps the state of its answer, so each request has its own.
    masks = grammar.masks(rules, model.vocabulary, model.size, answers)
    requests = [
      dataclasses.replace(request, mask=mask) for request, mask in zip(requests, masks, strict=True)
    ]
  names = tuple(tool.function.name for tool in offered)
  return EngineRequests(requests, answers, top, names)


def of_embedding(body: bodies.Embed, model: ServedModel) -> list[list[int]]:
  """Returns the tokens of every text of /v1/embeddings.

  Raises:
    ApiError: the model gives no embeddings, or a text is too long.
  """
  if model.two_sided:
    raise ApiError(f'{model.name} is an encoder-decoder, and gives no embeddings.')
  texts = _prompts(body.input, model, 'input')
  for tokens in texts:
    if len(tokens) > model.room:
      raise _too_long(len(tokens), 0, model, 'input')
    _check_ids(tokens, model, 'input')
  return texts


def _check_generates(model: ServedModel) -> None:
  if model.generator is None:
    raise ApiError(model.cannot_generate, code='model_does_not_generate')


def _prompts(field, model: ServedModel, param: str = 'prompt') -> list[list[int]]:
  """Returns the tokens of each text of a field: one text or several, as text or as tokens."""
  several = isinstance(field, list) and not isinstance(field[0], int)
  texts = field if several else [field]
  prompts = [model.encode(text) if isinstance(text, str) else list(text) for text in texts]
  if not all(prompts):
    raise ApiError(f'{param}: a text has no tokens.', param=param)
  return prompts


def _sides(tokens: list[int], model: ServedModel) -> dict:
  """Returns a request's prompt; of an encoder-decoder the encoder reads it."""
  if not model.two_sided:
    return {'prompt': tuple(tokens)}
  return {'encoder': tuple(tokens), 'prompt': model.generator.tokenizer.start or (0,)}


def _settings(body: bodies.Generate, model: ServedModel, top: int | None) -> dict:
  """Returns the fields of a request that completions and chats share."""
  stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
  reported = next(size for size in TOPS if size >= (top or 0))
  return {
    'sampling': sampling_of(body),
    'stop': stop,
    'stop_tokens': model.vocabulary.ends,
    'top': min(reported, model.size),
  }


def _checked(settings: dict, model: ServedModel, param: str) -> Request:
  """Returns a request that the engine can answer.

  Raises:
    ApiError: it cannot answer it.
  """
  request = Request(**settings)
  engine = model.generator.engine
  length = len(request.prompt)
  if length + request.max_tokens > engine.room:
    raise _too_long(length, request.max_tokens, model, param)
  if len(request.encoder) > engine.encoder_room:
    raise _too_long(len(request.encoder), 0, model, param)
  _check_ids(request.encoder or request.prompt, model, param)
  try:
    check_request(request, model.size, engine.room, engine.encoder_room, True)
  except Invalid as error:
    raise ApiError(f'{error.field}: {error.why}', param=error.field) from error
  return request


def _too_long(length: int, max_tokens: int, model: ServedModel, param: str) -> ApiError:
  """Returns the error of a text of `length` tokens with an answer of `max_tokens`."""
  message = (
    f'{length} tokens are more than the {model.room} that this model takes; shorten {param}.'
  )
  if max_tokens:
    message = (
      f'{length} tokens of {param} and {max_tokens} of the answer are more than the {model.room} that this '
      'model takes; shorten the text, or ask for fewer tokens.'
    )
  return ApiError(message, param=param, code='context_length_exceeded')


def _check_ids(tokens: Sequence[int], model: ServedModel, param: str) -> None:
  wrong = next((token for token in tokens if token >= model.size), None)
  if wrong is not None:
    raise ApiError(f'{param}: the model has no token {wrong}.', param=param)


def _samples(request: Request, count: int) -> list[Request]:
  """Returns `count` copies of a request, with different seeds (`generator.with_seed`)."""
  return [
    dataclasses.replace(request, sampling=with_seed(request.sampling, number))
    for number in range(count)
  ]


def _offered_tools(body: bodies.Chat) -> list[bodies.Tool]:
  """Returns the tools that the answer may call."""
  if body.tool_choice == 'none':
    return []
  offered = body.tools or []
  if isinstance(body.tool_choice, bodies.NamedTool):
    name = body.tool_choice.function.name
    offered = [tool for tool in offered if tool.function.name == name]
  return offered


def _parts(body: bodies.Chat, offered: list[bodies.Tool], model: ServedModel) -> list[str]:
  """Returns the text of a conversation up to the beginning of the answer.

  It is in one part, or cut at its turns if the model's training tokenized turn by turn.
  """
  render = model.render
  more = {}
  if getattr(render, 'knows_tools', False):
    turns = tools.for_template(body.messages)
    more['tools'] = tools.as_json(offered) or None
  else:
    turns = tools.as_plain_turns(body.messages, offered)
  try:
    whole = render(turns, add_generation_prompt=True, **more)
    return [whole] if model.vocabulary.whole else _by_turn(turns, render, whole)
  except conversations.Unsuitable as error:
    raise ApiError(f'messages: the conversation {error}.', param='messages') from error


def _by_turn(turns: list[dict], render, whole: str) -> list[str]:
  """Returns a text cut as `conversations.segments` cuts it, so that its tokens are those of training."""
  parts = []
  done = ''
  for number, turn in enumerate(turns):
    if turn['role'] == 'assistant':
      before = render(turns[:number], add_generation_prompt=True)
      after = render(turns[: number + 1])
      # A template may write a newline only between turns. It belongs to the text after this turn.
      if not (whole.startswith(after) and after.startswith(before) and before.startswith(done)):
        return [whole]
      parts += [before[len(done) :], after[len(before) :]]
      done = after
  return [*parts, whole[len(done) :]]


def _grammar(body: bodies.Chat, offered: list[bodies.Tool]) -> str:
  """Returns the grammar of the answer; '' if any text is allowed."""
  if offered:
    forced = body.tool_choice == 'required' or isinstance(body.tool_choice, bodies.NamedTool)
    return grammar.of_calls(offered, forced=forced, parallel=body.parallel_tool_calls is not False)
  if not body.constrains:
    return ''
  if isinstance(body.response_format, bodies.SchemaFormat):
    schema = body.response_format.json_schema.json_schema
    return grammar.of_schema(schema, 'response_format.json_schema.schema')
  return grammar.of_schema({'type': 'object'}, 'response_format')
