"""The evaluations of runs of reinforcement learning as a table: pass@1 on held-out sums against compute.

    python experiments/reinforcement/table.py runs/sums/grpo-* --out=experiments/reinforcement/results.csv

The compute of a row is 8 N D: 6 N for each token of an update, 2 N for sampling it. N includes the head.
"""

import argparse
import csv
import json
import pathlib

COLUMNS = (
  'run', 'seed', 'step', 'tokens', 'flops', 'pass1', 'pass4', 'reward', 'entropy', 'seconds',
)  # fmt: skip


def rows_of(workdir: pathlib.Path) -> list[dict]:
  """A row for each evaluation of a run, with the training row before it."""
  run = json.loads((workdir / 'run.json').read_text())
  rows = []
  latest = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    latest |= {name: row[name] for name in ('reward', 'entropy') if name in row}
    # The evaluation of the last step is in run.json.
    is_last = row['step'] == run['steps'] and 'validation/loss' in row
    evaluation = run if is_last else row
    if 'eval/held_out/pass@1' not in evaluation:
      continue
    tokens = row['tokens']
    rows.append({
      'run': workdir.name, 'seed': run['seed'], 'step': row['step'], 'tokens': tokens,
      'flops': 8 * run['params_with_head'] * tokens, 'pass1': evaluation['eval/held_out/pass@1'],
      'pass4': evaluation['eval/held_out/pass@4'], **latest, 'seconds': round(run['seconds'], 1),
    })  # fmt: skip
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  with flags.out.open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    for workdir in flags.workdirs:
      writer.writerows(rows_of(workdir))


if __name__ == '__main__':
  main()
