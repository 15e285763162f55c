"""Conversations: their shapes in files, and the templates that turn them into text.

A conversation is a list of messages {'role': 'system' | 'user' | 'assistant' | 'tool', 'content': text}. A
template turns it into segments of text. The assistant's segments carry loss; the others are context.
"""

import datetime
import json
import pathlib
from collections.abc import Callable

from research.core.errors import UserError

# The vocabulary's EOS in a template that does not come with a tokenizer. No message may contain it.
EOS = '\0'

# Roles by their usual names and by ShareGPT's.
_ROLES = {
  'system': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
  'tool': 'tool',
}
# The roles that may follow each role; None is the start.
_NEXT = {
  None: ('system', 'user'),
  'system': ('user',),
  'user': ('assistant',),
  'assistant': ('user', 'tool'),
  'tool': ('assistant', 'tool'),
}

Messages = list[dict[str, str]]


class Unsuitable(ValueError):
  """A record is not a conversation to learn from. The message is the end of a sentence about the record."""


def read_messages(record: dict) -> Messages:
  """Returns the messages of a JSON record in any of the usual shapes.

  These are {'messages': [{'role', 'content'}]}, ShareGPT's {'conversations': [{'from', 'value'}]},
  {'prompt', 'completion'} and Alpaca's {'instruction', 'input', 'output'}.

  Raises:
    Unsuitable: it has none of these shapes, roles out of order, or a turn that is empty.
  """
  if 'messages' in record:
    messages = read_turns(record, 'messages')
  elif 'conversations' in record:
    messages = [_message(m, i, 'from', 'value') for i, m in _turns(record, 'conversations')]
  elif 'prompt' in record and 'completion' in record:
    messages = _pair(record, 'prompt', 'completion')
  elif 'instruction' in record and 'output' in record:
    messages = _pair(record, 'instruction', 'output')
    if record.get('input'):
      messages[0]['content'] += '\n\n' + text_of(record['input'], "'input'")
  else:
    names = ', '.join(map(repr, list(record)[:8]))
    raise Unsuitable(
      "has neither 'messages' nor 'conversations', 'prompt' and 'completion', or 'instruction' and "
      f"'output' (it has {names or 'nothing'})"
    )
  check(messages)
  return messages


def read_turns(record: dict, name: str) -> Messages:
  """Returns the messages {'role', 'content'} that a record has under a name."""
  return [_message(m, i, 'role', 'content') for i, m in _turns(record, name)]


def _turns(record, name):
  if not isinstance(record[name], list) or not record[name]:
    raise Unsuitable(f'has no list of turns in {name!r}')
  return enumerate(record[name], 1)


def _pair(record, prompt, completion) -> Messages:
  return [
    {'role': 'user', 'content': text_of(record[prompt], repr(prompt))},
    {'role': 'assistant', 'content': text_of(record[completion], repr(completion))},
  ]


def text_of(value, what: str) -> str:
  """Returns a value that must be text; `what` names it in messages.

  Raises:
    Unsuitable: it is not text.
  """
  if not isinstance(value, str):
    kind = 'null' if value is None else f'of type {type(value).__name__}'
    raise Unsuitable(f'has {what} that is {kind} and not text')
  if EOS in value:
    raise Unsuitable(f'has {what} with a NUL character')
  return value


def _message(message, number: int, role: str, content: str) -> dict[str, str]:
  if not isinstance(message, dict) or role not in message or content not in message:
    raise Unsuitable(f'has turn {number} without {role!r} and {content!r}')
  if message[role] not in _ROLES:
    roles = ', '.join(_ROLES)
    raise Unsuitable(f'has turn {number} of the unknown role {message[role]!r} (known: {roles})')
  return {'role': _ROLES[message[role]], 'content': text_of(message[content], f'turn {number}')}


def check(messages: Messages):
  """Raises `Unsuitable` if turns are out of order or empty, or the last turn is not the assistant's."""
  last = None
  for number, message in enumerate(messages, 1):
    role = message['role']
    if role not in _NEXT[last]:
      after = f'after that of the {last}' if last else 'at the start'
      raise Unsuitable(f'has roles out of order: turn {number} is of the {role}, {after}')
    if role in ('user', 'assistant') and not message['content'].strip():
      raise Unsuitable(f"has an empty turn: turn {number}, the {role}'s")
    last = role
  if last != 'assistant':
    raise Unsuitable(f"ends with a turn of the {last} and not with the assistant's")


def render_plain(messages: Messages, add_generation_prompt: bool = False) -> str:
  """The template of Tülu 2: each turn follows the name of its role, and EOS ends the assistant's turns.

  Wang et al. (2023), arXiv:2306.04751, section 4.1.
  """
  parts = []
  for number, message in enumerate(messages, 1):
    end = EOS if message['role'] == 'assistant' else ''
    newline = '' if end and number == len(messages) else '\n'
    parts.append(f'<|{message["role"]}|>\n{message["content"]}{end}{newline}')
  return ''.join(parts) + ('<|assistant|>\n' if add_generation_prompt else '')


def template(path: str | None) -> Callable[..., str]:
  """Returns the function (messages, add_generation_prompt) -> text of a template.

  Args:
    path: a tokenizer_config.json with a chat_template, or a file with the jinja2 template itself; None is
      `render_plain`.

  Raises:
    UserError: the file has no template, or jinja2 cannot read it.
  """
  return render_plain if path is None else Template(path)


class Template:
  """A jinja2 template, with the functions and filters that transformers provides.

  Attributes:
    knows_tools: whether it writes the tools that a conversation may call.
    source: the text of the template that is used without tools.
  """

  def __init__(self, path: str):
    sources, self._tokens = read_template(path)
    try:
      import jinja2
      import jinja2.meta
    except ImportError:
      raise UserError(f'{path} is a jinja2 template: install the extra chat (jinja2).') from None
    environment = _environment()
    try:
      self._compiled = {name: environment.from_string(text) for name, text in sources.items()}
      used = {
        name: jinja2.meta.find_undeclared_variables(environment.parse(text))
        for name, text in sources.items()
      }
    except jinja2.TemplateError as e:
      raise UserError(f'{path}: the chat template is not jinja2 ({e}).') from e
    self.source = sources['default']
    self.knows_tools = 'tool_use' in sources or 'tools' in used['default']

  def __call__(
    self, messages: list[dict], add_generation_prompt: bool = False, tools: list | None = None
  ) -> str:
    """Returns the text of a conversation.

    Raises:
      Unsuitable: the template refuses the messages.
    """
    name = 'tool_use' if tools and 'tool_use' in self._compiled else 'default'
    try:
      return self._compiled[name].render(
        messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self._tokens
      )
    except Unsuitable:
      raise
    except Exception as e:  # a template is a program, and raises what programs raise
      raise Unsuitable(f'is refused by the template: {e}') from e


def _environment():
  """Returns a jinja2 environment like that of transformers' `apply_chat_template`."""
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def refuse(message):
    raise Unsuitable(f'is refused by the template: {message}')

  def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # The filter of jinja2 itself escapes < and > for HTML.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  def format_time(form):
    return datetime.datetime.now().strftime(form)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.globals |= {'raise_exception': refuse, 'strftime_now': format_time}
  environment.filters['tojson'] = to_json
  return environment


def read_template(path: str) -> tuple[dict[str, str], dict[str, str]]:
  """Returns the jinja2 sources of a template by name, one of them 'default', and {name: special token}.

  Raises:
    UserError: the file cannot be read, or has no template.
  """
  try:
    text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
    if not path.endswith('.json'):
      # In a Hugging Face folder this file beside the template has the tokens that the template names.
      config = pathlib.Path(path).expanduser().parent / 'tokenizer_config.json'
      settings = json.loads(config.read_text(encoding='utf-8')) if config.is_file() else {}
      return {'default': text}, _special_tokens(settings if isinstance(settings, dict) else {})
    settings = json.loads(text)
  except (OSError, ValueError) as e:
    raise UserError(f'{path}: the chat template cannot be read ({e}).') from e
  source = settings.get('chat_template') if isinstance(settings, dict) else None
  sources = {'default': source}
  if isinstance(source, list):  # several templates by name
    sources = {entry.get('name'): entry.get('template') for entry in source}
  if not isinstance(sources.get('default'), str):
    raise UserError(f'{path} has no chat_template: name a jinja2 file, or leave the template out.')
  return sources, _special_tokens(settings)


def _special_tokens(settings: dict) -> dict[str, str]:
  tokens = {'bos_token': '', 'eos_token': EOS}
  for name in ('bos_token', 'eos_token', 'unk_token', 'pad_token'):
    value = settings.get(name)
    value = value.get('content') if isinstance(value, dict) else value
    if isinstance(value, str):
      tokens[name] = value
  return tokens


def segments(messages: Messages, render: Callable[..., str]) -> list[tuple[str, bool]]:
  """Returns (text, whether it carries loss) of every segment, in order. The assistant's segments carry loss.

  The context before an assistant's turn is exactly the prompt of the same turn at generation.

  Raises:
    Unsuitable: the template changes earlier turns when later ones follow, so that it has no segments.
  """
  parts = []
  rendered = ''
  for number, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    before = render(messages[:number], add_generation_prompt=True)
    after = render(messages[: number + 1], add_generation_prompt=False)
    # The text so far must be a beginning of the longer one, and the prompt a beginning of the answer.
    if not before.startswith(rendered) or not after.startswith(before):
      raise Unsuitable('is written by the template in a way that changes with later turns')
    parts += [(before[len(rendered) :], False), (after[len(before) :], True)]
    rendered = after
  return parts
