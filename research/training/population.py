"""Runs of one shape trained in one compiled step, along an axis of members.

Members differ in numbers alone: seed (initialisation and order of the data), schedule and so learning rate
and warm-up, weight decay and its like, z-loss. Each leaves in its workdir what `research.train` leaves of a
run, may be resumed by it, and may have been begun by it.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.checkpoints import folders
from research.core import storage
from research.core.errors import UserError
from research.data import batches as batches_module
from research.data import cache
from research.data.batches import batch_at, eval_batches
from research.parallel import hosts
from research.training import background_jit, checks, interrupt
from research.training import program as program_module
from research.training.alike import _inputs, _with_inputs, possible, shape
from research.training.member import _Member
from research.training.program import keep_compiled, make_program
from research.training.run import Run
from research.training.workdir import open_workdir

"""Numbers of optimizers that members may differ in; optax computes with them and never asks what they are."""


def _one_by_one() -> bool:
  return jax.devices()[0].platform == 'cpu'


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
    The row of each run, as `research.training.loop.train` returns it, with the members' number as 'population'.

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
  workdirs = [storage.place(workdir) for workdir in workdirs]
  texts = texts or [''] * len(runs)
  streams = streams or [sys.stderr] * len(runs)
  keep_compiled()
  devices = jax.devices()[: len(runs)]
  mesh = jax.make_mesh((len(devices),), ('member',), devices=devices)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    for run, workdir, text in zip(runs, workdirs, texts, strict=True):
      open_workdir(workdir, run, text)
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
    frozen, validation = cache.open_streams([run.train, run.validation], log=say)
    self.program = make_program(run)
    checks.check_fits(run, self.program.vocab, self.program.inputs, frozen)
    self.runs, self.frozen, self.batch_size = runs, frozen, run.batch_size
    self.inputs = {k: [_inputs(r)[k] for r in runs] for k in _inputs(run)}
    # What is equal stays a constant of the program, as it is in a run's own.
    self.inputs = {
      k: self.spread(np.asarray(v, np.float32)) for k, v in self.inputs.items() if len(set(v)) > 1
    }
    self.compile(workdirs, validation)
    count, self.members = checks.count_of(run), []
    each = zip(runs, workdirs, streams, program_module.rates(runs), strict=True)
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

    state = hosts.on_mesh(jax.eval_shape(init, self.seeds(), ()))
    saved = [folders.saved_steps(workdir / 'checkpoints') for workdir in workdirs]
    self.init_fn = background_jit.jit(init, *([] if all(saved) else [self.seeds(), ()]))
    orders = [(r.seed, max(steps, default=0)) for r, steps in zip(self.runs, saved, strict=True)]
    batches = {o: batch_at(self.frozen, self.program.run.batches, *o) for o in orders}
    active = self.spread([True] * self.size, spare=False)
    arguments = self.arguments(batches, orders, [0.0] * self.size, active)
    self.step_fn = background_jit.jit(step, state, *arguments, donate_argnums=0)
    batch = next(eval_batches(validation, self.batch_size))
    own = {'params': state['params'], 'active': active}
    self.evaluate_fn = background_jit.jit(evaluate, own, self.shared(batch))

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
    batches = {
      m.order: batches_module.batches(self.frozen, m.run.batches, *m.order) for m in members
    }
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
        raise interrupt.Interrupted(
          'stopped, with a checkpoint of every member; start again to go on'
        )
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
      for batch in eval_batches(frozen, self.batch_size):
        results.append(self.evaluate_fn(own, self.shared(batch)))
      nll, tokens = np.asarray(jax.device_get(results), np.float64).sum(0)
      self.evaluated[id(frozen)] = nll, tokens
    nll, tokens = self.evaluated[id(frozen)]
    return float(nll[i]), float(tokens[i])
