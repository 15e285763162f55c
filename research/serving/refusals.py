"""Why a request is refused, in the shape of OpenAI's protocol."""

import re

import pydantic

from research.core.errors import UserError, did_you_mean


class Refused(UserError):
  """A request that is not answered.

  Args:
    message: one sentence, with what to do.
    status: of HTTP.
    kind: the protocol's `type`.
    param: the field that is wrong.
    code: the protocol's short name of the mistake.
    headers: of the answer.
  """

  def __init__(
    self,
    message: str,
    *,
    status: int = 400,
    kind: str = 'invalid_request_error',
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.kind, self.param, self.code = status, kind, param, code
    self.headers = headers or {}

  def to_json(self) -> dict:
    return {
      'error': {
        'message': str(self), 'type': self.kind, 'param': self.param, 'code': self.code,
      }
    }  # fmt: skip


def busy(seconds: int) -> Refused:
  """Too many requests wait."""
  return Refused(
    f'too many requests wait already: try again in {seconds} s.',
    status=429, kind='rate_limit_error', code='rate_limit_exceeded',
    headers={'Retry-After': str(seconds)},
  )  # fmt: skip


def server_error(message: str, status: int = 500, code: str | None = None) -> Refused:
  """Something that is not the client's fault."""
  return Refused(message, status=status, kind='server_error', code=code)


def of_validation(error: pydantic.ValidationError, known: list[str]) -> Refused:
  """The first thing that is wrong with a body.

  Args:
    known: the names of the body's fields.
  """
  errors = error.errors(include_url=False, include_input=False, include_context=False)
  # Of several forms that a field may have, the one that fits furthest is what was meant.
  first = max(errors, key=lambda one: len(one['loc']))
  # Of the other parts pydantic made names of forms: 'str', 'constrained-str', 'list[Text]', 'NamedTool'.
  parts = map(str, first['loc'])
  place = [part for part in parts if re.fullmatch('[a-z0-9_]+', part) and part != 'str']
  param = '.'.join(place) or None
  if first['type'] == 'json_invalid':
    return Refused(f'the body is not JSON: {first["msg"].removeprefix("Invalid JSON: ")}.')
  if first['type'] == 'extra_forbidden':
    guess = did_you_mean(place[0], known) if len(place) == 1 else ''
    message = f'{param} is no field of this request.{guess}'
    return Refused(message, param=param, code='unknown_parameter')
  if first['type'] == 'missing':
    return Refused(f'{param} is missing.', param=param, code='missing_required_parameter')
  why = first['msg'].removeprefix('Value error, ').rstrip('.')
  message = f'{param}: {why}.' if param else f'{why}.'
  return Refused(message, param=param, code='invalid_value')
