"""One server of a tiny model for all tests, and clients of it."""

import pytest

pytest.importorskip('starlette')
openai = pytest.importorskip('openai')

from tests.serving import tiny  # noqa: E402


@pytest.fixture(scope='session')
def llama(tmp_path_factory):
  return tiny.write_llama(tmp_path_factory.mktemp('served') / 'llama')


@pytest.fixture(scope='session')
def url(llama):
  with tiny.serving(llama, room=640, slots=4) as url:
    yield url


@pytest.fixture(scope='session')
def client(url):
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:
    yield client
