"""The table of the audit (test_audit.py), at the end of the tests."""


def pytest_terminal_summary(terminalreporter):
  """Prints, for every configuration that passed, how many keys and values were tried, and what came of them."""
  rows = []
  for report in terminalreporter.stats.get('passed', []):
    rows += [value for name, value in report.user_properties if name == 'audit']
  if not rows:
    return
  rows.append(['all', *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
  terminalreporter.section('audit of config.json')
  terminalreporter.write_line(f'{"":20}{"keys":>7}{"tried":>7}{"equal":>7}{"refused":>9}')
  for name, keys, equal, refused in rows:
    terminalreporter.write_line(f'{name:20}{keys:7,}{equal + refused:7,}{equal:7,}{refused:9,}')
