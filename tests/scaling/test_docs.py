"""The examples of docs/laws.md run as they stand, and are as short as it says."""

import pathlib
import re
import shlex

import numpy as np
import pytest

PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / 'docs' / 'laws.md'


def example(word: str) -> str:
  """The one Python example of the page that has this word."""
  blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.S)
  (code,) = [block for block in blocks if word in block]
  return code


def test_the_example_of_inference_in_the_laws_runs(monkeypatch, capsys):
  """It prints the figures that its comments have."""
  code, names = example('inference_aware'), {}
  monkeypatch.chdir(PAGE.parent.parent)
  exec(code, names)
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].startswith('C = (6.286 N + 2.19e+09) D')
  assert 'C = (2.183 N + 1.25e+09) D' in printed[0]
  comments = re.findall(r'# ([\d.e+ ]+)$', code, flags=re.M)
  for line, comment in zip(printed[1:], comments, strict=True):
    assert [float(f'{float(x):.3g}') for x in line.split()] == [float(x) for x in comment.split()]
  # Sardana et al.: with much inference, smaller and for longer.
  assert names['busy'].params < 0.6 * names['idle'].params
  assert names['busy'].tokens > 2 * names['idle'].tokens


def test_the_example_of_a_new_law_runs():
  code = example('class Depth')
  law = code[code.index('class Depth') : code.index('fitted =')]
  assert len([line for line in law.splitlines() if line.strip()]) <= 15
  rng = np.random.default_rng(0)
  n, layers = np.exp(rng.uniform(16, 23, 40)), rng.integers(2, 64, 40).astype(float)
  loss = 1.7 + 400 / n**0.34 + 0.8 / layers**0.6
  names = {'n': n, 'layers': layers, 'loss': loss}
  exec(code, names)
  parameters = names['fitted'].parameters
  assert parameters['kappa'] == pytest.approx(0.6, rel=1e-6)
  assert parameters['K'] == pytest.approx(0.8, rel=1e-6)


def test_the_example_is_fitted_from_a_table_outside_the_repository(tmp_path, monkeypatch, capsys):
  """As the page says: a file of one's own, --law=depth.Depth, and an input mapped to a column."""
  from research import fit

  code = example('class Depth')
  (tmp_path / 'depth.py').write_text(code[: code.index('fitted =')])
  rng = np.random.default_rng(0)
  n, layers = np.exp(rng.uniform(16, 23, 40)), rng.integers(2, 64, 40)
  loss = 1.7 + 400 / n**0.34 + 0.8 / layers**0.6
  lines = [f'{a},{b},{c}' for a, b, c in zip(n, layers, loss, strict=True)]
  (tmp_path / 'runs.csv').write_text('\n'.join(['params,n_layer,loss', *lines]))
  monkeypatch.syspath_prepend(tmp_path)
  flags = [
    '--law=depth.Depth',
    '--input=layers=n_layer',
    '--predict=params=1e9,layers=24',
    '--bootstrap=20',
  ]
  assert fit.main([f'--results={tmp_path / "runs.csv"}', *flags]) == 0
  out = capsys.readouterr().out
  assert re.search(r'kappa +0\.6 ', out)
  assert f'{1.7 + 400 / 1e9**0.34 + 0.8 / 24**0.6:.5g}' in out


def test_the_page_names_every_law():
  from research.scaling import laws

  text = PAGE.read_text() + PAGE.with_name('skills.md').read_text()
  for law in laws.standard():
    assert law.name in text or law.name.startswith('StepLaw'), law.name


SKILLS = PAGE.with_name('skills.md')


def skills_tables(folder):
  """Small made-up tables under the names that docs/skills.md gives them."""
  rng = np.random.default_rng(0)
  rows = ['run,params,tokens,task_bpb,accuracy']
  for run in range(9):
    params, end = 1e8 * 2 ** (run % 3), 1e10 * 3 ** (run // 3)
    for tokens in end * np.linspace(0.2, 1.0, 6):
      loss = 0.5 + 60 / params**0.3 + 120 / tokens**0.28
      accuracy = 0.25 + 0.75 / (1 + np.exp(8 * (loss - 0.9)))
      noise = np.exp(0.002 * rng.normal())
      rows.append(f'{run},{params:.6g},{tokens:.6g},{loss * noise:.6f},{accuracy:.5f}')
  (folder / 'ladder.csv').write_text('\n'.join(rows))
  counts = rng.binomial(500, rng.beta(0.4, 8.0, 40))
  (folder / 'counts.csv').write_text('\n'.join(['samples,correct', *(f'500,{c}' for c in counts)]))
  flops = np.geomspace(1e18, 1e23, 12)
  share = rng.binomial(500, 0.25 + 0.75 / (1 + (1e21 / flops) ** 0.6)) / 500
  lines = [f'{c:.4g},{s:.4f}' for c, s in zip(flops, share, strict=True)]
  (folder / 'accuracies.csv').write_text('\n'.join(['flops,accuracy', *lines]))


@pytest.mark.parametrize('number', [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_the_commands_of_the_page_of_skills_run(number, tmp_path, monkeypatch, capsys):
  from research import fit

  commands = re.findall(r'```bash\n(.*?)```', SKILLS.read_text(), flags=re.S)
  assert len(commands) == 3
  skills_tables(tmp_path)
  monkeypatch.chdir(tmp_path)
  program, _, module, *flags = shlex.split(commands[number].replace('\\\n', ' '))
  assert (program, module) == ('python', 'research.fit')
  assert fit.main([*flags, '--bootstrap=10']) == 0
  out = capsys.readouterr().out
  assert re.search(r'^At (params|flops|k) = .*\[', out, flags=re.M)
  assert ('Figure: ' in out) == ('--figure' in commands[number])
