"""Runs of one shape trained in one compiled step, along an axis of members.

Members differ only in numbers: the seed (initialisation and order of the data), the schedule (learning rate and
warm-up), weight decay and other numbers of the optimizer, numbers of the loss. Each leaves in its workdir what
`research.train` leaves of a run. Either may resume what the other began.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from research.checkpoints import folders
from research.core import storage
from research.data import batches as batches_module
from research.data import cache
from research.data.batches import batch_at, eval_batches
from research.parallel import hosts
from research.training import background_jit, checks, interrupt
from research.training import program as program_module
from research.training.alike import check_alike, inputs_of, with_inputs
from research.training.interrupt import TerminationSignal
from research.training.loop import total
from research.training.member import Member
from research.training.over_members import over_members
from research.training.program import keep_compiled, make_program
from research.training.record import Record
from research.training.run import Run
from research.training.workdir import open_workdir


def train_population(
  runs: Sequence[Run],
  workdirs: Sequence[str | pathlib.Path],
  texts: Sequence[str] | None = None,
  streams: Sequence | None = None,
) -> list[dict]:
  """Trains runs of one `shape` together, each to its end or from where its checkpoint left it.

  A member whose loss is not finite ends as 'nan' and the others go on. Equal to the runs trained one by one, up
  to the rounding of another compiled program.

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
  check_alike(runs)
  workdirs = [storage.place(workdir) for workdir in workdirs]
  texts = texts or [''] * len(runs)
  streams = streams or [sys.stderr] * len(runs)
  keep_compiled()
  devices = jax.devices()[: len(runs)]
  mesh = jax.make_mesh((len(devices),), ('member',), devices=devices)
  with jax.set_mesh(mesh):
    checks.check_start(runs[0])
    for run, workdir, text in zip(runs, workdirs, texts, strict=True):
      open_workdir(workdir, run, text)
    population = Population(runs, workdirs, streams)
    try:
      return population.train()
    finally:
      population.close()


class Population:
  """Members, their states as arrays [places, ...], and the step that advances them all.

  Every device has the same number of places. Where the members do not fill them, the last places are idle.
  """

  def __init__(self, runs, workdirs, streams):
    run = runs[0]
    self.runs = runs
    self.size = len(runs)
    self.spare = -len(runs) % jax.sharding.get_mesh().size  # places without a member

    def say(text: str) -> None:
      print(text, file=streams[0], flush=True)

    self.frozen, validation = cache.open_streams([run.train, run.validation], log=say)
    self.program = make_program(run)
    checks.check_fits(run, self.program.vocab, self.program.inputs, self.frozen, validation)
    self.batch_size = run.batch_size
    # A number that is equal for all stays a constant of the program, as it is in a run's own.
    values = {name: [inputs_of(r)[name] for r in runs] for name in inputs_of(run)}
    self.inputs = {
      name: self.spread(np.asarray(value, np.float32))
      for name, value in values.items()
      if len(set(value)) > 1
    }
    self.fixed = self.program.fixed()
    self.signal = TerminationSignal()
    self.compile(workdirs, validation)
    self.evaluated: dict = {}
    self.members: list[Member] = []
    self.open_members(workdirs, validation, streams)
    self.state = self.first_state()

  def open_members(self, workdirs, validation, streams) -> None:
    """Opens every member's record, and restores the checkpoint where there is one."""
    count = checks.count_of(self.runs[0])
    all_rates = program_module.rates(self.runs)
    for i, (run, workdir, stream) in enumerate(zip(self.runs, workdirs, streams, strict=True)):
      own = functools.partial(self.sum_losses, i), functools.partial(self.params_of, i)
      record = Record(
        run, workdir, self.frozen, validation, count, all_rates[i], stream, self.program.abstract, *own,
        base=self.program.base(),
      )  # fmt: skip
      self.members.append(Member(record, self.size))

  def params_of(self, i: int) -> dict:
    """Those of member i, host arrays."""
    params = jax.tree.map(lambda x: np.array(x[i]), jax.device_get(self.state['params']))
    return jax.device_get(self.program.whole(params, self.fixed))

  def close(self) -> None:
    self.signal.restore()
    for member in self.members:
      member.record.close()

  # What is compiled.

  def compile(self, workdirs, validation) -> None:
    """Begins to compile what makes, trains and evaluates the members, before their records are opened."""
    init, one, evaluate = map(over_members, (self.init, self.step, self.evaluate))

    def step(state, own, shared):
      return one({'state': state, **own}, shared)

    state = hosts.on_mesh(jax.eval_shape(init, self.seeds(), {}))
    saved = [folders.saved_steps(workdir / 'checkpoints') for workdir in workdirs]
    self.given = {} if all(saved) else self.program.given()
    self.init_fn = background_jit.jit(init, *([] if all(saved) else [self.seeds(), self.given]))
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
    """[places, ...]: each member's restored state, or a new one."""
    records = [member.record for member in self.members]
    new = None
    if any(record.state is None for record in records):
      new = self.init_fn(self.seeds(), self.given or self.program.given())
    self.given = {}  # it is in the members' states
    if all(record.state is None for record in records):
      return new
    states = []
    for i, record in enumerate(records):
      state = record.state
      if state is None:
        state = jax.tree.map(lambda x, i=i: x[i], new)
      states.append(jax.device_get(state))
      record.state = None
    return jax.tree.map(lambda *x: self.spread(x), *states)

  def init(self, own: dict, given: dict) -> dict:
    return self.program.init(jax.random.wrap_key_data(own['key']), given)

  def step(self, own: dict, shared: dict) -> tuple[dict, dict]:
    """One member's update."""
    program = self.program
    if own['inputs']:
      values = {**inputs_of(program.run), **own['inputs']}
      program = dataclasses.replace(program, run=with_inputs(program.run, values))
    batch = own['batch'] or shared['batch']
    return program.step(own['state'], batch, own['rate'], shared['fixed'])

  def evaluate(self, own: dict, shared: dict) -> dict:
    return self.program.evaluate(own['params'], shared['batch'], shared['fixed'])

  # Arrays over the members.

  def place(self, x, axis: str | None = 'member'):
    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(axis)))

  def shared(self, batch: dict) -> dict:
    return {'batch': {k: self.place(v, None) for k, v in batch.items()}, 'fixed': self.fixed}

  def spread(self, values: Sequence, spare=None):
    """[places, ...] of a value of each member; `spare`, or the first one's again, where there is no member."""
    more = [values[0] if spare is None else spare] * self.spare
    return self.place(np.stack([*values, *more]))

  def active(self):
    return self.spread([member.status is None for member in self.members], spare=False)

  def arguments(self, batches: dict, orders: list, rates: list, active) -> tuple[dict, dict]:
    """What the step takes beside the state: each member's own, and what they share.

    Args:
      batches: host arrays by order of the data, one that all members share or several.
      orders: of each member.
      rates: of each member.
      active: [places], which members are in training.
    """
    rates = self.spread(np.asarray(rates, np.float32))
    own = {'batch': {}, 'rate': rates, 'active': active, 'inputs': self.inputs}
    if len(batches) == 1:
      (batch,) = batches.values()
      return own, self.shared(batch)
    rows = [batches[order] for order in orders]
    own['batch'] = {name: self.spread([row[name] for row in rows]) for name in rows[0]}
    return own, self.shared({})

  # The loop.

  def train(self) -> list[dict]:
    """Trains every member to its end; returns their rows.

    Raises:
      Interrupted: SIGTERM was received; every member's checkpoint was saved.
    """
    members = self.members
    start = functools.partial(batches_module.batches, self.frozen)
    batches = {m.order: start(m.run.batches, *m.order) for m in members}
    self.pause([member for member in members if member.at == member.run.steps])
    pending = []
    while live := self.living():
      scalars = self.advance(batches)
      for member in live:
        member.at += 1
      self.look(pending)
      pending = [(member, member.at, scalars) for member in self.living()]
      stop = self.signal.check(live[0].at)
      if stop or any(member.record.pauses_at(member.at) for member in live):
        self.look(pending)
        pending = []
        due = [m for m in self.living() if stop or m.record.pauses_at(m.at)]
        self.pause(due, stop)
      if stop and self.living():
        for member in members:
          member.record.checkpoints.wait()
        why = 'stopped, with a checkpoint of every member; start again to go on'
        raise interrupt.Interrupted(why)
    return [member.final for member in members]

  def living(self) -> list[Member]:
    return [member for member in self.members if member.status is None]

  def advance(self, batches: dict) -> dict:
    """Dispatches the next step of every member that is in training; returns its metrics [members]."""
    self.evaluated = {}
    new = {order: next(stream) for order, stream in batches.items()}
    rates = [m.record.rates[min(m.at, m.run.steps - 1)] for m in self.members]
    orders = [member.order for member in self.members]
    arguments = self.arguments(new, orders, rates, self.active())
    self.state, scalars = self.step_fn(self.state, *arguments)
    return scalars

  def look(self, pending: list) -> None:
    """Looks at the members' metrics of a step; a member whose loss is not finite has ended."""
    if not pending:
      return
    scalars = jax.device_get(pending[0][2])
    for member, step, _ in pending:
      i = self.members.index(member)
      if not member.record.look(step, {name: value[i] for name, value in scalars.items()}):
        member.end('nan')

  def pause(self, due: list[Member], stop: bool = False) -> None:
    """Between steps: evaluates and saves the members that are due, and ends those after their last step."""
    host = jax.device_get(self.state) if due else None
    for member in due:
      i = self.members.index(member)
      state = jax.tree.map(lambda x, i=i: np.array(x[i]), host)
      member.record.pause(member.at, state, save=stop or member.record.saves_at(member.at))
      if member.at == member.run.steps:
        member.end('finished')

  def sum_losses(self, i: int, frozen) -> dict[str, float]:
    """Sums over a whole stream, of member i; computed for all members in training at once."""
    if id(frozen) not in self.evaluated:
      own = {'params': self.state['params'], 'active': self.active()}
      batches = eval_batches(frozen, self.batch_size)
      results = [self.evaluate_fn(own, self.shared(batch)) for batch in batches]
      self.evaluated[id(frozen)] = total(results)
    return {name: value[i] for name, value in self.evaluated[id(frozen)].items()}
