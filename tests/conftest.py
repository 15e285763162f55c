"""Eight fake CPU devices for every test, and the folder of public data where it is at hand."""

import contextlib
import gc
import os
import pathlib
import random

# Before jax: with fewer threads than devices, eight devices on two cores deadlock in a collective.
os.environ.setdefault('PJRT_NPROC', '16')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A worker holds millions of objects, mostly traced programs that live on. Python would walk through them after
# every 700 new ones, which took 7% of the time.
gc.set_threshold(100_000, 20, 20)


def pytest_addoption(parser):
  parser.addoption(
    '--model', action='append', default=[], metavar='FILE.gin',
    help='hold the MODEL of this gin file to what must be true of every model (tests/model/test_model.py)',
  )  # fmt: skip


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder of public results that some tests compare with (docs/laws.md says what is in it)."""
  for folder in (os.environ.get('ISOFLOP_DATA'), ROOT.parent / 'shared' / 'data'):
    if folder and pathlib.Path(folder).is_dir():
      return pathlib.Path(folder)
  pytest.skip('no public data: set ISOFLOP_DATA to a folder with it (see docs/laws.md)')


@pytest.fixture(scope='session')
def text_file(tmp_path_factory) -> pathlib.Path:
  """A small text: lines that a small model learns something of. The session's data cache is its own.

  Workers of one session have the same text and share its frozen streams, so that each is frozen once.
  They do not share compiled programs: jax writes those in place, and another worker would read half of one.
  """
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  folder = shared / 'text'
  folder.mkdir(exist_ok=True)
  cache = tmp_path_factory.mktemp('cache')
  (shared / 'streams').mkdir(exist_ok=True)
  (cache / 'streams').symlink_to(shared / 'streams')
  os.environ['ISOFLOP_CACHE'] = str(cache)
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
  choose = random.Random(0).choice
  for i in range(40):
    text = '\n'.join(' '.join(choose(words) for _ in range(12)) for _ in range(20))
    partial = base / f'{i:02}.partial'
    partial.write_text(text)
    # A stream is named by the times of its files too, so the first worker's file stays.
    with contextlib.suppress(FileExistsError):
      os.link(partial, folder / f'{i:02}.txt')
  return folder / '*.txt'


@pytest.fixture(scope='session', autouse=True)
def frozen_here():
  """Streams are frozen in the test's process, which imports TensorFlow (ten seconds) once and not every time.

  A command that a test starts freezes in a process of its own, as a user's does; so does a test with
  `frozen_in_a_process`. Yields how it is done there.
  """
  from research.data import cache

  def freeze(streams, folder, log):
    # Before `freezing` sees that TensorFlow is missing, and starts processes that read meanwhile.
    import tasks.objectives  # noqa: F401
    from tasks import freezing

    freezing.freeze(streams, folder, log)

  with pytest.MonkeyPatch.context() as patch:
    in_a_process = cache._freeze
    patch.setattr(cache, '_freeze', freeze)
    yield in_a_process


@pytest.fixture
def frozen_in_a_process(frozen_here, monkeypatch):
  """Streams are frozen as a user's run freezes them."""
  from research.data import cache

  monkeypatch.setattr(cache, '_freeze', frozen_here)


@pytest.fixture(scope='session')
def smollm2() -> pathlib.Path:
  """The trained SmolLM2-135M-Instruct as a Hugging Face folder (see tests/trained.py)."""
  from tests import trained

  return trained.smollm2()


@pytest.fixture(scope='session')
def gemma3() -> pathlib.Path:
  """The trained Gemma 3 270M as a Hugging Face folder (see tests/trained.py)."""
  from tests import trained

  return trained.gemma3()


@pytest.fixture(scope='session')
def ray_hosts():
  """A Ray cluster of three hosts (see tests/raylets.py), which the tests of a session share."""
  from tests import raylets

  with raylets.started(3) as hosts:
    yield hosts


@pytest.fixture
def one_device(monkeypatch):
  """Most of what is tested here does not depend on the mesh, and one device compiles much faster."""
  import jax

  monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


@pytest.fixture(scope='session')
def user_environment() -> dict[str, str]:
  """The environment of a process as a user starts it: one device, as many threads as there are cores."""
  return {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'PJRT_NPROC')}


@pytest.fixture
def compiled(caplog):
  """How often a function of some name was compiled in this test."""
  import jax

  jax.config.update('jax_log_compiles', True)  # in every thread, as its context manager does not
  with caplog.at_level('WARNING'):
    yield lambda name: sum(f'XLA compilation of jit({name})' in m for m in caplog.messages)
  jax.config.update('jax_log_compiles', False)
