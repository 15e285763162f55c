"""Grammars of answers: JSON of a schema, and calls of tools. llguidance says which tokens may come next."""

import json
from collections.abc import Sequence

import llguidance
import numpy as np

from research.core.errors import first_line
from research.serving.api_errors import ApiError
from research.serving.bodies import Tool
from research.serving.vocabulary import Vocabulary

# The marks around a call, as Hermes and Qwen write them.
BEGIN = '<tool_call>'
END = '</tool_call>'
# A step takes longer the more alternatives a schema has: at this size at most half a second.
LONGEST_SCHEMA = 100_000  # characters
# With free white space a model could write spaces for ever.
COMPACT = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}


class Mask:
  """Says which tokens may come next (`inference.request.Mask`). It keeps state, so each request has its own.

  Args:
    matcher: of the grammar; no other mask may use it.
    ends: the ids that end a text.
    size: how many logits the model has.
  """

  def __init__(self, matcher: llguidance.LLMatcher, ends: Sequence[int], size: int):
    self.matcher = matcher
    self.ends = list(ends)
    self.size = size
    self.consumed = 0  # how many tokens the matcher has seen

  def __call__(self, tokens: Sequence[int]) -> np.ndarray:
    """Returns bool [size] after the tokens of an answer. No token is allowed after a fault of the library."""
    try:
      return self._allowed(tokens)
    except Exception:  # this answer ends with an error, and the engine continues with the others
      return np.zeros(self.size, bool)

  @property
  def error(self) -> str:
    """Why no token is allowed, if the library could not go on; otherwise ''."""
    return first_line(self.matcher.get_error(), '')

  def _allowed(self, tokens: Sequence[int]) -> np.ndarray:
    self.matcher.consume_tokens(list(tokens[self.consumed :]))
    self.consumed = len(tokens)
    allowed = np.zeros(self.size, bool)
    if not self.matcher.is_stopped():
      bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
      known = np.unpackbits(bits, bitorder='little')[: self.size]
      allowed[: len(known)] = known
    # A model may have several ends, and llguidance knows one. If the matcher has an error, no token is allowed,
    # and the engine reports that.
    allowed[self.ends] = self.matcher.is_accepting() and not self.matcher.is_error()
    return allowed


def masks(grammar: str, vocabulary: Vocabulary, size: int, count: int) -> list[Mask]:
  """Returns the masks of `count` answers.

  Args:
    grammar: in llguidance's language.
    vocabulary: the model's.
    size: how many logits the model has.
    count: how many answers follow the grammar.

  Raises:
    ApiError: no token can begin such an answer.
  """
  matcher = llguidance.LLMatcher(vocabulary.matcher_tokenizer, grammar)
  # The first step of a large grammar takes long. Here it holds up no other answer, and the copies share it.
  first = Mask(matcher.deep_copy(), vocabulary.ends, size)
  if not first(()).any():
    why = first.error or 'the tokenizer lacks its characters'
    raise ApiError(
      f'no token can begin an answer of this schema ({why}): use a smaller or simpler one.',
      code='no_token_allowed',
    )
  return [Mask(matcher.deep_copy(), vocabulary.ends, size) for _ in range(count)]


def check(grammar: str, param: str) -> str:
  """Returns the grammar if llguidance understands it.

  Raises:
    ApiError: it does not; the error names the field `param`.
  """
  message = llguidance.LLMatcher.validate_grammar(grammar)
  if message:
    raise ApiError(f'{param}: {first_line(message)}.', param=param, code='invalid_schema')
  return grammar


def of_schema(schema: dict, param: str) -> str:
  """Returns the grammar of JSON that fits a schema, which is the field `param` of the request."""
  text = _dumps(schema)
  if len(text) > LONGEST_SCHEMA:
    why = f'{len(text):,} characters are more than the {LONGEST_SCHEMA:,} that a schema may have.'
    raise ApiError(f'{param}: {why}', param=param, code='invalid_schema')
  return check(llguidance.LLMatcher.grammar_from_json_schema(text, defaults=COMPACT), param)


def of_calls(tools: Sequence[Tool], *, forced: bool, parallel: bool) -> str:
  """Returns the grammar of answers with calls of tools, in the form of `tools.PROMPT`.

  Args:
    tools: the tools that the model may call.
    forced: whether the answer is calls alone; otherwise it is text that may contain calls.
    parallel: whether there may be more than one call.
  """
  schemas = [
    _parameters(tool, f'tools.{number}.function.parameters') for number, tool in enumerate(tools)
  ]
  rules = [
    _call_rule(number, tool, schema)
    for number, (tool, schema) in enumerate(zip(tools, schemas, strict=True))
  ]
  any_call = ' | '.join(f'call_{number}' for number in range(len(tools)))
  if forced:
    start = ['start: call more*' if parallel else 'start: call', f'call: "{BEGIN}" rest_of_call']
    if parallel:
      start.append(f'more: "\\n{BEGIN}" rest_of_call')
  else:
    start = [
      'start: call* text' if parallel else 'start: call? text',
      'text: TEXT',
      r'TEXT: /(.|\n)*/',
      f'trigger[lazy]: TEXT "{BEGIN}"',
      'call: trigger rest_of_call',
    ]
  rest = f'rest_of_call: "\\n" ({any_call}) "\\n{END}"'
  return check('\n'.join(['%llguidance {}', *start, rest, *rules]), 'tools')


def _call_rule(number: int, tool: Tool, schema: dict) -> str:
  # The schema is a document of its own here, so that its references from the root stay valid.
  beginning = _dumps(f'{{"name": "{tool.function.name}", "arguments": ')
  return f'call_{number}: {beginning} %json {_dumps({**schema, "x-guidance": COMPACT})} "}}"'


def _parameters(tool: Tool, param: str) -> dict:
  """Returns the schema of a tool's arguments. A function without a schema takes none.

  Raises:
    ApiError: it is no schema of an object; the error names the field `param`.
  """
  if tool.function.parameters is None:
    return {'type': 'object', 'properties': {}, 'additionalProperties': False}
  kind = tool.function.parameters.get('type', 'object')
  if kind != 'object' and not (isinstance(kind, list) and 'object' in kind):
    why = "the arguments of a call are an object, so its type must be 'object'."
    raise ApiError(f'{param}: {why}', param=param, code='invalid_schema')
  schema = {**tool.function.parameters, 'type': 'object'}
  # Each schema is also checked alone, so that an error names its tool.
  of_schema(schema, param)
  return schema


def _dumps(value) -> str:
  return json.dumps(value, ensure_ascii=False)
