"""Decoding on meshes says what one device says: the same greedy tokens, and logits to 1e-5 of their scale."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from research.core.errors import UserError
from research.inference import beams, decode
from research.inference.engine import Engine
from research.inference.request import Request
from research.inference.sampling import Sampling
from research.model import experts
from research.parallel.mesh import Mesh
from tests.families import tiny
from tests.model.test_model import COMPILE, make

ROWS, PROMPT, MORE = 8, 5, 6
MESHES = {
  'data x tensor': Mesh(data=4, tensor=2),
  'fsdp x tensor': Mesh(data=1, fsdp=4, tensor=2),
  'data x expert': Mesh(data=4, expert=2),
}
FOUR = {'data x tensor': Mesh(data=2, tensor=2), 'fsdp x tensor': Mesh(data=1, fsdp=2, tensor=2)}
CASES = [
  ('llama2', 'data x tensor'), ('llama2', 'fsdp x tensor'), ('gemma2', 'fsdp x tensor'),
  ('t5', 'data x tensor'), ('mamba2', 'fsdp x tensor'), ('deepseek_v2', 'data x tensor'),
  ('mixtral', 'data x expert'), ('mixtral', 'fsdp x tensor'), ('bloom', 'data x tensor'),
]  # fmt: skip
jit = functools.partial(jax.jit, compiler_options=COMPILE)


def batch_of(model) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  batch = {'decoder_input_tokens': rng.integers(1, 64, (ROWS, PROMPT)).astype(np.int32)}
  if 'encoder' in model.func.inputs:
    batch['encoder_input_tokens'] = rng.integers(1, 64, (ROWS, 8)).astype(np.int32)
  return batch


def greedy(model, mesh: Mesh, devices) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [rows, MORE] and logits [rows, MORE, vocab]; every step changes the cache in place."""
  with mesh.use(devices):
    graphdef, params = make(model)
    merge = functools.partial(nnx.merge, graphdef)
    prefill = jit(lambda p, b: decode.prefill(merge(p), b, PROMPT + MORE))
    step = jit(lambda p, t, c: decode.step(merge(p), t, c), donate_argnums=2)
    logits, cache = prefill(params, batch_of(model))
    said, tokens = [np.asarray(logits)], []
    for _ in range(MORE):
      tokens.append(said[-1].argmax(-1).astype(np.int32))
      logits, cache = step(params, tokens[-1][:, None], cache)
      said.append(np.asarray(logits)[:, 0])
  return np.stack(tokens, axis=1), np.stack(said[:-1], axis=1)


@functools.cache
def alone(family):
  return greedy(tiny(family), Mesh(), jax.local_devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'mesh'), CASES)
def test_tokens_are_those_of_one_device(family, mesh):
  tokens, logits = greedy(tiny(family), MESHES[mesh], jax.local_devices())
  want_tokens, want = alone(family)
  assert tokens.tolist() == want_tokens.tolist()
  assert np.abs(logits - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['data x expert', 'fsdp x tensor'])
def test_on_other_platforms_all_experts_read_all_tokens(mesh, monkeypatch):
  want_tokens, want = alone('mixtral')
  monkeypatch.setattr(experts, 'platform', lambda: 'tpu')
  tokens, logits = greedy(tiny('mixtral'), MESHES[mesh], jax.local_devices())
  assert tokens.tolist() == want_tokens.tolist()
  assert np.abs(logits - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.slow
def test_beams_are_those_of_one_device():
  model, found = tiny('llama2'), []
  for mesh, devices in (
    (Mesh(), jax.local_devices()[:1]),
    (MESHES['data x tensor'], jax.local_devices()),
  ):
    with mesh.use(devices):
      tokens, scores = beams.search(*make(model), batch_of(model), MORE, beams=3, ends=(7,))
      found.append((np.asarray(tokens), np.asarray(scores)))
  (want, want_scores), (tokens, scores) = found
  assert tokens.tolist() == want.tolist()
  np.testing.assert_allclose(scores, want_scores, rtol=1e-5)


def completions(family, mesh: Mesh, devices, **knobs) -> list:
  """What an engine answers to more requests than it has slots: greedy ones, a drawn one, one with penalties."""
  rng = np.random.default_rng(1)
  settings = [Sampling()] * 4 + [
    Sampling(temperature=1.0, top_p=0.9, seed=3),
    Sampling(frequency_penalty=0.5, repetition_penalty=1.3),
  ]
  with mesh.use(devices):
    graphdef, params = make(tiny(family))
    two_sided = 'encoder' in tiny(family).func.inputs
    requests = [
      Request(
        prompt=tuple(rng.integers(1, 64, 3 * number + 1).tolist()),
        encoder=tuple(rng.integers(1, 64, 5).tolist()) if two_sided else (),
        max_tokens=MORE, sampling=sampling, top=3,
      )
      for number, sampling in enumerate(settings)
    ]  # fmt: skip
    engine = Engine(
      graphdef, params, slots=4, room=32, chunk=8, encoder_room=8 * two_sided, pieces=1, kept=2, **knobs
    )  # fmt: skip
    return engine.run(requests)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('family', 'mesh'),
  [
    ('llama2', 'data x tensor'), ('llama2', 'fsdp x tensor'), ('t5', 'data x tensor'),
    ('mamba2', 'data x tensor'), ('mixtral', 'fsdp x tensor'),
  ],
)  # fmt: skip
def test_an_engine_on_a_mesh_answers_as_on_one_device(family, mesh):
  found = completions(family, FOUR[mesh], jax.local_devices()[:4])
  wanted = alone_in_slots(family)
  assert [one.tokens for one in found] == [one.tokens for one in wanted]
  for one, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one.logprobs, want.logprobs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['data x tensor', 'fsdp x tensor'])
def test_prompts_read_together_on_a_mesh_have_the_answers_of_one_device(mesh):
  found = completions('llama2', FOUR[mesh], jax.local_devices()[:4], together=2)
  wanted = alone_in_slots('llama2')
  assert [one.tokens for one in found] == [one.tokens for one in wanted]
  for one, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one.logprobs, want.logprobs, atol=2e-5)
  with pytest.raises(UserError, match=r'Engine\.together.*3 must be 1 or a multiple of 2'):
    completions('llama2', FOUR[mesh], jax.local_devices()[:4], together=3)


@functools.cache
def alone_in_slots(family):
  return completions(family, Mesh(), jax.local_devices()[:1])
