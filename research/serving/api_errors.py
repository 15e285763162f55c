"""Errors in the shape of OpenAI's protocol."""

import re

import pydantic

from research.core.errors import UserError, did_you_mean

MOST_FAULTS = 1000  # of a body, that are looked through for the one to report


class ApiError(UserError):
  """A request that the server refuses or cannot answer.

  Args:
    message: one sentence, with what to do.
    status: the HTTP status.
    kind: the protocol's `type`.
    param: the wrong field.
    code: the protocol's short name of the error.
    headers: HTTP headers of the response.
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
    self.status = status
    self.kind = kind
    self.param = param
    self.code = code
    self.headers = headers or {}

  def to_json(self) -> dict:
    return {
      'error': {
        'message': str(self), 'type': self.kind, 'param': self.param, 'code': self.code,
      }
    }  # fmt: skip


def busy(seconds: int) -> ApiError:
  """Returns the error of a full queue, which the client should try again after so many seconds."""
  return ApiError(
    f'too many requests wait already: try again in {seconds} s.',
    status=429, kind='rate_limit_error', code='rate_limit_exceeded',
    headers={'Retry-After': str(seconds)},
  )  # fmt: skip


def client_gone() -> ApiError:
  """Returns the error of a client that hung up. Nobody reads it, but the metrics count its status."""
  return ApiError('the client is gone.', status=499)


def server_error(message: str, status: int = 500, code: str | None = None) -> ApiError:
  """Returns an error that is not the client's fault."""
  return ApiError(message, status=status, kind='server_error', code=code)


def of_validation(error: pydantic.ValidationError, fields: list[str]) -> ApiError:
  """Returns the error of the first fault that pydantic reports in a body.

  Args:
    error: pydantic's report.
    fields: the names of the body's fields, for a suggestion.
  """
  if error.error_count() > MOST_FAULTS:
    return ApiError(
      f'the body has {error.error_count():,} faults: is it a request?', code='invalid_value'
    )
  errors = error.errors(include_url=False, include_input=False, include_context=False)
  # A field may have several forms. The form that matched deepest is what the client meant.
  first = max(errors, key=_depth)
  # pydantic adds the names of forms to the location: 'str', 'constrained-str', 'list[Text]', 'NamedTool'.
  parts = [str(part) for part in first['loc']]
  # The name of an unknown field is the client's, so it may look like a form's.
  known = parts[:-1] if first['type'] == 'extra_forbidden' else parts
  location = [part for part in known if re.fullmatch('[a-z0-9_]+', part) and part != 'str']
  location += parts[len(known) :]
  param = '.'.join(location)[:200] or None  # a hostile body may have a name of megabytes
  if first['type'] == 'json_invalid':
    return ApiError(f'the body is not JSON: {first["msg"].removeprefix("Invalid JSON: ")}.')
  if first['type'] == 'extra_forbidden':
    guess = did_you_mean(param, fields) if len(location) == 1 else ''
    message = f'{param} is no field of this request.{guess}'
    return ApiError(message, param=param, code='unknown_parameter')
  if first['type'] == 'missing':
    return ApiError(f'{param} is missing.', param=param, code='missing_required_parameter')
  why = first['msg'].removeprefix('Value error, ').rstrip('.')
  message = f'{param}: {why}.' if param else f'{why}.'
  return ApiError(message, param=param, code='invalid_value')


def _depth(error: dict) -> int:
  return len(error['loc'])
