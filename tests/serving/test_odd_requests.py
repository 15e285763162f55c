"""What a stranger may send, by mistake or to do harm: each request gets an answer or a sentence, soon."""

import json
import random
import socket
import threading
import time
import urllib.parse

import httpx
import numpy as np
import pytest

from research.serving import bodies, grammar
from research.serving.served_model import ServedModel
from tests.serving import tiny
from tests.serving.test_server_faults import CHAT, JSON, ask, ends, measured

COMPLETE = {'model': 'tiny', 'prompt': 'abc', 'max_tokens': 4}


def turn(content, **more) -> dict:
  return {**CHAT, 'messages': [{'role': 'user', 'content': content, **more}]}


def tool(parameters, **more) -> dict:
  function = {'name': 'f', 'parameters': parameters, **more}
  return {**CHAT, 'tools': [{'type': 'function', 'function': function}], 'tool_choice': 'required'}


def shaped(schema) -> dict:
  form = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}
  return {**CHAT, 'response_format': form}


DEEP = {'id': '1', 'function': {'name': 'f', 'arguments': '[' * 50_000}}
WRONG = {
  'arguments that are nested without end': (
    {**CHAT, 'messages': [*CHAT['messages'], {'role': 'assistant', 'tool_calls': [DEEP]}]},
    'tokens of messages and 4 of the answer',
  ),
  'no turns': ({**CHAT, 'messages': []}, 'messages: List should have at least 1 item'),
  'more turns than tokens': (
    {**CHAT, 'messages': CHAT['messages'] * 641},
    'messages: 641 turns are more than the 640 tokens',
  ),
  'no answers': ({**CHAT, 'n': 0}, 'n: Input should be greater than or equal to 1.'),
  'a name of another language': ({**CHAT, 'maxTokens': 1}, 'maxTokens is no field'),
  'a name of a kilobyte': ({**CHAT, 'x' * 1000: 1}, f'{"x" * 200} is no field'),
  'a NUL in a turn': (turn('a\0b'), 'messages.0.content: the text has a NUL character.'),
  'a NUL in a part': (
    turn([{'type': 'text', 'text': '\0'}]),
    'messages.0.content.0.text: the text has a NUL character.',
  ),
  'a stop string that cannot come': (
    {**CHAT, 'stop': ['x' * 1025]},
    'stop.0: String should have at most 1024 characters.',
  ),
  'a number of 400 digits': ({**CHAT, 'max_tokens': 10**400}, 'max_tokens: Input should be less'),
  'a token of 400 digits': ({**COMPLETE, 'prompt': [10**400]}, 'prompt.0: Input should be less'),
  'too many prompts': (
    {**COMPLETE, 'prompt': ['a'] * 2049},
    'prompt: List should have at most 2048',
  ),
  'too many answers': (
    {**COMPLETE, 'prompt': ['a'] * 17, 'n': 128, 'max_tokens': 0, 'echo': True},
    'a request gives at most 2,048 answers.',
  ),
  # A report of every fault in a large body would cost gigabytes.
  'a hundred thousand faults in a list': ({**COMPLETE, 'prompt': [True] * 100_000}, 'prompt.0: '),
  'a hundred thousand kinds of answers': ({**CHAT, 'modalities': [1] * 100_000}, 'modalities: '),
  'ten thousand unknown fields': (
    {**CHAT, **{f'x{i}': 0 for i in range(10_000)}},
    'the body has 10,000 faults: is it a request?',
  ),
  'arguments that are no object': (
    tool({'type': 'array'}),
    "tools.0.function.parameters: the arguments of a call are an object, so its type must be 'object'.",
  ),
  'a schema that nothing fits': (
    shaped({'$ref': '#'}),
    'no token can begin an answer of this schema',
  ),
  'a schema of the network': (shaped({'$ref': 'http://127.0.0.1:1/x'}), 'does not fetch resources'),
  'a schema of a book': (
    shaped({'description': 'x' * grammar.LONGEST_SCHEMA}),
    'response_format.json_schema.schema: 100,0',
  ),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_sentence_says_what_is_wrong(case, url):
  body, message = WRONG[case]
  answer = ask(url, body, 'completions' if 'prompt' in body else 'chat/completions')
  error = answer.json()['error']
  assert answer.status_code == 400, error
  assert message in error['message']
  assert len(error['message']) < 500


RIGHT = {
  'a negative seed': {**CHAT, 'seed': -1, 'n': 4},
  'the least seed': {**CHAT, 'seed': -(2**63)},
  'all settings at their ends': {
    **CHAT, 'temperature': 2, 'top_p': bodies.LEAST_MASS, 'typical': bodies.LEAST_MASS, 'min_p': 1,
    'top_k': 2**31 - 1, 'presence_penalty': -2, 'frequency_penalty': 2, 'repetition_penalty': 0.01,
    'seed': 2**63 - 1, 'logprobs': True, 'top_logprobs': 20,
  },
  'a bias of every token': {**CHAT, 'logit_bias': {str(i): -100 for i in range(200)}},
  'sixteen long stops': {**CHAT, 'stop': [chr(65 + i) * 1024 for i in range(16)]},
  'no stops': {**CHAT, 'stop': []},
  'a type that may be null': tool({'type': ['object', 'null'], 'properties': {}}),
  'tools that must not be called': {**tool({}), 'tool_choice': 'none'},
  'signs of every kind': turn('\x7f\u2028\u202e\U0001f469\u200d\U0001f680\ufffe e\u0301'),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('case', RIGHT)
def test_odd_requests_are_answered(case, url):
  answer = ask(url, RIGHT[case])
  assert answer.status_code == 200, answer.text
  assert answer.json()['choices'][0]['finish_reason'] in ('stop', 'length')


@pytest.mark.slow
def test_a_schema_of_too_many_alternatives_is_told_as_such(url):
  objects = [{'type': 'object', 'properties': {f'a{i}': {}}} for i in range(500)]
  answer = ask(url, shaped({'anyOf': objects}))
  assert answer.status_code == 400
  message = answer.json()['error']['message']
  assert 'the schema is too large for this server (Parser Error: Current row has 5500' in message


def test_methods_and_types_of_bodies(url):
  assert httpx.head(url).status_code == 200
  for method in ('OPTIONS', 'HEAD', 'PUT', 'DELETE'):
    answer = httpx.request(method, f'{url}/v1/chat/completions')
    assert (answer.status_code, answer.headers['Allow']) == (405, 'POST')
  for headers in (
    {'Content-Type': 'multipart/form-data; boundary=x'},
    {'Content-Type': ''},
    {'Content-Type': 'application/json', 'Content-Encoding': 'gzip'},
  ):
    answer = ask(url, CHAT, headers=headers)
    assert (answer.status_code, answer.json()['error']['type']) == (415, 'invalid_request_error')
  answer = ask(url, CHAT, headers={**JSON, 'Host': 'box.example:80'})
  assert "not to 'box.example'" in answer.json()['error']['message']


def test_lines_of_a_stream_end_only_at_events(url):
  """Some clients split a stream at U+2028 and its like, so the stream has only ASCII."""
  bias = {str(i): 50 for i in range(131, 259)}  # bytes beyond ASCII
  answer = ask(
    url,
    {
      **CHAT,
      'stream': True,
      'temperature': 0,
      'max_tokens': 40,
      'logit_bias': bias,
      'logprobs': True,
    },
  )
  assert answer.content.isascii()
  events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith('data: {')]
  assert any(
    not (choice['delta'].get('content') or '').isascii() for e in events for choice in e['choices']
  )


def send(url: str, data: bytes) -> socket.socket:
  """Returns a connection that has sent the beginning of a request with a body of 1,000 bytes."""
  place = urllib.parse.urlsplit(url)
  connection = socket.create_connection((place.hostname, place.port))
  head = 'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
  connection.sendall(f'{head}Content-Length: 1000\r\n\r\n'.encode() + data)
  return connection


def test_bodies_that_do_not_come(tmp_path):
  served = tiny.scripted(tmp_path, lambda prompt: 'word')
  with tiny.serving(opened=lambda: served, timeout=0.3) as url:
    with send(url, b'{"model"') as connection:
      assert b'408' in connection.recv(100)
    send(url, b'{"model"').close()
    deadline = time.monotonic() + 2
    while not (gone := measured(url, 'requests_total{path="/v1/completions",status="499"')):
      assert time.monotonic() < deadline
      time.sleep(0.02)
    assert gone == 1
    assert measured(url, 'requests_total{path="/v1/completions",status="5') == 0


class SlowEmbedder(ServedModel):
  calls = 0

  def embed(self, tokens):
    SlowEmbedder.calls += 1
    time.sleep(0.02)
    return np.ones(2, np.float32) / np.sqrt(2)


def test_embeddings_end_when_the_client_hangs_up(tmp_path):
  served = SlowEmbedder(**vars(tiny.scripted(tmp_path, lambda prompt: 'word')))
  with tiny.serving(opened=lambda: served) as url:
    many = {'model': 'tiny', 'input': ['a'] * 2000}
    with pytest.raises(httpx.ReadTimeout):
      ask(url, many, 'embeddings', timeout=0.2)
    time.sleep(0.1)
    calls = SlowEmbedder.calls
    assert 0 < calls < 100
    answer = ask(url, {'model': 'tiny', 'input': 'a', 'dimensions': 3}, 'embeddings')
    assert 'this model has 2 dimensions' in answer.json()['error']['message']
    assert SlowEmbedder.calls == calls + 1


@pytest.mark.slow
def test_clients_that_come_and_go_leave_nothing_behind(tmp_path):
  """Two hundred clients at once, whole and streamed, of which most hang up at any time."""
  chance = random.Random(0)
  served = tiny.scripted(tmp_path, lambda prompt: 'word ' * 20, pause=0.001)
  plans = [
    (chance.random() < 0.5, chance.choice([0.01, 0.05, 0.2, 0.5, 30]), chance.choice([1, 3]))
    for _ in range(200)
  ]
  statuses = []

  def come(url, stream, patience, n):
    try:
      statuses.append(
        ask(
          url, {**CHAT, 'max_tokens': 100, 'stream': stream, 'n': n}, timeout=patience
        ).status_code
      )
    except httpx.TimeoutException:
      statuses.append(0)

  with tiny.serving(opened=lambda: served, most=60) as url:
    threads = [threading.Thread(target=come, args=(url, *plan)) for plan in plans]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert {0, 200} <= set(statuses) <= {0, 200, 429}
    assert ends(served.generator.engine)
    assert measured(url, 'open_requests') == 0
    assert ask(url, CHAT).status_code == 200
