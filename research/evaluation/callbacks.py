"""What callers of the engine are called with: its progress, and each answer."""

from collections.abc import Callable

from research.evaluation.requests import Answer

# Called with the rows that are done, and with their total.
Progress = Callable[[int, int], None]
# The same of a suite; first comes the name of the task.
TaskProgress = Callable[[str, int, int], None]
# Called with the number of a request and its answer, as soon as there is one.
Keep = Callable[[int, Answer], None]


def no_progress(done: int, total: int) -> None:
  """A `Progress` that shows nothing."""


def no_task_progress(task: str, done: int, total: int) -> None:
  """A `TaskProgress` that shows nothing."""


def keep_nothing(number: int, answer: Answer) -> None:
  """A `Keep` that keeps nothing."""
