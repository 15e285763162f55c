"""The contract of parts: whoever does not say what it costs is refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.errors import UserError
from research.model import counts, residual
from research.model.part import Cost, cost_of
from research.parallel.hosts import place
from research.parallel.mesh import Mesh
from tests.families import tiny


class Silent(nnx.Module):
  """A mixer of tokens that says nothing of its FLOPs."""

  def __init__(self, embed: int, *, rngs: nnx.Rngs):
    pass

  def __call__(self, x, context):
    return x.cumsum(1), {}


class Wrong(Silent):
  def cost(self, length, encoder_length):
    return 6 * length


class Shifted(Silent):
  """It needs the whole length on every device, and does not ask for it."""

  def __call__(self, x, context):
    return x + jax.lax.slice_in_dim(jnp.pad(x, ((0, 0), (1, 0), (0, 0))), 0, x.shape[1], axis=1), {}

  def cost(self, length, encoder_length):
    return Cost()


class Mean(Shifted):
  def __call__(self, x, context):
    return x.mean(1, keepdims=True), {}


class Single(Shifted):
  def __call__(self, x, context):
    return x


class SilentWiring(nnx.Module):
  """A wiring of a user's that forgets the costs of its parts."""

  def __init__(self, embed: int, parts, *, rngs: nnx.Rngs):
    self.parts = nnx.List([part(embed, rngs=rngs) for part in parts])

  def __call__(self, x, context):
    return self.parts[0](x, context)


def with_stack(**knobs):
  model = tiny('llama')
  return functools.partial(model, stack=functools.partial(model.keywords['stack'], **knobs))


@pytest.mark.parametrize(
  ('knobs', 'why'),
  [
    ({'parts': (Silent,)}, r'test_part.Silent: a part needs a method cost\(length'),
    ({'parts': (Wrong,)}, r'test_part.Wrong.cost returned 48; return a part.Cost'),
    ({'residual': SilentWiring}, r'test_part.SilentWiring: a part needs a method cost'),
  ],
)
def test_who_does_not_say_its_cost_is_refused_by_name(knobs, why):
  with pytest.raises(UserError, match=why):
    counts.count(with_stack(**knobs), {'targets': 8})


def run(part, mesh=None):
  model = with_stack(parts=(part,))
  tokens = np.ones((2, 24), np.int32)
  with (mesh or Mesh()).use(jax.devices()[: 2 if mesh else 1]):
    call = lambda key, batch: model(rngs=nnx.Rngs(params=key))(batch)[0]
    return jax.eval_shape(call, jax.random.key(0), place({'decoder_input_tokens': tokens}))


def test_a_part_that_does_not_run_on_a_mesh_is_named_with_what_the_mesh_splits():
  assert run(Shifted).shape == (2, 24, 64)
  with pytest.raises(
    UserError, match=r'test_part.Shifted does not run on this mesh, which splits .*length'
  ):
    run(Shifted, Mesh(context=2))


@pytest.mark.parametrize(
  ('part', 'why'),
  [
    (Mean, r'Mean returned float32\[2, 1, 16\] for an input of float32\[2, 24, 16\]'),
    (Single, r'Single returned .*; return \(y, penalties by name\)'),
  ],
)
def test_a_part_that_returns_something_else_is_refused_and_not_broadcast(part, why):
  with pytest.raises(UserError, match=why):
    run(part)


def test_an_error_of_a_part_itself_stays_what_it_is():
  class Broken(Shifted):
    def __call__(self, x, context):
      raise KeyError('a name')

  with pytest.raises(KeyError, match='a name'):
    run(Broken, Mesh(context=2))


def test_costs_add_up_over_the_parts_of_a_layer_and_over_layers():
  one = Cost(full=8, visible=4, softmax=2, cached=3)
  assert (one + one).times(3) == Cost(full=48, visible=24, softmax=12, cached=18)
  model = tiny('llama')
  attention = model.keywords['stack'].keywords['parts'][0]
  parts, norm = (attention, attention), model.keywords['stack'].keywords['norm']
  with Mesh().use(jax.devices()[:1]):
    wiring = jax.eval_shape(lambda: residual.PreNorm(16, parts, norm=norm, rngs=nnx.Rngs(0)))
  alone = cost_of(wiring.parts[0], 16, 0)
  assert alone.full == 4 * 4 * 8 * 16 * 16
  assert cost_of(wiring, 16, 0) == alone + alone
