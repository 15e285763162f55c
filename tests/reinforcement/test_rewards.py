"""Rewards: verifiers, unit tests, a reward model, and a judge that is slow, down, or replies nonsense."""

import contextlib
import dataclasses
import functools
import http.server
import json
import re
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx

from research.checkpoints.pretrained import Pretrained
from research.core import configs
from research.core.errors import Invalid, UserError
from research.data.encoding import ByteEncoding
from research.evaluation.code_problems import builtin_problems
from research.evaluation.generated_tasks import Problem
from research.inference.request import Completion
from research.model.heads import ScalarHead
from research.parallel.mesh import Mesh
from research.reinforcement.judge import Judge
from research.reinforcement.programs import CodeProblems, UnitTests
from research.reinforcement.prompts import Prompt
from research.reinforcement.reward import Answer, Format, Reward, Sum
from research.reinforcement.reward_model import RewardModel


def completion(text, finish='stop_token'):
  return Completion(text=text, finish=finish)


def scores(reward, target, *completions):
  return reward([Prompt('?', target)] * len(completions), completions).tolist()


def test_an_answer_is_right_when_it_is_the_target_and_has_ended():
  completions = [completion(text) for text in ('46', ' 46', '460', '')]
  completions.append(completion('46', 'length'))
  assert scores(Answer(), Problem('12+34=', '', '46'), *completions) == [1, 1, 0, 0, 0]
  assert scores(Answer(), 46, *completions) == [1, 1, 0, 0, 0]
  assert scores(Answer(after=']'), '46', completion('[2+4=6]46'), completion('46]4')) == [1, 0]
  with pytest.raises(Invalid, match='not an answer'):
    scores(Answer(), None, completion('46'))


def test_rewards_add_up_and_an_abstention_stays_one():
  reward = Sum(parts=(Answer(), Format(pattern=r'\[.*\]\d+')), weights=(1.0, 0.1))
  pair = completion('[x]46'), completion('46')
  np.testing.assert_allclose(scores(reward, '46', *pair), [0.1, 1.0])

  class Silent(Reward):
    def __call__(self, prompts, completions):
      return np.full(len(completions), np.nan)

  assert np.isnan(scores(Sum(parts=(Answer(), Silent()), weights=(1.0, 0.0)), '46', *pair)).all()


def test_functions_are_run_against_their_tests():
  problem = builtin_problems()[0]
  prompt = Prompt(problem.prompt, problem)
  completions = [completion(text) for text in (problem.solution, '  return 0\n', '  exit()\n')]
  assert UnitTests()([prompt] * 3, completions).tolist() == [1, 0, 0]
  texts = {CodeProblems().draw(0, i).text for i in range(len(builtin_problems()))}
  assert texts == {problem.prompt for problem in builtin_problems()}


SMALL = ('EMBED=16', 'HEADS=2', 'MLP=32')


class Scorer(Pretrained):
  """A reward model without a folder, of random weights."""

  model = functools.partial(
    configs.load(
      'gin/models/llama/tiny.gin', ['LAYERS=1', 'EMBED=16', 'HEADS=2', 'MLP=32'], root='MODEL'
    ).tree(),
    head=functools.partial(ScalarHead, init=nnx.initializers.normal(1.0)),
  )

  def params(self):
    return nnx.to_pure_dict(nnx.state(self.model(rngs=nnx.Rngs(params=jax.random.key(0)))))


def test_a_reward_model_reads_where_it_was_trained_to(monkeypatch):
  """At the last token of rows as seqio's converter makes them: end-of-text is predicted, not read."""
  monkeypatch.setattr(RewardModel, '_encoding', ByteEncoding())
  reward = RewardModel(model=Scorer(folder='nowhere'))
  completions = completion('yes'), completion('cuts', 'length')
  results = scores(reward, None, *completions)
  with Mesh().use(jax.devices()[:1]):
    graphdef, params = nnx.graphdef(reward.model.abstract), reward.model.params()

    @jax.jit
    def last_score(inputs):
      model = nnx.merge(graphdef, params)
      return model.logits(model.features({'decoder_input_tokens': inputs})[0])[0, -1, 0]

    for answer, score in zip(completions, results, strict=True):
      targets = [byte + 3 for byte in f'?{answer.text}'.encode()]
      targets += [1] * (answer.finish == 'stop_token')
      expected = last_score(np.array([[0, *targets[:-1]]], np.int32))
      assert score == pytest.approx(float(expected), abs=1e-5)
  assert results[0] != results[1]
  with pytest.raises(Invalid, match='more than 4'):
    scores(dataclasses.replace(reward, longest=4), None, *completions)


class Endpoint(http.server.BaseHTTPRequestHandler):
  """A judge: `server.reply(question, number)` gives a text, or (HTTP code, body)."""

  def do_POST(self):
    size = int(self.headers['Content-Length'])
    body = json.loads(self.rfile.read(size))
    with self.server.lock:
      number = self.server.requests
      self.server.requests += 1
    reply = self.server.reply(body['messages'][0]['content'], number)
    code, text = reply if isinstance(reply, tuple) else (200, None)
    if text is None:
      text = json.dumps({'choices': [{'message': {'role': 'assistant', 'content': reply}}]})
    with contextlib.suppress(OSError):  # the client may have closed the connection
      self.send_response(code)
      self.end_headers()
      self.wfile.write(text.encode())

  def log_message(self, *arguments): ...


@contextlib.contextmanager
def served(reply, **knobs):
  """(a judge behind a server with these replies, the server)."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Endpoint)
  server.reply = reply
  server.requests = 0
  server.lock = threading.Lock()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    url = f'http://127.0.0.1:{server.server_port}/v1'
    yield Judge(url=url, model='stub', wait=0.01, **knobs), server
  finally:
    server.shutdown()
    server.server_close()


def longer(question, number):
  """Prefers the longer answer, in either position."""
  first, second = re.search(r'Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nReply', question).groups()
  return 'C' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'


THREE = [completion('a'), completion('aaa'), completion('aa')]


def fails(judge, message):
  with pytest.raises(UserError, match=message):
    scores(judge, None, *THREE)


def test_a_judge_compares_in_both_orders():
  with served(longer) as (judge, server):
    assert scores(judge, None, *THREE) == [0, 1, 0.5]
    assert server.requests == 6
    assert scores(judge, None, completion('a'), completion('b')) == [0.5, 0.5]
  with served(longer, against='target') as (judge, _):
    assert scores(judge, 'aa', *THREE) == [0, 1, 0.5]


def test_a_judge_that_prefers_a_position_prefers_no_answer():
  with served(lambda question, number: 'A') as (judge, _):
    assert np.isnan(scores(judge, None, *THREE)).all()


def test_a_judge_that_is_down_for_a_while_is_asked_again():
  def reply(question, number):
    return (503, 'busy') if number < 3 else longer(question, number)

  with served(reply, parallel=1) as (judge, server):
    assert scores(judge, None, *THREE) == [0, 1, 0.5]
    assert server.requests == 9


def test_a_judge_that_stays_down_stops_the_run_with_a_sentence():
  with served(lambda question, number: (503, 'busy'), tries=3) as (judge, _):
    fails(judge, r'no answer in 3 tries .*HTTP 503.* goes on from its checkpoint')
  with pytest.raises(UserError, match='no answer in 2 tries'):  # nothing listens there any more
    scores(Judge(url=judge.url, model='stub', wait=0.01, tries=2), None, *THREE)


def test_a_judge_that_is_too_slow_stops_the_run_with_a_sentence():
  def slow(question, number):
    time.sleep(0.5)
    return 'A'

  with served(slow, seconds=0.05, tries=2) as (judge, _):
    fails(judge, r'2 tries of 0\.05 seconds .*timed out')


@pytest.mark.parametrize(
  'body', ['not json', '{"choices": []}', '[]', '{"choices": [{"message": {"content": null}}]}']
)
def test_a_reply_that_is_no_chat_completion_is_none(body):
  with served(lambda question, number: (200, body), tries=2) as (judge, _):
    fails(judge, r'no answer in 2 tries')


def test_nonsense_is_no_verdict_and_too_much_of_it_stops_the_run():
  def mostly(question, number):
    return 'Well, it depends.' if number == 0 else longer(question, number)

  with served(mostly, nonsense=0.2, parallel=1) as (judge, _):
    # The first comparison does not count: the first answer has lost to the third, the second beaten it.
    assert scores(judge, None, *THREE) == [0, 1, 0.5]
  with served(mostly, parallel=1) as (judge, _):
    fails(judge, r"1 of 6 replies .*'Well, it depends\.'")


def test_a_refused_request_is_not_repeated(monkeypatch):
  with served(lambda question, number: (401, 'wrong key'), parallel=1) as (judge, server):
    fails(judge, r'HTTP 401: wrong key')
    assert server.requests <= 2
  monkeypatch.delenv('JUDGE_KEY', raising=False)
  with pytest.raises(UserError, match='JUDGE_KEY'):
    scores(Judge(url='http://127.0.0.1:9/v1', model='stub', key='JUDGE_KEY'), None, *THREE[:2])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('url', 'localhost'),
    ('against', 'all'),
    ('tries', 0),
    ('nonsense', 1.0),
    ('question', 'A or B?'),
  ],
)
def test_a_wrong_knob_of_a_judge_is_named(field, value):
  with pytest.raises(Invalid) as error:
    Judge(**{'url': 'http://localhost/v1', 'model': 'stub', field: value})
  assert error.value.field == field
