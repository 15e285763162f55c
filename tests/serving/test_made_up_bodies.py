"""Bodies that schemathesis makes up by the endpoint's own document get no fault of the server as an answer.

    uv run --group page pytest -n 0 -m slow tests/serving/test_made_up_bodies.py

Longer, against a server that runs: schemathesis run http://127.0.0.1:8000/openapi.json
--checks not_a_server_error --max-time 600
"""

import pathlib
import subprocess
import sys

import httpx
import pytest


@pytest.mark.slow
def test_no_body_is_a_fault_of_the_server(url, tmp_path):
  program = pathlib.Path(sys.executable).parent / 'schemathesis'
  if not program.is_file():
    pytest.skip('schemathesis is not installed: uv sync --group page')
  command = [
    program, 'run', f'{url}/openapi.json', '--checks', 'not_a_server_error', '--max-time', '40',
    '--request-timeout', '60',
    '--suppress-health-check', 'all', '--seed', '1', '--workers', '4', '--warnings', 'off',
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
  assert done.returncode == 0, done.stdout[-4000:]
  counted = httpx.get(f'{url}/metrics').text
  # It got further than the checks of bodies: some were answered.
  assert 'isoflop_requests_total{path="/v1/embeddings",status="200"}' in counted
  assert httpx.get(f'{url}/health').json() == {'status': 'ok'}
