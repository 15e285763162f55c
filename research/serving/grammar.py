"""Grammars of answers: JSON by a schema, and calls of tools. llguidance says which tokens may come next."""

import json
from collections.abc import Sequence

import llguidance
import numpy as np

from research.core.errors import first_line
from research.serving.bodies import Tool
from research.serving.refusals import Refused
from research.serving.vocabulary import Vocabulary

BEGIN, END = '<tool_call>', '</tool_call>'
# Without free white space a model cannot go on with it for ever.
COMPACT = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}


class Mask:
  """Which tokens may come next (`inference.request.Mask`). One is for one request, for it remembers its tokens.

  Args:
    grammar: of llguidance.
    vocabulary: of the model.
    size: how many logits the model has.
  """

  def __init__(self, grammar: str, vocabulary: Vocabulary, size: int):
    self.matcher = llguidance.LLMatcher(vocabulary.matcher_tokenizer, grammar)
    self.ends, self.size, self.read = list(vocabulary.ends), size, 0

  def __call__(self, tokens: Sequence[int]) -> np.ndarray:
    try:
      return self._allowed(tokens)
    except Exception:  # of the library: this answer ends with an error, and the engine goes on
      return np.zeros(self.size, bool)

  def _allowed(self, tokens: Sequence[int]) -> np.ndarray:
    self.matcher.consume_tokens(list(tokens[self.read :]))
    self.read = len(tokens)
    allowed = np.zeros(self.size, bool)
    if not self.matcher.is_stopped():
      bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
      known = np.unpackbits(bits, bitorder='little')[: self.size]
      allowed[: len(known)] = known
    # An error leaves no token, and the engine says so. A model may have several ends.
    allowed[self.ends] = self.matcher.is_accepting() and not self.matcher.is_error()
    return allowed


def check(grammar: str, param: str) -> str:
  """The grammar, if llguidance understands it.

  Raises:
    Refused: it does not.
  """
  message = llguidance.LLMatcher.validate_grammar(grammar)
  if message:
    raise Refused(f'{param}: {first_line(message)}.', param=param, code='invalid_schema')
  return grammar


def of_schema(schema: dict, param: str) -> str:
  """JSON that a schema describes."""
  return check(_json_grammar(schema), param)


def _json_grammar(schema: dict) -> str:
  return llguidance.LLMatcher.grammar_from_json_schema(_dumps(schema), defaults=COMPACT)


def of_calls(tools: Sequence[Tool], *, forced: bool, parallel: bool) -> str:
  """Calls of tools, in the form of `tools.PROMPT`.

  Args:
    forced: the answer is one call or more; else it is a text that may have calls.
    parallel: whether there may be more than one.
  """
  rules = [_call_rule(number, tool) for number, tool in enumerate(tools)]
  for number, tool in enumerate(tools):
    # Each alone, so that a message names the tool.
    check(_json_grammar(_parameters(tool)), f'tools.{number}.function.parameters')
  any_call = ' | '.join(f'call_{number}' for number in range(len(tools)))
  if forced:
    start = ['start: call more*' if parallel else 'start: call', f'call: "{BEGIN}" rest_of_call']
    start += [f'more: "\\n{BEGIN}" rest_of_call'] if parallel else []
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


def _call_rule(number: int, tool: Tool) -> str:
  # The schema stands alone, so that references from its root go on being right.
  beginning = _dumps(f'{{"name": "{tool.function.name}", "arguments": ')
  schema = _dumps({**_parameters(tool), 'x-guidance': COMPACT})
  return f'call_{number}: {beginning} %json {schema} "}}"'


def _parameters(tool: Tool) -> dict:
  """The schema of the arguments; a function without one takes none."""
  if tool.function.parameters is None:
    return {'type': 'object', 'properties': {}, 'additionalProperties': False}
  return {'type': 'object', **tool.function.parameters}


def _dumps(value) -> str:
  return json.dumps(value, ensure_ascii=False)
