"""LoRA, rsLoRA, DoRA, (IA)^3 and adapters: a few parameters learn, and the base does not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.errors import UserError
from research.huggingface.outwards import family_to_write
from research.model import counts
from research.model.layers import Linear
from research.model.part import Context, Cost
from research.model.weights import Matrix
from research.parallel.mesh import Mesh
from research.tuning import adapters, lora, merge
from tests.families import tiny

KINDS = {
  'LoRA': functools.partial(lora.LoRA, rank=3),
  'rsLoRA': functools.partial(lora.LoRA, rank=3, rank_stabilized=True),
  'DoRA': functools.partial(lora.DoRA, rank=3),
  'ia3': lora.ia3,
}
LEARNED = ('lora_b', 'magnitude', 'scale')


def batch_of(model) -> dict:
  tokens = np.arange(1, 9, dtype=np.int32)[None]
  return {f'{name}_input_tokens': tokens for name in model.func.inputs}


def run(model, params, batch):
  """Logits, on one device."""

  graphdef = nnx.graphdef(counts.abstract(model))

  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
  def logits(params):
    return nnx.merge(graphdef, params)(batch)[0]

  return np.asarray(logits(params))


def random_params(model) -> dict:
  return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key)))))(
    jax.random.key(0)
  )


def moved(params: dict, size: float = 0.05) -> dict:
  """Parameters as if they had learned: those that start at 0 or 1 have moved."""

  def move(path, x):
    if path[-1].key not in LEARNED or 'norm' in str(path):
      return x
    return x + size * jax.random.normal(jax.random.key(x.size), x.shape)

  return jax.tree.map_with_path(move, params)


@pytest.mark.parametrize(
  ('family', 'kind'),
  [
    ('mixtral', 'LoRA'),
    *(
      pytest.param(family, kind, marks=pytest.mark.slow)
      for family in ('llama', 'mixtral', 'bert', 't5', 'mamba2', 'deepseek_v2')
      for kind in KINDS
      # The first is above; a Mamba has neither keys, values nor an MLP for (IA)^3 to rescale.
      if (family, kind) not in (('mixtral', 'LoRA'), ('mamba2', 'ia3'))
    ),
  ],
)
def test_at_first_it_is_the_base_and_merged_it_is_the_same(family, kind):
  model = functools.partial(tiny(family), weight=KINDS[kind])
  batch = batch_of(model)
  with Mesh().use(jax.devices()[:1]):
    params = random_params(model)
    plain, base = merge.merged(model, params)
    at_first = run(model, params, batch)
    of_base = run(plain, base, batch)
    if kind == 'DoRA':  # it multiplies by a ratio that is one up to rounding
      assert np.linalg.norm(at_first - of_base) < 1e-6 * np.linalg.norm(of_base)
    else:
      np.testing.assert_array_equal(at_first, of_base)
    # rsLoRA's factor is sqrt(3) times LoRA's: a change of the same size, so that one tolerance suits all.
    params = moved(params, 0.05 / np.sqrt(3) if kind == 'rsLoRA' else 0.05)
    _, merged = merge.merged(model, params)
    learned = run(model, params, batch)
    assert np.abs(learned - at_first).max() > 1e-2
    error = np.linalg.norm(learned - run(plain, merged, batch)) / np.linalg.norm(learned)
    assert error < 1e-6


@pytest.mark.parametrize('kind', list(KINDS)[:3])
def test_a_matrix_equals_the_papers_formula(kind):
  matrix = Matrix(
    (2, 3, 4, 5), ('expert', 'heads', 'head_dim', 'embed'), nnx.initializers.normal(1.0), 2, 1
  )
  with Mesh().use(jax.devices()[:1]):
    weight = KINDS[kind](matrix, rngs=nnx.Rngs(params=0))
    params = moved(nnx.to_pure_dict(nnx.state(weight)), 0.5)
    result = np.asarray(nnx.merge(nnx.graphdef(weight), params)[...])
  value = {name: np.asarray(x, np.float64) for name, x in params.items()}
  scale = 16 / (np.sqrt(3) if kind == 'rsLoRA' else 3)
  changed = value['base'] + scale * np.einsum('xhdr,xre->xhde', value['lora_a'], value['lora_b'])
  if kind == 'DoRA':

    def length(w):
      return np.sqrt((w**2).sum((1, 2), keepdims=True))

    magnitude = value['magnitude'][:, None, None] * length(value['base'])
    changed = magnitude * changed / length(changed)
  np.testing.assert_allclose(result, changed, rtol=2e-6, atol=2e-6)


def test_ia3_rescales_keys_values_and_hidden_units():
  module = counts.abstract(functools.partial(tiny('llama'), weight=lora.ia3))
  rescaled = {path[-2] for path, m in nnx.iter_modules(module) if isinstance(m, lora.Rescaled)}
  assert rescaled == {'key', 'value', 'output'}  # the output of the MLP, not of attention
  of_inputs = [
    m.axes for _, m in nnx.iter_modules(module) if isinstance(m, lora.Rescaled) and m.of_inputs
  ]
  assert of_inputs == [('mlp', 'embed')]


def test_an_adapter_changes_nothing_at_first_and_is_not_written_without():
  plain = tiny('llama')
  adapter = functools.partial(adapters.Adapter, bottleneck=4)
  stack = plain.keywords['stack']
  parts = tuple(
    functools.partial(adapters.After, base=part, adapter=adapter)
    for part in stack.keywords['parts']
  )
  model = functools.partial(plain, stack=functools.partial(stack, parts=parts))
  with Mesh().use(jax.devices()[:1]):
    x = jnp.ones((1, 3, 8))
    after = functools.partial(adapters.After, base=_Half, adapter=adapter)(
      8, rngs=nnx.Rngs(params=0)
    )
    np.testing.assert_array_equal(after(x, Context(positions=jnp.arange(3)[None]))[0], x / 2)
  # No family of Hugging Face has adapters, and they are not left out in silence.
  with pytest.raises(UserError, match='has no tensor for'):
    family_to_write(merge.Tree(model), 'llama')


class _Half(nnx.Module):
  """A part that halves."""

  def __init__(self, embed, *, rngs):
    self.linear = Linear({'embed': embed}, {'embed': embed}, rngs=rngs)

  def __call__(self, x, context):
    return x / 2, {}

  def cost(self, length, encoder_length):
    return Cost()
