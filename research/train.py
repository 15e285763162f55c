"""Train one model: gin file -> Run -> batches -> one jitted step -> rows.

Writes into --workdir: config.gin (re-runnable), config.txt (resolved), metrics.jsonl, tensorboard/,
checkpoints/ and at last run.json, the one row of the run. Started again with the same workdir it resumes.
One process a host is started with the same command on all hosts; they find each other by the three flags, or by
what Slurm, a TPU slice, Ray Train or torchrun tell them. The workdir is one that all of them see.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time

from research import cli
from research.errors import Invalid, UserError

if __name__ == '__main__':
  _parser = cli.parser('train', __doc__)
  _parser.add_argument(
    '--workdir', default=None, metavar='DIR', help='default: runs/<name of the first gin file>'
  )
  _parser.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0')
  _parser.add_argument('--num_processes', type=int, metavar='N', help='of the job; 1: only this')
  _parser.add_argument('--process_id', type=int, metavar='I', help='which of them this is, from 0')
  FLAGS = cli.parse(_parser)  # before jax: --help and a wrong flag answer at once
  cli.use_huge_pages()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from research import configs, data, distributed, sharding
from research.model import counts, layers
from research.run import Run
from research.training import ahead, losses, metrics, places
from research.training.checkpoints import Checkpoints

# A core of a CPU goes through so many at a time: its caches hold their activations (experiments/speed).
CACHED_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Program:
  """The functions of a run under the mesh in use: what is compiled."""

  run: Run
  graphdef: nnx.GraphDef
  vocab: int
  inputs: tuple[str, ...]
  routed: bool

  def optimizer(self, rate) -> optax.GradientTransformation:
    """The optimizer whose learning rate now is `rate`, an input: runs that differ only in it and in their
    number of steps share one compiled step."""
    optimizer = self.run.optimizer(learning_rate=lambda _: rate)
    clip = optax.clip_by_global_norm(self.run.clip) if self.run.clip else optax.identity()
    return optax.chain(clip, optimizer)

  def init(self, key: jax.Array) -> dict:
    """The state before the first step: step, params, opt."""
    params = nnx.to_pure_dict(nnx.state(self.run.model(rngs=nnx.Rngs(params=key))))
    return {
      'step': jnp.zeros((), jnp.int32),
      'params': params,
      'opt': self.optimizer(0.0).init(params),
    }

  @functools.cached_property
  def abstract(self) -> dict:
    """The shapes of the state, and where its arrays live."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def loss(self, params: dict, batch: dict) -> tuple[jax.Array, dict]:
    """Sum of the loss over a batch's target tokens, and what it is made of."""
    model = nnx.merge(self.graphdef, params)
    x, penalties = model.features(batch)
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    targets = batch['decoder_target_tokens']
    nll, z_loss = losses.cross_entropy(
      model.readout(), x, targets, weights, z_loss=self.run.z_loss,
      chunks=self.run.logits_chunks or _chunks(*targets.shape, model.vocab),
    )  # fmt: skip
    tokens = jnp.sum(weights)
    seen = jnp.sum(batch.get('decoder_segment_ids', targets) > 0, dtype=jnp.float32)
    # Penalties are means over tokens: weighted by tokens, microbatches add up to the batch.
    sums = {'nll': nll, 'z_loss': z_loss, **{k: v * tokens for k, v in penalties.items()}}
    return sum(sums.values()), {**sums, 'tokens': tokens, 'seen': seen}

  def step(self, state: dict, batch: dict, rate: jax.Array) -> tuple[dict, dict]:
    """One update at learning rate `rate`, by the mean loss of the batch's target tokens, however it is cut."""
    gradient = jax.value_and_grad(self.loss, has_aux=True)
    (_, sums), grads = self.over_parts(functools.partial(gradient, state['params']), batch)
    tokens = jnp.maximum(sums['tokens'], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt = self.optimizer(rate).update(grads, state['opt'], state['params'])
    params = optax.apply_updates(state['params'], updates)
    scalars = {k: v / tokens for k, v in sums.items() if k not in ('tokens', 'seen')}
    scalars = {
      'loss': scalars.pop('nll'),
      **scalars,
      'tokens': sums['seen'],  # D: read, whether or not they carry a loss
      'grad_norm': optax.tree.norm(grads),
    }
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, scalars

  def evaluate(self, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Sum of the negative log-likelihood in nats, and the number of target tokens."""
    _, sums = self.over_parts(functools.partial(self.loss, params), batch)
    return sums['nll'], sums['tokens']

  def over_parts(self, f, batch: dict):
    """The sum of f(part) over the parts of a batch, which are gone through one by one."""
    n = self.parts(batch)
    if n == 1:
      return f(batch)
    # Every part takes every n-th row, so that each has its rows on all the devices.
    cut = lambda x: x.reshape(-1, n, x.shape[1], out_sharding=sharding.spec('batch', None, None))
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
    if sharding.platform() != 'cpu' or sharding.threads() > 1 or sharding.splits() or self.routed:
      return n
    inputs = [x for name, x in batch.items() if name.endswith('_input_tokens')]
    rows, length = len(inputs[0]) // n, sum(x.shape[1] for x in inputs)
    fits = lambda k: rows % k == 0 and rows // k * length <= CACHED_TOKENS
    return n * next((k for k in range(1, rows) if fits(k)), rows)


def make_program(run: Run) -> Program:
  """Builds a run's functions under the mesh in use. Nothing is computed or compiled.

  Raises:
    Invalid: the mesh does not suit a parameter.
  """
  abstract = jax.eval_shape(lambda: run.model(rngs=nnx.Rngs(params=jax.random.key(0))))
  parameters = layers.named_axes(abstract)
  sharding.check(parameters)
  routed = any('expert' in axes for axes, _ in parameters.values())
  return Program(run, nnx.graphdef(abstract), abstract.vocab, tuple(abstract.inputs), routed)


def _chunks(rows: int, length: int, vocab: int) -> int:
  """How many parts the length is cut into for the logits where the run does not say."""
  # Of one device's logits: a chunk has a part of every device's part of the sequence.
  rows, parts = sharding.on_each(rows, 'batch'), sharding.axis_size('sequence')
  return losses.default_chunks(
    rows * parts // sharding.axis_size('length'), length // parts, sharding.on_each(vocab, 'vocab')
  )


def mesh_of(run: Run, devices, device_bytes: int | None = None) -> sharding.Mesh:
  """The run's mesh, or the one that suits its state where it names none.

  Args:
    devices: to be used.
    device_bytes: memory of one; asked of it when None.
  """
  if run.mesh is not None or len(devices) == 1:
    return run.mesh or sharding.Mesh()
  with sharding.Mesh().use(devices[:1]):
    init = make_program(run).init
    state = jax.eval_shape(lambda: init(jax.random.key(0)))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
  device_bytes = device_bytes or (devices[0].memory_stats() or {}).get('bytes_limit')
  return sharding.default_mesh(size, device_bytes)


def open_workdir(workdir: pathlib.Path, run: Run, config_text: str) -> None:
  """Makes the folder, or checks that it holds this very run.

  Raises:
    UserError: it cannot be written, or holds another run.
  """
  places.make(workdir)
  identity, path = run.identity(), workdir / 'config.txt'
  if path.exists() and path.read_text() != identity:
    there, here = path.read_text().splitlines(), identity.splitlines()
    old, new = next(
      (pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]), ('', '')
    )
    raise UserError(
      f'--workdir={workdir} holds a different run ("{old.strip()}" there, "{new.strip()}" here); '
      'choose another workdir, or delete that one.'
    )
  if jax.process_index() == 0:
    metrics.write_atomic(path, identity)
    metrics.write_atomic(workdir / 'config.gin', config_text)


def check_fits(run: Run, vocab: int, inputs: tuple[str, ...], train: data.Frozen) -> None:
  """Raises Invalid where model, data and devices do not go together."""
  if vocab < train.vocab_size:
    owner = getattr(run.model, 'func', run.model)
    raise Invalid(
      owner,
      'vocab',
      f'{vocab} is less than the {train.vocab_size} tokens of the data; set it to that or more.',
    )
  missing = [name for name in inputs if f'{name}_input_tokens' not in train.features]
  if missing:
    raise Invalid(
      Run,
      'train',
      f'the model reads {missing[0]} tokens and {run.train.name} for this architecture has none.',
    )
  check_divides(run)


def check_divides(run: Run) -> None:
  """Raises Invalid where the mesh in use does not divide the run's batches."""
  devices, (_, hosts) = sharding.axis_size('batch') * run.microbatches, sharding.host_share()
  parts = sharding.axis_size('sequence')
  field = 'batch_size'
  for size, cut in reversed(run.batches.sizes()):
    if size * cut % devices:
      raise Invalid(
        Run, field, f'{size * cut} is not a multiple of {devices}, the devices a batch is split over '
        'times the microbatches.',
      )  # fmt: skip
    if size % hosts:
      raise Invalid(Run, field, f'{size} examples cannot be shared by {hosts} hosts equally.')
    for name, length in run.train.lengths.items():
      if length // cut % parts:
        why = f'{parts} does not divide the length {length // cut} of the {name}; '
        why += 'change Mesh.context or that length.'
        raise Invalid(sharding.Mesh, 'context', why)
    field = 'curriculum'


def count_of(run: Run) -> counts.Counts:
  """What the run's model counts; FLOPs per token are the mean over the run, for shorter rows cost less."""
  of = lambda cut: counts.count(run.model, {k: n // cut for k, n in run.train.lengths.items()})
  whole, total = of(1), run.batches.examples(run.steps)
  flops = {k: v for k, v in vars(whole).items() if k.startswith('flops_')}
  for steps, size, cut in run.curriculum:
    if cut > 1:
      short, share = of(cut), steps * size / total
      flops = {k: v + share * (getattr(short, k) - getattr(whole, k)) for k, v in flops.items()}
  return dataclasses.replace(whole, **flops)


def keep_compiled() -> None:
  """Compiled programs are kept: a restart, and a sweep's runs of one shape, need not compile again."""
  jax.config.update('jax_compilation_cache_dir', str(data.default_cache() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


class Interrupted(Exception):
  """SIGTERM came; the state is saved."""


class _Signal:
  """True once SIGTERM came, on any host."""

  def __init__(self):
    self.came, self.previous = False, None
    if jax.process_count() > 1:  # jax listens, and makes all the processes stop at one step
      return
    try:
      self.previous = signal.signal(signal.SIGTERM, self._come)
    except ValueError:  # not the main thread: whoever started it handles signals
      self.previous = None

  def _come(self, *_):
    self.came = True

  def check(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self.came
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def restore(self):
    if self.previous is not None:
      signal.signal(signal.SIGTERM, self.previous)


def train(run: Run, workdir: str | pathlib.Path, config_text: str = '', stream=sys.stderr) -> dict:
  """Trains to the end, or from where a checkpoint in `workdir` left it; returns the run's row.

  Raises:
    UserError: something does not fit; before anything is compiled.
    Interrupted: SIGTERM came; a checkpoint was saved.
  """
  workdir = places.place(workdir)
  keep_compiled()
  with mesh_of(run, jax.devices()).use() as mesh, open(os.devnull, 'w') as silence:
    stream = stream if jax.process_index() == 0 else silence
    open_workdir(workdir, run, config_text)
    say = lambda text: print(text, file=stream, flush=True)
    devices = jax.devices()
    say(f'{len(devices)} {devices[0].device_kind} device(s), mesh {sharding.describe(mesh)}')
    frozen, validation = open_data(run, say)
    program = make_program(run)
    check_fits(run, program.vocab, program.inputs, frozen)
    count = count_of(run)
    say(
      f'{metrics.si(count.params_total)} parameters ({metrics.si(count.params_non_embedding)} non-embedding), '
      f'{metrics.si(run.batches.examples(run.steps) * run.target_length)} tokens to train on; '
      f'a uniform guess has a loss of ln {program.vocab} = {math.log(program.vocab):.3f} nats/token'
    )
    loop = _Loop(run, program, workdir, frozen, validation, count, rates([run])[0], stream)
    try:
      row = loop.train()
    finally:
      loop.close()
    if jax.process_index() == 0:
      metrics.write_atomic(workdir / 'run.json', json.dumps(row, indent=1) + '\n')
    return row


def open_data(run: Run, log) -> list:
  """The run's frozen streams, made by the first process where the others see its cache."""
  first, streams = jax.process_index() == 0, [run.train, run.validation]
  opened = data.open_streams(streams, log=log) if first else None
  distributed.exchange('data', '', timeout=24 * 3600.0)  # to freeze a large corpus takes hours
  return opened or data.open_streams(streams, log=log)


def rates(runs: list[Run]) -> list[np.ndarray]:
  """The learning rate of every step of each run, float32 [steps]."""
  # As one program: op by op, or run by run, takes a second to compile.
  schedules = [run.schedule(run.steps) for run in runs]
  of = jax.jit(lambda *steps: [jax.vmap(f)(x) for f, x in zip(schedules, steps, strict=True)])
  return [np.asarray(x, np.float32) for x in of(*(jnp.arange(run.steps) for run in runs))]


class _Loop:
  """The loop around the step: dispatches it, and looks at each step's metrics one step later."""

  def __init__(self, run, program, workdir, frozen, validation, count, rates, stream):
    self.run, self.program, self.workdir, self.rates = run, program, workdir, rates
    self.frozen, self.validation, self.count = frozen, validation, count
    self.signal = _Signal()
    self.checkpoints = Checkpoints(workdir / 'checkpoints', keep=run.keep_checkpoints)
    self.compile()
    restored = self.checkpoints.restore(program.abstract, log=self._say(stream))
    if restored:
      self.start, self.state, meta = restored
      self.tokens, self.seconds = meta['tokens'], meta['seconds']
      print(f'resumed from step {self.start:,}', file=stream, flush=True)
    else:
      self.start, self.state, self.tokens, self.seconds = 0, self.initial(), 0, 0.0
    writes = jax.process_index() == 0
    self.rows = metrics.Rows(workdir, self.start) if writes else metrics.NoRows()
    flops = count.flops_6n_with_head
    self.progress = metrics.Progress(run.steps, self.start, flops, stream)
    self.window: list[dict] = []
    self.clock = time.monotonic()
    self.began = self.clock - self.seconds

  def compile(self) -> None:
    """Begins to compile what the run calls."""
    program, run, share = self.program, self.run, sharding.host_share()
    state = ahead.on_mesh(program.abstract)
    batch = sharding.place(data.batch_at(self.frozen, run.batches, run.seed, 0, *share))
    saved = places.saved_steps(self.workdir / 'checkpoints')
    self.init_fn = ahead.jit(program.init, *([] if saved else [self.key()]))
    self.step_fn = ahead.jit(program.step, state, batch, self.rates[0], donate_argnums=0)
    batch = sharding.place(next(data.eval_batches(self.validation, run.batch_size, *share)))
    self.evaluate_fn = ahead.jit(program.evaluate, state['params'], batch)

  def initial(self) -> dict:
    return self.init_fn(self.key())

  def key(self) -> jax.Array:
    return jax.random.key(self.run.seed)

  @staticmethod
  def _say(stream):
    return lambda text: print(text, file=stream, flush=True)

  def train(self) -> dict:
    run, pending, status, step = self.run, None, 'finished', self.start
    part, parts = sharding.host_share()
    batches = data.batches(
      self.frozen,
      run.batches,
      run.seed,
      start=self.start,
      process_index=part,
      process_count=parts,
    )
    for step in range(self.start + 1, run.steps + 1):
      self.state, scalars = self.step_fn(
        self.state, sharding.place(next(batches)), self.rates[step - 1]
      )
      if pending is not None and not self.look(*pending):
        status = 'nan'
        break
      pending = step, scalars
      stop = self.signal.check(step)
      if stop or step == run.steps or self.due(step):
        pending = None
        if not self.look(step, scalars):
          status = 'nan'
          break
        self.pause(
          step, last=step == run.steps, save=stop or step == run.steps or self.due_checkpoint(step)
        )
      if stop and step < run.steps:
        self.checkpoints.wait()
        raise Interrupted(f'stopped at step {step:,} with a checkpoint; start again to go on')
    return self.row(step, status)

  def due_checkpoint(self, step: int) -> bool:
    return bool(self.run.checkpoint_every) and step % self.run.checkpoint_every == 0

  def due(self, step: int) -> bool:
    return self.due_checkpoint(step) or (
      bool(self.run.eval_every) and step % self.run.eval_every == 0
    )

  def look(self, step: int, scalars: dict) -> bool:
    """Fetches a step's metrics and logs them; False when the loss is no number."""
    scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
    self.window.append(scalars)
    self.tokens += int(scalars['tokens'])
    good = math.isfinite(scalars['loss']) and math.isfinite(scalars['grad_norm'])
    if step % self.run.log_every == 0 or step == self.run.steps or not good:
      self.log(step)
    return good

  def log(self, step: int) -> None:
    """One row: means over the steps since the last row."""
    now = time.monotonic()
    window, seconds = self.window, max(now - self.clock, 1e-9)
    tokens = sum(w['tokens'] for w in window)
    mean = lambda key: sum(w[key] for w in window) / len(window)
    row = {'step': step, 'tokens': self.tokens} | {k: mean(k) for k in window[0] if k != 'tokens'}
    row |= {'learning_rate': float(self.rates[step - 1]), 'tokens_per_second': tokens / seconds}
    row['flops_per_second'] = row['tokens_per_second'] * self.progress.flops_per_token
    self.window, self.clock = [], now
    self.rows.write(row)
    self.progress.show(row, last=step == self.run.steps)

  def pause(self, step: int, last: bool, save: bool) -> None:
    """Between steps: evaluate, save."""
    began = time.monotonic()
    if last or (self.run.eval_every and step % self.run.eval_every == 0):
      self.last_evaluation = self.evaluate()
      self.rows.write(
        {
          'step': step,
          'tokens': self.tokens,
          **{f'validation/{k}': v for k, v in self.last_evaluation.items()},
        }
      )
      self.progress.say(
        f'step {step:,}: validation loss {self.last_evaluation["loss"]:.4f} nats/token, '
        f'{self.last_evaluation["bits_per_byte"]:.4f} bits/byte'
      )
    if save:
      self.rows.flush()  # a run resumed from here drops what is later, and lacks nothing earlier
      self.checkpoints.save(
        step, self.state, {'tokens': self.tokens, 'seconds': time.monotonic() - self.began}
      )
    self.clock += time.monotonic() - began  # speed is of training alone

  def evaluate(self) -> dict[str, float]:
    """Mean over all target tokens of the validation stream, in nats per token and bits per byte; for a mixture
    also the loss on each of its parts."""
    mixture = isinstance(self.validation, data.FrozenMixture)
    parts = self.validation.parts if mixture else {'': self.validation}
    sums = {name: self.sum_losses(part) for name, part in parts.items()}
    nll, tokens = (sum(s) for s in zip(*sums.values(), strict=True))
    size = sum(sums[name][1] * part.bytes_per_token for name, part in parts.items())
    losses = {f'{name}/loss': n / t for name, (n, t) in sums.items()} if mixture else {}
    return {'loss': nll / tokens, 'bits_per_byte': nll / math.log(2) / size, **losses}

  def sum_losses(self, frozen) -> tuple[float, float]:
    """Nats and target tokens of a whole stream."""
    batches = data.eval_batches(frozen, self.run.batch_size, *sharding.host_share())
    sums = [self.evaluate_fn(self.state['params'], sharding.place(batch)) for batch in batches]
    nll, tokens = zip(*jax.device_get(sums), strict=True)
    return float(np.sum(nll, dtype=np.float64)), float(np.sum(tokens, dtype=np.float64))

  def row(self, step: int, status: str) -> dict:
    """The run as one row: N, D and C by every convention, the loss, the hyper-parameters."""
    run, evaluation = self.run, getattr(self, 'last_evaluation', {}) if status == 'finished' else {}
    if status == 'finished' and not evaluation:
      evaluation = self.evaluate()
    if status == 'nan':
      self.progress.say(
        f'step {step:,}: the loss is not a number; stopped, the last good checkpoint is kept'
      )
    epochs = self.frozen.epochs(run.batches.examples(step))
    mixture = isinstance(self.frozen, data.FrozenMixture)
    return {
      'status': status,
      **{k: v for k, v in vars(self.count).items() if k.startswith('params_')},
      'tokens': self.tokens,
      'epochs': max(epochs.values()),
      **({f'{name}/epochs': n for name, n in epochs.items()} if mixture else {}),
      **{k: v * self.tokens for k, v in vars(self.count).items() if k.startswith('flops_')},
      'loss': evaluation.get('loss'),
      'bits_per_byte': evaluation.get('bits_per_byte'),
      **{name: value for name, value in evaluation.items() if name.endswith('/loss')},
      'steps': step,
      'batch_size': run.batch_size,
      'length': run.target_length,
      'learning_rate': float(self.rates.max()),
      'seed': run.seed,
      'task': run.train.name,
      'seconds': time.monotonic() - self.began,
      'devices': jax.device_count(),
    }  # fmt: skip

  def close(self):
    self.signal.restore()
    self.checkpoints.close()
    self.rows.close()


def default_workdir(gin_files: list[str]) -> pathlib.Path:
  return pathlib.Path('runs') / pathlib.Path(gin_files[0]).stem


def main(flags) -> int:
  cluster = distributed.find(flags.coordinator, flags.num_processes, flags.process_id)
  distributed.initialize(cluster, log=lambda text: print(text, file=sys.stderr, flush=True))
  config = configs.load(flags.gin_file, flags.gin)
  run = config.build()
  workdir = places.place(flags.workdir or default_workdir(flags.gin_file))
  try:
    with config.explains():
      row = train(run, workdir, config.text)
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    return 143
  print(json.dumps({'workdir': str(workdir), **row}))
  return 0 if row['status'] == 'finished' else 1


if __name__ == '__main__':
  cli.run(main, FLAGS)
