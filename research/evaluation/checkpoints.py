"""Evaluates every checkpoint of a run or of a sweep: in this process, or on a cluster."""

import functools
import json
import pathlib

import jax

from research.core import configs, storage
from research.core.errors import UserError
from research.evaluation import loading
from research.evaluation.callbacks import TaskProgress
from research.evaluation.engine import Engine
from research.evaluation.suite import Suite, make_engine, run_suite, run_task, write_summary
from research.parallel import ray_cluster, ray_tasks


def evaluate(
  suite: Suite, folder: loading.Folder, out: pathlib.Path, progress: TaskProgress
) -> dict:
  """The summary that `run_suite` gives for a model."""
  with loading.mesh_for(folder.model).use(jax.devices()):
    engine, identity = engine_of(suite, folder)
    return run_suite(suite, engine, out, identity, progress=progress)


def engine_of(suite: Suite, folder: loading.Folder) -> tuple[Engine, dict]:
  """(the engine of a folder's model under the mesh in use, what its answers depend on)."""
  model = loading.abstract_model(folder.model)
  read_params = functools.partial(loading.read_params, folder)
  engine, identity = make_engine(suite, model, read_params, folder.run, folder.tokenizer)
  return engine, {'checkpoint': str(folder.path), 'step': folder.step, **identity}


def evaluate_all(
  suite: Suite, workdir: pathlib.Path, out: pathlib.Path, progress: TaskProgress
) -> list[dict]:
  """The summaries of all checkpoints of a run or a sweep, without those that cannot be evaluated."""
  pairs = loading.checkpoints_of(workdir)
  summaries: list[dict] = []
  for run, step in pairs:
    label = f'{run.name}-step-{step}'
    print(f'{label}:')
    try:
      summary = evaluate(suite, loading.open_folder(run, step), out / label, progress)
    except UserError as error:
      print(f'  not evaluated: {error}')
      continue
    add_row(summaries, summary, run, step, out)
  return conclude(summaries, len(pairs), workdir, out)


def add_row(summaries: list[dict], summary: dict, run: pathlib.Path, step: int, out) -> None:
  """Adds a checkpoint's summary to the others, and writes the rows of all to rows.jsonl."""
  path = run / 'run.json'
  run_row = json.loads(path.read_text()) if path.is_file() else {}
  # The run's row brings N, tokens and FLOPs, to fit a law to. It describes the run's last step only.
  run_row = run_row if run_row.get('steps') == step else {}
  summary['row'] = {'run': run.name, **run_row, **summary['row']}
  summaries.append(summary)
  rows = ''.join(json.dumps(summary['row']) + '\n' for summary in summaries)
  storage.write_atomic(out / 'rows.jsonl', rows)


def conclude(summaries: list[dict], count: int, workdir, out: pathlib.Path) -> list[dict]:
  """Prints how many checkpoints were evaluated; returns the summaries.

  Raises:
    UserError: there are none.
  """
  if not summaries:
    raise UserError(f'none of the {count} checkpoints of {workdir} could be evaluated.')
  print(f'{len(summaries)} of {count} checkpoints: {out / "rows.jsonl"}')
  return summaries


def evaluate_on_cluster(
  suite: Suite,
  gin: tuple[tuple[str, ...], tuple[str, ...]],
  workdir: pathlib.Path,
  out: pathlib.Path,
  needs: ray_cluster.Needs,
) -> list[dict]:
  """`evaluate_all` with each task of the suite on each checkpoint as one call on a Ray cluster.

  Answers are kept in the folder of their checkpoint, so that a call that was lost with its host goes on
  elsewhere. Call `ray_cluster.connect` first.

  Args:
    gin: the files and the bindings that describe the suite.
    needs: the resources of a call.

  Raises:
    UserError: none of the checkpoints could be evaluated, or a host cannot do it.
  """
  pairs = loading.checkpoints_of(workdir)
  storage.make(out)  # before any host looks whether it sees the folder
  tasks = ray_tasks.Tasks('research.evaluation.checkpoints', 'answer', needs, [workdir, out])
  calls = {}
  for run, step in pairs:
    folder = str(out / f'{run.name}-step-{step}')
    for task in suite.tasks:
      calls[run.name, step, task.name] = (*gin, str(run), step, folder, task.name)
  done = 0

  def show(outcome: ray_tasks.Outcome) -> None:
    nonlocal done
    run, step, task = outcome.key
    done += not outcome.lost
    state = f'is run again ({outcome.lost})' if outcome.lost else 'done'
    print(f'[{done}/{len(calls)}] {run}-step-{step}, {task}: {state}', flush=True)

  answers = ray_tasks.do_all(tasks, calls, show)
  return _summarise(suite, pairs, answers, workdir, out)


def _summarise(suite: Suite, pairs: list, answers: dict, workdir, out: pathlib.Path) -> list[dict]:
  """The summaries of the checkpoints from the answers to their tasks; see `evaluate_all`."""
  summaries: list[dict] = []
  for run, step in pairs:
    label = f'{run.name}-step-{step}'
    parts = {task.name: answers[run.name, step, task.name] for task in suite.tasks}
    print(f'{label}:')
    refusals = [part['refused'] for part in parts.values() if 'refused' in part]
    if refusals:
      print(f'  not evaluated: {refusals[0]}')
      continue
    # All tasks of a checkpoint have the same identity.
    identity = next(iter(parts.values()))['identity']
    results = {name: part['result'] for name, part in parts.items()}
    summary = write_summary(out / label, identity, results)
    add_row(summaries, summary, run, step, out)
  return conclude(summaries, len(pairs), workdir, out)


def answer(files, bindings, run: str, step: int, out: str, name: str) -> dict:
  """Runs one task of a suite on one checkpoint, in a process of the cluster.

  Returns:
    {'identity', 'result'}, or {'refused': why the checkpoint cannot be evaluated}.
  """
  suite = _suite(tuple(files), tuple(bindings))
  try:
    mesh, engine, identity = _engine(suite, run, step)
  except UserError as error:
    return {'refused': str(error)}
  task = next(task for task in suite.tasks if task.name == name)
  folder = storage.place(out)
  storage.make(folder)
  with mesh.use(jax.devices()):
    return {'identity': identity, 'result': run_task(task, engine, folder, identity)}


@functools.cache
def _suite(files: tuple[str, ...], bindings: tuple[str, ...]) -> Suite:
  from research.training.program import keep_compiled

  keep_compiled()
  return configs.load(list(files), bindings, root='EVALUATION').build()


# A process often gets the next task of the same checkpoint. One engine at a time fits its memory.
@functools.lru_cache(maxsize=1)
def _engine(suite: Suite, run: str, step: int):
  folder = loading.open_folder(run, step)
  mesh = loading.mesh_for(folder.model)
  with mesh.use(jax.devices()):
    return mesh, *engine_of(suite, folder)
