"""Eight fake CPU devices for every test, and the folder of public data where it is at hand."""

import os
import pathlib

# Before jax: with fewer threads than devices, eight devices on two cores deadlock in a collective.
os.environ.setdefault('PJRT_NPROC', '16')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder of public results that some tests compare with (docs/laws.md says what is in it)."""
  for folder in (os.environ.get('ISOFLOP_DATA'), ROOT.parent / 'shared' / 'data'):
    if folder and pathlib.Path(folder).is_dir():
      return pathlib.Path(folder)
  pytest.skip('no public data: set ISOFLOP_DATA to a folder with it (see docs/laws.md)')
