"""What the page is made of: colours that differ, formulas as mathematics, a figure's data, every minimum."""

import csv
import io
import itertools
import types

import numpy as np
import pytest

from research.scaling import fitted, laws
from research.scaling.report import figure, page, sections


@pytest.mark.parametrize('count', [2, 7, 8, 14])
def test_neighbouring_budgets_differ_to_the_eye(count):
  flops = np.geomspace(1e18, 1e22, count)[::-1]
  colors = np.array(figure.budget_colors(flops))[:, :3]
  apart = np.linalg.norm(np.diff(colors, axis=0), axis=1)
  markers = figure.budget_markers(flops)
  assert apart.min() > 0.12
  assert len({(*color, marker) for color, marker in zip(colors, markers, strict=True)}) == count
  if count > figure.FEW:
    assert all(a != b for a, b in itertools.pairwise(markers))


FORMS = {
  'E + A / N^alpha': '<i>E</i> + <i>A</i> / <i>N</i><sup><i>α</i></sup>',
  '(A / N)^gamma': '(<i>A</i> / <i>N</i>)<sup><i>γ</i></sup>',
  'a M^-eta': '<i>a</i> <i>M</i><sup>\u2212<i>η</i></sup>',
  'exp(-bits / g)': 'exp(\u2212bits / <i>g</i>)',
  'C_c^(1 / alpha_N)': '<i>C</i><sub><i>c</i></sub><sup>1 / <i>α</i><sub><i>N</i></sub></sup>',
  'a < b': '<i>a</i> &lt; <i>b</i>',
}


@pytest.mark.parametrize('form', FORMS)
def test_a_form_is_set_as_mathematics(form):
  assert page.formula(form) == FORMS[form]


def test_every_law_of_the_library_can_be_set():
  for law in laws.standard():
    shown = page.formula(law.form)
    assert '^' not in shown
    assert shown.count('<sup>') == shown.count('</sup>') == law.form.count('^')


def test_a_figures_data_are_what_it_shows():
  drawn, (ax,) = figure.new_figure()
  ax.set_title('panel one')
  ax.plot([1.0, 2.0], [3.0, 4.0], label='a line')
  ax.scatter([5.0], [6.0], label='a dot')
  ax.fill_between([1.0, 2.0], [0.1, 0.2], [0.3, 0.4], label='a band')
  ax.axhline(0)
  found = list(csv.reader(io.StringIO(figure.data(drawn))))
  assert found == [
    ['panel', 'series', 'x', 'y', 'y_high'],
    ['panel one', 'a line', '1.0', '3.0', ''],
    ['panel one', 'a line', '2.0', '4.0', ''],
    ['panel one', 'a dot', '5.0', '6.0', ''],
    ['panel one', 'a band', '1.0', '0.1', '0.3'],
    ['panel one', 'a band', '2.0', '0.2', '0.4'],
  ]


def test_every_minimum_is_on_the_page_and_in_the_text_and_unconverged_ends_apart():
  minima = [
    fitted.Minimum({'E': 1.0 + k}, 0.5 + k, 3, 'unconverged' if k > 9 else 'minimum')
    for k in range(12)
  ]
  result = types.SimpleNamespace(minima=minima, starts=36, condition=10.0)
  html = sections._minima(result)
  converged, stopped = html.split('6 starts did not converge')
  assert all(f'E {1 + k}' in converged for k in range(10))
  assert 'E 11' not in converged
  assert 'E 11' in stopped
  assert 'E 12' in stopped
  text = '\n'.join(fitted.show_minima(result))
  assert all(f'E {1 + k}' in text for k in range(1, 12))
  assert text.index('did not converge') < text.index('E 11')
