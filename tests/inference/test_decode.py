"""A model that reads token by token says what it says of the whole text, whatever its family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.errors import UserError
from research.inference import decode, state
from research.model import counts, experts
from research.model.part import Context
from research.parallel.mesh import Mesh
from tests.families import PRESETS, tiny
from tests.model.test_model import COMPILE, make

FAST = ('gemma2', 'mamba2')
RECURRENT = ('mamba', 'mamba2', 'jamba')  # they cannot forget a token
PROMPT, MORE, ROOM = 7, 9, 20  # tokens; the windows of the tiny models are 4
LENGTHS = np.array([7, 4, 1, 6])  # of the prompts
TOLERANCE = 1e-5  # of the logits' scale
# bfloat16 has 8 bits: steps and the full forward round in other places, in each of two layers.
BFLOAT16_TOLERANCE = 3e-2
jit = functools.partial(jax.jit, compiler_options=COMPILE)


def families(fast=FAST, names=tuple(PRESETS)):
  names = [name for name in names if name != 'bert']
  return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with Mesh().use(jax.local_devices()[:1]) as mesh:
    yield mesh


@functools.cache
def setup(family, bindings=()):
  """The model, its graph and parameters, and a batch of texts of several lengths, padded on the left."""
  dropless = {'switch': ('MoE.capacity=None', 'MoE.places=None')}.get(family, ())
  model = tiny(family, (*bindings, *dropless))
  rng, length = np.random.default_rng(0), PROMPT + MORE
  first = PROMPT - LENGTHS[:, None]
  real = (np.arange(length) >= first).astype(np.int32)
  batch = {
    'decoder_input_tokens': rng.integers(1, 64, real.shape).astype(np.int32) * real,
    'decoder_segment_ids': real,
    'decoder_positions': np.maximum(np.arange(length) - first, 0).astype(np.int32),
  }
  if 'encoder' in model.func.inputs:
    source = rng.integers(1, 64, (len(real), 8)).astype(np.int32)
    source[1, 5:] = 0
    batch['encoder_input_tokens'] = source
  return model, *make(model), batch


def prompts_of(batch):
  """The batch without what comes after the prompts. Positions are left to `prefill`."""
  cut = ('decoder_input_tokens', 'decoder_segment_ids', 'decoder_causal_attention')
  kept = {k: x for k, x in batch.items() if k != 'decoder_positions'}
  return {k: x[:, :PROMPT] if k in cut else x for k, x in kept.items()}


@functools.cache
def functions(graphdef):
  """Compiled (whole, prefill, step)."""
  model = functools.partial(nnx.merge, graphdef)
  whole = jit(lambda p, b: model(p)(b)[0])
  prefill = jit(
    lambda p, b, ahead, int8: decode.prefill(model(p), b, ROOM, ahead=ahead, int8=int8),
    static_argnums=(2, 3),
  )
  return whole, prefill, jit(lambda p, t, c: decode.step(model(p), t, c))


def compare(family, *, bindings=(), prefix=False, tokens=1, tolerance=TOLERANCE):
  """Prefill and steps of so many tokens against the logits of one full forward pass."""
  _, graphdef, params, batch = setup(family, bindings)
  batch = dict(batch)
  if prefix:
    among = (np.arange(PROMPT + MORE) < PROMPT) & (batch['decoder_segment_ids'] > 0)
    batch['decoder_causal_attention'] = among.astype(np.int32)
  whole, prefill, step = functions(graphdef)
  want = np.asarray(whole(params, batch))[:, PROMPT - 1 :]
  logits, cache = prefill(params, prompts_of(batch), tokens, False)
  got = [logits[:, None]]
  for i in range(0, MORE, tokens):
    if tokens > 1 and family not in RECURRENT:  # a draft that turns out wrong
      drafted = step(params, np.full((len(LENGTHS), tokens), 5, np.int32), cache)[1]
      cache = dataclasses.replace(drafted, length=cache.length)
    new = batch['decoder_input_tokens'][:, PROMPT + i : PROMPT + i + tokens]
    logits, cache = step(params, new, cache)
    got.append(logits)
  assert np.abs(np.concatenate(got, axis=1) - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize('family', families())
def test_prefill_and_steps_equal_the_full_forward(family):
  compare(family)


@pytest.mark.parametrize('family', families(('gemma2',)))
def test_several_tokens_a_step_after_a_wrong_draft(family):
  compare(family, tokens=3)


@pytest.mark.parametrize('family', families((), ('glm', 'llama', 'bloom', 'gemma2')))
def test_a_prefix_is_read_both_ways(family):
  compare(family, prefix=True)


@pytest.mark.parametrize(
  'family', families((), ('gemma2', 'llama', 'deepseek_v2', 'mixtral', 't5'))
)
def test_the_cache_and_the_experts_of_other_platforms(family, monkeypatch):
  monkeypatch.setattr(state, 'platform', lambda: 'tpu')
  monkeypatch.setattr(experts, 'platform', lambda: 'tpu')
  functions.cache_clear()
  _, graphdef, params, batch = setup(family)
  model = functools.partial(nnx.merge, graphdef)
  read = lambda params, batch: decode.prefill(model(params), batch, ROOM)[1]
  cache = jax.eval_shape(read, params, prompts_of(batch))
  # Rows, layers, slots: of keys, or of what stands for them.
  assert {x.shape[2] for x in jax.tree.leaves(cache.entries)} & {ROOM, 4}
  compare(family)
  functions.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize('family', ['llama', 't5', 'deepseek_v2', *FAST])
def test_layers_written_out(family):
  compare(family, bindings=('Stack.scan=False',))


@pytest.mark.slow
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'mamba2', 't5'])
def test_bfloat16_is_close_to_its_full_forward(family):
  model = 'EncoderDecoder' if family == 't5' else 'LanguageModel'
  bindings = (f"{model}.dtype='bfloat16'",)
  compare(family, bindings=bindings, tolerance=BFLOAT16_TOLERANCE)


@pytest.mark.parametrize('family', families(('gemma2',), ('gemma2', 'jamba', 't5', 'deepseek_v2')))
def test_layers_with_parameters_of_their_own(family):
  """Every stack of a model comes apart, also within stacks, and says what it said."""
  _, graphdef, params, batch = setup(family, ('Stack.scan=True',))
  apart, separate = decode.separated(graphdef, params)
  stacked = sum(x.size for x in jax.tree.leaves(params))
  assert sum(x.size for x in jax.tree.leaves(separate)) == stacked
  assert apart != graphdef
  assert decode.separated(apart, separate) == (apart, separate)
  prompts, token = prompts_of(batch), np.full((len(LENGTHS), 1), 3, np.int32)
  said = []
  for graph, tree in ((graphdef, params), (apart, separate)):
    _, prefill, step = functions(graph)
    logits, cache = prefill(tree, prompts, 1, False)
    said.append((logits, step(tree, token, cache)[0]))
  for want, got in zip(*said, strict=True):
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize('family', families(('gemma2',)))
def test_ragged_prompts_equal_each_alone(family):
  _, graphdef, params, batch = setup(family)
  _, prefill, step = functions(graphdef)
  prompts, token = prompts_of(batch), np.full((len(LENGTHS), 1), 3, np.int32)
  logits, cache = prefill(params, prompts, 1, False)
  more, _ = step(params, token, cache)
  row = 1
  alone = {k: x[row : row + 1] for k, x in prompts.items()}
  want, cache = prefill(params, alone, 1, False)
  want_more, _ = step(params, token[:1], cache)
  scale = np.abs(want).max()
  np.testing.assert_allclose(logits[row], want[0], atol=TOLERANCE * scale)
  np.testing.assert_allclose(more[row], want_more[0], atol=TOLERANCE * scale)


@pytest.mark.parametrize('family', families(('gemma2',)))
def test_the_cache_is_as_large_as_is_counted(family):
  model, graphdef, params, batch = setup(family)

  def size(room):
    read = lambda p, b: decode.prefill(nnx.merge(graphdef, p), b, room)[1].entries
    prompts = {k: x[:, :2] if k.startswith('decoder') else x for k, x in prompts_of(batch).items()}
    entries = jax.eval_shape(read, params, prompts)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))

  per_token = counts.count(model, {'targets': 16, 'inputs': 8}).kv_cache_bytes_per_token
  # While the room is within the windows (4 here) all layers grow by a token.
  assert size(3) - size(2) == len(LENGTHS) * per_token


def test_a_request_joins_others():
  _, graphdef, params, batch = setup('mamba2')
  _, prefill, step = functions(graphdef)
  batch, token = prompts_of(batch), np.full((len(LENGTHS), 1), 3, np.int32)
  alone = prefill(params, jax.tree.map(lambda x: x[1:2], batch), 1, False)[1]
  want, _ = step(params, token[:1], alone)
  _, others = step(params, token, prefill(params, batch, 1, False)[1])
  got, _ = step(params, token, decode.insert(others, alone, 2))
  np.testing.assert_allclose(got[2], want[0], atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize('family', families(('gemma2',), ('gemma2', 'llama')))
def test_keys_in_int8_are_close_to_those_in_float32(family):
  _, graphdef, params, batch = setup(family)
  _, prefill, step = functions(graphdef)
  token = np.full((len(LENGTHS), 1), 3, np.int32)
  want, plain = step(params, token, prefill(params, prompts_of(batch), 1, False)[1])
  got, rounded = step(params, token, prefill(params, prompts_of(batch), 1, True)[1])
  size = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache.entries))
  assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
  assert size(rounded) < 0.4 * size(plain)


def test_a_position_past_the_room_is_nan_and_never_wrapped():
  _, graphdef, params, batch = setup('gemma2')
  _, prefill, step = functions(graphdef)
  _, cache = prefill(params, prompts_of(batch), 1, False)
  cache = dataclasses.replace(cache, length=np.array([ROOM - 1, ROOM, 3, 4], np.int32))
  logits, _ = step(params, np.full((4, 1), 3, np.int32), cache)
  assert np.isnan(logits).all(axis=(1, 2)).tolist() == [False, True, False, False]


def test_a_prompt_longer_than_the_room_is_refused():
  _, graphdef, params, batch = setup('gemma2')
  with pytest.raises(UserError, match='prompts of 7 tokens do not fit into a room of 6'):
    decode.prefill(nnx.merge(graphdef, params), prompts_of(batch), 6)


@pytest.mark.parametrize('family', ['llama', 'falcon'])  # alone, and beside another part
def test_a_mixer_that_keeps_nothing_is_refused_by_name(family, monkeypatch):
  _, graphdef, params, batch = setup(family)
  monkeypatch.setattr(Context, 'recall', lambda self, *new, window=None: (*new, self))
  read = lambda p, b: decode.prefill(nnx.merge(graphdef, p), b, ROOM)[0]
  with pytest.raises(UserError, match=r'attention\.Attention mixes tokens and keeps none of them'):
    jax.eval_shape(read, params, prompts_of(batch))


def test_an_encoder_does_not_generate():
  model = tiny('bert')
  graphdef, params = make(model)
  with pytest.raises(UserError, match='sees both ways'):
    decode.prefill(nnx.merge(graphdef, params), {'decoder_input_tokens': jnp.ones((1, 3))}, ROOM)


@pytest.mark.parametrize('family', families(('gemma2',), ('gemma2', 'mamba2', 't5', 'mixtral')))
def test_training_is_the_program_of_parts_that_ask_nothing(family, monkeypatch):
  """With every question to the context cut out, the gradient's program is the same to the letter."""
  _, graphdef, params, batch = setup(family)
  abstract = jax.eval_shape(lambda: (params, batch))

  def program():
    def loss(params, batch):
      logits, penalties = nnx.merge(graphdef, params)(batch)
      return jnp.sum(logits) + sum(penalties.values())

    return jax.jit(jax.grad(loss)).lower(*abstract).as_text()

  before = program()
  monkeypatch.setattr(Context, 'recall', lambda self, *new, window=None: (*new, self))
  monkeypatch.setattr(Context, 'carry', lambda self, f, initial: f(initial)[1])
  monkeypatch.setattr(Context, 'once', lambda self, *arrays: arrays)
  monkeypatch.setattr(Context, 'reach', lambda self, length: length)
  assert program() == before
