"""Every token of every packed document sees the prefix; a prompt changes rows of the token table."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from research.core.errors import Invalid
from research.model import counts
from research.model.weights import Matrix
from research.parallel.mesh import Mesh
from research.tuning import prefixes
from tests.families import tiny


def with_prefix(model, length: int):
  """A tiny model whose attention has a prefix."""
  stack = model.keywords['stack']
  attention, mlp = stack.keywords['parts']
  prefix = functools.partial(prefixes.Prefix, length=length)
  parts = (functools.partial(attention, prefix=prefix), mlp)
  return functools.partial(model, stack=functools.partial(stack, parts=parts))


def test_packed_documents_see_the_prefix_and_not_each_other():
  model = with_prefix(tiny('llama'), 3)
  tokens = np.arange(1, 9, dtype=np.int32)[None]
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2]], np.int32)
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3]], np.int32)
  packed = {
    'decoder_input_tokens': tokens, 'decoder_segment_ids': segments, 'decoder_positions': positions,
  }  # fmt: skip
  with Mesh().use(jax.devices()[:1]):
    params = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key)))))(
      jax.random.key(0)
    )
    graphdef = nnx.graphdef(counts.abstract(model))

    @jax.jit
    def logits(params, batch):
      return nnx.merge(graphdef, params)(batch)[0]

    together = logits(params, packed)
    alone = [logits(params, {'decoder_input_tokens': tokens[:, i : i + 4]}) for i in (0, 4)]
    np.testing.assert_allclose(together, np.concatenate(alone, 1), rtol=2e-5, atol=2e-5)
    # Another prefix gives other logits at every position.
    changed = jax.tree.map_with_path(lambda path, x: x + 1 if 'prefix' in str(path) else x, params)
    assert (np.abs(logits(changed, packed) - together).max(-1) > 1e-3).all()


def test_a_prompt_is_a_difference_from_rows_of_the_table():
  matrix = Matrix((8, 4), ('vocab', 'embed'), nnx.initializers.normal(1.0), kind='table')
  with Mesh().use(jax.devices()[:1]):
    table = prefixes.Prompt(matrix, first=2, length=3, rngs=nnx.Rngs(params=0))
    base = np.asarray(table.base[...])
    np.testing.assert_array_equal(table[...], base)
    table.prompt[...] = table.prompt[...] + 1
    changed = (np.asarray(table[...]) != base).all(1)
    np.testing.assert_array_equal(changed, np.isin(np.arange(8), [2, 3, 4]))
    with pytest.raises(Invalid, match='rows 6 to 8 are not all among the 8 tokens'):
      prefixes.Prompt(matrix, first=6, length=3, rngs=nnx.Rngs(params=0))
