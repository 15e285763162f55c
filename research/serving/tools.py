"""Calls of tools within a text: how a model is told of its tools, and how its calls are found."""

import dataclasses
import json
import secrets
from collections.abc import Sequence

from research.serving.bodies import Message, Tool
from research.serving.grammar import BEGIN, END

# The words of Hermes and Qwen, which many open models have learned.
PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclasses.dataclass(frozen=True)
class Call:
  """A call that a model wrote.

  Attributes:
    arguments: JSON of an object.
  """

  name: str
  arguments: str
  id: str = dataclasses.field(default_factory=lambda: f'call_{secrets.token_hex(12)}')


def as_json(tools: Sequence[Tool]) -> list[dict]:
  """The tools as templates expect them."""
  return [tool.model_dump(exclude_none=True) for tool in tools]


def for_template(messages: Sequence[Message]) -> list[dict]:
  """The turns for a template that knows of tools."""
  turns = []
  for message in messages:
    turn = {'role': _role(message), 'content': message.text}
    if message.tool_calls:
      turn['tool_calls'] = [
        {
          'id': call.id,
          'type': 'function',
          # Templates write the arguments as JSON themselves.
          'function': {'name': call.function.name, 'arguments': _arguments(call)},
        }
        for call in message.tool_calls
      ]
    for name in ('name', 'tool_call_id'):
      if getattr(message, name) is not None:
        turn[name] = getattr(message, name)
    turns.append(turn)
  return turns


def as_plain_turns(messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict]:
  """The turns for a template that knows nothing of tools: tools, calls and their results as text."""
  turns: list[dict] = []
  for message in messages:
    content = message.text
    if message.tool_calls:
      calls = [
        f'{BEGIN}\n{{"name": {json.dumps(c.function.name)}, "arguments": {json.dumps(_arguments(c))}}}\n{END}'
        for c in message.tool_calls
      ]
      content = '\n'.join([content, *calls] if content else calls)
    role = _role(message)
    if role == 'tool':
      role, content = 'user', f'<tool_response>\n{content}\n</tool_response>'
      if turns and turns[-1].get('answers'):
        turns[-1]['content'] += '\n' + content
        continue
      turns.append({'role': role, 'content': content, 'answers': True})
      continue
    turns.append({'role': role, 'content': content})
  turns = [{'role': turn['role'], 'content': turn['content']} for turn in turns]
  if tools:
    told = PROMPT.format(tools='\n'.join(json.dumps(tool) for tool in as_json(tools)))
    if turns[0]['role'] == 'system':
      turns[0] = {'role': 'system', 'content': f'{turns[0]["content"]}\n\n{told}'}
    else:
      turns.insert(0, {'role': 'system', 'content': told})
  return turns


def _role(message: Message) -> str:
  return 'system' if message.role == 'developer' else message.role


def _arguments(call) -> dict | str:
  """The arguments as a client sent them back; text that is no JSON stays text."""
  try:
    return json.loads(call.function.arguments)
  except ValueError:
    return call.function.arguments


class CallReader:
  """Splits a text that comes in pieces into plain text and calls. White space around calls is no text.

  A call is <tool_call>{...}</tool_call>, or the whole text is one JSON object of the same shape, as Llama 3.1
  writes it. What looks like a call and names none of the tools is text.

  Args:
    names: of the tools.
  """

  def __init__(self, names: Sequence[str]):
    self.names = set(names)
    self.calls = 0
    self._held = ''  # what may still become a call
    self._space = ''  # in front of what comes next
    # What has come before, but for space.
    self._at_start, self._after_call, self._said = True, False, False

  def add(self, text: str) -> tuple[str, list[Call]]:
    """(text that is sure, calls that are whole) with another piece."""
    self._held += text
    said, calls = '', []
    while (begin := self._held.find(BEGIN)) >= 0:
      end = self._held.find(END, begin)
      said += self._say(self._take(begin))
      if end < 0:
        return said, calls
      written = self._take(end - begin + len(END))
      call = self._parse(written[len(BEGIN) : -len(END)])
      if call is None:
        said += self._say(written)
      else:
        calls.append(self._count(call))
    if not self._may_be_bare():
      said += self._say(self._take(len(self._held) - _overlap(self._held, BEGIN)))
    return said, calls

  def finish(self) -> tuple[str, list[Call]]:
    """What is left when no piece follows."""
    left = self._take(len(self._held))
    call = self._parse(left) if self._at_start else None
    if call is not None:
      return '', [self._count(call)]
    said = self._say(left)
    return (said if self.calls else said + self._space), []

  def _take(self, count: int) -> str:
    taken, self._held = self._held[:count], self._held[count:]
    return taken

  def _say(self, text: str) -> str:
    """Text as it is told: space is held back until something follows, and dropped beside a call."""
    if not text.strip():
      self._space += text
      return ''
    whole = self._space + text
    between = '\n' if self._said else ''  # a call stood there
    start = between + whole.lstrip() if self._after_call else whole
    kept = start.rstrip()
    self._space = start[len(kept) :]
    self._at_start = self._after_call = False
    self._said = True
    return kept

  def _count(self, call: Call) -> Call:
    self.calls += 1
    self._space, self._at_start, self._after_call = '', False, True
    return call

  def _may_be_bare(self) -> bool:
    """Whether all of the text so far may become one JSON object."""
    return self._at_start and self._held.lstrip().startswith('{')

  def _parse(self, text: str) -> Call | None:
    try:
      value = json.loads(text)
    except ValueError:
      return None
    if not isinstance(value, dict) or value.get('name') not in self.names:
      return None
    arguments = value.get('arguments', value.get('parameters', {}))
    return Call(value['name'], json.dumps(arguments)) if isinstance(arguments, dict) else None


def _overlap(text: str, mark: str) -> int:
  """How many of the last characters may begin `mark`."""
  for length in range(min(len(mark) - 1, len(text)), 0, -1):
    if mark.startswith(text[-length:]):
      return length
  return 0
