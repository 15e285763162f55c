"""The frameworks that people build with speak to the endpoint: a chat, a stream, a tool call, an embedding.

Each is a group of its own, and `clients` is all of them; a framework that is not installed is skipped:

    uv run --group langchain pytest -n 0 -m slow tests/serving/test_frameworks.py
    uv run --group clients pytest -n 0 -m slow tests/serving/test_frameworks.py
"""

import asyncio
import re

import numpy as np
import pytest

from tests.serving import tiny

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),  # of the frameworks, about themselves
]
PARAMETERS = {
  'type': 'object',
  'properties': {'place': {'type': 'string'}},
  'required': ['place'],
}


def say(prompt: str) -> str:
  """Calls a tool where there is one, and answers when its result has come."""
  if 'sunny' in prompt:
    return 'It is sunny in Oslo.'
  if '<tools>' in prompt:
    name = re.search(r'"name": "([\w-]*weather)"', prompt)[
      1
    ]  # semantic-kernel puts a plugin's before it
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"place": "Oslo"}}}}\n</tool_call>'
  return 'Hello there.'


@pytest.fixture(scope='module')
def url(tmp_path_factory):
  folder = tmp_path_factory.mktemp('scripted')
  with tiny.serving(opened=lambda: tiny.scripted(folder, say)) as url:
    yield f'{url}/v1'


@pytest.fixture(scope='module')
def embedder(llama):
  with tiny.serving(llama, room=256, slots=4) as url:
    yield f'{url}/v1'


def test_langchain(url, embedder):
  openai = pytest.importorskip('langchain_openai')
  from langchain_core import messages, tools

  @tools.tool
  def weather(place: str) -> str:
    """The weather of a place."""
    return f'{place}: sunny'

  chat = openai.ChatOpenAI(model='tiny', base_url=url, api_key='none', max_retries=0)
  assert chat.invoke('Hi').content == 'Hello there.'
  assert ''.join(chunk.content for chunk in chat.stream('Hi')) == 'Hello there.'
  with_tools = chat.bind_tools([weather])
  turns = [messages.HumanMessage('Weather?')]
  turns.append(with_tools.invoke(turns))
  (call,) = turns[-1].tool_calls
  assert (call['name'], call['args']) == ('weather', {'place': 'Oslo'})
  streamed = list(with_tools.stream(turns[:1]))
  whole = streamed[0]
  for chunk in streamed[1:]:
    whole += chunk
  assert whole.tool_calls[0]['args'] == {'place': 'Oslo'}
  turns.append(weather.invoke(call))
  assert with_tools.invoke(turns).content == 'It is sunny in Oslo.'
  # Its own default asks the internet for a tokenizer.
  own = openai.OpenAIEmbeddings(
    model='tiny', base_url=embedder, api_key='none', check_embedding_ctx_length=False
  )
  assert np.linalg.norm(own.embed_query('Oslo')) == pytest.approx(1, abs=1e-5)


def test_langchain_structured_output(embedder):
  openai = pytest.importorskip('langchain_openai')
  import typing

  import pydantic

  class Place(pydantic.BaseModel):
    city: typing.Literal['Oslo', 'Paris']

  chat = openai.ChatOpenAI(model='tiny', base_url=embedder, api_key='none', max_tokens=60)
  place = chat.with_structured_output(Place).invoke('Where?')
  assert place.city in ('Oslo', 'Paris')


def test_llama_index(url, embedder):
  openai_like = pytest.importorskip('llama_index.llms.openai_like')
  from llama_index.core.llms import ChatMessage
  from llama_index.core.tools import FunctionTool

  def weather(place: str) -> str:
    """The weather of a place."""
    return f'{place}: sunny'

  knobs = {'model': 'tiny', 'api_base': url, 'api_key': 'none'}
  model = openai_like.OpenAILike(**knobs, is_chat_model=True, is_function_calling_model=True)
  turns = [ChatMessage(role='user', content='Hi')]
  assert model.chat(turns).message.content == 'Hello there.'
  assert [part.delta for part in model.stream_chat(turns)][-1] is not None
  assert list(model.stream_chat(turns))[-1].message.content == 'Hello there.'
  answer = model.chat_with_tools([FunctionTool.from_defaults(weather)], user_msg='Weather?')
  (call,) = model.get_tool_calls_from_response(answer)
  assert (call.tool_name, call.tool_kwargs) == ('weather', {'place': 'Oslo'})
  plain = openai_like.OpenAILike(
    **knobs | {'api_base': embedder}, is_chat_model=False, max_tokens=5
  )
  assert plain.complete('abc').text


def test_haystack(url, embedder):
  generators = pytest.importorskip('haystack.components.generators.chat')
  from haystack.components.embedders import OpenAITextEmbedder
  from haystack.dataclasses import ChatMessage
  from haystack.tools import Tool
  from haystack.utils import Secret

  key = Secret.from_token('none')
  knobs = {'model': 'tiny', 'api_base_url': url, 'api_key': key}
  generator = generators.OpenAIChatGenerator(**knobs)
  turns = [ChatMessage.from_user('Hi')]
  assert generator.run(turns)['replies'][0].text == 'Hello there.'
  parts = []
  streamed = generator.run(turns, streaming_callback=lambda chunk: parts.append(chunk.content))
  assert streamed['replies'][0].text == ''.join(parts) == 'Hello there.'
  weather = Tool(
    name='weather', description='The weather of a place.', parameters=PARAMETERS,
    function=lambda place: f'{place}: sunny',
  )  # fmt: skip
  reply = generator.run([ChatMessage.from_user('Weather?')], tools=[weather])['replies'][0]
  assert reply.tool_calls[0].arguments == {'place': 'Oslo'}
  embed = OpenAITextEmbedder(model='tiny', api_base_url=embedder, api_key=key)
  assert len(embed.run('Oslo')['embedding']) == tiny.SIZES['hidden_size']


def test_semantic_kernel(url):
  semantic_kernel = pytest.importorskip('semantic_kernel')
  import openai
  from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
  from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
  )
  from semantic_kernel.contents import ChatHistory
  from semantic_kernel.functions import kernel_function

  called = []

  class Weather:
    @kernel_function(name='weather', description='The weather of a place.')
    def weather(self, place: str) -> str:
      called.append(place)
      return f'{place}: sunny'

  async def converse():
    async with openai.AsyncOpenAI(base_url=url, api_key='none') as client:
      chat = OpenAIChatCompletion(ai_model_id='tiny', async_client=client)
      plain = OpenAIChatPromptExecutionSettings()
      history = ChatHistory()
      history.add_user_message('Hi')
      assert str(await chat.get_chat_message_content(history, plain)) == 'Hello there.'
      # It asks for the usage, which a last chunk without choices tells.
      parts = [str(p) async for p in chat.get_streaming_chat_message_content(history, plain)]
      assert ''.join(parts) == 'Hello there.'
      kernel = semantic_kernel.Kernel()
      kernel.add_service(chat)
      kernel.add_plugin(Weather(), 'plugin')
      settings = OpenAIChatPromptExecutionSettings(
        function_choice_behavior=FunctionChoiceBehavior.Auto()
      )
      history = ChatHistory()
      history.add_user_message('Weather?')
      answer = await chat.get_chat_message_content(history, settings, kernel=kernel)
      assert str(answer) == 'It is sunny in Oslo.'

  asyncio.run(converse())
  assert called == ['Oslo']
