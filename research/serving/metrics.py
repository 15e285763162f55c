"""The server's measurements, for Prometheus."""

import collections
import math

import prometheus_client as prometheus

# Bounds of the buckets, in seconds. A CPU takes seconds for what an accelerator does in milliseconds.
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
RECENT_ANSWERS = 32  # how many answers the estimate of the waiting time averages over
LONGEST_RETRY = 60  # seconds; a client should look again at least once a minute


class Metrics:
  """The metrics of one server, in a registry of its own, so that a process may have several servers."""

  def __init__(self):
    self.registry = prometheus.CollectorRegistry()
    knobs = {'namespace': 'isoflop', 'registry': self.registry}
    self.requests = prometheus.Counter(
      'requests', 'Requests that were answered, by path and status.', ['path', 'status'], **knobs
    )
    self.prompt_tokens = prometheus.Counter('prompt_tokens', 'Tokens of prompts.', **knobs)
    self.generated_tokens = prometheus.Counter('generated_tokens', 'Tokens generated.', **knobs)
    self.open = prometheus.Gauge(
      'open_requests', 'Requests that wait in the queue or are active.', **knobs
    )
    self.first = prometheus.Histogram(
      'time_to_first_token_seconds', 'From the request to its first token.', buckets=LONG, **knobs
    )
    self.between = prometheus.Histogram(
      'time_between_tokens_seconds', 'From one token to the next.', buckets=SHORT, **knobs
    )
    self.whole = prometheus.Histogram(
      'answer_seconds', 'From the request to its last token.', buckets=LONG, **knobs
    )
    self.steps = prometheus.Histogram(
      'step_seconds', 'A step of the engine.', buckets=SHORT, **knobs
    )
    self._recent: collections.deque[float] = collections.deque(maxlen=RECENT_ANSWERS)

  def on_piece(self, job, number: int, piece, now: float) -> None:
    """Records what one step generated for a request.

    Args:
      job: the `model_thread.Job` of the request.
      number: the request's number in the job.
      piece: a `model_thread.Piece`.
      now: the time in seconds, by `time.monotonic`.
    """
    self.generated_tokens.inc(len(piece.tokens))
    last = job.last_times[number]
    if last is None:
      self.first.observe(now - job.began)
    else:
      self.between.observe(now - last)
    job.last_times[number] = now
    if piece.finish:
      self.whole.observe(now - job.began)
      self._recent.append(now - job.began)

  def seconds_to_wait(self) -> int:
    """Returns the Retry-After of a full queue: about as long as an answer takes now."""
    mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
    return min(LONGEST_RETRY, max(1, math.ceil(mean)))

  def text(self) -> bytes:
    """Returns all metrics in Prometheus' text format."""
    return prometheus.generate_latest(self.registry)
