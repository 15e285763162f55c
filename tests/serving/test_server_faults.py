"""What goes wrong is told in the protocol's own shape, and the server goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.serving import tiny

CHAT = {'model': 'tiny', 'messages': [{'role': 'user', 'content': 'Hello'}], 'max_tokens': 4}
JSON = {'Content-Type': 'application/json'}


def ask(url, body, path='chat/completions', **knobs):
  if isinstance(body, dict):
    body = json.dumps(body)
  knobs = {'headers': JSON, 'timeout': 60, **knobs}
  return httpx.post(f'{url}/v1/{path}', content=body, **knobs)


def measured(url, name) -> float:
  lines = httpx.get(f'{url}/metrics').text.splitlines()
  return sum(float(line.split()[-1]) for line in lines if line.startswith(f'isoflop_{name}'))


LONG = [{'role': 'user', 'content': 'x' * 800}]
IMAGE = [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}]
NO_SCHEMA = {
  'type': 'json_schema',
  'json_schema': {'name': 'x', 'schema': {'type': 'no such type'}},
}
HOT = json.dumps(CHAT | {'temperature': float('nan')})
WRONG = {
  'not JSON': ('{"model": ', 400, 'the body is not JSON: EOF'),
  'not an object': ('[1]', 400, 'Input should be'),
  'deep': ('[' * 100_000, 400, 'the body is not JSON: recursion limit'),
  'half a surrogate': ('{"model": "\\ud800"}', 400, 'the body is not JSON'),
  'unknown model': ({**CHAT, 'model': 'gpt'}, 404, "there is no model 'gpt' here: ask for 'tiny'."),
  'unknown field': ({**CHAT, 'temprature': 1}, 400, 'Did you mean temperature?'),
  'no messages': ({'model': 'tiny'}, 400, 'messages is missing.'),
  'NaN': (HOT, 400, 'temperature: Input should be a finite number.'),
  'text for a number': ({**CHAT, 'temperature': '1'}, 400, 'Input should be a valid number.'),
  'too hot': ({**CHAT, 'temperature': 3}, 400, 'Input should be less than or equal to 2.'),
  'a top p of 0 in float32': ({**CHAT, 'top_p': 1e-300}, 400, 'top_p: Input should be greater'),
  'a penalty of 0 in float32': (
    {**CHAT, 'repetition_penalty': 1e-300},
    400,
    'repetition_penalty: Input should be greater than or equal to 0.01.',
  ),
  'too long': ({**CHAT, 'messages': LONG}, 400, 'tokens of messages and 4 of the answer'),
  'too many tokens': (
    {**CHAT, 'max_tokens': 10**6},
    400,
    'more than the 640 that this model takes',
  ),
  'an image': (
    {**CHAT, 'messages': IMAGE},
    400,
    'messages.0.content.0.',  # its type or its field, by the version of pydantic
  ),
  'tool_choice alone': ({**CHAT, 'tool_choice': 'required'}, 400, 'tool_choice needs tools.'),
  'no schema': (
    {**CHAT, 'response_format': NO_SCHEMA},
    400,
    'response_format.json_schema.schema: Invalid type: no such type.',
  ),
  'an unknown token': ({**CHAT, 'logit_bias': {'5000': 1}}, 400, 'the model has no token 5000'),
  'too many answers': ({**CHAT, 'n': 100}, 400, 'more than the 64 that this server takes'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_request_is_told_what_is_wrong(case, url):
  body, status, message = WRONG[case]
  answer = ask(url, body)
  error = answer.json()['error']
  assert answer.status_code == status, error
  assert message in error['message']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['type'] == 'invalid_request_error'


def test_a_body_that_is_too_large_or_of_another_type(url):
  answer = ask(url, b'x' * 5_000_000)
  assert answer.status_code == 413
  assert answer.json()['error']['code'] == 'body_too_large'
  answer = ask(url, json.dumps(CHAT), headers={'Content-Type': 'text/plain'})
  assert answer.status_code == 415


def test_paths_and_methods_that_do_not_exist(url):
  for method, path, status in (('GET', '/v1/nothing', 404), ('GET', '/v1/completions', 405)):
    answer = httpx.request(method, url + path)
    assert answer.status_code == status
    assert 'error' in answer.json()


def test_other_names_of_this_machine_are_refused(url):
  """A page of the web could reach a server on loopback by a name that it lets point there."""
  assert httpx.get(f'{url}/v1/models', headers={'Host': 'evil.example'}).status_code == 400


def test_a_key_is_demanded_and_pages_of_one_origin_may_ask(llama):
  page = 'http://localhost:3000'
  with tiny.serving(llama, room=256, slots=4, key='secret', origins=(page,)) as url:
    answer = httpx.get(f'{url}/v1/models')
    assert answer.status_code == 401
    assert answer.json()['error']['code'] == 'invalid_api_key'
    right = {'Authorization': 'Bearer secret'}
    assert httpx.get(f'{url}/v1/models', headers=right).status_code == 200
    assert httpx.get(f'{url}/health').status_code == 200
    # A browser asks for permission first, without the key.
    asks = {'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'x-any'}
    for origin, status in ((page, 200), ('http://evil.example', 400)):
      permission = httpx.options(f'{url}/v1/completions', headers={'Origin': origin, **asks})
      assert permission.status_code == status
    answer = httpx.get(f'{url}/v1/models', headers={'Origin': page})
    assert (answer.status_code, answer.headers['Access-Control-Allow-Origin']) == (401, page)


@pytest.fixture(params=[60.0])
def slow(request, tmp_path):
  """A server of two requests at a time, whose model takes 20 ms for a token; the parameter is its timeout."""
  served = tiny.scripted(tmp_path, lambda prompt: 'word ' * 200, pause=0.02)
  with tiny.serving(opened=lambda: served, most=2, timeout=request.param) as url:
    yield url, served.generator.engine


def ends(engine) -> bool:
  """Whether the engine has nothing to do within a second."""
  deadline = time.monotonic() + 1
  while engine.busy and time.monotonic() < deadline:
    time.sleep(0.02)
  return not engine.busy


def test_a_client_that_hangs_up_frees_its_place(slow):
  url, engine = slow
  body = json.dumps({**CHAT, 'max_tokens': 900, 'stream': True})
  with httpx.stream('POST', f'{url}/v1/chat/completions', content=body, headers=JSON) as answer:
    assert next(answer.iter_lines()).startswith('data: ')
  with pytest.raises(httpx.ReadTimeout):
    ask(url, {**CHAT, 'max_tokens': 900}, timeout=0.2)
  assert ends(engine)
  assert measured(url, 'open_requests') == 0


def test_too_many_requests_are_told_when_to_come_again(slow):
  url, _ = slow
  body = json.dumps({**CHAT, 'max_tokens': 900, 'stream': True, 'n': 2})
  with httpx.stream('POST', f'{url}/v1/chat/completions', content=body, headers=JSON) as answer:
    lines = answer.iter_lines()  # which closes the connection when it is let go
    next(lines)
    refused = ask(url, CHAT)
    assert refused.status_code == 429
    assert refused.json()['error']['code'] == 'rate_limit_exceeded'
    assert 1 <= int(refused.headers['Retry-After']) <= 60


@pytest.mark.parametrize('slow', [0.5], indirect=True)
def test_an_answer_that_takes_too_long_ends(slow):
  url, engine = slow
  assert ask(url, {**CHAT, 'max_tokens': 900}).status_code == 504
  answer = ask(url, {**CHAT, 'max_tokens': 900, 'stream': True})
  last = json.loads(answer.text.strip().splitlines()[-1].removeprefix('data: '))
  assert 'longer than 0.5 s' in last['error']['message']
  assert ends(engine)


def test_a_model_that_fails_is_told_to_all_and_ends_the_server(tmp_path):
  served = tiny.scripted(tmp_path, lambda prompt: 'word ' * 20)

  def fail():
    raise RuntimeError('out of memory')

  served.generator.engine.step = fail
  with tiny.serving(opened=lambda: served) as url:
    answer = ask(url, CHAT)
    assert answer.status_code == 503
    assert 'RuntimeError: out of memory' in answer.json()['error']['message']


def test_a_server_that_others_reach_needs_a_key(monkeypatch):
  from research.core.errors import UserError
  from research.serving import server

  monkeypatch.delenv(server.KEY, raising=False)
  assert server.api_key('127.0.0.1') is None
  with pytest.raises(UserError, match=f'set {server.KEY} to a key'):
    server.api_key('0.0.0.0')
  monkeypatch.setenv(server.KEY, 'secret')
  assert server.api_key('0.0.0.0') == 'secret'


@pytest.mark.slow
def test_sigterm_under_load_loses_no_answer(llama, user_environment):
  """The command itself: it listens, and after SIGTERM answers what it has begun and ends with status 0."""
  command = [
    sys.executable,
    '-m',
    'research.serve',
    f'--hf={llama}',
    '--port=0',
    '--room=512',
    '--slots=4',
  ]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny.ROOT,
    env={**user_environment, 'PYTHONPATH': str(tiny.ROOT)},
  )  # fmt: skip
  try:
    assert process.stdout.readline().startswith(f'opening {llama};')
    url = re.search(r'http://\S+', process.stdout.readline())[0]
    assert ask(url, {**CHAT, 'model': 'llama'}).status_code == 200
    answers, asked = [], {**CHAT, 'model': 'llama', 'max_tokens': 300, 'temperature': 0}
    threads = [threading.Thread(target=lambda: answers.append(ask(url, asked))) for _ in range(12)]
    for thread in threads:
      thread.start()
    while measured(url, 'open_requests') < 12:
      time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    for thread in threads:
      thread.join()
    assert process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200] * 12
    assert len({answer.json()['choices'][0]['message']['content'] for answer in answers}) == 1
    with pytest.raises(httpx.ConnectError):
      httpx.get(f'{url}/health')
  finally:
    process.kill()
    process.communicate()
