"""Runs of one shape trained in one compiled step, along an axis of members.

Members differ in numbers alone: seed (initialisation and order of the data), schedule and so learning rate
and warm-up, weight decay and its like, z-loss. Each leaves in its workdir what `research.train` leaves of a
run, may be resumed by it, and may have been begun by it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research import data, sharding, train
from research.errors import UserError
from research.run import Run
from research.training import ahead, metrics, places

OPTIMIZER_INPUTS = ('weight_decay', 'weight_decay_rate', 'b1', 'b2', 'eps')
"""Numbers of optimizers that members may differ in; optax computes with them and never asks what they are."""


def _any_schedule(steps: int):
  """Stands for a schedule in the comparison of runs: rates are inputs of the step."""


def _inputs(run: Run) -> dict[str, float]:
  """The numbers of a run, beside its rates and its seed, that its compiled step takes as inputs."""
  bound = run.optimizer.keywords if isinstance(run.optimizer, functools.partial) else {}
  return {'z_loss': run.z_loss, **{k: bound[k] for k in OPTIMIZER_INPUTS if k in bound}}


def _with_inputs(run: Run, values: dict) -> Run:
  bound = {k: v for k, v in values.items() if k != 'z_loss'}
  optimizer = functools.partial(run.optimizer, **bound) if bound else run.optimizer
  return dataclasses.replace(run, z_loss=values['z_loss'], optimizer=optimizer)


def shape(run: Run) -> str:
  """A text that is equal for runs that may be members of one population."""
  run = _with_inputs(run, dict.fromkeys(_inputs(run), 0.0))
  run = dataclasses.replace(run, seed=0, schedule=_any_schedule)
  reports = ('log_every', 'checkpoint_every', 'keep_checkpoints')
  return run.identity() + ''.join(f'{name} = {getattr(run, name)}\n' for name in reports)


def possible(run: Run) -> bool:
  """Whether a run may be a member at all: it lives on one device, and one process."""
  return run.mesh is None and jax.process_count() == 1


def share_cores(most: int) -> bool:
  """Makes the cores that this process may use, `most` at most, devices of jax, which has not started yet.

  A core to a member: by itself jax would divide every product over the cores, which small ones do not repay.
  True where there are several; then a run that is alone has one core.
  """
  devices = min(sharding.cores(), most)
  if devices > 1:
    os.environ['PJRT_NPROC'] = '1'  # threads to divide a product over; a device has one of its own
    jax.config.update('jax_num_cpu_devices', devices)
  return devices > 1


def _one_by_one() -> bool:
  return jax.devices()[0].platform == 'cpu'


class _Member(train._Loop):
  """The record of a member: its rows, its checkpoints and its fate. Its state is the population's."""

  def __init__(self, *args, size: int, sums):
    self.size, self.sums, self.status = size, sums, None
    super().__init__(*args)
    self.at = self.start

  @property
  def order(self) -> tuple[int, int]:
    """What the order of its batches follows from."""
    return self.run.seed, self.start

  def compile(self):
    pass  # for all members at once, and so is the state made

  def initial(self):
    return None

  def sum_losses(self, frozen) -> tuple[float, float]:
    return self.sums(frozen)

  def row(self, step: int, status: str) -> dict:
    row = super().row(step, status)
    devices = len(jax.sharding.get_mesh().devices.ravel())
    # A member's share of the time, so that the rows of a sweep add up.
    return {
      **row,
      'seconds': row['seconds'] / self.size,
      'devices': devices,
      'population': self.size,
    }

  def end(self, status: str) -> None:
    self.status = status
    row = self.row(self.at, status)
    metrics.write_atomic(self.workdir / 'run.json', json.dumps(row, indent=1) + '\n')
    self.final = row


def train_population(
  runs: Sequence[Run],
  workdirs: Sequence[str | pathlib.Path],
  texts: Sequence[str] | None = None,
  streams: Sequence | None = None,
) -> list[dict]:
  """Trains runs of one `shape` together, each to its end or from where its checkpoint left it.

  A member whose loss is no number ends as 'nan'; the others go on. Equal to the runs trained one by one up to
  the rounding of another compiled program.

  Args:
    runs: of one shape; their learning rates, seeds, weight decays, z-losses may differ.
    workdirs: of each run.
    texts: the gin text of each run, for its config.gin.
    streams: where each run's progress is written.

  Returns:
    The row of each run, as `research.train.train` returns it, with the members' number as 'population'.

  Raises:
    UserError: the runs differ in more than that, or something does not fit.
    train.Interrupted: SIGTERM came; every member's checkpoint was saved.
  """
  shapes = [shape(run) for run in runs]
  if len(set(shapes)) > 1:
    there = next(text for text in shapes if text != shapes[0])
    lines = zip(shapes[0].splitlines(), there.splitlines(), strict=False)
    first, other = next(pair for pair in lines if pair[0] != pair[1])
    raise UserError(
      f'runs of a population have one shape, and these differ ("{first.strip()}", "{other.strip()}").'
    )
  if not possible(runs[0]):
    raise UserError(
      'members of a population live on one device each, of one process: unset Run.mesh.'
    )
  workdirs = [places.place(workdir) for workdir in workdirs]
  texts = texts or [''] * len(runs)
  streams = streams or [sys.stderr] * len(runs)
  train.keep_compiled()
  devices = jax.devices()[: len(runs)]
  mesh = jax.make_mesh((len(devices),), ('member',), devices=devices)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    for run, workdir, text in zip(runs, workdirs, texts, strict=True):
      train.open_workdir(workdir, run, text)
    population = Population(runs, workdirs, streams, stack)
    return population.train()


class Population:
  """Members, their states as arrays [places, ...], and the step that advances them all.

  Every device has as many places; where the members do not fill them the last ones are idle.
  """

  def __init__(self, runs, workdirs, streams, stack: contextlib.ExitStack):
    run, self.size = runs[0], len(runs)
    self.spare = -len(runs) % jax.sharding.get_mesh().size  # places that no member has
    say = lambda text: print(text, file=streams[0], flush=True)
    frozen, validation = data.open_streams([run.train, run.validation], log=say)
    self.program = train.make_program(run)
    train.check_fits(run, self.program.vocab, self.program.inputs, frozen)
    self.runs, self.frozen, self.batch_size = runs, frozen, run.batch_size
    self.inputs = {k: [_inputs(r)[k] for r in runs] for k in _inputs(run)}
    # What is equal stays a constant of the program, as it is in a run's own.
    self.inputs = {
      k: self.spread(np.asarray(v, np.float32)) for k, v in self.inputs.items() if len(set(v)) > 1
    }
    self.compile(workdirs, validation)
    count, self.members = train.count_of(run), []
    each = zip(runs, workdirs, streams, train.rates(runs), strict=True)
    for i, (own, workdir, stream, rates) in enumerate(each):
      record = own, self.program, workdir, frozen, validation, count, rates, stream
      member = _Member(*record, size=self.size, sums=functools.partial(self.sums, i))
      stack.callback(member.close)  # the last first: each restores the signal's handler before it
      self.members.append(member)
    self.state = self.first_state()
    self.evaluated: dict = {}

  # What is compiled.

  def over_members(self, f):
    """(member's arguments, shared arguments) -> f of them, for all members that are `active`.

    What f makes of `state`, its first result where it has one, stays as it was for others; the rest is zero.
    Each device has its share of the members. On an accelerator it does that at once, which fills it. A CPU is
    filled by one, and goes through them one by one, each in its place: products of a batch of small matrices
    are slow there, and a member fits into its cache.
    """
    f = jax.jit(f)  # is traced once

    def share(own, shared):
      active, at = own['active'], lambda i, tree: jax.tree.map(lambda x: x[i], tree)
      zeros = lambda x: jnp.zeros((len(active), *x.shape), x.dtype)
      made = jax.tree.map(zeros, jax.eval_shape(f, at(0, own), shared))
      if 'state' in own:
        made = own['state'], *made[1:]
      if not _one_by_one():
        other = lambda own, made: jax.lax.cond(own['active'], lambda: f(own, shared), lambda: made)
        return jax.vmap(other)(own, made)
      order = jnp.argsort(~active, stable=True)

      def one(i, made):
        mine = {**own, 'state': made[0]} if 'state' in own else own
        new = f(at(order[i], mine), shared)
        put = lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, order[i], 0)
        return jax.tree.map(put, made, new)

      return jax.lax.fori_loop(0, jnp.sum(active), one, made)

    share.__name__ = f.__name__  # in logs and profiles
    specs = (jax.P('member'), jax.P())
    return jax.shard_map(share, in_specs=specs, out_specs=jax.P('member'), check_vma=False)

  def compile(self, workdirs, validation) -> None:
    """Begins to compile what makes, trains and evaluates the members, before they are opened."""
    init, one, evaluate = map(self.over_members, (self.init, self.step, self.evaluate))

    def step(state, own, shared):
      return one({'state': state, **own}, shared)

    state = ahead.on_mesh(jax.eval_shape(init, self.seeds(), ()))
    saved = [places.saved_steps(workdir / 'checkpoints') for workdir in workdirs]
    self.init_fn = ahead.jit(init, *([] if all(saved) else [self.seeds(), ()]))
    orders = [(r.seed, max(steps, default=0)) for r, steps in zip(self.runs, saved, strict=True)]
    batches = {o: data.batch_at(self.frozen, self.program.run.batches, *o) for o in orders}
    active = self.spread([True] * self.size, spare=False)
    arguments = self.arguments(batches, orders, [0.0] * self.size, active)
    self.step_fn = ahead.jit(step, state, *arguments, donate_argnums=0)
    batch = next(data.eval_batches(validation, self.batch_size))
    own = {'params': state['params'], 'active': active}
    self.evaluate_fn = ahead.jit(evaluate, own, self.shared(batch))

  def seeds(self) -> dict:
    """The arguments of `init`."""
    keys = [jax.random.key_data(jax.random.key(run.seed)) for run in self.runs]
    return {'key': self.spread(keys), 'active': self.spread([True] * self.size)}

  def first_state(self) -> dict:
    """[places, ...]: restored or made."""
    members = self.members
    if any(m.state is None for m in members):
      made = self.init_fn(self.seeds(), ())
    if all(m.state is None for m in members):
      return made
    host = lambda i, m: jax.device_get(
      m.state if m.state is not None else jax.tree.map(lambda x: x[i], made)
    )
    states = [host(i, m) for i, m in enumerate(members)]
    for m in members:
      m.state = None
    return jax.tree.map(lambda *x: self.spread(x), *states)

  def init(self, own: dict, shared) -> dict:
    return self.program.init(jax.random.wrap_key_data(own['key']))

  def step(self, own: dict, shared: dict) -> tuple[dict, dict]:
    """One member's update."""
    program = self.program
    if own['inputs']:
      values = {**_inputs(program.run), **own['inputs']}
      program = dataclasses.replace(program, run=_with_inputs(program.run, values))
    return program.step(own['state'], own['batch'] or shared['batch'], own['rate'])

  def evaluate(self, own: dict, shared: dict) -> tuple[jax.Array, jax.Array]:
    return self.program.evaluate(own['params'], shared['batch'])

  def place(self, x, axis: str | None = 'member'):
    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(axis)))

  def shared(self, batch: dict) -> dict:
    return {'batch': {k: self.place(v, None) for k, v in batch.items()}}

  def spread(self, values: Sequence, spare=None):
    """[places, ...] of a value of each member; `spare`, or the first one's again, where there is no member."""
    more = [values[0] if spare is None else spare] * self.spare
    return self.place(np.stack([*values, *more]))

  def active(self):
    return self.spread([m.status is None for m in self.members], spare=False)

  # The loop.

  def train(self) -> list[dict]:
    members = self.members
    batches = {m.order: data.batches(self.frozen, m.run.batches, *m.order) for m in members}
    self.pause([m for m in members if m.at == m.run.steps])
    pending = []
    while live := self.living():
      scalars = self.advance(batches)
      for m in live:
        m.at += 1
      self.look(pending)
      pending = [(m, m.at, scalars) for m in self.living()]
      stop = members[-1].signal.check(live[0].at)
      if stop or any(m.at == m.run.steps or m.due(m.at) for m in live):
        self.look(pending)
        pending = []
        self.pause([m for m in self.living() if stop or m.due(m.at) or m.at == m.run.steps], stop)
      if stop and self.living():
        for m in members:
          m.checkpoints.wait()
        raise train.Interrupted('stopped, with a checkpoint of every member; start again to go on')
    return [m.final for m in members]

  def living(self) -> list[_Member]:
    return [m for m in self.members if m.status is None]

  def advance(self, batches: dict) -> dict:
    """Dispatches the next step of every member that is in training; the metrics [members] of it."""
    members, self.evaluated = self.members, {}
    new = {order: next(stream) for order, stream in batches.items()}
    rates = [m.rates[min(m.at, m.run.steps - 1)] for m in members]
    arguments = self.arguments(new, [m.order for m in members], rates, self.active())
    self.state, scalars = self.step_fn(self.state, *arguments)
    return scalars

  def arguments(self, batches: dict, orders: list, rates: list, active) -> tuple[dict, dict]:
    """What the step takes beside the state: each member's own, and what they share.

    Args:
      batches: host arrays by order of the data, one that all members share or several.
      orders: of each member.
      rates: of each member.
      active: [places], who is in training.
    """
    own = {
      'batch': {},
      'rate': self.spread(np.asarray(rates, np.float32)),
      'active': active,
      'inputs': self.inputs,
    }
    if len(batches) == 1:
      (batch,) = batches.values()
      return own, self.shared(batch)
    rows = [batches[order] for order in orders]
    return {
      **own,
      'batch': {k: self.spread([row[k] for row in rows]) for k in rows[0]},
    }, self.shared({})

  def look(self, pending: list) -> None:
    """The members' metrics of a step; who has no number for a loss is out."""
    if pending:
      scalars = jax.device_get(pending[0][2])
    for m, step, _ in pending:
      i = self.members.index(m)
      if not m.look(step, {k: v[i] for k, v in scalars.items()}):
        m.end('nan')

  def pause(self, due: list[_Member], stop: bool = False) -> None:
    """Between steps: those who are due are evaluated, saved, and ended after their last step."""
    host = jax.device_get(self.state) if due else None
    for m in due:
      i, last = self.members.index(m), m.at == m.run.steps
      m.state = jax.tree.map(lambda x, i=i: np.array(x[i]), host)
      m.pause(m.at, last=last, save=last or stop or m.due_checkpoint(m.at))
      if last:
        m.end('finished')
      m.state = None

  def sums(self, i: int, frozen) -> tuple[float, float]:
    """Nats and target tokens of a whole stream, of member i; of all those in training at once."""
    if id(frozen) not in self.evaluated:
      own, results = {'params': self.state['params'], 'active': self.active()}, []
      for batch in data.eval_batches(frozen, self.batch_size):
        results.append(self.evaluate_fn(own, self.shared(batch)))
      nll, tokens = np.asarray(jax.device_get(results), np.float64).sum(0)
      self.evaluated[id(frozen)] = nll, tokens
    nll, tokens = self.evaluated[id(frozen)]
    return float(nll[i]), float(tokens[i])
