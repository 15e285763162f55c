"""The flags of a freeze on a cluster; test_shuffle.py holds its tasks to the bytes of one process."""

import pytest

from research.core.errors import UserError


def test_the_flags_of_an_engine_go_together(tmp_path):
  from research import freeze

  for flags, why in (
    (['--address=a:1'], '--address=a:1 goes with --engine=ray'),
    (['--engine=ray', '--workers=2'], '--workers=2 goes with --engine=local'),
  ):
    with pytest.raises(UserError, match=why):
      freeze.main(['--gin_file=gin/runs/tiny.gin', f'--cache={tmp_path}', *flags])
