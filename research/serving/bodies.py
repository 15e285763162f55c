"""The bodies of requests in OpenAI's protocol, with bounds. A field that is not listed here is an error."""

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

# A list ends its check at the first fault. A body of millions of faults would cost gigabytes otherwise.
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
MOST_TEXTS = 2048  # of a body; OpenAI's bound on `input`


def _form(value: Any) -> str:
  """Returns the form that a client means by a value, so that an error is about that form alone."""
  if isinstance(value, str):
    return 'Text'
  first = value[0] if isinstance(value, list) and value else None
  return 'Tokens' if isinstance(first, int) else 'Texts'


def _form_of_one(value: Any) -> str:
  return 'Text' if isinstance(value, str) else 'Tokens'


OneText = Annotated[
  Annotated[Text, pydantic.Tag('Text')] | Annotated[Tokens, pydantic.Tag('Tokens')],
  pydantic.Discriminator(_form_of_one),
]
Texts = Annotated[list[OneText], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
# One text or several, each as text or as tokens.
OneOrMore = Annotated[
  Annotated[Text, pydantic.Tag('Text')]
  | Annotated[Tokens, pydantic.Tag('Tokens')]
  | Annotated[Texts, pydantic.Tag('Texts')],
  pydantic.Discriminator(_form),
]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # a number of tokens
# A stop string that is longer than an answer can never end it, and costs time at every token.
Stop = Annotated[str, Field(min_length=1, max_length=1024)]

# The engine computes in float32. A mass that is 0 there would keep no token at all.
LEAST_MASS = 1e-6


class Body(pydantic.BaseModel):
  """A part of a body. Types are strict: '5' is not a number, and 1 is not a bool."""

  model_config = pydantic.ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)


def _without_nul(text: str) -> str:
  if '\0' in text:  # `conversations.EOS`, which would end the turn
    raise ValueError('the text has a NUL character')
  return text


TurnText = Annotated[str, pydantic.AfterValidator(_without_nul)]


class StreamOptions(Body):
  """What a stream has beside its text."""

  include_usage: bool = False
  include_obfuscation: bool = (
    False  # random padding against eavesdroppers, which this server does not add
  )


class Request(Body):
  """The fields of every request. All but `model` concern billing and storage and change no answer."""

  model: str
  user: str | None = None
  metadata: dict[str, Any] | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None
  prompt_cache_retention: str | None = None
  service_tier: str | None = None
  store: bool | None = None


class Generate(Request):
  """The fields of both kinds of generation. None means the protocol's default.

  `top_k`, `min_p`, `typical` and `repetition_penalty` are beyond the protocol (`inference.sampling.Sampling`).
  """

  stream: bool | None = None
  stream_options: StreamOptions | None = None
  n: Annotated[int, Field(ge=1, le=128)] | None = None
  stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  temperature: Annotated[float, Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, Field(ge=LEAST_MASS, le=1)] | None = None
  presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
  frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
  logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
  top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
  min_p: Annotated[float, Field(ge=0, le=1)] | None = None
  typical: Annotated[float, Field(ge=LEAST_MASS, le=1)] | None = None
  repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None

  @pydantic.model_validator(mode='after')
  def _options_need_a_stream(self):
    if self.stream_options is not None and not self.stream:
      raise ValueError('stream_options go with stream: true')
    return self

  @pydantic.field_validator('logit_bias')
  @classmethod
  def _biases_are_of_ids(cls, biases):
    wrong = [key for key in biases or () if not re.fullmatch('[0-9]{1,9}', key)]
    if wrong:
      raise ValueError(f'{wrong[0][:40]!r} is not the id of a token')
    return biases


class Completion(Generate):
  """POST /v1/completions"""

  prompt: OneOrMore
  max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
  echo: bool | None = None
  logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
  best_of: int | None = None
  suffix: None = None

  @pydantic.model_validator(mode='after')
  def _only_what_is_generated(self):
    if self.best_of is not None and self.best_of != (self.n or 1):
      raise ValueError('best_of other than n is not supported: ask for n and choose')
    if self.max_tokens == 0 and not self.echo:
      raise ValueError('max_tokens of 0 goes with echo: true')
    if self.echo and self.stream:
      raise ValueError('echo does not go with stream')
    several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
    if several and len(self.prompt) * (self.n or 1) > MOST_TEXTS:
      raise ValueError(f'a request gives at most {MOST_TEXTS:,} answers')
    return self


class TextPart(Body):
  """A part of a turn's content. Text is the only kind: these models read no pictures."""

  type: Literal['text']
  text: TurnText


class CalledFunction(Body):
  """The function of a call, with its arguments as JSON text."""

  name: TurnText
  arguments: TurnText


class ToolCall(Body):
  """A call in a turn of the assistant. Some clients send the `index` of the stream back."""

  id: TurnText
  type: Literal['function'] = 'function'
  function: CalledFunction
  index: int | None = None


Content = TurnText | Annotated[list[TextPart], Field(fail_fast=True)]


class Message(Body):
  """A turn. Clients send the assistant's turns back with all fields of the answer, some of them null."""

  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: Content | None = None
  name: TurnText | None = None
  tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
  tool_call_id: TurnText | None = None
  refusal: None = None
  audio: None = None
  function_call: None = None
  annotations: list | None = None

  @pydantic.model_validator(mode='after')
  def _has_content(self):
    if self.content is None and not (self.role == 'assistant' and self.tool_calls):
      raise ValueError(f'the turn of the {self.role} has no content')
    if self.tool_calls and self.role != 'assistant':
      raise ValueError(f'the turn of the {self.role} has tool_calls')
    if self.role == 'tool' and self.tool_call_id is None:
      raise ValueError('the turn of a tool has no tool_call_id')
    return self

  @property
  def text(self) -> str:
    if isinstance(self.content, list):
      return ''.join(part.text for part in self.content)
    return self.content or ''


class Function(Body):
  """The description of a function. `parameters` is a JSON schema; None is a function without parameters."""

  name: Annotated[str, Field(pattern=r'^[a-zA-Z0-9_-]{1,64}$')]
  description: TurnText | None = None
  parameters: dict[str, Any] | None = None
  strict: bool | None = None


class Tool(Body):
  """A tool that the model may call."""

  type: Literal['function']
  function: Function


class NamedFunction(Body):
  """The name of a function that must be called."""

  name: str


class NamedTool(Body):
  """The tool that must be called."""

  type: Literal['function']
  function: NamedFunction


class PlainFormat(Body):
  """Any text, or any JSON object."""

  type: Literal['text', 'json_object']


class Schema(Body):
  """A named JSON schema."""

  name: str
  description: str | None = None
  # A field named schema would hide a method of pydantic's.
  json_schema: dict[str, Any] = Field(alias='schema')
  strict: bool | None = None


class SchemaFormat(Body):
  """JSON of a schema."""

  type: Literal['json_schema']
  json_schema: Schema


class Chat(Generate):
  """POST /v1/chat/completions"""

  messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
  max_tokens: Count | None = None
  max_completion_tokens: Count | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
  tools: Annotated[list[Tool], Field(max_length=128)] | None = None
  tool_choice: Literal['none', 'auto', 'required'] | NamedTool | None = None
  parallel_tool_calls: bool | None = None
  response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator='type')] | None = None
  modalities: Annotated[list[Literal['text']], Field(max_length=1)] | None = None

  @pydantic.model_validator(mode='after')
  def _fields_that_go_together(self):
    if self.top_logprobs is not None and not self.logprobs:
      raise ValueError('top_logprobs goes with logprobs: true')
    names = [tool.function.name for tool in self.tools or ()]
    if len(set(names)) < len(names):
      raise ValueError('two of the tools have one name')
    choice = self.tool_choice
    if choice not in (None, 'none', 'auto') and not names:
      raise ValueError('tool_choice needs tools')
    if isinstance(choice, NamedTool) and choice.function.name not in names:
      raise ValueError(f'tool_choice names {choice.function.name!r}, which is none of the tools')
    if self.constrains and names and choice != 'none':
      raise ValueError("response_format goes with tools only where tool_choice is 'none'")
    return self

  @property
  def constrains(self) -> bool:
    """Whether `response_format` constrains the answer."""
    return self.response_format is not None and self.response_format.type != 'text'


class Embed(Request):
  """POST /v1/embeddings"""

  input: OneOrMore
  encoding_format: Literal['float', 'base64'] | None = None
  dimensions: Count | None = None
