"""What must hold of every model: over tiny versions of the presets, or of the gin files that `--model` names.

    pytest tests/model/test_model.py --model=mixers/hawk.gin

holds a model of your own to the same.
"""

import ast
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.errors import UserError
from research.model import counts
from research.model.part import cost_of
from research.parallel.hosts import place
from research.parallel.mesh import Mesh
from tests.families import PRESETS, tiny

LENGTH = 12
# A family of each kind; the slow suite has them all.
FAST = ('llama', 'bert', 't5', 'mixtral', 'mamba2')
# Tokens there compete for places.
CAPACITY = ('switch',)
# Routing is a choice: a rounded score can choose another expert, and then the output is another.
ROUTED = ('mixtral', 'qwen3_moe', 'deepseek_v2', 'deepseek_v3', 'jamba', 'switch')
COMPILE = {'xla_backend_optimization_level': 0}
jit = functools.partial(jax.jit, compiler_options=COMPILE)


def every_model(fast=FAST, without=(), own=True):
  """The test runs for every family, some of them among the slow tests; with --model, for those gin files alone.

  Args:
    fast: families that the fast tests have.
    without: families for which this is not so.
    own: whether it must hold of any model; if not, there are no tests of it for those of `--model`.
  """
  names = [name for name in PRESETS if name not in without]
  params = [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]

  def mark(test):
    test.families, test.own = params, own
    return test

  return mark


def pytest_generate_tests(metafunc):
  if hasattr(metafunc.function, 'families'):
    files, test = metafunc.config.getoption('--model'), metafunc.function
    metafunc.parametrize('family', (files if test.own else []) if files else test.families)


def make(model, seed=0):
  """The graph of a model and random parameters, on the mesh in use."""

  @jit
  def init(key):
    params = nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))
    # Biases and scales of norms that are not 0 and 1.
    return jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)

  return nnx.graphdef(counts.abstract(model)), init(jax.random.key(seed))


def batch_of(model, rows=1, seed=0):
  """A batch in which no token occurs twice in a row of the encoder and the decoder together."""
  rng = np.random.default_rng(seed)
  tokens = np.stack([rng.permutation(np.arange(1, 64))[: 2 * LENGTH] for _ in range(rows)])
  tokens, same = tokens.astype(np.int32), np.ones((rows, LENGTH), np.int32)
  places = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
  batch = {}
  for i, name in enumerate(model.func.inputs):
    batch[f'{name}_input_tokens'] = tokens[:, i * LENGTH : (i + 1) * LENGTH]
    batch[f'{name}_segment_ids'], batch[f'{name}_positions'] = same, places
  batch['decoder_causal_attention'] = np.zeros_like(same)
  return batch


@functools.cache
def influence_of(family):
  """A function of a batch (1 row): [decoder token, token] how much each token moves each feature vector."""
  model = tiny(family)
  with Mesh().use(jax.devices()[:1]):
    graphdef, params = make(model)

    @jit
    def influence(batch, at):
      def feature(table):
        changed = {**params, 'embedder': {**params['embedder'], 'tokens': table}}
        x, _ = nnx.merge(graphdef, changed).features(batch)
        return jnp.sum(x[0, at] * jnp.cos(jnp.arange(x.shape[-1])))

      table = jax.grad(feature)(params['embedder']['tokens'])
      size = jnp.sum(jnp.abs(table), axis=-1)
      return {name: size[batch[f'{name}_input_tokens'][0]] for name in model.func.inputs}

  def matrix(batch):
    with Mesh().use(jax.devices()[:1]):
      rows = [influence(batch, i) for i in range(LENGTH)]
    return {name: np.stack([row[name] for row in rows]) for name in model.func.inputs}

  return model, matrix


@every_model()
def test_a_causal_model_sees_no_later_token(family):
  model, matrix = influence_of(family)
  sees = matrix(batch_of(model))
  later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
  if getattr(counts.abstract(model), 'causal', True):
    assert (sees['decoder'][later] == 0).all()
  else:
    assert (sees['decoder'] > 0).all()
  # Every token reaches the one after it, and all of the input reaches all of the output.
  assert (np.diagonal(sees['decoder']) > 0).all()
  assert (np.diagonal(sees['decoder'], -1) > 0).all()
  if 'encoder' in sees:
    assert (sees['encoder'] > 0).all()


@every_model(without=CAPACITY)
def test_packed_documents_do_not_see_each_other(family):
  model, matrix = influence_of(family)
  batch = batch_of(model)
  for name in model.func.inputs:
    batch[f'{name}_segment_ids'] = np.where(np.arange(LENGTH) < 7, 1, 2)[None].astype(np.int32)
    batch[f'{name}_positions'] = np.r_[np.arange(7), np.arange(LENGTH - 7)][None].astype(np.int32)
  for sees in matrix(batch).values():
    assert (sees[7:, :7] == 0).all()
    assert (sees[:7, 7:] == 0).all()
    assert (np.diagonal(sees) > 0).any()


# A state cannot look ahead, and T5's decoder has no prefix.
NO_PREFIX = ('mamba', 'mamba2', 'jamba', 'bert', 't5', 't5_1_0', 'mt5', 'byt5', 'ul2', 'switch')


@every_model(without=NO_PREFIX, own=False)
def test_a_prefix_sees_itself_both_ways_and_nothing_after_it(family):
  model, matrix = influence_of(family)
  batch = batch_of(model)
  batch['decoder_causal_attention'] = (np.arange(LENGTH) < 4)[None].astype(np.int32)
  sees = matrix(batch)['decoder']
  assert (sees[:4, :4] > 0).all()
  assert (sees[:4, 4:] == 0).all()
  later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
  later[:4, :4] = False
  assert (sees[later] == 0).all()


@jit
def descend(params, gradient):
  """Parameters moved by 0.02 along the direction of steepest descent."""
  length = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
  return jax.tree.map(lambda p, g: p - 0.02 / length * g, params, gradient)


def step_of(model):
  graphdef, params = make(model)

  @jit
  def loss_and_gradient(params, batch):
    def loss(params):
      logits, penalties = nnx.merge(graphdef, params)(batch)
      labels = jax.nn.one_hot(batch['decoder_input_tokens'][:, ::-1], logits.shape[-1])
      return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, -1)) + sum(penalties.values())

    return jax.value_and_grad(loss)(params)

  return loss_and_gradient, params


# The fast tests of tests/parallel have a decoder and a mixture of experts on meshes.
@every_model(())
def test_the_mesh_does_not_change_the_loss_or_its_gradient_and_a_step_lowers_it(family):
  model = tiny(family)
  results = []
  for mesh, devices in ((Mesh(), 1), (Mesh(data=2, fsdp=2, tensor=2), 8)):
    with mesh.use(jax.devices()[:devices]):
      step, params = step_of(model)
      batch = place(batch_of(model, rows=4))
      loss, gradient = step(params, batch)
      after, _ = step(descend(params, gradient), batch)
      results.append(jax.tree.map(np.asarray, (loss, after, gradient)))
  (loss, after, gradient), (loss8, after8, gradient8) = results
  assert after < loss
  assert loss8 == pytest.approx(loss, rel=1e-5)
  assert after8 == pytest.approx(after, rel=1e-5)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient8), strict=True):
    assert np.abs(a - b).max() < 1e-4 * scale


MESHES = [Mesh(fsdp=2), Mesh(tensor=2), Mesh(context=2), Mesh(stage=2)]


@every_model(('llama', 'mamba'))
def test_every_mesh_is_run_on_or_refused_in_a_sentence(family):
  model = tiny(family)
  run = lambda key, batch: model(rngs=nnx.Rngs(params=key))(batch)[0]
  for mesh in MESHES:
    with mesh.use(jax.devices()[:2]):
      batch = place(batch_of(model, rows=4))
      try:
        said = f'{jax.eval_shape(run, jax.random.key(0), batch).shape}'
      except UserError as error:
        said = str(error)
    ran = said == f'(4, {LENGTH}, 64)'
    assert ran or re.fullmatch(r'.*(does not run on this mesh|Mesh\.).*', said), said


# At lengths this short a window is a mask, and hidden pairs are computed; projected relative positions are made
# for more distances than a query sees. Tokens reach experts by neither products nor arithmetic.
MORE_THAN_COUNTED = ('gemma2', 'gemma3', 'gopher', 'chinchilla', *ROUTED)


@every_model(('llama', 'mamba', 't5'), without=MORE_THAN_COUNTED)
def test_the_counts_are_of_the_program(family):
  """No product is left out, and what is counted beyond products is arithmetic that the program does."""
  model = tiny(family)
  lengths = {'inputs': LENGTH, 'targets': LENGTH}
  with Mesh().use(jax.devices()[:1]):
    module, batch = counts.abstract(model), batch_of(model)
    jaxpr = jax.make_jaxpr(lambda module, batch: module(batch)[0])(module, batch).jaxpr
  cost = cost_of(module, LENGTH, LENGTH)
  found = counts.count(model, lengths)
  counted = found.flops_chinchilla / 3 * LENGTH - cost.softmax
  counted -= 2 * cost.one_hot * len(model.func.inputs) * LENGTH
  products, arithmetic = flops_of(jaxpr)
  assert products <= counted * (1 + 1e-9)
  assert counted <= products + arithmetic


def flops_of(jaxpr) -> tuple[int, int]:
  """FLOPs of the matrix products of a program, and of the rest of its arithmetic; of branches, the larger."""
  products = arithmetic = 0
  for equation in jaxpr.eqns:
    sizes = [math.prod(getattr(x.aval, 'shape', ())) for x in equation.outvars]
    inner = [flops_of(getattr(b, 'jaxpr', b)) for b in equation.params.get('branches', ())]
    inner = [max(inner)] if inner else []
    for value in equation.params.values():
      value = getattr(value, 'jaxpr', value)
      inner += [flops_of(value)] if hasattr(value, 'eqns') else []
    trips = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
    products += trips * sum(p for p, _ in inner)
    arithmetic += trips * sum(a for _, a in inner)
    if equation.primitive.name == 'dot_general':
      (contract, _), _ = equation.params['dimension_numbers']
      products += 2 * sizes[0] * math.prod(equation.invars[0].aval.shape[i] for i in contract)
    elif not inner:
      arithmetic += sum(sizes)
  return products, arithmetic


@every_model(('llama',), without=ROUTED)
def test_bfloat16_is_close_to_float32(family):
  model = tiny(family)
  owner = model.func.__name__
  with Mesh().use(jax.devices()[:1]):
    graphdef, params = make(model)
    half = nnx.graphdef(counts.abstract(tiny(family, [f'{owner}.dtype="bfloat16"'])))
    run = jit(lambda g, p, b: nnx.merge(g, p)(b)[0], static_argnums=0)
    a, b = (run(g, params, batch_of(model, rows=2)) for g in (graphdef, half))
  assert b.dtype == jnp.float32  # logits
  # bfloat16 keeps 8 bits; a few roundings in a row on the way through the layers.
  assert np.abs(a - b).max() < 0.06 * np.abs(a).max()
  assert not (a == b).all()


def test_no_python_branch_on_a_family_name():
  root = pathlib.Path(__file__).resolve().parent.parent.parent / 'research'
  families = {path.name for path in (root.parent / 'gin' / 'models').iterdir() if path.is_dir()}
  tested = []
  for path in root.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      tests = [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else []
      tests += [node] if isinstance(node, ast.Compare | ast.match_case) else []
      tested += [
        f'{path.name}:{leaf.lineno}'
        for test in tests
        for leaf in ast.walk(test.pattern if isinstance(test, ast.match_case) else test)
        if isinstance(leaf, ast.Constant) and leaf.value in families
      ]
  assert len(families) > 20
  assert not tested
