"""Reads preferences from records: pairs of answers to a prompt, or answers that were judged one by one."""

from research.data.conversations import Messages, Unsuitable, check, read_turns, text_of

# The judgement of an answer, a conversation's last turn. Segments of a row with odd numbers are good answers.
GOOD = 1
BAD = 2
Answer = tuple[int, Messages]


def read_preference(record: dict) -> list[Answer]:
  """Returns the chosen conversation of a JSON record, and the rejected one. They differ in their last turn.

  The shapes are {'prompt', 'chosen', 'rejected'}, each a text or a list of messages, and {'chosen', 'rejected'}
  as whole conversations.

  Raises:
    Unsuitable: it has none of these shapes, roles out of order, an empty turn, or two equal answers.
  """
  if not ('chosen' in record and 'rejected' in record):
    names = ', '.join(map(repr, list(record)[:8]))
    raise Unsuitable(f"has no 'chosen' and 'rejected' (it has {names or 'nothing'})")
  chosen, rejected = (_conversation(record, name) for name in ('chosen', 'rejected'))
  if chosen[:-1] != rejected[:-1]:
    raise Unsuitable("has 'chosen' and 'rejected' that differ before the last turn")
  if chosen == rejected:
    raise Unsuitable("has one answer as both 'chosen' and 'rejected'")
  return [(GOOD, chosen), (BAD, rejected)]


def read_judgement(record: dict) -> list[Answer]:
  """Returns the conversation of a JSON record {'prompt', 'completion', 'label'}; true labels good answers.

  Raises:
    Unsuitable: it has another shape, roles out of order, or an empty turn.
  """
  if not ('completion' in record and 'label' in record):
    names = ', '.join(map(repr, list(record)[:8]))
    raise Unsuitable(f"has no 'completion' and 'label' (it has {names or 'nothing'})")
  if not isinstance(record['label'], bool):
    raise Unsuitable(f"has a 'label' that is {record['label']!r} and not true or false")
  return [(GOOD if record['label'] else BAD, _conversation(record, 'completion'))]


def _conversation(record: dict, name: str) -> Messages:
  """Returns the prompt and the answer `name` as messages, after checking them."""
  answer = _messages(record, name, 'assistant')
  # In some files the conversation begins with the prompt (UltraFeedback), which must not be repeated.
  if answer[0]['role'] == 'assistant':
    if 'prompt' not in record:
      raise Unsuitable(f"has no 'prompt', and {name!r} begins with the assistant's turn")
    answer = _messages(record, 'prompt', 'user') + answer
  try:
    check(answer)
  except Unsuitable as error:
    raise Unsuitable(f'{error} (of {name!r})') from None
  return answer


def _messages(record: dict, name: str, role: str) -> Messages:
  if isinstance(record[name], str):
    return [{'role': role, 'content': text_of(record[name], repr(name))}]
  return read_turns(record, name)
