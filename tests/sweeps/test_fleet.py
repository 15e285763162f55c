"""How long a fleet takes: the simulation against the formula of restarts, and what --plan prints of it."""

import json
import math
import time
import types

import pytest

from research.core import configs
from research.core.errors import UserError
from research.sweeps import estimate, fleet
from research.sweeps.fleet import Fleet, Job, simulate
from research.sweeps.launchers import by_name, local

HOUR = 3600.0


def test_without_preemption_it_is_list_scheduling():
  jobs = [Job(seconds, math.inf) for seconds in (5.0, 3.0, 3.0, 2.0, 2.0, 1.0)]
  alone = simulate(jobs, Fleet(hosts=1, start=0.0), retries=2, seed=0)
  assert (alone.seconds, alone.trained, alone.preempted, alone.failed) == (16.0, 16.0, 0, 0)
  # The longest first: 5+2+1 and 3+3+2.
  assert simulate(jobs, Fleet(hosts=2, start=0.0), retries=2, seed=0).seconds == 8.0
  assert simulate(jobs, Fleet(hosts=9, start=0.5), retries=2, seed=0).seconds == 5.5


@pytest.mark.parametrize(('rate', 'every'), [(1.0, 600.0), (4.0, 300.0)])
def test_preemption_costs_what_the_formula_of_restarts_says(rate, every):
  """A segment of s seconds between two checkpoints takes (exp(l s) - 1) / l where hosts are lost at rate l.

  (Daly 2006, Future Generation Computer Systems 22, equation 13, without the cost of a checkpoint.) The mean of
  200 simulations of 10 hours has a standard error below 1%.
  """
  job = Job(10 * HOUR, every)
  host = Fleet(hosts=1, preemptions=rate, start=0.0, lease=0.0, replace=0.0)
  times = [simulate([job], host, retries=10**9, seed=seed).seconds for seed in range(200)]
  loss_rate = rate / HOUR
  expected = job.seconds / every * (math.exp(loss_rate * every) - 1) / loss_rate
  assert sum(times) / len(times) == pytest.approx(expected, rel=0.03)


def test_a_run_that_never_saves_fails_after_its_retries():
  jobs = [Job(5 * HOUR, math.inf)] * 20
  lossy = Fleet(hosts=4, preemptions=2.0)
  given_up = simulate(jobs, lossy, retries=2, seed=1)
  assert given_up.failed == 20  # five hours without a loss: once in exp(10)
  assert given_up.preempted == 60
  assert simulate([Job(5 * HOUR, 60.0)] * 20, lossy, retries=6, seed=1).failed == 0
  said = fleet.forecast(jobs, lossy, retries=2)
  assert '20.0 of 20 runs would fail, lost 3 times before they saved: raise Sweep.retries' in said


def test_ten_thousand_runs_are_simulated_in_seconds():
  jobs = [Job(60.0 + i % 600, 30.0) for i in range(10_000)]
  began = time.process_time()
  done = simulate(jobs, Fleet(hosts=100, preemptions=0.5), retries=5, seed=0)
  assert time.process_time() - began < 5
  total = sum(job.seconds + 30 for job in jobs)
  # No host is idle before the end, and what is lost is little: half a checkpoint's time and a new start each.
  assert total / 100 < done.seconds < 1.1 * total / 100
  assert done.failed == 0


def test_the_forecast_is_a_sentence():
  jobs = [Job(HOUR, 300.0)] * 40
  said = fleet.forecast(jobs, Fleet(hosts=10, preemptions=0.5), retries=2)
  assert said.startswith('on 10 hosts: 4:')
  assert 'each is taken away 0.5 times an hour' in said
  assert 'would fail' not in said
  assert fleet.forecast(jobs, Fleet(hosts=10, start=0.0), retries=2) == (
    "on 10 hosts: 4:00:00; 100% of the hosts' time is training"
  )


@pytest.fixture
def compiled(tmp_path):
  """What research.compile writes of a step of 6e12 FLOPs in a second."""
  path = tmp_path / 'compiled.json'
  facts = {'predicted_step_s': 1.0, 'model_flops': 6e12, 'devices': 1, 'topology': 'chip'}
  path.write_text(json.dumps(facts))
  return str(path)


def plan(monkeypatch, **flags) -> None:
  """`--plan` of two runs of an hour each that save four times."""
  sweep = types.SimpleNamespace(
    design=types.SimpleNamespace(law=False), run='run.gin', bindings=(), lease=60.0, retries=2,
    launcher=local.Local(),
  )  # fmt: skip
  runs = [types.SimpleNamespace(cost=HOUR * 6e12, steps=100, fork=0)] * 2
  built = types.SimpleNamespace(build=lambda: types.SimpleNamespace(checkpoint_every=25))
  monkeypatch.setattr(configs, 'load', lambda run, bindings: built)
  given = {'measure': False, 'compiled': None, 'fleet': None, 'preemptions': 0.0, 'address': None}
  flags = types.SimpleNamespace(launcher=None, **given | flags)
  sweep.launcher = by_name.chosen(flags, sweep.launcher)  # as the command does
  estimate.show_estimate(flags, sweep, runs)


def test_a_plan_says_how_long_a_fleet_takes(compiled, monkeypatch, capsys):
  plan(monkeypatch, compiled=compiled, fleet=2)
  said = capsys.readouterr().out.splitlines()
  assert said[0].endswith('2:00:00 of training one by one, 2 chip-hours')
  assert said[1] == "on 2 hosts: 1:00:30; 99% of the hosts' time is training"
  plan(monkeypatch, compiled=compiled, fleet=2, preemptions=1.0)
  assert 'each is taken away 1 times an hour' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('flags', 'why'),
  [
    ({'fleet': 2}, '--fleet and --address need the speed of a host'),
    ({'preemptions': 1.0}, '--preemptions=1 goes with --fleet or --address'),
    ({'address': 'a:1'}, '--address=a:1: Local has no address; give --launcher=ray'),
  ],
)
def test_a_plan_that_cannot_say_it_says_why(flags, why, monkeypatch):
  with pytest.raises(UserError, match=why):
    plan(monkeypatch, **flags)


def test_a_fleet_of_no_hosts_is_told(compiled, monkeypatch):
  with pytest.raises(UserError, match=r'--fleet=0: a fleet has at least one host'):
    plan(monkeypatch, compiled=compiled, fleet=0)


def test_what_no_fleet_is_is_told():
  with pytest.raises(UserError, match=r'--fleet=0: a fleet has at least one host'):
    Fleet(hosts=0)
  with pytest.raises(UserError, match=r'--preemptions=-1: how often an hour'):
    Fleet(hosts=1, preemptions=-1.0)
