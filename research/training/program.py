"""The functions of a run that are compiled: initialisation, the update step, evaluation.

The whole update stands in `Program.step`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from research.checkpoints.manager import names
from research.core.divisors import largest_divisor
from research.core.errors import Invalid
from research.data import cache
from research.model.parameters import abstract_model, kinds, named_axes
from research.parallel import axes as axes_module
from research.parallel import hosts
from research.parallel.axes import on_one_cpu, spec
from research.parallel.mesh import Mesh, default_mesh, threads
from research.training import cross_entropy, learning, optimizers, row_seeds
from research.training.run import Run

# A single CPU core computes so many tokens at a time: their activations fit its caches (experiments/speed).
CACHED_TOKENS = 1024
# The key of the parameters that do not learn in `Program.fixed`. The other keys are fields of the loss, and no
# field can have a name with spaces.
FROZEN = 'parameters that do not learn'


@dataclasses.dataclass(frozen=True)
class Program:
  """The functions of a run that are compiled, under the mesh in use.

  Attributes:
    run: the run.
    graphdef: the structure of its model, without parameters.
    others: the structures of the models that the loss reads, by the loss's field.
    vocab: how many logits the model has.
    inputs: prefixes of the token features that the model reads, such as 'decoder'.
    routed: True if the model has experts.
    kinds: the kind of every parameter, nested as the parameters are.
    frozen: names of the parameters that do not learn.
    seeded: True if rows of a training batch need seeds (row_seeds.py).
  """

  run: Run
  graphdef: nnx.GraphDef
  others: dict[str, nnx.GraphDef]
  vocab: int
  inputs: tuple[str, ...]
  routed: bool
  kinds: dict
  frozen: frozenset[str] = frozenset()
  seeded: bool = False

  def optimizer(self, rate) -> optax.GradientTransformation:
    """Returns the optimizer with learning rate `rate`.

    The rate is an input of the step and not a constant of it. So runs that differ only in their schedule and in
    their number of steps share one compiled step.
    """
    optimizer = self.run.optimizer(learning_rate=lambda _: rate)
    clip = optax.clip_by_global_norm(self.run.clip) if self.run.clip else optax.identity()
    return optimizers.knowing(self.kinds, optax.chain(clip, optimizer))

  def init(self, key: jax.Array, initial: dict | None = None) -> dict:
    """Returns the state before the first step: step, params (those that learn), opt.

    Args:
      key: the key that parameters are drawn from.
      initial: values of `Run.init` that replace them (`Program.initial_values`).
    """
    params = nnx.to_pure_dict(nnx.state(self.run.model(rngs=nnx.Rngs(params=key))))
    params = learning.without(params, self.frozen)
    if initial:
      params = learning.filled(params, initial)
    return {
      'step': jnp.zeros((), jnp.int32),
      'params': params,
      'opt': self.optimizer(0.0).init(params),
    }

  @functools.cached_property
  def abstract(self) -> dict:
    """The shapes and shardings of the state."""
    return jax.eval_shape(self.init, jax.random.key(0))

  @functools.cached_property
  def abstract_fixed(self) -> dict:
    """The shapes and shardings of `fixed`."""
    fixed = {name: other.shapes() for name, other in self.run.loss.models.items()}
    if self.frozen:
      params = nnx.to_pure_dict(nnx.state(abstract_model(self.run.model)))
      fixed[FROZEN] = learning.keep(params, self.frozen)
    return fixed

  @functools.cached_property
  def sources(self) -> dict[str, str]:
    """The name in the checkpoint of `Run.init`, by the parameter that takes its value from there.

    Raises:
      UserError: the checkpoint does not suit the model.
      Invalid: a parameter would neither learn nor come from the checkpoint.
    """
    if self.run.init is None:
      return {}
    shapes = {}
    for part in (self.abstract['params'], self.abstract_fixed.get(FROZEN, {})):
      shapes |= {name: tuple(x.shape) for name, x in names(part).items()}
    sources = self.run.init.sources(shapes)
    saved_shapes = self.run.init.checkpoint.shapes()
    for name in sorted(self.frozen):
      if name not in sources or saved_shapes[sources[name]] != shapes[name]:
        fault = (
          'has another size in the checkpoint' if name in sources else 'is not in the checkpoint'
        )
        why = (
          f'{name} does not learn and {fault}; let it learn, or give it the size that it has there.'
        )
        raise Invalid(Run, 'learns', why)
    return sources

  def initial_values(self) -> dict:
    """Returns the values that `Run.init` has for parameters that learn, by name, on the mesh in use."""
    if self.run.init is None:
      return {}
    return self.run.init.load(names(hosts.on_mesh(self.abstract['params'])), self.sources)

  def fixed(self) -> dict:
    """Returns the parameters that the step reads and does not change.

    Those of the models that the loss reads stand under the loss's field. Those of the model itself that do not
    learn stand under `FROZEN`.
    """
    fixed = {name: other.params() for name, other in self.run.loss.models.items()}
    if self.frozen:
      places = hosts.on_mesh(self.abstract_fixed[FROZEN])
      values = self.run.init.load(names(places), self.sources)
      fixed[FROZEN] = learning.filled(places, values)
    return fixed

  def base(self) -> dict | None:
    """Returns where a checkpoint says its missing parameters are; None if it holds all parameters."""
    if not self.frozen:
      return None
    return self.run.init.reference({name: self.sources[name] for name in sorted(self.frozen)})

  def whole(self, params: dict, fixed: dict | None) -> dict:
    """Returns all parameters of the model: those that learn (`params`), and those that do not."""
    return learning.joined(params, fixed[FROZEN]) if self.frozen else params

  def loss(self, params: dict, batch: dict, fixed: dict | None = None) -> tuple[jax.Array, dict]:
    """Returns the sum of the run's loss over a batch, and a dict of the sums that it consists of."""
    model = nnx.merge(self.graphdef, self.whole(params, fixed))
    features, penalties = model.features(batch)
    batch = row_seeds.without_seeds(batch)
    chunks = self.run.logits_chunks or cross_entropy.choose_chunks(*features.shape[:2], model.vocab)
    others = {name: nnx.merge(self.others[name], fixed[name]) for name in self.run.loss.models}
    terms, counts = self.run.loss(model, features, batch, chunks, **others)
    # Penalties are means over tokens. Weighted by tokens, microbatches add up to the batch.
    terms |= {name: value * counts['weight'] for name, value in penalties.items()}
    read = batch.get('decoder_segment_ids', batch['decoder_target_tokens']) > 0
    return sum(terms.values()), {**terms, **counts, 'read': jnp.sum(read, dtype=jnp.float32)}

  def step(
    self, state: dict, batch: dict, rate: jax.Array, fixed: dict | None = None
  ) -> tuple[dict, dict]:
    """One update at learning rate `rate`, by the mean loss over the batch.

    The result does not depend on how the batch is cut into microbatches or over devices.

    Args:
      state: step, params, opt. Its memory may be donated.
      batch: arrays [batch, length] by seqio's keys.
      rate: the learning rate, a scalar.
      fixed: as `Program.fixed` returns it.

    Returns:
      The new state, and metrics by name: means over the batch, 'tokens' and 'grad_norm'.
    """
    gradient = jax.value_and_grad(self.loss, has_aux=True)
    if self.seeded:
      batch = row_seeds.with_seeds(batch, state['step'])
    of_part = functools.partial(gradient, state['params'], fixed=fixed)
    (_, sums), grads = self.over_parts(of_part, batch)
    weight = jnp.maximum(sums.pop('weight'), 1.0)  # a batch without any target would divide by 0
    tokens = sums.pop('read')  # D counts the tokens that are read, with or without a loss
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt = self.optimizer(rate).update(grads, state['opt'], state['params'])
    params = optax.apply_updates(state['params'], updates)
    scalars = {name: value / weight for name, value in sums.items()}
    scalars |= {'tokens': tokens, 'grad_norm': optax.tree.norm(grads)}
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, scalars

  def evaluate(self, params: dict, batch: dict, fixed: dict | None = None) -> dict:
    """Returns sums over a batch by name: the terms and counts of the loss, and penalties.

    Divided by 'weight' they are means.
    """
    run = dataclasses.replace(self.run, loss=self.run.loss.evaluation)
    program = dataclasses.replace(self, run=run)
    _, sums = self.over_parts(functools.partial(program.loss, params, fixed=fixed), batch)
    del sums['read']
    return sums

  def over_parts(self, f, batch: dict):
    """Returns the sum of f(part) over the parts of a batch, computed one after the other."""
    n = self.parts(batch)
    if n == 1:
      return f(batch)

    # A part takes every n-th row, so that all devices have rows of each part.
    def cut(x):
      sharding = spec('batch', *[None] * x.ndim)
      return x.reshape(-1, n, *x.shape[1:], out_sharding=sharding)

    parts = {k: jnp.moveaxis(cut(x), 1, 0) for k, x in batch.items()}
    f = jax.jit(f)  # traced once, for its shapes and for the loop

    def add(total, part):
      # The barrier keeps XLA for TPUs from moving the sum over devices out of the loop, where a device would
      # hold the whole gradient of every microbatch; libtpu 0.0.42 even fails when it tries.
      return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(f(part))), None

    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], parts))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)[0]

  def parts(self, batch: dict) -> int:
    """Returns the number of parts that a batch is cut into.

    These are `Run.microbatches`. A single CPU core cuts them further: it is faster if activations fit its
    caches.
    """
    n = self.run.microbatches
    # With experts, smaller parts would change the result: their capacity and balance are per part.
    if not on_one_cpu() or threads() > 1 or self.routed:
      return n
    inputs = [x for name, x in batch.items() if name.endswith('_input_tokens')]
    rows = len(inputs[0]) // n
    length = sum(x.shape[1] for x in inputs)
    return n * (rows // largest_divisor(rows, max(1, CACHED_TOKENS // length)))


def make_program(run: Run) -> Program:
  """Makes the functions of a run under the mesh in use. Computes and compiles nothing.

  Raises:
    Invalid: the mesh does not suit a parameter.
  """
  abstract = abstract_model(run.model)
  parameters = named_axes(abstract)
  axes_module.check(parameters)
  routed = any('expert' in axes for axes, _ in parameters.values())
  inputs = tuple(abstract.inputs)
  others = {name: nnx.graphdef(other.abstract) for name, other in run.loss.models.items()}
  graphdef = nnx.graphdef(abstract)
  frozen = learning.frozen_names(abstract, run.learns)
  of_run = graphdef, others, abstract.vocab, inputs, routed
  return Program(run, *of_run, kinds(abstract), frozen, row_seeds.are_needed(abstract))


def mesh_of(run: Run, devices, device_bytes: int | None = None) -> Mesh:
  """Returns the run's mesh, or one that suits the size of its state if the run names none.

  Args:
    run: the run.
    devices: the devices of the mesh.
    device_bytes: the memory of a device; None asks the device.
  """
  if run.mesh is not None or len(devices) == 1:
    return run.mesh or Mesh()
  with Mesh().use(devices[:1]):
    program = make_program(run)
    arrays = jax.tree.leaves((program.abstract, program.abstract_fixed.get(FROZEN)))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  return default_mesh(size, device_bytes or hosts.device_bytes(devices))


def keep_compiled() -> None:
  """Turns on jax's cache of compiled programs, for restarts and for the runs of a sweep that have one shape."""
  jax.config.update('jax_compilation_cache_dir', str(cache.default_cache() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
