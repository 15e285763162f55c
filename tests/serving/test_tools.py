"""Calls of tools in a text that comes in pieces, and tools told to a template that knows nothing of them."""

import json

import pytest

from tests.serving import tiny

pydantic = pytest.importorskip('pydantic')

from research.serving import tools  # noqa: E402
from research.serving.bodies import Message, Tool  # noqa: E402

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def read(text: str, size: int) -> tuple[str, list[tuple[str, dict]]]:
  """What is said and called when the text comes in pieces of `size` characters."""
  reader, said, calls = tools.CallReader(['f', 'g']), '', []
  for start in range(0, len(text), size):
    more, found = reader.add(text[start : start + size])
    said, calls = said + more, calls + found
  more, found = reader.finish()
  calls += found
  assert reader.calls == len(calls)
  return said + more, [(call.name, json.loads(call.arguments)) for call in calls]


F = ('f', {'a': 1})
TEXTS = {
  'text': ('Hello <b> there', 'Hello <b> there', []),
  'a call': (CALL, '', [F]),
  'text and two calls': (f'I look.\n{CALL}\n{CALL}\n', 'I look.', [F, F]),
  'text around a call': (f'  a \n{CALL}\n b ', '  a\nb', [F]),
  'space alone': (' \n', ' \n', []),
  'a call of nothing known': (CALL.replace('f', 'h'), CALL.replace('f', 'h'), []),
  'a call that is no JSON': ('<tool_call>{</tool_call>', '<tool_call>{</tool_call>', []),
  'a call that is cut off': ('a<tool_call>{"name"', 'a<tool_call>{"name"', []),
  'as Llama writes it': ('{"name": "g", "parameters": {}}', '', [('g', {})]),
  'JSON of something else': ('{"name": "x"}', '{"name": "x"}', []),
}


@pytest.mark.parametrize('size', [1, 3, 1000])
@pytest.mark.parametrize('case', TEXTS)
def test_calls_are_found_however_the_text_comes(case, size):
  text, said, calls = TEXTS[case]
  assert read(text, size) == (said, calls)


def test_plain_text_is_not_held_back():
  reader = tools.CallReader(['f'])
  assert reader.add('Hello <tool') == ('Hello', [])
  assert reader.add('box>') == (' <toolbox>', [])


def test_a_template_without_tools_is_told_of_them_in_words():
  tool = Tool.model_validate(
    {'type': 'function', 'function': {'name': 'f', 'description': 'Does.'}}
  )
  call = {'id': 'x', 'function': {'name': 'f', 'arguments': '{"a": 1}'}}
  messages = [
    {'role': 'developer', 'content': 'Be short.'},
    {'role': 'user', 'content': 'Go'},
    {'role': 'assistant', 'tool_calls': [call]},
    {'role': 'tool', 'tool_call_id': 'x', 'content': 'one'},
    {'role': 'tool', 'tool_call_id': 'y', 'content': 'two'},
  ]
  turns = tools.as_plain_turns([Message.model_validate(m) for m in messages], [tool])
  assert [turn['role'] for turn in turns] == ['system', 'user', 'assistant', 'user']
  assert turns[0]['content'].startswith('Be short.\n\n# Tools')
  assert '"description": "Does."' in turns[0]['content']
  assert turns[2]['content'] == CALL
  answers = '<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>'
  assert turns[3]['content'] == answers


@pytest.mark.parametrize('template', [tiny.TEMPLATE, tiny.PLAIN_TEMPLATE], ids=['knows', 'plain'])
def test_tools_of_choice_auto_are_called_and_answered(template, tmp_path):
  """The whole round through the endpoint, with a model that calls as it should."""
  openai = pytest.importorskip('openai')

  def say(prompt):
    if '12:00' in prompt:
      return 'It is noon.'
    calls = [
      f'<tool_call>\n{{"name": "time", "arguments": {{"zone": "{zone}"}}}}\n</tool_call>'
      for zone in ('UTC', 'CET')
    ]
    return '\n'.join(['I look.', *calls])

  time = {'type': 'function', 'function': {'name': 'time', 'parameters': {'type': 'object'}}}
  asked = {'model': 'tiny', 'tools': [time], 'tool_choice': 'auto'}
  turns = [{'role': 'user', 'content': 'What time is it?'}]
  with (
    tiny.serving(opened=lambda: tiny.scripted(tmp_path, say, template)) as url,
    openai.OpenAI(base_url=f'{url}/v1', api_key='none') as client,
  ):
    message = client.chat.completions.create(**asked, messages=turns).choices[0].message
    assert message.content == 'I look.'
    zones = [json.loads(call.function.arguments)['zone'] for call in message.tool_calls]
    assert zones == ['UTC', 'CET']
    with client.chat.completions.stream(**asked, messages=turns) as stream:
      for _ in stream:
        pass
      streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == 'tool_calls'
    assert [call.function.name for call in streamed.message.tool_calls] == ['time', 'time']
    results = [
      {'role': 'tool', 'tool_call_id': call.id, 'content': '12:00'} for call in message.tool_calls
    ]
    turns += [message.model_dump(), *results]
    answer = client.chat.completions.create(**asked, messages=turns).choices[0]
    assert (answer.message.content, answer.finish_reason) == ('It is noon.', 'stop')
