"""Asks a chat model behind an OpenAI-compatible endpoint: waits, tries again, and then says what is wrong."""

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request

from research.core.errors import UserError

# Too many requests, and faults of the server that may pass. Any other refusal is one of the request.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where to ask.

  Attributes:
    url: up to and with /v1.
    model: its name there.
    key: the environment variable that holds the key; None where none is needed.
    seconds: that an answer may take.
    tries: before it is given up.
    wait: seconds before the second try, twice as many before the third, and so on.
  """

  url: str
  model: str
  key: str | None = None
  seconds: float = 60.0
  tries: int = 5
  wait: float = 1.0

  def ask(self, question: str) -> str:
    """The answer to a question, greedily.

    Raises:
      UserError: the last try failed, or the endpoint refuses the request.
    """
    body = {
      'model': self.model,
      'messages': [{'role': 'user', 'content': question}],
      'temperature': 0,
    }
    headers = {'Content-Type': 'application/json'}
    if self.key:
      if not os.environ.get(self.key):
        raise UserError(f'the environment variable {self.key} holds no key for {self.url}: set it.')
      headers['Authorization'] = f'Bearer {os.environ[self.key]}'
    request = urllib.request.Request(
      f'{self.url.rstrip("/")}/chat/completions', json.dumps(body).encode(), headers
    )
    for number in range(self.tries):
      if number:
        time.sleep(min(self.wait * 2 ** (number - 1), LONGEST_WAIT))
      try:
        return self._answer(request)
      except urllib.error.HTTPError as error:
        fault = f'HTTP {error.code}'
        if error.code not in PASSING:
          said = error.read(200).decode(errors='replace')
          raise UserError(f'{self.url} refuses the request with {fault}: {said}') from None
      except (OSError, http.client.HTTPException, ValueError) as error:
        fault = f'{type(error).__name__}: {error}'
    raise UserError(
      f'{self.url} gave no answer in {self.tries} tries of {self.seconds:g} seconds (the last: {fault}); '
      'see that it runs, and start again: the run goes on from its checkpoint.'
    )

  def _answer(self, request: urllib.request.Request) -> str:
    """The text of an answer; ValueError where it is none."""
    with urllib.request.urlopen(request, timeout=self.seconds) as response:
      value = json.loads(response.read())
    try:
      text = value['choices'][0]['message']['content']
    except (KeyError, IndexError, TypeError):
      raise ValueError(f'no choices[0].message.content in {str(value)[:200]}') from None
    if not isinstance(text, str):
      raise ValueError(f'content is {text!r} and no text')
    return text
