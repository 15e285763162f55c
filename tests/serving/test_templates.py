"""Chat templates are rendered as transformers renders them, tools and special tokens included."""

import json

import pytest

from research.data import conversations
from tests.serving import tiny

TOOL = {
  'type': 'function',
  'function': {'name': 'f', 'description': "It's <b> & é", 'parameters': {'type': 'object'}},
}
CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': {'a': "<'é'>"}}}
TURNS = [
  {'role': 'user', 'content': 'Ask <b>'},
  {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
  {'role': 'tool', 'content': 'two'},
]
NAMED = '{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}'


@pytest.mark.slow
@pytest.mark.parametrize('tools', [None, [TOOL]])
@pytest.mark.parametrize('template', [tiny.TEMPLATE, NAMED])
def test_as_transformers(template, tools, tmp_path):
  transformers = pytest.importorskip('transformers')
  tiny.write_tokenizer(tmp_path, None)
  (tmp_path / 'chat_template.jinja').write_text(template)
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  config |= {'bos_token': '<|im_start|>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
    TURNS, tools=tools, tokenize=False, add_generation_prompt=True
  )
  ours = conversations.template(str(tmp_path / 'chat_template.jinja'))
  assert ours(TURNS, add_generation_prompt=True, tools=tools) == theirs


def test_a_template_of_its_own_for_tools(tmp_path):
  pytest.importorskip('jinja2')
  several = [
    {'name': 'default', 'template': 'plain'},
    {'name': 'tool_use', 'template': '{{ tools | length }} tools'},
  ]
  path = tmp_path / 'tokenizer_config.json'
  path.write_text(json.dumps({'chat_template': several}))
  render = conversations.template(str(path))
  assert render.knows_tools
  assert render(TURNS) == 'plain'
  assert render(TURNS, tools=[TOOL]) == '1 tools'
