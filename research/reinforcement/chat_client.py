"""A client of a chat model behind an OpenAI-compatible endpoint, with waits and retries."""

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request

from research.core.errors import UserError

# Too many requests, and faults of the server that may pass. Any other status refuses the request itself.
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """An endpoint and its limits.

  Attributes:
    url: of the API, such as 'http://localhost:8000/v1'.
    model: the model's name there.
    key: the environment variable that holds the key; None where none is needed.
    seconds: the time limit of an answer.
    tries: how many attempts are made.
    wait: seconds before the second attempt; they double before each further one.
  """

  url: str
  model: str
  key: str | None = None
  seconds: float = 60.0
  tries: int = 5
  wait: float = 1.0

  def ask(self, question: str) -> str:
    """The greedy answer to a question.

    Raises:
      UserError: the last attempt failed, or the endpoint refuses the request.
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
    for attempt in range(self.tries):
      if attempt:
        time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT))
      try:
        return self._answer(request)
      except urllib.error.HTTPError as error:
        fault = f'HTTP {error.code}'
        if error.code not in TRANSIENT:
          body = error.read(200).decode(errors='replace')
          raise UserError(f'{self.url} refuses the request with {fault}: {body}') from None
      except (OSError, http.client.HTTPException, ValueError) as error:
        fault = f'{type(error).__name__}: {error}'
    raise UserError(
      f'{self.url} gave no answer in {self.tries} tries of {self.seconds:g} seconds (the last: {fault}); '
      'check that the endpoint runs, and start again: the run goes on from its checkpoint.'
    )

  def _answer(self, request: urllib.request.Request) -> str:
    """The text of an answer.

    Raises:
      ValueError: the reply is no chat completion.
    """
    with urllib.request.urlopen(request, timeout=self.seconds) as response:
      value = json.loads(response.read())
    try:
      text = value['choices'][0]['message']['content']
    except (KeyError, IndexError, TypeError):
      raise ValueError(f'no choices[0].message.content in {str(value)[:200]}') from None
    if not isinstance(text, str):
      raise ValueError(f'content is {text!r}, not a text')
    return text
