"""An engine that answers by a function of the request, without a model."""

from research.data.encoding import ByteEncoding
from research.evaluation.callbacks import keep_nothing, no_progress
from research.evaluation.rows import Settings


class Scripted:
  """Stands in for `evaluation.engine.Engine`, and counts its requests."""

  encoding = ByteEncoding()
  settings = Settings(length=128)

  def __init__(self, function):
    self.function = function
    self.requests = 0

  def answer(self, requests, progress=no_progress, keep=keep_nothing):
    answers = []
    for number, request in enumerate(requests):
      answers.append(self.function(request))
      self.requests += 1
      keep(number, answers[-1])
    return answers
