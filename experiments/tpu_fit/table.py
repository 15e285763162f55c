"""Compiles what has no result yet in `results/`, and prints two tables: of training and of decoding.

    uv run --extra tpu python experiments/tpu_fit/table.py [NAME ...]

One compilation at a time, 2 to 20 minutes each; a result is removed to make it anew. With names only those.
"""

import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
GIB = 2**30
HEAD = (
  'model', 'slice', 'mesh', 'batch', 'state, GiB', 'arguments + temporaries, GiB', 'alive at once, GiB',
  'compute, s', 'memory, s', 'network, s', 'MFU, all overlapped / none', 'compiled in, s',
)  # fmt: skip
# Result: (gin file, topology, slices, bindings).
ROWS = {
  'gpt2_124m': ('gpt2_124m', 'v5e:4x4', 2, ()),
  'llama2_7b': ('llama2_7b', 'v5e:16x16', 1, ()),
  'llama2_7b_outer': ('llama2_7b', 'v5e:16x16', 1, ('mesh.Mesh.fsdp_outer=8',)),
  'llama2_7b_two_layers': (
    'llama2_7b',
    'v5e:16x16',
    1,
    ('mesh.Mesh.fsdp_outer=8', 'stack.Stack.remat_layers=2'),
  ),
  'llama2_7b_microbatches': ('llama2_7b', 'v5e:16x16', 1, ('Run.microbatches=4',)),
  'llama2_7b_offload': ('llama2_7b', 'v5e:16x16', 1, ("stack.Stack.remat='offload'",)),
  'llama2_7b_v5p': ('llama2_7b_v5p', 'v5p:2x4x4', 1, ()),
  'llama2_7b_32k': ('llama2_7b_32k', 'v5e:16x16', 1, ()),
  'mixtral_8x7b': ('mixtral_8x7b', 'v5p:4x4x4', 1, ()),
  't5_11b': ('t5_11b', 'v5e:16x16', 1, ()),
  'llama2_70b': ('llama2_70b', 'v5p:4x8x8', 1, ()),
  'bloom_176b': ('bloom_176b', 'v5p:4x8x8', 1, ()),
  'palm_540b': ('palm_540b', 'v4:12x16x16', 2, ()),
}
DECODING_HEAD = (
  'model', 'slice', 'mesh', 'rows x room', 'parameters, GiB', 'cache, GiB', 'temporaries of a step, GiB',
  'peak of prefill, GiB', 'step: compute, ms', 'memory, ms', 'network, ms', 'tokens/s of a chip',
)  # fmt: skip
# Parameters in bfloat16. Result: (gin file, topology, rows, room, bindings of the mesh).
DECODING_ROWS = {
  'decode_llama2_7b': ('llama2_7b', 'v5e:2x4', 16, 2048, ('Mesh.fsdp=1', 'Mesh.tensor=8')),
  'decode_llama2_7b_fsdp': ('llama2_7b', 'v5e:2x4', 16, 2048, ()),
  'decode_llama2_70b': ('llama2_70b', 'v5p:2x2x2', 64, 4096, ('Mesh.fsdp=1', 'Mesh.tensor=8')),
  'decode_mixtral_8x7b': (
    'mixtral_8x7b', 'v5e:4x4', 32, 4096, ('EXPERT=1', 'Mesh.fsdp=1', 'Mesh.tensor=8', 'Mesh.data=2'),
  ),
  'decode_deepseek_v2_lite': ('deepseek_v2_lite', 'v5e:2x4', 32, 4096, ('Mesh.fsdp=1', 'Mesh.expert=8')),
}  # fmt: skip


def flags_of(name: str) -> list[str]:
  """The flags of `research.compile` for a row of either table."""
  if name in ROWS:
    gin, topology, slices, bindings = ROWS[name]
    more = [f'--slices={slices}']
  else:
    gin, topology, rows, room, bindings = DECODING_ROWS[name]
    more = [
      '--gin_file=gin/quantisation/bfloat16.gin',
      '--decode',
      f'--batch={rows}',
      f'--room={room}',
    ]
  folder = HERE.relative_to(HERE.parents[1])
  files = [f'--gin_file={folder}/{gin}.gin', *more, f'--topology={topology}']
  return [*files, *(f'--gin.{binding}' for binding in bindings)]


def compile_row(name: str) -> str | None:
  """Writes results/NAME.json; the error where there is none."""
  result = f'--json={HERE}/results/{name}.json'
  command = [sys.executable, '-m', 'research.compile', *flags_of(name), result]
  done = subprocess.run(command, cwd=HERE.parents[1], stderr=subprocess.PIPE, text=True)
  return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def row(name: str) -> str:
  """One line of the table."""
  r = json.loads((HERE / 'results' / f'{name}.json').read_text())
  mesh = ' x '.join(f'{axis} {n}' for axis, n in r['mesh'].items() if n > 1)
  slices = f'{r["slices"]} x ' if r['slices'] > 1 else ''
  m, steps = r['memory'], r['microbatches']
  state = (m['parameters'] + m['optimizer']) / GIB
  network = f'{r["ici_s"]:.2f}' + (f' + {r["dcn_s"]:.2f} DCN' if r['dcn_s'] else '')
  batch = f'{r["batch_size"]:,}' + (f' in {steps}' if steps > 1 else '')
  cells = (
    name, slices + r['topology'], mesh, batch, f'{state:.2f}',
    f'{m["total"] / GIB:.2f} of {m["limit"] / GIB:.0f}', f'{m["peak"] / GIB:.2f}',
    f'{r["compute_s"]:.2f}', f'{r["hbm_s"]:.2f}', network,
    f'{r["mfu"]:.0%} / {r["no_overlap_mfu"]:.0%}', f'{r["compile_s"]:.0f}',
  )  # fmt: skip
  return f'| {" | ".join(cells)} |'


def decoding_row(name: str) -> str:
  """One line of the table of decoding."""
  r = json.loads((HERE / 'results' / f'{name}.json').read_text())
  mesh = ' x '.join(f'{axis} {n}' for axis, n in r['mesh'].items() if n > 1)
  memory, step = r['memory'], r['step']
  sizes = memory['parameters'], memory['cache'], step['temporaries'], r['prefill']['peak']
  times = step['compute_s'], step['hbm_s'], step['network_s']
  cells = (
    name.removeprefix('decode_'), r['topology'], mesh, f'{r["batch"]} x {r["room"]:,}',
    *(f'{size / GIB:.2f}' for size in sizes), *(f'{1e3 * seconds:.2f}' for seconds in times),
    f'{r["tokens_per_s_per_chip"]:,.0f}',
  )  # fmt: skip
  return f'| {" | ".join(cells)} |'


def print_table(head, rows, line, errors) -> None:
  """Prints a table of the rows that have a result or an error."""
  print(f'| {" | ".join(head)} |\n{"|---" * len(head)}|')
  for name in rows:
    if (HERE / 'results' / f'{name}.json').exists():
      print(line(name))
    elif name in errors:
      print(f'| {name} | {rows[name][1]} | {errors[name]} |')


def main(names) -> None:
  errors = {}
  for name in names or [*ROWS, *DECODING_ROWS]:
    if not (HERE / 'results' / f'{name}.json').exists():
      errors[name] = compile_row(name)
  print_table(HEAD, ROWS, row, errors)
  print()
  print_table(DECODING_HEAD, DECODING_ROWS, decoding_row, errors)


if __name__ == '__main__':
  main(sys.argv[1:])
