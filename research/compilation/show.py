"""The text of a report."""

from research.compilation.chips import GIB


def show(report: dict) -> str:
  """Returns the report as a table."""
  mesh = ' x '.join(f'{k} {v}' for k, v in report['mesh'].items() if v > 1) or 'one device'
  memory = report['memory']
  keys = ['parameters', 'optimizer', 'frozen', 'batch', 'temporaries', 'total', 'peak', 'host']
  if not memory['frozen']:
    keys.remove('frozen')
  lines = [
    f'{report["topology"]} x {report["slices"]}: {report["devices"]} devices, mesh {mesh}, batch '
    f'{report["batch_size"]:,}, remat {report["remat"]}; compiled in {report["compile_s"]:.0f} s',
    *_pipeline_line(report['pipeline']),
    'memory per device:',
    *(f'  {key:12}{_gib(memory[key])}' for key in keys),
  ]
  if memory['limit']:
    share = memory['peak'] / memory['limit']
    lines.append(f'  {"of":12}{_gib(memory["limit"])}  ({share:.0%})')
  lines += [
    f'FLOPs of a step: {report["model_flops"]:.3e}; {report["hardware_flops"]:.3e} with recomputation',
    'collectives of a step, per device:',
    f'  {"kind":20}{"axes":16}{"count":>7}{"MiB each":>10}  seconds at peak',
  ]
  for c in report['collectives']:
    timed = f'{c["seconds"]:.4f} {c["network"]}' if 'seconds' in c else ''
    lines.append(
      f'  {c["kind"]:20}{c["axes"]:16}{c["count"]:>7,}{c["bytes"] / 2**20:>10.2f}  {timed}'
    )
  if 'mfu' in report:
    terms = ', '.join(f'{k} {report[f"{k}_s"]:.3f} s' for k in ('compute', 'hbm', 'ici', 'dcn'))
    lines += [
      f'roofline: {terms}',
      f'a step takes {report["predicted_step_s"]:.3f} s and has an MFU of {report["mfu"]:.0%} if all of these '
      f'overlap at their peaks; {report["no_overlap_step_s"]:.3f} s, {report["no_overlap_mfu"]:.0%} if none do',
    ]
  return '\n'.join(lines)


def _pipeline_line(pipeline: dict | None) -> list[str]:
  if pipeline is None:
    return []
  sizes = ', '.join(
    f'{pipeline[key]} {key}' for key in ('stages', 'rounds', 'microbatches', 'ticks')
  )
  return [f'pipeline: {sizes}; a stage is idle in {pipeline["bubble"]:.1%} of them']


def _gib(size: float) -> str:
  return f'{size / GIB:8.3f} GiB'
