"""What to look at before believing a fit."""

import numpy as np

from research.scaling import approaches, planning
from research.scaling.analysis import Analysis


def parabola_bias(a: Analysis, replicates: int = 1) -> float | None:
  """How far approach 2's exponent of N* lies from the fitted law's own, on the very grid that was run.

  The law's noiseless losses at the runs' N and D go through the same profile; a parabola is exact only when
  alpha = beta and the grid is narrow and centred.
  """
  if a.approach2 is None or a.approach3 is None:
    return None
  import dataclasses

  clean = dataclasses.replace(a.rows, loss=a.predict(a.rows.params, a.rows.tokens))
  try:
    two = approaches.isoflop(clean, a.cost, method=a.approach2.method, replicates=1)
  except approaches.NoAllocation:
    return None
  c = np.array([p.flops for p in two.used])
  true, _, _ = planning.optimum(a.approach3.law, a.approach3.parameters, c, a.cost)
  return two.params.exponent - approaches.power_law(c, true).exponent


def notes(a: Analysis) -> list[str]:
  """Sentences for a reader, worst first."""
  out = []
  found = a.exponents()
  if {'a, approach 2', 'a, approach 3'} <= set(found):
    two, three = found['a, approach 2'], found['a, approach 3']
    if two[1] > three[2] or two[2] < three[1]:
      out.append(
        f'approaches 2 and 3 disagree about N* ~ C^a: {two[0]:.3f} and {three[0]:.3f}, intervals apart.'
      )
  bias = parabola_bias(a)
  if bias is not None and abs(bias) > 0.005:
    out.append(
      f'the {a.approach2.method} itself shifts approach 2: on the fitted surface this grid gives a '
      f'{bias:+.3f}.'
    )
  if a.approach2 is not None and abs(a.approach2.drift) > 0.5:
    out.append(
      f'the optimum moves by {a.approach2.drift:+.2f} e-folds of N against the centre of the grid: '
      'centre every budget on its optimum.'
    )
  if a.approach3 is not None and len(a.approach3.minima) > 1:
    near = [m for m in a.approach3.minima[1:] if m.objective < 1.05 * a.approach3.objective]
    if near:
      out.append(
        f'{len(near)} other minima lie within 5% of the best objective: see the list of minima.'
      )
  return out
