"""Calls of tools: how the prompt describes the tools, and how calls are found in an answer."""

import dataclasses
import json
import secrets
from collections.abc import Sequence

from research.serving.bodies import Message, Tool, ToolCall
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


def _new_id() -> str:
  return f'call_{secrets.token_hex(12)}'


@dataclasses.dataclass(frozen=True)
class Call:
  """A call that a model wrote.

  Attributes:
    name: the tool's.
    arguments: a JSON object, as text.
    id: a random name, by which the client's answer refers to the call.
  """

  name: str
  arguments: str
  id: str = dataclasses.field(default_factory=_new_id)


def as_json(tools: Sequence[Tool]) -> list[dict]:
  """Returns the tools in the form that chat templates expect."""
  return [tool.model_dump(exclude_none=True) for tool in tools]


def for_template(messages: Sequence[Message]) -> list[dict]:
  """Returns the turns of a conversation for a template that supports tools."""
  turns = []
  for message in messages:
    turn = {'role': _role(message), 'content': message.text}
    if message.tool_calls:
      turn['tool_calls'] = [
        {
          'id': call.id,
          'type': 'function',
          # Templates convert the arguments to JSON themselves.
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
  """Returns the turns for a template that does not support tools: tools, calls and results become text.

  Results follow the form of Qwen's template: consecutive results are one turn of the user.
  """
  turns: list[dict] = []
  last_is_result = False
  for message in messages:
    content = message.text
    if message.tool_calls:
      calls = [_call_text(call) for call in message.tool_calls]
      content = '\n'.join([content, *calls] if content else calls)
    if message.role != 'tool':
      turns.append({'role': _role(message), 'content': content})
      last_is_result = False
      continue
    content = f'<tool_response>\n{content}\n</tool_response>'
    if last_is_result:
      turns[-1]['content'] += '\n' + content
    else:
      turns.append({'role': 'user', 'content': content})
    last_is_result = True
  if tools:
    prompt = PROMPT.format(tools='\n'.join(json.dumps(tool) for tool in as_json(tools)))
    if turns[0]['role'] == 'system':
      turns[0] = {'role': 'system', 'content': f'{turns[0]["content"]}\n\n{prompt}'}
    else:
      turns.insert(0, {'role': 'system', 'content': prompt})
  return turns


def _role(message: Message) -> str:
  """Returns a turn's role. Templates know OpenAI's newer name `developer` as `system`."""
  return 'system' if message.role == 'developer' else message.role


def _call_text(call: ToolCall) -> str:
  name = json.dumps(call.function.name)
  arguments = json.dumps(_arguments(call))
  return f'{BEGIN}\n{{"name": {name}, "arguments": {arguments}}}\n{END}'


def _arguments(call: ToolCall) -> dict | str:
  """Returns the arguments of a call that a client sent back. Text that is no JSON object stays text."""
  value = _json_object(call.function.arguments)
  return call.function.arguments if value is None else value


def _json_object(text: str) -> dict | None:
  """Returns the JSON object that a text is; None if it is none, or is nested too deeply to be read."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


class CallReader:
  """Splits an answer, which comes in pieces, into text and calls. White space around calls is dropped.

  A call is <tool_call>{...}</tool_call>. An answer that is a single JSON object of the same shape, as Llama 3.1
  writes it, is a call too. Anything that looks like a call but names none of the tools is text.

  Args:
    names: the names of the tools.
  """

  def __init__(self, names: Sequence[str]):
    self.names = set(names)
    self.calls = 0
    self._held = ''  # text that may still become a call
    self._space = ''  # white space that awaits the text after it
    # What came before, white space aside.
    self._at_start = True
    self._after_call = False
    self._after_text = False

  def add(self, text: str) -> tuple[str, list[Call]]:
    """Adds a piece; returns the text that is now certain, and the calls that are now complete."""
    self._held += text
    certain = ''
    calls = []
    while (begin := self._held.find(BEGIN)) >= 0:
      end = self._held.find(END, begin)
      certain += self._release(self._take(begin))
      if end < 0:
        return certain, calls
      written = self._take(end - begin + len(END))
      call = self._parse(written[len(BEGIN) : -len(END)])
      if call is None:
        certain += self._release(written)
      else:
        calls.append(self._count(call))
    if not self._may_be_bare():
      certain += self._release(self._take(len(self._held) - _overlap(self._held, BEGIN)))
    return certain, calls

  def finish(self) -> tuple[str, list[Call]]:
    """Returns the rest after the last piece, as `add` does."""
    rest = self._take(len(self._held))
    call = self._parse(rest) if self._at_start else None
    if call is not None:
      return '', [self._count(call)]
    certain = self._release(rest)
    return (certain if self.calls else certain + self._space), []

  def _take(self, count: int) -> str:
    """Removes so many characters from the held text and returns them."""
    taken = self._held[:count]
    self._held = self._held[count:]
    return taken

  def _release(self, text: str) -> str:
    """Returns text for the client, without the white space at its end: that awaits what follows, and is dropped
    beside a call."""
    if not text.strip():
      self._space += text
      return ''
    whole = self._space + text
    if self._after_call:
      between = '\n' if self._after_text else ''  # in place of a call between two texts
      whole = between + whole.lstrip()
    released = whole.rstrip()
    self._space = whole[len(released) :]
    self._at_start = False
    self._after_call = False
    self._after_text = True
    return released

  def _count(self, call: Call) -> Call:
    self.calls += 1
    self._space = ''
    self._at_start = False
    self._after_call = True
    return call

  def _may_be_bare(self) -> bool:
    """Returns whether all text so far may become a single JSON object."""
    return self._at_start and self._held.lstrip().startswith('{')

  def _parse(self, text: str) -> Call | None:
    value = _json_object(text)
    name = value.get('name') if value else None
    if not isinstance(name, str) or name not in self.names:
      return None
    # Llama 3.1 calls the arguments parameters.
    arguments = value.get('arguments', value.get('parameters', {}))
    return Call(name, json.dumps(arguments)) if isinstance(arguments, dict) else None


def _overlap(text: str, mark: str) -> int:
  """Returns how many characters at the end of a text may be the beginning of `mark`."""
  for length in range(min(len(mark) - 1, len(text)), 0, -1):
    if mark.startswith(text[-length:]):
      return length
  return 0
