"""Reports of a compiled train step: memory per device, FLOPs, collectives, and a roofline of its time.

Memory and collectives are those of the program that XLA compiles for the topology, so they hold for hardware
that this machine lacks. Times are computed from the chip's peak rates; they were not measured on a TPU.
"""

import dataclasses
import math
import operator
import time

import jax
import jax.numpy as jnp

from research.compilation import chips, hlo, traffic
from research.core.errors import UserError
from research.model import counts
from research.model.pipeline import schedule_in_use
from research.parallel import axes
from research.training import checks
from research.training.program import make_program, mesh_of
from research.training.run import Run

GIB = chips.GIB


class DoesNotFit(UserError):
  """The step needs more memory than a device has."""


def batch_features(run: Run) -> dict[str, int]:
  """Returns {key: length} of the run's batches, as the frozen stream will have them."""
  stream = getattr(run.train, 'streams', None)
  stream = next(iter(stream.values())) if isinstance(stream, dict) else run.train
  lengths = run.train.lengths
  both = 'inputs' in lengths and 'targets' in lengths
  keys = ['target_tokens', 'input_tokens', 'loss_weights', 'segment_ids', 'positions']
  features = {f'decoder_{key}': run.target_length for key in keys}
  if both:
    keys = ('input_tokens', 'segment_ids', 'positions')
    features |= {f'encoder_{key}': lengths['inputs'] for key in keys}
  elif getattr(getattr(stream, 'task', None), 'prefixed', False):
    features['decoder_causal_attention'] = run.target_length
  return features


def lower(run: Run, mesh: jax.sharding.Mesh):
  """Lowers the step of a run, under the mesh in use.

  Returns:
    The lowered step; and trees of shapes and shardings: the state, a batch, and what the step only reads.
  """
  program = make_program(run)
  checks.check_divides(run)

  def abstract(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  def on_mesh(x):
    return abstract(x.shape, x.dtype, x.sharding.spec if x.sharding is not None else jax.P())

  state = jax.eval_shape(lambda: program.init(jax.random.key(0)))
  state, fixed = jax.tree.map(on_mesh, (state, program.abstract_fixed))
  rows = axes.spec('batch', 'length')
  batch = {
    key: abstract((run.batch_size, length), jnp.int32, rows)
    for key, length in batch_features(run).items()
  }
  for key, (shape, dtype) in run.beside_tokens.items():
    batch[key] = abstract((run.batch_size, *shape), dtype, rows)
  step = jax.jit(program.step, donate_argnums=0)
  return step.lower(state, batch, abstract((), jnp.float32, jax.P()), fixed), state, batch, fixed


def device_bytes(tree) -> int:
  """Returns the bytes of a device's share of a tree of shapes and shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def of_first_stack(tree, field: str, default):
  """Returns a knob of a model's first stack, from the model's tree of partials."""
  found = []

  def walk(value):
    if hasattr(value, 'keywords'):
      if getattr(value.func, '__name__', '') == 'Stack':
        found.append(value.keywords.get(field, default))
      for v in value.keywords.values():
        walk(v)
    elif isinstance(value, list | tuple):
      for v in value:
        walk(v)

  walk(tree)
  return found[0] if found else default


def remat_of(tree) -> str:
  """Returns the rematerialisation policy of a model's first stack, from the model's tree of partials."""
  return of_first_stack(tree, 'remat', 'full')


def flops(run: Run) -> dict[str, float]:
  """Returns the FLOPs of a step on all devices: those of the model, with recomputation, and of the head alone.

  The model's FLOPs count only visible pairs of attention. The forward pass is a third of a step. By the policy,
  the backward pass computes again: nothing ('none'), the products of attention ('dots' stores those without a
  batch axis), or everything but the head ('full').
  """
  count = counts.count(run.model, run.train.lengths)
  tokens = run.batch_size * run.target_length
  head = 6 * (count.params_with_head - count.params_non_embedding)
  mixing = count.flops_attention_causal - count.flops_6n_with_head
  all_but_head = (count.flops_attention_causal - head) / 3
  times = 1 if of_first_stack(run.model, 'remat_layers', 1) == 1 else 2
  recomputed = {'none': 0.0, 'dots': mixing / 3}.get(remat_of(run.model), times * all_but_head)
  return {
    'model_flops': tokens * count.flops_attention_causal,
    'hardware_flops': tokens * (count.flops_attention_causal + recomputed),
    'head_flops': tokens * head,
  }


def network(
  collectives: list[hlo.Collective], mesh, chip: chips.Chip | None, topology: str
) -> list[dict]:
  """Returns every collective, with the mesh axes that it runs over and its time at the network's peak rate."""
  devices = mesh.devices.ravel()
  sizes = dict(mesh.shape)
  rows = []
  for c in sorted(collectives, key=operator.attrgetter('wire_bytes'), reverse=True):
    row = {'kind': c.kind, 'count': c.count, 'bytes': c.bytes}
    group = _one_per_slice(devices, c.group) if c.dcn else c.group
    row['axes'] = '+'.join(hlo.axes_of(group, sizes)) or '-'
    if chip is not None and len(group) > 1:
      rate = chip.dcn_rate
      if not c.dcn:
        rate = chip.ici_rate * _links([devices[i] for i in group], topology)
      row |= {'network': 'DCN' if c.dcn else 'ICI', 'seconds': c.wire_bytes / rate}
    rows.append(row)
  return rows


def _one_per_slice(devices, slices: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the index in the mesh of a device of each slice: that with the coordinates of the mesh's first."""
  order = sorted({d.slice_index for d in devices})
  first = devices[0].coords
  place = {d.slice_index: i for i, d in enumerate(devices) if d.coords == first}
  return tuple(place[order[i]] for i in slices)


def _links(members, topology: str) -> int:
  """Returns over how many links a device sends to these neighbours at once: two along a side that wraps."""
  extents = [len(set(side)) for side in zip(*(d.coords for d in members), strict=True)]
  sides = [int(n) for n in topology.partition(':')[2].split('x')]
  links = 0
  for extent, side, wrap in zip(extents, sides, chips.wraps(topology), strict=False):
    if extent > 1:
      links += 2 if extent == side and wrap else 1
  return max(links, 1)


def compile_run(run: Run, topology: str, slices: int = 1, keep_hlo: str | None = None) -> dict:
  """Returns the report of a run's step on this topology, as a dict of JSON values with the keys below.

  Args:
    run: the run.
    topology: the devices, such as 'v5e:2x4' (`chips.prepare`).
    slices: how many slices of TPUs.
    keep_hlo: a file for the text of the compiled program.

  Raises:
    Invalid: the mesh, the batch and the devices do not fit together.
    DoesNotFit: the step needs more memory than a device has.
  """
  devices, chip = chips.devices_of(topology, slices)
  with mesh_of(run, devices, chip and chip.hbm_bytes).use(devices) as mesh:
    began = time.monotonic()
    lowered, state, batch, fixed = lower(run, mesh)
    try:
      compiled = lowered.compile()
    except Exception as error:  # XLA's runtime error has no public type
      if 'hbm' not in str(error).lower() and 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise DoesNotFit(_advice(run, str(error), device_bytes((state, fixed)), chip)) from None
    seconds = time.monotonic() - began
    text = compiled.as_text()
    if keep_hlo:
      with open(keep_hlo, 'w') as file:
        file.write(text)
    report = {
      'topology': topology, 'slices': slices, 'devices': len(devices), 'mesh': dict(mesh.shape),
      'batch_size': run.batch_size, 'microbatches': run.microbatches, 'lengths': run.train.lengths,
      'remat': remat_of(run.model), 'compile_s': seconds,
      'memory': memory(compiled, state, batch, fixed, chip),
      **flops(run), 'moved_bytes_per_device': traffic.moved_bytes(text),
      'collectives': network(hlo.collectives(text), mesh, chip, topology), 'pipeline': pipeline(),
    }  # fmt: skip
  return report | roofline(report, chip) if chip else report


def pipeline() -> dict | None:
  """Returns the schedule of a pipeline on the mesh in use; None without stages.

  `bubble` is the fraction of the ticks of its loop in which a stage is idle. Backwards it is the same.
  """
  schedule = schedule_in_use()
  if schedule is None:
    return None
  return {**dataclasses.asdict(schedule), 'ticks': schedule.ticks, 'bubble': schedule.bubble}


def memory(compiled, state, batch, fixed, chip) -> dict[str, float]:
  """Returns bytes per device. The new state of the step replaces the old one in place.

  `parameters` are those that learn. `frozen` are those that the step only reads: the others, and a teacher's.

  `peak` is the most that is alive at once; XLA compares the allocation for it with the device's memory. `total`
  is jax's sum of arguments and temporaries, on a TPU up to a third more than is allocated
  (experiments/tpu_fit/heap.py). If `host` memory is in use, `peak` can exceed `total`; then `total` is right.
  """
  stats = compiled.memory_analysis()
  fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
  total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + max(fresh, 0)
  return {
    'parameters': device_bytes(state['params']), 'optimizer': device_bytes(state['opt']),
    'frozen': device_bytes(fixed), 'batch': device_bytes(batch), 'arguments': stats.argument_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes, 'host': stats.host_temp_size_in_bytes,
    'total': total, 'peak': stats.peak_memory_in_bytes, 'limit': chip and chip.hbm_bytes,
  }  # fmt: skip


def roofline(report: dict, chip: chips.Chip) -> dict:
  """Returns the seconds of each resource at its peak; a step takes at least the largest, at most their sum.

  The ticks in which a stage of a pipeline is idle are in the seconds of arithmetic.
  """

  def network_seconds(kind: str) -> float:
    return sum(c.get('seconds', 0) for c in report['collectives'] if c.get('network') == kind)

  busy = 1 - report['pipeline']['bubble'] if report['pipeline'] else 1.0
  in_layers = report['hardware_flops'] - report['head_flops']
  terms = {
    'compute_s': (report['head_flops'] + in_layers / busy) / report['devices'] / chip.flops,
    'hbm_s': report['moved_bytes_per_device'] / chip.hbm_rate,
    'ici_s': network_seconds('ICI'),
    'dcn_s': network_seconds('DCN'),
  }
  best = max(terms.values())
  peak = report['devices'] * chip.flops
  return {
    **terms, 'predicted_step_s': best, 'no_overlap_step_s': sum(terms.values()),
    'mfu': report['model_flops'] / best / peak,
    'no_overlap_mfu': report['model_flops'] / sum(terms.values()) / peak,
  }  # fmt: skip


def _advice(run: Run, error: str, state: int, chip) -> str:
  """Returns a sentence with the cheapest change that can make the step fit."""
  used = next((line.strip() for line in error.splitlines() if 'sed' in line), '').rstrip('.')
  limit = chip.hbm_bytes if chip else math.inf
  if state > 0.8 * limit:
    remedy = 'split parameters and optimizer further (Mesh.fsdp = -1), or take a larger slice'
  elif remat_of(run.model) != 'full':
    remedy = "recompute more: Stack.remat = 'full'"
  else:
    remedy = (
      'halve the activations in memory: double Run.microbatches, or Mesh.tensor or Mesh.context'
    )
  return f'the step does not fit a device ({used}; state {state / GIB:.2f} GiB): {remedy}.'
