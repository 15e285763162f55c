"""Conditions and picks: which rows of a table are fitted."""

import pytest

from research.core.errors import UserError
from research.scaling import selection

TABLE = [
  {'data': 'a', 'seed': 0, 'tokens': '1e9', 'loss': '3.5', 'run': 'x'},
  {'data': 'a', 'seed': 1, 'tokens': '2,000,000,000', 'loss': '3.25', 'run': 'x'},
  {'data': 'b', 'seed': 1, 'tokens': '4B', 'loss': 'nan', 'run': 'y'},
]


@pytest.mark.parametrize(
  ('conditions', 'kept'),
  [
    ([], [0, 1, 2]), (['data=a'], [0, 1]), (['data=a', 'seed=1'], [1]), (['data!=a'], [2]),
    (['tokens>=2e9'], [1, 2]), (['tokens > 2e9'], [2]), (['tokens<2B'], [0]), (['tokens<=1e9'], [0]),
    (['data in b,c'], [2]), (['seed in (0, 1)'], [0, 1, 2]), (['Data=a'], [0, 1]), (['seed=1.0'], [1, 2]),
  ],
)  # fmt: skip
def test_conditions(conditions, kept):
  assert selection.where(TABLE, conditions) == [TABLE[i] for i in kept]


@pytest.mark.parametrize(
  ('condition', 'message'),
  [
    ('dat=a', r"no column 'dat'\. Did you mean data"),
    ('data=c', 'no row has data=c; there are a, b'),
    ('data', 'is not COLUMN=VALUE'),
    ('tokens<many', "'many' is not a number"),
  ],
)
def test_wrong_conditions_say_what_is_there(condition, message):
  with pytest.raises(UserError, match=message):
    selection.where(TABLE, [condition])


def test_picks():
  assert selection.pick(TABLE, ['last:run']) == [TABLE[1], TABLE[2]]
  assert selection.pick(TABLE, ['best:loss:data']) == [TABLE[1], TABLE[2]]
  assert selection.pick(TABLE, ['best:loss:seed']) == [TABLE[0], TABLE[1]]  # NaN is not best
  assert selection.pick(TABLE, ['all']) == TABLE
  with pytest.raises(UserError, match='none of last:COLUMN'):
    selection.pick(TABLE, ['best:loss'])
