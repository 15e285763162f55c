"""Trains several runs of one shape in one compiled step, along an axis of members.

Members differ only in numbers: the seed (initialisation and order of the data), the schedule (learning rate and
warm-up), weight decay and other numbers of the optimizer, numbers of the loss. The workdir of a member looks
like that of a run by `research.train`, and either may resume the other.
"""

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
from research.parallel import dispatch, hosts
from research.training import background_jit, checks, interrupt, schedules
from research.training.alike import check_alike, inputs_of
from research.training.interrupt import TerminationSignal
from research.training.loop import total
from research.training.member import Member, MemberProgram
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
  """Trains runs of one `alike.shape` together, each to its end, from its last checkpoint if it has one.

  A member whose loss is not finite ends as 'nan', and the others continue. The results equal those of the runs
  trained one by one, up to the rounding of a different compiled program.

  Args:
    runs: runs of one shape; their learning rates, seeds, weight decays and z-losses may differ.
    workdirs: the workdir of each run.
    texts: the gin text of each run, for its config.gin.
    streams: where the progress of each run is printed; stderr by default.

  Returns:
    The row of each run, as `loop.train` returns it, with the number of members as 'population'.

  Raises:
    UserError: the runs differ in more than these numbers, or something does not fit.
    Interrupted: the process received SIGTERM; every member's checkpoint was saved.
  """
  check_alike(runs)
  workdirs = [storage.place(workdir) for workdir in workdirs]
  texts = texts or [''] * len(runs)
  streams = streams or [sys.stderr] * len(runs)
  dispatch.run_one_program_at_once()
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
  """The members, their states as arrays [places, ...], and the step that updates them all.

  Every device has the same number of places. If there are more places than members, the last ones are idle.
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
    # A number that is equal for all members stays a constant of the program, as in a run that is trained alone.
    values = {name: [inputs_of(r)[name] for r in runs] for name in inputs_of(run)}
    self.inputs = {
      name: self.spread(np.asarray(value, np.float32))
      for name, value in values.items()
      if len(set(value)) > 1
    }
    self.fixed = self.program.fixed()
    self.signal = TerminationSignal()
    # XLA compiles in the background while the checkpoints are read.
    self.compile(workdirs, validation)
    self.evaluated: dict = {}  # sums of all members by stream, for the current step
    self.members: list[Member] = []
    self.open_members(workdirs, validation, streams)
    self.state = self.first_state()

  def open_members(self, workdirs, validation, streams) -> None:
    """Opens every member's record, which restores its checkpoint if there is one."""
    count = checks.count_of(self.runs[0])
    all_rates = schedules.rates(self.runs)
    for i, (run, workdir, stream) in enumerate(zip(self.runs, workdirs, streams, strict=True)):
      sum_losses = functools.partial(self.sum_losses, i)
      params = functools.partial(self.params_of, i)
      record = Record(
        run, workdir, self.frozen, validation, count, all_rates[i], stream, self.program.abstract,
        sum_losses, params, base=self.program.base(),
      )  # fmt: skip
      self.members.append(Member(record, self.size))

  def params_of(self, i: int) -> dict:
    """Returns all parameters of member i, as host arrays."""
    params = jax.tree.map(lambda x: np.array(x[i]), jax.device_get(self.state['params']))
    return jax.device_get(self.program.whole(params, self.fixed))

  def close(self) -> None:
    self.signal.restore()
    for member in self.members:
      member.record.close()

  # Compilation.

  def compile(self, workdirs, validation) -> None:
    """Starts to compile init, step and evaluate in the background, before the records are opened."""
    member = MemberProgram(self.program)
    init, step_members, evaluate = map(over_members, (member.init, member.step, member.evaluate))

    # The state is an argument of its own, so that its memory can be donated.
    def step(state, varying, shared):
      return step_members({'state': state, **varying}, shared)

    state = hosts.on_mesh(jax.eval_shape(init, self.seeds(), {}))
    saved = [folders.saved_steps(workdir / 'checkpoints') for workdir in workdirs]
    self.initial = {} if all(saved) else self.program.initial_values()
    # If all members resume, init is not called, and without arguments it is not compiled.
    arguments = [] if all(saved) else [self.seeds(), self.initial]
    self.init_fn = background_jit.jit(init, *arguments)
    orders = [(r.seed, max(steps, default=0)) for r, steps in zip(self.runs, saved, strict=True)]
    batches = {o: batch_at(self.frozen, self.program.run.batches, *o) for o in orders}
    active = self.spread([True] * self.size, spare=False)
    arguments = self.arguments(batches, orders, [0.0] * self.size, active)
    self.step_fn = background_jit.jit(step, state, *arguments, donate_argnums=0)
    batch = next(eval_batches(validation, self.batch_size))
    varying = {'params': state['params'], 'active': active}
    self.evaluate_fn = background_jit.jit(evaluate, varying, self.shared(batch))

  def seeds(self) -> dict:
    """Returns the members' arguments of `init`."""
    keys = [jax.random.key_data(jax.random.key(run.seed)) for run in self.runs]
    return {'key': self.spread(keys), 'active': self.spread([True] * self.size)}

  def first_state(self) -> dict:
    """Returns the states [places, ...]: of each member the restored state, or a new one."""
    records = [member.record for member in self.members]
    new = None
    if any(record.state is None for record in records):
      # `initial` is empty here if all checkpoints of a member were damaged.
      new = self.init_fn(self.seeds(), self.initial or self.program.initial_values())
    self.initial = {}  # the members' states hold its values; free its memory
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

  # Arrays over the members.

  def place(self, x, axis: str | None = 'member'):
    """Puts a host array on the mesh, split over its members, or copied to all devices where axis is None."""
    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(axis)))

  def shared(self, batch: dict) -> dict:
    """Returns the arguments that all members share."""
    return {'batch': {k: self.place(v, None) for k, v in batch.items()}, 'fixed': self.fixed}

  def spread(self, values: Sequence, spare=None):
    """Stacks one value per member to [places, ...]. Idle places get `spare`, or the first value again."""
    more = [values[0] if spare is None else spare] * self.spare
    return self.place(np.stack([*values, *more]))

  def active(self):
    """Returns which places have a member in training, [places] booleans."""
    return self.spread([member.status is None for member in self.members], spare=False)

  def arguments(self, batches: dict, orders: list, rates: list, active) -> tuple[dict, dict]:
    """Returns the arguments of the step beside the state: those of each member, and the shared ones.

    Args:
      batches: the host batch of every order of the data. With a single order all members share the batch.
      orders: each member's order of the data.
      rates: each member's learning rate.
      active: [places], which members are in training.
    """
    rates = self.spread(np.asarray(rates, np.float32))
    varying = {'batch': {}, 'rate': rates, 'active': active, 'inputs': self.inputs}
    if len(batches) == 1:
      (batch,) = batches.values()
      return varying, self.shared(batch)
    rows = [batches[order] for order in orders]
    varying['batch'] = {name: self.spread([row[name] for row in rows]) for name in rows[0]}
    return varying, self.shared({})

  # Training.

  def train(self) -> list[dict]:
    """Trains every member to its end; returns their rows.

    Raises:
      Interrupted: the process received SIGTERM; every member's checkpoint was saved.
    """
    members = self.members
    start = functools.partial(batches_module.batches, self.frozen)
    batches = {m.order: start(m.run.batches, *m.order) for m in members}
    self.pause([member for member in members if member.step == member.run.steps])
    pending = []
    while live := self.living():
      scalars = self.advance(batches)
      for member in live:
        member.step += 1
      # The metrics of the step before: the devices have the next step to compute while the host waits for them.
      self.log_step(pending)
      pending = [(member, member.step, scalars) for member in self.living()]
      stop = self.signal.check(live[0].step)
      if stop or any(member.record.pauses_at(member.step) for member in live):
        # Nothing is saved or evaluated before the metrics say that the states are finite.
        self.log_step(pending)
        pending = []
        due = [m for m in self.living() if stop or m.record.pauses_at(m.step)]
        self.pause(due, stop)
      if stop and self.living():
        for member in members:
          member.record.checkpoints.wait()
        why = 'stopped with a checkpoint of every member; start the same command again to continue'
        raise interrupt.Interrupted(why)
    return [member.final for member in members]

  def living(self) -> list[Member]:
    """Returns the members that are in training."""
    return [member for member in self.members if member.status is None]

  def advance(self, batches: dict) -> dict:
    """Dispatches the next step of every member that is in training; returns its metrics [members]."""
    self.evaluated = {}
    new = {order: next(stream) for order, stream in batches.items()}
    # A member that has ended needs some rate as well: the step ignores it.
    rates = [m.record.rates[min(m.step, m.run.steps - 1)] for m in self.members]
    orders = [member.order for member in self.members]
    arguments = self.arguments(new, orders, rates, self.active())
    self.state, scalars = self.step_fn(self.state, *arguments)
    return scalars

  def log_step(self, pending: list) -> None:
    """Logs the members' metrics of a step, and ends members whose loss is not finite."""
    if not pending:
      return
    scalars = jax.device_get(pending[0][2])
    for member, step, _ in pending:
      i = self.members.index(member)
      if not member.record.log_step(step, {name: value[i] for name, value in scalars.items()}):
        member.step = step  # and not that of the update after it, which is under way
        member.end('nan')

  def pause(self, due: list[Member], stop: bool = False) -> None:
    """Between two steps: evaluates and saves the members that are due, and ends those at their last step."""
    host = jax.device_get(self.state) if due else None
    for member in due:
      i = self.members.index(member)
      state = jax.tree.map(lambda x, i=i: np.array(x[i]), host)
      record = member.record
      finite = record.pause(member.step, state, save=stop or record.saves_at(member.step))
      if not finite or member.step == member.run.steps:
        member.end('finished' if finite else 'nan')

  def sum_losses(self, i: int, frozen) -> dict[str, float]:
    """Returns member i's sums over a whole stream. The first call computes those of all members in training."""
    if id(frozen) not in self.evaluated:
      varying = {'params': self.state['params'], 'active': self.active()}
      batches = eval_batches(frozen, self.batch_size)
      results = [self.evaluate_fn(varying, self.shared(batch)) for batch in batches]
      self.evaluated[id(frozen)] = total(results)
    return {name: value[i] for name, value in self.evaluated[id(frozen)].items()}
