"""The example of docs/laws.md runs as it stands, and is as short as it says."""

import pathlib
import re

import numpy as np
import pytest

PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / 'docs' / 'laws.md'


def test_the_example_of_a_new_law_runs():
  (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.S)
  law = code[code.index('class Depth') : code.index('found =')]
  assert len([line for line in law.splitlines() if line.strip()]) <= 15
  rng = np.random.default_rng(0)
  n, layers = np.exp(rng.uniform(16, 23, 40)), rng.integers(2, 64, 40).astype(float)
  loss = 1.7 + 400 / n**0.34 + 0.8 / layers**0.6
  names = {'n': n, 'layers': layers, 'loss': loss}
  exec(code, names)
  found = names['found'].parameters
  assert found['kappa'] == pytest.approx(0.6, rel=1e-6)
  assert found['K'] == pytest.approx(0.8, rel=1e-6)


def test_the_example_is_fitted_from_a_table_outside_the_repository(tmp_path, monkeypatch, capsys):
  """As the page says: a file of one's own, --law=depth.Depth, and an input mapped to a column."""
  from research import fit

  (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.S)
  (tmp_path / 'depth.py').write_text(code[: code.index('found =')])
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
