"""Answers equal those of transformers, and depend on their own request alone."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from research.core import configs
from research.data.encoding import ByteEncoding
from research.evaluation import loading, programs
from research.evaluation.engine import Engine
from research.evaluation.kept import to_json
from research.evaluation.requests import (
  Embed,
  Failed,
  GenerateUntil,
  LogLikelihood,
  RollingLogLikelihood,
  TokensLogLikelihood,
)
from research.evaluation.rows import NO_CONTINUATION, Settings, rows_of
from research.huggingface import inwards
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TEXTS = ('def f(x):\n  return ', 'the law of ', 'a', 'Prüfung: 12+34=')
CONTINUATIONS = ('x + 1\n', 'the run falls with compute', 'b', '46')


@pytest.fixture(scope='module')
def mesh():
  with Mesh(data=1).use(jax.local_devices()[:1]) as mesh:
    yield mesh


@pytest.fixture(scope='module')
def llama(tmp_path_factory, mesh):
  """(transformers' model, an `Engine` maker over the same weights): a random LLaMA over bytes."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
  )  # fmt: skip
  reference = transformers.LlamaForCausalLM(config).eval()
  folder = tmp_path_factory.mktemp('llama')
  reference.save_pretrained(folder)
  return reference, engine_of(folder)


def engine_of(folder):
  text, params = inwards.load(folder)
  path = folder / 'model.gin'
  path.write_text(text)
  model = loading.abstract_model(configs.load(str(path), root='MODEL').tree())
  params = jax.tree.map(jax.numpy.asarray, params)

  def make(batch_size=3, **settings):
    settings = Settings(**{'length': 96, **settings})
    return Engine(nnx.graphdef(model), params, ByteEncoding(), settings, batch_size)

  return make


def nats_of(reference, inputs, targets) -> tuple[np.ndarray, np.ndarray]:
  """(log-likelihood of each target, whether it is the likeliest) by transformers."""
  with torch.no_grad():
    logits = reference(torch.tensor([inputs])).logits[0].double()
  targets = torch.tensor(targets)
  nats = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
  return nats.numpy(), (logits.argmax(-1) == targets).numpy()


REQUESTS = [LogLikelihood(a, b) for a in TEXTS for b in CONTINUATIONS]


def test_log_likelihoods_equal_those_of_transformers(llama):
  reference, make = llama
  encode = ByteEncoding().encode
  for request, answer in zip(REQUESTS, make().answer(REQUESTS), strict=True):
    tokens = [0, *encode(request.context + request.continuation)]
    nats, greedy = nats_of(reference, tokens[:-1], tokens[1:])
    # A space at the end of a context is scored with the continuation.
    scored = len(tokens) - 1 - len(encode(request.context.rstrip()))
    assert answer.tokens == scored
    assert answer.nats == pytest.approx(nats[-scored:].sum(), rel=1e-4)
    assert answer.greedy == greedy[-scored:].all()


MIXED = [
  *REQUESTS[:4],
  RollingLogLikelihood('one\ntwo ' * 6),
  GenerateUntil('the ', max_tokens=5),
  GenerateUntil('the ', max_tokens=5, sampling=Sampling(temperature=1.0, seed=3)),
  Embed('compute'),
]


@pytest.mark.slow
def test_an_answer_depends_on_nothing_but_its_request(llama):
  _, make = llama
  expected = [to_json(answer) for answer in make().answer(MIXED)]
  assert [to_json(answer) for answer in make().answer(MIXED[::-1])][::-1] == expected
  assert [to_json(make().answer([request])[0]) for request in MIXED] == expected


@pytest.mark.slow
def test_another_batch_size_changes_nothing_but_the_last_digits(llama):
  _, make = llama
  requests = [*REQUESTS, *MIXED]
  pairs = zip(make().answer(requests), make(batch_size=7).answer(requests), strict=True)
  for answer, other in pairs:
    if hasattr(answer, 'nats'):
      assert other.nats == pytest.approx(answer.nats, rel=1e-5)
    elif hasattr(answer, 'text'):
      assert other == answer


@pytest.mark.slow
def test_a_context_is_read_once_for_all_its_continuations(llama, monkeypatch):
  _, make = llama
  read = programs.read
  contexts = []

  def counted(graphdef, params, batch, **settings):
    contexts.append(np.asarray(batch['decoder_segment_ids']).any(1).sum())
    return read(graphdef, params, batch, **settings)

  monkeypatch.setattr(programs, 'read', counted)
  choices = [LogLikelihood('def f(x):\n  return', text) for text in ('\n', ' y', ' x + 1', ' -x')]
  make(batch_size=4).answer(choices)
  assert len(contexts) == 1
  # A longer continuation has another shape, and its own reading.
  make(batch_size=4).answer([*choices, LogLikelihood('def f(x):\n  return', ' x + 1 + 2 + 3')])
  assert len(contexts) == 3


@pytest.mark.slow
def test_a_context_without_other_continuations_is_read_with_its_own(llama, monkeypatch):
  _, make = llama
  shared = make().answer(REQUESTS)
  monkeypatch.setattr(programs, 'read', None)  # calling it would fail
  alone = make().answer([dataclasses.replace(request, alone=True) for request in REQUESTS])
  for answer, other in zip(alone, shared, strict=True):
    assert answer.nats == pytest.approx(other.nats, rel=1e-5)
    assert (answer.greedy, answer.tokens) == (other.greedy, other.tokens)


@pytest.mark.slow
def test_two_devices_give_the_same_answers(llama):
  _, make = llama
  engine = make(batch_size=4)
  requests = [*REQUESTS[:6], GenerateUntil('the ', max_tokens=3)]
  expected = engine.answer(requests)
  with Mesh(data=2).use(jax.local_devices()[:2]):
    replicated = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    params = jax.device_put(jax.device_get(engine.params), replicated)
    answers = Engine(engine.graphdef, params, engine.encoding, engine.settings, 4).answer(requests)
  for answer, other in zip(answers[:-1], expected[:-1], strict=True):
    assert answer.nats == pytest.approx(other.nats, rel=1e-5)
  assert answers[-1] == expected[-1]


def test_tokens_are_scored_as_they_are(llama):
  _, make = llama
  ids = tuple(ByteEncoding().encode('the law of'))
  text, tokens = make().answer([
    LogLikelihood('the law', ' of'), TokensLogLikelihood((0, *ids[:7]), ids[7:])
  ])  # fmt: skip
  assert tokens.nats == text.nats


def test_a_model_that_cannot_decode_reads_whole_rows(llama):
  _, make = llama
  engine = make()
  expected = make().answer(REQUESTS)
  engine.cannot_decode = 'the part X cannot decode.'
  for answer, reference in zip(engine.answer(REQUESTS), expected, strict=True):
    assert answer.nats == pytest.approx(reference.nats, rel=1e-5)
    assert answer.greedy == reference.greedy
  (generated,) = engine.answer([GenerateUntil('the ')])
  assert generated == Failed('the part X cannot decode.')


@pytest.mark.parametrize('stride', [None, 32, 10])
def test_a_long_text_is_scored_in_windows_each_token_once(stride, llama):
  reference, make = llama
  text = ''.join(chr(97 + i * i % 26) for i in range(150))
  (answer,) = make(length=64, stride=stride).answer([RollingLogLikelihood(text)])
  tokens = [0, *ByteEncoding().encode(text)]
  total, scored = 0.0, 0
  while scored < 150:
    end = min(150, scored + ((stride or 64) if scored else 64))
    first = max(0, end - 64)
    nats, _ = nats_of(reference, tokens[first:end], tokens[first + 1 : end + 1])
    total += nats[scored - first :].sum()
    scored = end
  assert answer.tokens == 150
  assert answer.nats == pytest.approx(total, rel=1e-4)


def test_greedy_text_equals_that_of_transformers(llama):
  reference, make = llama
  encoding = ByteEncoding()
  requests = [GenerateUntil(text, ('\n', 'ab'), 12) for text in TEXTS]
  for request, answer in zip(requests, make().answer(requests), strict=True):
    ids = torch.tensor([[0, *encoding.encode(request.context)]])
    with torch.no_grad():
      out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1
      )
    expected = encoding.decode(out[0, ids.shape[1] :].tolist())
    ends = [expected.index(stop) for stop in request.until if stop in expected]
    assert answer.text == (expected[: min(ends)] if ends else expected)


def test_a_stop_ends_a_text_before_it(llama):
  _, make = llama
  (whole,) = make().answer([GenerateUntil('the ', (), 12)])
  stop = whole.text[3:5]
  (answer,) = make().answer([GenerateUntil('the ', (stop,), 12)])
  assert answer.text == whole.text[: whole.text.index(stop)]
  assert answer.stopped
  assert answer.tokens < 12


def test_an_embedding_is_the_mean_of_the_last_features(llama):
  reference, make = llama
  text = 'compute'
  with torch.no_grad():
    ids = torch.tensor([[0, *ByteEncoding().encode(text)]])
    features = reference.model(ids).last_hidden_state[0].numpy()
  mean, last = make().answer([Embed(text), Embed(text, 'last')])
  np.testing.assert_allclose(mean.vector, features.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(last.vector, features[-1], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_or_cut_and_told(llama):
  _, make = llama
  long = [LogLikelihood('x' * 100, 'yz'), GenerateUntil('x' * 100, max_tokens=4), Embed('x' * 100)]
  for answer in make(length=64).answer(long):
    assert isinstance(answer, Failed)
    assert 'do not fit the length 64' in answer.reason
  cut, generated, _ = make(length=64, too_long='cut').answer(long)
  assert (cut.cut, generated.cut) == (102 - 64, 105 - 64)
  # The left is cut, and the rest is scored as if it were the whole context.
  (same,) = make(length=64, begin=None).answer([LogLikelihood('x' * 63, 'yz')])
  assert cut.nats == pytest.approx(same.nats, rel=1e-6)
  # A continuation is never cut.
  (failed,) = make(length=64, too_long='cut').answer([LogLikelihood('x', 'y' * 65)])
  assert isinstance(failed, Failed)


@pytest.mark.parametrize(
  ('request_', 'settings', 'why'),
  [
    (GenerateUntil('', max_tokens=4), {'begin': None}, 'nothing to start from'),
    (LogLikelihood('a', ''), {}, 'the continuation has no tokens'),
    (RollingLogLikelihood(''), {}, 'the text has no tokens'),
    (GenerateUntil('a', max_tokens=96), {}, 'leave no room for a context in 96'),
    (Embed('a', 'first'), {}, "pooling 'first' is not 'mean' or 'last'"),
  ],
)
def test_a_request_without_an_answer_fails_and_the_others_do_not(request_, settings, why, llama):
  _, make = llama
  failed, answer = make(**settings).answer([request_, LogLikelihood('ab', 'c')])
  assert why in failed.reason
  assert answer.tokens == 1


def test_a_continuation_without_tokens_fails_in_an_encoder_decoder_too():
  settings = Settings(length=8, architecture='encoder_decoder')
  for request in (LogLikelihood('a', ''), TokensLogLikelihood((5,), ())):
    assert rows_of(0, request, ByteEncoding(), settings) == Failed(NO_CONTINUATION)
  (row,) = rows_of(0, GenerateUntil('a', max_tokens=4), ByteEncoding(), settings)
  assert (row.inputs, row.encoder) == ((0,), (100, 1))


def test_the_context_of_a_prefix_model_sees_itself_both_ways(llama):
  _, make = llama
  engine = make(architecture='prefix')
  context = ByteEncoding().encode('the law')
  continuation = ByteEncoding().encode('of')
  inputs = np.array([[0, *context, *continuation[:-1]]], np.int32)
  batch = {
    'decoder_input_tokens': inputs,
    # As seqio marks it: the first input and the whole context.
    'decoder_causal_attention': np.array([[1] * 8 + [0]], np.int32),
  }
  model = nnx.merge(engine.graphdef, engine.params)
  logits = np.asarray(model(batch)[0][0], np.float64)
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = logs[7, continuation[0]] + logs[8, continuation[1]]
  request = LogLikelihood('the law', 'of')
  (answer,) = engine.answer([request])
  (causal,) = make(architecture='decoder').answer([request])
  assert answer.nats == pytest.approx(expected, rel=1e-5)
  assert abs(causal.nats - answer.nats) > 1e-3


@pytest.mark.slow
def test_an_encoder_decoder_equals_transformers(tmp_path, mesh):
  torch.manual_seed(0)
  config = transformers.T5Config(
    vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
    initializer_factor=2.0, feed_forward_proj='gated-gelu',
  )  # fmt: skip
  reference = transformers.T5ForConditionalGeneration(config).eval()
  reference.save_pretrained(tmp_path)
  engine = engine_of(tmp_path)(architecture='encoder_decoder')
  requests = [LogLikelihood(a, b) for a, b in zip(TEXTS, CONTINUATIONS, strict=True)]
  generated = [GenerateUntil(text, (), 4) for text in TEXTS[:2]]
  *answers, first, second = engine.answer([*requests, *generated])
  for request, answer in zip(requests, answers, strict=True):
    source = [*ByteEncoding().encode(request.context), 1]
    target = ByteEncoding().encode(request.continuation)
    with torch.no_grad():
      out = reference(
        input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *target[:-1]]])
      )
    logs = torch.log_softmax(out.logits[0].double(), -1)
    expected = logs[torch.arange(len(target)), torch.tensor(target)].sum()
    assert answer.nats == pytest.approx(float(expected), rel=1e-4)
  for request, answer in zip(generated, (first, second), strict=True):
    source = torch.tensor([[*ByteEncoding().encode(request.context), 1]])
    with torch.no_grad():
      out = reference.generate(source, max_new_tokens=4, do_sample=False, eos_token_id=1)
    assert answer.text == ByteEncoding().decode(out[0, 1:].tolist())
