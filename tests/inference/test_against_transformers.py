"""Greedy tokens and beams are those of `transformers.generate`: tiny random models, converted, float32."""

import functools

import jax
import numpy as np
import pytest

from research.inference import beams
from research.inference.engine import Engine
from research.inference.request import Request
from research.parallel.mesh import Mesh
from tests.huggingface import test_parity as parity

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

LENGTHS, MORE = (7, 3, 11), 12
FAST = ('llama', 't5-1.1')
EVERY = (
  'llama', 't5-1.1', 'qwen3', 'gemma2', 'gemma3_text', 'falcon-7b', 'bloom', 'mixtral', 'deepseek_v3',
  'deepseek_v2', 'mamba', 'mamba2', 't5-1.0', 'glm', 'mistral', 'gpt2', 'opt', 'mpt', 'jamba', 'olmo2',
)  # fmt: skip
exported = parity.exported


def families(fast=FAST):
  return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in EVERY]


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with Mesh().use(jax.local_devices()[:1]) as mesh:
    yield mesh


@functools.cache
def prompts() -> list[tuple[int, ...]]:
  rng = np.random.default_rng(1)
  return [tuple(int(t) for t in rng.integers(3, parity.VOCAB, n)) for n in LENGTHS]


def reference(name, prompt, **settings) -> list[list[int]]:
  """The tokens that transformers generates after one prompt, as many as it returns."""
  model = parity._reference(name)
  ids = torch.tensor([prompt])
  both = name in parity.ENCODER_DECODERS
  more = {'decoder_start_token_id': 0} if both else {}
  with torch.no_grad():
    out = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=MORE,
      pad_token_id=0,
      **more,
      **settings,
    )
  return [[int(t) for t in row[1 if both else len(prompt) :]] for row in out]


def request(name, prompt, **settings) -> Request:
  if name in parity.ENCODER_DECODERS:
    return Request(prompt=(0,), encoder=prompt, max_tokens=MORE, **settings)
  return Request(prompt=prompt, max_tokens=MORE, **settings)


@pytest.mark.parametrize('name', families())
def test_greedy_tokens_are_those_of_transformers(name, exported):
  """Three requests in two slots, so that one joins later; a prompt longer than a chunk is read in chunks."""
  _, params, graphdef = parity._converted(exported(name))
  encoder_room = 16 if name in parity.ENCODER_DECODERS else 0
  engine = Engine(graphdef, params, slots=2, room=24, chunk=8, encoder_room=encoder_room)
  got = engine.run([request(name, prompt) for prompt in prompts()])
  want = [reference(name, prompt, eos_token_id=None)[0] for prompt in prompts()]
  assert [completion.tokens for completion in got] == want


@pytest.mark.parametrize('name', families(('llama',)))
def test_four_beams_are_those_of_transformers(name, exported):
  _, params, graphdef = parity._converted(exported(name))
  both = name in parity.ENCODER_DECODERS
  prompt = prompts()[0]
  tokens = np.array([(0,) if both else prompt], np.int32)
  batch = {'decoder_input_tokens': tokens}
  if both:
    batch['encoder_input_tokens'] = np.array([prompt], np.int32)
  # An end that is likely to come: a token that greedy decoding says.
  end = reference(name, prompt, eos_token_id=None)[0][4]
  for power in (1.0, 0.0):
    want = reference(
      name, prompt, eos_token_id=end, num_beams=4, num_return_sequences=4, length_penalty=power
    )
    penalty = functools.partial(beams.by_length, power=power)
    got, _ = beams.search(
      graphdef, params, batch, MORE, beams=4, ends=(end,), penalty=penalty, patient=False
    )
    assert [_until(row, end) for row in np.asarray(got)[0]] == [_until(row, end) for row in want]


def _until(row, end) -> list[int]:
  row = [int(t) for t in row]
  return row[: row.index(end) + 1] if end in row else row
