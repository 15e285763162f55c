"""Compiles decoding for devices that need not exist on this machine, and reports memory and a roofline.

The programs are those of `inference.decode` (prefill and one step), for a batch of rows of the same room. As
for a train step (`report`), memory and collectives are those of the compiled program, and times are
computed from the chip's peak rates.
"""

import time

import jax
import jax.numpy as jnp
from flax import nnx

from research.compilation import chips, hlo, traffic
from research.compilation.report import GIB, DoesNotFit, device_bytes, network
from research.core.errors import Invalid, UserError
from research.inference import decode
from research.model import counts
from research.parallel import axes
from research.parallel.mesh import platform
from research.training.program import mesh_of
from research.training.run import Run


def compile_decode(
  run: Run, topology: str, slices: int = 1, *, batch: int, room: int, prompt: int = 0
) -> dict:
  """Returns the report of decoding with a run's model on its mesh, as a dict of JSON values.

  Args:
    run: its model and its mesh are used.
    topology: the devices, such as 'v5e:2x4' (`chips.prepare`).
    slices: how many slices of TPUs.
    batch: rows, over all devices.
    room: the most tokens of a row. The step is that of a full row.
    prompt: tokens of each prompt; 0 for half of the room.

  Raises:
    UserError: the prompt or the batch does not suit the room or the devices.
    DoesNotFit: prefill or the step needs more memory than a device has.
  """
  prompt = prompt or max(room // 2, 1)
  if not 1 <= prompt < room:
    raise UserError(
      f'--prompt={prompt} and --room={room}: a prompt has 1 token or more, and fewer than the room.'
    )
  if batch < 1:
    raise UserError(f'--batch={batch}: ask for 1 or more rows.')
  devices, chip = chips.devices_of(topology, slices)
  with mesh_of(run, devices, chip and chip.hbm_bytes).use(devices) as mesh:
    began = time.monotonic()
    programs = lower(run, mesh, batch, room, prompt)
    params, cache = programs.pop('params'), programs.pop('cache')
    report = {
      'topology': topology, 'slices': slices, 'devices': len(devices), 'mesh': dict(mesh.shape),
      'batch': batch, 'room': room, 'prompt': prompt,
      'memory': {
        'parameters': device_bytes(params), 'cache': device_bytes(cache), 'limit': chip and chip.hbm_bytes,
      },
    }  # fmt: skip
    for name, lowered in programs.items():
      report[name] = _program_report(lowered, mesh, chip, topology)
    report['compile_s'] = time.monotonic() - began
  lengths = {'targets': room, 'inputs': run.train.lengths.get('inputs', 0)}
  step = counts.count_decoding(run.model, lengths)
  training = counts.count(run.model, {**lengths, 'targets': prompt})
  report['step']['flops'] = batch * step.flops
  # The forward pass is a third of training. Only the last token of a prompt goes through the head.
  head = 2 * (training.params_with_head - training.params_non_embedding)
  layers = training.flops_attention_causal / 3 - head
  report['prefill']['flops'] = batch * (prompt * layers + head)
  if chip:
    for name in programs:
      report[name] |= _roofline(report[name], len(devices), chip)
    report['tokens_per_s'] = batch / report['step']['seconds']
    report['tokens_per_s_per_chip'] = report['tokens_per_s'] / len(devices)
  return report


def lower(run: Run, mesh: jax.sharding.Mesh, batch: int, room: int, prompt: int) -> dict:
  """Lowers prefill and a step, under the mesh in use.

  Returns:
    'prefill' and 'step', lowered programs; 'params' and 'cache', trees of shapes and shardings.
  """
  if batch % axes.axis_size('batch'):
    why = (
      f'{batch} rows are not a multiple of the {axes.axis_size("batch")} devices that split them.'
    )
    raise Invalid(Run, 'mesh', f'--batch: {why}')

  def on_mesh(x):
    spec = x.sharding.spec if x.sharding is not None else jax.P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  def tokens(length: int):
    sharding = jax.sharding.NamedSharding(mesh, axes.spec('batch', None))
    return jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding)

  def make():
    model = run.model(rngs=nnx.Rngs(params=jax.random.key(0)))
    if platform() == 'cpu':  # as `decode.for_backend` does
      decode.suit_cpu(model)
    return nnx.split(model)

  graphdef, state = jax.eval_shape(make)
  abstract = nnx.merge(graphdef, state)
  decode.check_decodes(abstract)
  params = jax.tree.map(on_mesh, nnx.to_pure_dict(state))
  inputs = {'decoder_input_tokens': tokens(prompt)}
  if 'encoder' in abstract.inputs:
    inputs['encoder_input_tokens'] = tokens(run.train.lengths['inputs'])

  def prefill(params, inputs):
    return decode.prefill(nnx.merge(graphdef, params), inputs, room)

  def step(params, tokens, cache):
    return decode.step(nnx.merge(graphdef, params), tokens, cache)

  cache = jax.tree.map(on_mesh, jax.eval_shape(prefill, params, inputs)[1])
  return {
    'prefill': jax.jit(prefill).lower(params, inputs),
    'step': jax.jit(step, donate_argnums=2).lower(params, tokens(1), cache),
    'params': params,
    'cache': cache,
  }


def _program_report(lowered, mesh, chip, topology: str) -> dict:
  """Compiles a program; returns its memory per device, the bytes that it moves, and its collectives."""
  try:
    compiled = lowered.compile()
  except Exception as error:  # XLA's runtime error has no public type
    if 'hbm' not in str(error).lower() and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    used = next((line.strip() for line in str(error).splitlines() if 'sed' in line), '').rstrip('.')
    raise DoesNotFit(
      f'decoding does not fit a device ({used}): take fewer rows or a smaller room, split the model further '
      '(Mesh.tensor, Mesh.fsdp), or take a larger slice.'
    ) from None
  stats = compiled.memory_analysis()
  text = compiled.as_text()
  return {
    'arguments': stats.argument_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes,
    'peak': stats.peak_memory_in_bytes,
    # Every argument (parameters and cache) is read once, in addition to the results of the program.
    'moved_bytes_per_device': stats.argument_size_in_bytes + traffic.moved_bytes(text),
    'collectives': network(hlo.collectives(text), mesh, chip, topology),
  }


def _roofline(program: dict, devices: int, chip: chips.Chip) -> dict:
  """Returns the seconds of each resource at its peak rate, and the largest of them."""
  terms = {
    'compute_s': program['flops'] / devices / chip.flops,
    'hbm_s': program['moved_bytes_per_device'] / chip.hbm_rate,
    'network_s': sum(c.get('seconds', 0) for c in program['collectives']),
  }
  return {**terms, 'seconds': max(terms.values())}


def show(report: dict) -> str:
  """Returns the report as text."""
  mesh = ' x '.join(f'{k} {v}' for k, v in report['mesh'].items() if v > 1) or 'one device'
  memory = report['memory']
  lines = [
    f'{report["topology"]} x {report["slices"]}: {report["devices"]} devices, mesh {mesh}; '
    f'{report["batch"]:,} rows of {report["room"]:,} tokens, prompts of {report["prompt"]:,}; '
    f'compiled in {report["compile_s"]:.0f} s',
    'memory per device:',
    f'  {"parameters":24}{memory["parameters"] / GIB:8.3f} GiB',
    f'  {"cache":24}{memory["cache"] / GIB:8.3f} GiB',
  ]
  for name in ('prefill', 'step'):
    for key in ('arguments', 'temporaries', 'peak'):
      lines.append(f'  {f"{key} of {name}":24}{report[name][key] / GIB:8.3f} GiB')
  if memory['limit']:
    lines.append(f'  {"of":24}{memory["limit"] / GIB:8.3f} GiB')
  for name in ('prefill', 'step'):
    program = report[name]
    line = (
      f'{name}: {program["flops"]:.3e} FLOPs, '
      f'{program["moved_bytes_per_device"] / GIB:.3f} GiB to and from the memory of a device'
    )
    if 'seconds' in program:
      terms = ', '.join(f'{k} {1e3 * program[f"{k}_s"]:.3f}' for k in ('compute', 'hbm', 'network'))
      line += f'; roofline in ms: {terms}'
    lines.append(line)
  if 'tokens_per_s' in report:
    lines.append(
      f'a step takes {1e3 * report["step"]["seconds"]:.3f} ms if all of these overlap at their peaks: '
      f'{report["tokens_per_s"]:,.0f} tokens/s, {report["tokens_per_s_per_chip"]:,.0f} of a chip'
    )
  return '\n'.join(lines)
