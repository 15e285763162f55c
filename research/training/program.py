"""The functions of a run that are compiled: initialisation, the update step, evaluation.

The whole update stands in `Program.step`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from research.checkpoints.manager import names
from research.core.errors import Invalid
from research.data import cache
from research.model.parameters import abstract_model, kinds, named_axes
from research.parallel import axes as axes_module
from research.parallel import hosts
from research.parallel.axes import axis_size, on_each, spec, splits
from research.parallel.mesh import Mesh, default_mesh, platform, threads
from research.training import cross_entropy, learning, optimizers
from research.training.run import Run

# A core of a CPU goes through so many at a time: its caches hold their activations (experiments/speed).
CACHED_TOKENS = 1024
# The key of the parameters that do not learn in `Program.fixed`: a word that no field of a loss can be named.
FROZEN = 'parameters that do not learn'


@dataclasses.dataclass(frozen=True)
class Program:
  """The functions of a run under the mesh in use: what is compiled."""

  run: Run
  graphdef: nnx.GraphDef
  others: dict[str, nnx.GraphDef]  # models that the loss reads
  vocab: int
  inputs: tuple[str, ...]
  routed: bool
  kinds: dict  # of the parameters, nested as they are
  frozen: frozenset[str] = frozenset()  # names of the parameters that do not learn

  def optimizer(self, rate) -> optax.GradientTransformation:
    """The optimizer whose learning rate now is `rate`, an input: runs that differ only in it and in their
    number of steps share one compiled step."""
    optimizer = self.run.optimizer(learning_rate=lambda _: rate)
    clip = optax.clip_by_global_norm(self.run.clip) if self.run.clip else optax.identity()
    return optimizers.knowing(self.kinds, optax.chain(clip, optimizer))

  def init(self, key: jax.Array, given: dict | None = None) -> dict:
    """The state before the first step: step, params (those that learn), opt.

    Args:
      key: parameters are drawn from it.
      given: what `Run.init` puts in their place (`Program.given`).
    """
    params = nnx.to_pure_dict(nnx.state(self.run.model(rngs=nnx.Rngs(params=key))))
    params = learning.without(params, self.frozen)
    if given:
      params = learning.filled(params, given)
    return {
      'step': jnp.zeros((), jnp.int32),
      'params': params,
      'opt': self.optimizer(0.0).init(params),
    }

  @functools.cached_property
  def abstract(self) -> dict:
    """The shapes of the state, and where its arrays live."""
    return jax.eval_shape(self.init, jax.random.key(0))

  @functools.cached_property
  def abstract_fixed(self) -> dict:
    """The shapes of `fixed`, and where its arrays live."""
    fixed = {name: other.shapes() for name, other in self.run.loss.models.items()}
    if self.frozen:
      params = nnx.to_pure_dict(nnx.state(abstract_model(self.run.model)))
      fixed[FROZEN] = learning.keep(params, self.frozen)
    return fixed

  @functools.cached_property
  def sources(self) -> dict[str, str]:
    """Name in the checkpoint of `Run.init` of every parameter that it gives.

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
    there = self.run.init.checkpoint.shapes()
    for name in sorted(self.frozen):
      if name not in sources or there[sources[name]] != shapes[name]:
        fault = 'has another size there' if name in sources else 'is not in the checkpoint'
        why = f'{name} does not learn and {fault}; let it learn, or let it be as it is there.'
        raise Invalid(Run, 'learns', why)
    return sources

  def given(self) -> dict:
    """Values for parameters that learn, by name, from `Run.init`, on the mesh in use."""
    if self.run.init is None:
      return {}
    return self.run.init.load(names(hosts.on_mesh(self.abstract['params'])), self.sources)

  def fixed(self) -> dict:
    """What the step reads and does not change.

    Parameters of the models that the loss reads, by name, and under `FROZEN` the model's own that do not learn.
    """
    fixed = {name: other.params() for name, other in self.run.loss.models.items()}
    if self.frozen:
      places = hosts.on_mesh(self.abstract_fixed[FROZEN])
      given = self.run.init.load(names(places), self.sources)
      fixed[FROZEN] = learning.filled(places, given)
    return fixed

  def base(self) -> dict | None:
    """What a checkpoint says of the parameters that it does not hold; None where it holds all."""
    if not self.frozen:
      return None
    return self.run.init.reference({name: self.sources[name] for name in sorted(self.frozen)})

  def whole(self, params: dict, fixed: dict | None) -> dict:
    """All parameters of the model: those that learn, and those that do not."""
    return learning.joined(params, fixed[FROZEN]) if self.frozen else params

  def loss(self, params: dict, batch: dict, fixed: dict | None = None) -> tuple[jax.Array, dict]:
    """The sum of the run's loss over a batch, and the sums that it is made of."""
    model = nnx.merge(self.graphdef, self.whole(params, fixed))
    features, penalties = model.features(batch)
    chunks = self.run.logits_chunks or choose_chunks(*features.shape[:2], model.vocab)
    others = {name: nnx.merge(self.others[name], fixed[name]) for name in self.run.loss.models}
    terms, counts = self.run.loss(model, features, batch, chunks, **others)
    # Penalties are means over tokens. Weighted by tokens, microbatches add up to the batch.
    terms |= {name: value * counts['weight'] for name, value in penalties.items()}
    read = batch.get('decoder_segment_ids', batch['decoder_target_tokens']) > 0
    return sum(terms.values()), {**terms, **counts, 'read': jnp.sum(read, dtype=jnp.float32)}

  def step(
    self, state: dict, batch: dict, rate: jax.Array, fixed: dict | None = None
  ) -> tuple[dict, dict]:
    """One update at learning rate `rate`, by the mean loss over the batch, however the batch is cut."""
    gradient = jax.value_and_grad(self.loss, has_aux=True)
    of_part = functools.partial(gradient, state['params'], fixed=fixed)
    (_, sums), grads = self.over_parts(of_part, batch)
    weight = jnp.maximum(sums.pop('weight'), 1.0)
    tokens = sums.pop('read')  # D counts tokens that are read, whether or not they carry a loss
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt = self.optimizer(rate).update(grads, state['opt'], state['params'])
    params = optax.apply_updates(state['params'], updates)
    scalars = {name: value / weight for name, value in sums.items()}
    scalars |= {'tokens': tokens, 'grad_norm': optax.tree.norm(grads)}
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, scalars

  def evaluate(self, params: dict, batch: dict, fixed: dict | None = None) -> dict:
    """Sums over a batch by name: the loss's terms and counts, and penalties.

    'weight' is what the others are divided by.
    """
    run = dataclasses.replace(self.run, loss=self.run.loss.evaluation)
    program = dataclasses.replace(self, run=run)
    _, sums = self.over_parts(functools.partial(program.loss, params, fixed=fixed), batch)
    del sums['read']
    return sums

  def over_parts(self, f, batch: dict):
    """The sum of f(part) over the parts of a batch, which are gone through one by one."""
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
    """The microbatches, which a single core cuts smaller: it is faster while activations fit its caches."""
    n = self.run.microbatches
    # What experts do with a token depends on those beside it.
    if platform() != 'cpu' or threads() > 1 or splits() or self.routed:
      return n
    inputs = [x for name, x in batch.items() if name.endswith('_input_tokens')]
    rows = len(inputs[0]) // n
    length = sum(x.shape[1] for x in inputs)
    for k in range(1, rows):
      if rows % k == 0 and rows // k * length <= CACHED_TOKENS:
        return n * k
    return n * rows


def make_program(run: Run) -> Program:
  """Builds a run's functions under the mesh in use. Nothing is computed or compiled.

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
  return Program(run, graphdef, others, abstract.vocab, inputs, routed, kinds(abstract), frozen)


def choose_chunks(rows: int, length: int, vocab: int) -> int:
  """How many parts the length is cut into for the logits where the run does not say."""
  # Of one device's logits: a chunk has a part of every device's part of the sequence.
  rows, parts = on_each(rows, 'batch'), axis_size('sequence')
  return cross_entropy.default_chunks(
    rows * parts // axis_size('length'), length // parts, on_each(vocab, 'vocab')
  )


def mesh_of(run: Run, devices, device_bytes: int | None = None) -> Mesh:
  """The run's mesh, or the one that suits its state where it names none.

  Args:
    devices: to be used.
    device_bytes: memory of one; asked of it when None.
  """
  if run.mesh is not None or len(devices) == 1:
    return run.mesh or Mesh()
  with Mesh().use(devices[:1]):
    program = make_program(run)
    arrays = jax.tree.leaves((program.abstract, program.abstract_fixed.get(FROZEN)))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  device_bytes = device_bytes or (devices[0].memory_stats() or {}).get('bytes_limit')
  return default_mesh(size, device_bytes)


def keep_compiled() -> None:
  """Compiled programs are kept: a restart, and a sweep's runs of one shape, need not compile again."""
  jax.config.update('jax_compilation_cache_dir', str(cache.default_cache() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def rates(runs: list[Run]) -> list[np.ndarray]:
  """The learning rate of every step of each run, float32 [steps]."""
  schedules = [run.schedule(run.steps) for run in runs]

  # As one program: op by op, or run by run, takes a second to compile.
  @jax.jit
  def all_rates(*steps):
    return [jax.vmap(f)(x) for f, x in zip(schedules, steps, strict=True)]

  return [np.asarray(x, np.float32) for x in all_rates(*(jnp.arange(run.steps) for run in runs))]
