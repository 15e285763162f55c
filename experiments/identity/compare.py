"""Whether two versions of this repository train the very same models.

    git worktree add /tmp/before VERSION
    python experiments/identity/compare.py --before=/tmp/before

trains the quickstart's smallest run, a T5 and a Mixtral for a few steps with each version, in processes and
data caches of their own. It compares frozen streams (every byte), checkpoints (every bit of every array), rows
of metrics and the run's row (every number but times; rows may gain names). Then this version continues from the
other's checkpoint in the middle of the run, and must end the same. Exit status 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STEPS = 20
CASES = {  # name: (gin files, bindings)
  'quickstart': (
    ['gin/runs/quickstart.gin'],
    ['EMBED=8', 'LAYERS=2', 'HEADS=2', 'HEAD_DIM=4', 'MLP=24', 'Stream.lengths={"targets": 64}'],
  ),
  't5': (['tests/gin/encoder_decoder.gin'], []),
  'mixtral': (['tests/gin/decoder.gin', 'gin/models/mixtral/tiny.gin'], []),
}


def write_text(folder: pathlib.Path) -> str:
  """Text files to train on; returns their pattern."""
  random = np.random.default_rng(0)
  words = [
    'the',
    'law',
    'of',
    'this',
    'run',
    'is',
    'loss',
    'falls',
    'with',
    'compute',
    'and',
    'data',
  ]
  folder.mkdir(parents=True)
  for number in range(40):
    lines = [' '.join(random.choice(words, 12)) for _ in range(20)]
    (folder / f'{number:02}.txt').write_text('\n'.join(lines))
  return f'{folder}/*.txt'


def train(version: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path, case: str, files: str):
  """Trains one case with one version."""
  gin_files, bindings = CASES[case]
  if case == 'quickstart':
    bindings = [*bindings, 'train/Stream.examples=2000', 'validation/Stream.examples=64']
  else:
    bindings = [*bindings, f'FILES="{files}"']
  bindings = [*bindings, f'Run.steps={STEPS}', 'Run.batch_size=8', 'Run.checkpoint_every=10']
  command = [sys.executable, '-m', 'research.train', f'--workdir={workdir}']
  command += [f'--gin_file={file}' for file in gin_files]
  command += [f'--gin.{binding}' for binding in bindings]
  environment = os.environ | {'ISOFLOP_CACHE': str(cache), 'PYTHONPATH': str(version)}
  process = subprocess.run(command, cwd=version, env=environment, capture_output=True, text=True)
  if process.returncode:
    sys.exit(f'{case} with {version} failed:\n{process.stderr[-2000:]}')


def without_times(row: dict) -> dict:
  """The row without its times, which differ from run to run."""
  return {
    name: value
    for name, value in row.items()
    if name != 'seconds' and not name.endswith('_per_second')
  }


def stream_bytes(cache: pathlib.Path) -> dict[str, str]:
  """The hash of every file of every frozen stream."""
  files = [path for path in sorted((cache / 'streams').rglob('*')) if path.suffix == '.bin']
  hashes = {str(p.relative_to(cache)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
  assert hashes, f'no frozen streams in {cache}'
  return hashes


def arrays(workdir: pathlib.Path) -> dict[str, bytes]:
  """Every array of the last checkpoint, by name."""
  state = workdir / 'checkpoints' / str(STEPS) / 'state'
  tree = ocp.PyTreeCheckpointer().restore(state)
  import jax

  flat, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def results(workdir: pathlib.Path) -> dict:
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {
    'run.json': without_times(json.loads((workdir / 'run.json').read_text())),
    'metrics.jsonl': [without_times(json.loads(line)) for line in lines],
    'checkpoint': arrays(workdir),
  }


def same(expected, actual) -> bool:
  """Whether two results are equal in everything that the expected one names."""
  if isinstance(expected, dict) and isinstance(actual, dict):
    return all(name in actual and same(expected[name], actual[name]) for name in expected)
  if isinstance(expected, list) and isinstance(actual, list):
    return len(expected) == len(actual) and all(map(same, expected, actual))
  return expected == actual


def differences(case: str, expected: dict, actual: dict) -> list[str]:
  return [f'{case}: {name} differs' for name in expected if not same(expected[name], actual[name])]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--before', required=True, type=pathlib.Path, help='the other checkout')
  parser.add_argument('--case', choices=CASES, help='this one alone')
  flags = parser.parse_args()
  wrong = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    files = write_text(folder / 'text')
    for case in [flags.case] if flags.case else CASES:
      outcomes = {}
      streams = {}
      for name, version in {'before': flags.before.resolve(), 'after': ROOT}.items():
        workdir = folder / name / case
        cache = folder / name / 'cache'
        train(version, workdir, cache, case, files)
        outcomes[name] = results(workdir)
        streams[name] = stream_bytes(cache)
      wrong += differences(case, outcomes['before'], outcomes['after'])
      if streams['before'] != streams['after']:
        wrong.append(f'{case}: frozen streams differ')
      # This version continues from the other version's checkpoint of step 10.
      continued = folder / 'continued' / case
      shutil.copytree(folder / 'before' / case, continued)
      shutil.rmtree(continued / 'checkpoints' / str(STEPS))
      (continued / 'run.json').unlink()
      train(ROOT, continued, folder / 'after' / 'cache', case, files)
      expected = outcomes['before']
      # A row is a mean over the steps since the previous row. After a restart those are fewer.
      expected.pop('metrics.jsonl')
      wrong += differences(f'{case}, continued', expected, results(continued))
      loss = outcomes['after']['run.json']['loss']
      count = len(outcomes['after']['checkpoint'])
      print(
        f'{case}: loss {loss!r}, {count} arrays, {len(streams["after"])} files of frozen streams'
      )
  print('\n'.join(wrong) if wrong else 'all equal to the bit')
  return bool(wrong)


if __name__ == '__main__':
  sys.exit(main())
