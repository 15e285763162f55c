"""The contract as OpenAI's own client reads it: every answer goes through its types."""

import asyncio
import base64
import json

import numpy as np
import openai
import pytest

HELLO = [{'role': 'user', 'content': 'Hello'}]
ASK = {'model': 'tiny', 'messages': HELLO, 'max_tokens': 6}
WEATHER = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'description': 'The weather of a place.',
    'parameters': {
      'type': 'object',
      'properties': {
        'place': {'enum': ['Paris', 'Oslo']},
        'days': {'type': 'integer', 'maximum': 3, 'minimum': 1},
      },
      'required': ['place', 'days'],
      'additionalProperties': False,
    },
  },
}  # fmt: skip
TIME = {'type': 'function', 'function': {'name': 'time'}}


def test_models(client):
  (model,) = client.models.list().data
  assert model.id == 'tiny'
  assert client.models.retrieve('tiny').id == 'tiny'
  with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
    client.models.retrieve('another')


def test_a_stream_says_what_a_whole_answer_says(client):
  whole = client.chat.completions.create(**ASK, temperature=0)
  options = {'include_usage': True}
  chunks = list(
    client.chat.completions.create(**ASK, temperature=0, stream=True, stream_options=options)
  )
  *parts, last = chunks
  assert last.choices == []
  assert last.usage == whole.usage
  assert whole.usage.completion_tokens == 6
  assert [chunk.usage for chunk in parts] == [None] * len(parts)
  assert parts[0].choices[0].delta.role == 'assistant'
  text = ''.join(chunk.choices[0].delta.content or '' for chunk in parts)
  assert text == whole.choices[0].message.content != ''
  finishes = [chunk.choices[0].finish_reason for chunk in parts]
  assert finishes == [None] * (len(parts) - 1) + ['length']
  assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_are_of_the_tokens_that_are_said(client):
  answer = client.chat.completions.create(**ASK, temperature=0, logprobs=True, top_logprobs=3)
  tokens = answer.choices[0].logprobs.content
  said = b''.join(bytes(token.bytes) for token in tokens)
  assert said.decode(errors='replace') == answer.choices[0].message.content
  assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)  # greedy
  assert all(len(token.top_logprobs) == 3 for token in tokens)


def test_samples_and_seeds(client):
  def texts(**knobs):
    answer = client.chat.completions.create(**ASK, n=3, **knobs)
    return [choice.message.content for choice in answer.choices]

  first = texts(seed=5)
  assert texts(seed=5) == first
  assert len(set(first)) == 3
  assert texts() != first  # a seed of its own


def test_penalties_and_biases_reach_the_sampler(client):
  ids = {'bias': {'40': 100}}
  answer = client.completions.create(
    model='tiny', prompt='ab', max_tokens=4, temperature=0, logit_bias=ids['bias'], logprobs=0
  )
  assert len(set(answer.choices[0].logprobs.tokens)) == 1
  # A bias of 100 outweighs any penalty of the protocol, so penalties are seen without it.
  plain = client.completions.create(model='tiny', prompt='ab', max_tokens=30, temperature=0)
  penalised = client.completions.create(
    model='tiny', prompt='ab', max_tokens=30, temperature=0, frequency_penalty=2, presence_penalty=2
  )
  assert plain.choices[0].text != penalised.choices[0].text


def test_stop_strings_end_a_text_and_are_not_told(client):
  asked = {'model': 'tiny', 'prompt': 'abc', 'max_tokens': 20, 'temperature': 0}
  whole = client.completions.create(**asked).choices[0].text
  stop = whole[3:5]
  for stream in (False, True):
    answer = client.completions.create(**asked, stop=[stop], stream=stream)
    chunks = list(answer) if stream else [answer]
    assert ''.join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == 'stop'


def test_several_prompts_of_text_and_of_tokens(client):
  asked = {'model': 'tiny', 'max_tokens': 3, 'temperature': 0}
  answer = client.completions.create(**asked, prompt=['abc', 'xyz'], n=2)
  alone = [client.completions.create(**asked, prompt=prompt) for prompt in ('abc', 'xyz')]
  texts = [a.choices[0].text for a in alone]
  assert [c.text for c in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
  assert [c.index for c in answer.choices] == [0, 1, 2, 3]
  assert answer.usage.prompt_tokens == 6
  tokens = client.completions.create(**asked, prompt=[[5, 6, 7]], echo=True)
  assert tokens.choices[0].text.startswith('#$%')


def test_an_echo_scores_its_prompt_as_generation_does(client):
  """The log-probabilities of a text read at once are those with which it was generated."""
  asked = {'model': 'tiny', 'temperature': 0, 'logprobs': 2}
  said = client.completions.create(**asked, prompt='abc', max_tokens=5, echo=True).choices[0]
  ids = [ord(c) for c in 'abc']
  assert len(said.logprobs.tokens) == len(ids) + 5
  assert said.logprobs.token_logprobs[0] is None
  plain = client.completions.create(**asked, prompt='abc', max_tokens=5).choices[0]
  assert said.logprobs.token_logprobs[3:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-5)
  alone = client.completions.create(**asked, prompt='abc', max_tokens=0, echo=True).choices[0]
  assert alone.text == 'abc'
  assert alone.logprobs.token_logprobs == said.logprobs.token_logprobs[:3]
  assert said.logprobs.text_offset[:4] == [0, 1, 2, 3]


def test_forced_tools_are_called_with_arguments_of_their_schema(client):
  asked = {**ASK, 'max_tokens': 100, 'tools': [WEATHER, TIME], 'seed': 1}
  named = {'type': 'function', 'function': {'name': 'weather'}}
  answer = client.chat.completions.create(**asked, tool_choice=named, parallel_tool_calls=False)
  (call,) = answer.choices[0].message.tool_calls
  assert answer.choices[0].finish_reason == 'tool_calls'
  assert answer.choices[0].message.content is None
  arguments = json.loads(call.function.arguments)
  assert arguments['place'] in ('Paris', 'Oslo')
  assert 1 <= arguments['days'] <= 3
  answer = client.chat.completions.create(**asked, tool_choice='required', n=2)
  for choice in answer.choices:
    assert {c.function.name for c in choice.message.tool_calls} <= {'weather', 'time'}


def test_a_stream_of_tool_calls_has_indices_and_its_own_finish_reason(client):
  """What other servers got wrong: deltas without index, "stop" at the end, no null before it."""
  asked = {**ASK, 'max_tokens': 100, 'tools': [TIME], 'tool_choice': 'required'}
  asked['parallel_tool_calls'] = False
  with client.chat.completions.stream(**asked) as stream:
    for _ in stream:
      pass
    final = stream.get_final_completion()
  (call,) = final.choices[0].message.tool_calls
  assert (call.function.name, call.function.arguments) == ('time', '{}')
  chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
  deltas = [call for c in chunks for call in c.delta.tool_calls or ()]
  assert [call.index for call in deltas] == [0]
  assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ['tool_calls']


def test_a_conversation_with_calls_and_results_goes_on(client):
  call = {'id': 'a1', 'type': 'function', 'function': {'name': 'time', 'arguments': '{}'}}
  turns = [
    *HELLO,
    {'role': 'assistant', 'content': None, 'tool_calls': [call]},
    {'role': 'tool', 'tool_call_id': 'a1', 'content': [{'type': 'text', 'text': '12:00'}]},
  ]
  answer = client.chat.completions.create(**{**ASK, 'messages': turns}, tools=[TIME])
  assert answer.choices[0].finish_reason == 'length'


def test_an_answer_has_the_shape_of_its_schema(client):
  schema = {
    'type': 'object',
    'properties': {'size': {'enum': ['small', 'large']}, 'ok': {'type': 'boolean'}},
    'required': ['size', 'ok'],
    'additionalProperties': False,
  }
  form = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema, 'strict': True}}
  answer = client.chat.completions.create(**{**ASK, 'max_tokens': 60}, response_format=form)
  value = json.loads(answer.choices[0].message.content)
  assert value['size'] in ('small', 'large')
  assert isinstance(value['ok'], bool)
  assert answer.choices[0].finish_reason == 'stop'


def test_embeddings_are_the_same_as_numbers_and_in_base64(client, url):
  texts = ['a cat', 'a dog and a cat', 'Paris']
  by_base64 = client.embeddings.create(model='tiny', input=texts)  # what the client asks for
  by_number = client.embeddings.create(model='tiny', input=texts, encoding_format='float')
  vectors = [np.array(d.embedding, np.float32) for d in by_number.data]
  for one, two in zip(by_base64.data, vectors, strict=True):
    np.testing.assert_array_equal(np.array(one.embedding, np.float32), two)
    assert np.linalg.norm(two) == pytest.approx(1, abs=1e-6)
  import httpx

  raw = httpx.post(
    f'{url}/v1/embeddings',
    json={'model': 'tiny', 'input': 'Paris', 'encoding_format': 'base64'},
  ).json()
  decoded = np.frombuffer(base64.b64decode(raw['data'][0]['embedding']), '<f4')
  np.testing.assert_allclose(decoded, vectors[2], atol=1e-6)


def test_the_asynchronous_client_is_answered_at_the_same_time(url, client):
  expected = client.chat.completions.create(**ASK, temperature=0).choices[0].message.content

  async def ask_all():
    async with openai.AsyncOpenAI(base_url=f'{url}/v1', api_key='none') as several:

      async def streamed():
        stream = await several.chat.completions.create(**ASK, temperature=0, stream=True)
        return ''.join([c.choices[0].delta.content or '' async for c in stream])

      return await asyncio.gather(*(streamed() for _ in range(12)))

  assert asyncio.run(ask_all()) == [expected] * 12
