"""Other people's files: every kind is read as it is meant, or refused in a sentence that says what to do."""

import bz2
import contextlib
import gzip
import json
import lzma
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import fit
from research.scaling import cells, doubts, rows, tables

CASES = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'cases' / '20-fit-tables'
needs_cases = pytest.mark.skipif(
  not CASES.is_dir(), reason='no folder of cases beside the checkout'
)


def observe(path, columns=rows.DEFAULT) -> rows.Observations:
  seen = rows.observe(tables.read(path).rows, columns)
  doubts.check_units(seen)
  return seen


@pytest.fixture(scope='module')
def plain() -> rows.Observations:
  return observe(CASES / 'ok.csv')


SAME = {
  'blank_lines.csv': '', 'budget_text.csv': '', 'budget_name.csv': '', 'layers_L.csv': '', 'ok.pq': '',
  'rows.ndjson': '', 'trailing_ragged.csv': '', 'time_t.csv': '',
  'latin1.csv': 'not UTF-8, read as Windows-1252', 'ok.csv.gz': 'compressed by gzip',
  'semicolon_comma.csv': 'separated by semicolons, decimal commas', 'tab.tsv': 'separated by tabs',
  'utf16.csv': 'UTF-16',
}  # fmt: skip


@needs_cases
@pytest.mark.parametrize('name', SAME)
def test_a_file_of_another_form_gives_the_same_rows(name, plain):
  table = tables.read(CASES / name)
  assert table.reading == SAME[name]
  seen = observe(CASES / name)
  np.testing.assert_array_equal(seen.params, plain.params)
  np.testing.assert_array_equal(seen.loss, plain.loss)
  # Where there is no column of tokens or of FLOPs, C = 6 N D, which the whole tokens of the file round.
  np.testing.assert_allclose(seen.tokens, plain.tokens, rtol=1e-6)
  np.testing.assert_allclose(seen.flops, plain.flops, rtol=1e-6)


@needs_cases
def test_an_export_of_a_logger_gives_the_same_rows(plain):
  """Its columns are eval/loss, train/tokens, throughput/total_gflops; one run has crashed."""
  seen = observe(CASES / 'wandb.csv')
  assert seen.columns['loss'] == 'eval/loss'
  assert len(seen) == 23
  assert len(seen.excluded) == 1
  kept = np.isin(plain.loss, seen.loss)
  for quantity in ('params', 'tokens', 'flops', 'loss'):
    np.testing.assert_allclose(getattr(seen, quantity), getattr(plain, quantity)[kept])


REFUSED = {
  'book.xlsx': 'an Excel workbook; save the sheet as CSV',
  'broken.parquet': 'is not a Parquet file, or is damaged',
  'dup_loss.csv': "two columns called 'loss' .* that differ: rename or remove one",
  'list_of_lists.json': 'row 1 is a list and not an object',
  'list_of_numbers.json': 'row 1 is a number and not an object',
  'rows_list.jsonl': ':1 is a list and not an object',
  'rows_null.jsonl': ':1 is null and not an object',
  'mixed_units.csv': '5 of 24 rows, such as row 1 .* are in other units',
  'pfdays.csv': r'in PF-days: pass --flops_unit=8.64e\+19',
  'ppl.csv': "no column for loss.*'ppl' looks like a perplexity.*--loss_unit=perplexity",
  'ragged_some.csv': r":4 has 5 cells in 4 columns \('restarted once' is surplus\)",
}


@needs_cases
@pytest.mark.parametrize('name', REFUSED)
def test_a_file_that_cannot_be_fitted_is_refused_in_a_sentence(name):
  with pytest.raises(rows.RowError, match=REFUSED[name]):
    observe(CASES / name)


@needs_cases
def test_what_the_sentence_says_is_the_cure(plain):
  days = observe(CASES / 'pfdays.csv', rows.Columns(flops_unit=8.64e19))
  np.testing.assert_allclose(days.flops, plain.flops, rtol=1e-9)
  nats = observe(CASES / 'ppl.csv', rows.Columns(loss='ppl', loss_unit='perplexity'))
  np.testing.assert_allclose(nats.loss, plain.loss - 1, atol=1e-5)  # the file has exp(loss - 1)


def write(folder, name, data) -> pathlib.Path:
  path = folder / name
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


HEAD = 'params,tokens,loss\n'
LINES = '1000000,20000000,3.5\n2000000,40000000,3.25\n4000000,80000000,3.125\n'


@pytest.mark.parametrize(
  ('name', 'pack'), [('a.csv.bz2', bz2.compress), ('a.csv.xz', lzma.compress), ('a', gzip.compress)]
)
def test_compressed_files_are_known_by_their_bytes(name, pack, tmp_path):
  assert len(tables.read(write(tmp_path, name, pack((HEAD + LINES).encode()))).rows) == 3
  with pytest.raises(rows.RowError, match='damaged or cut'):
    tables.read(write(tmp_path, name, pack((HEAD + LINES).encode())[:-9]))


@pytest.mark.parametrize(
  'text',
  [
    '\ufeff' + HEAD + LINES,
    '# made by hand\n\n' + HEAD + LINES,
    (HEAD + LINES).replace(',', '|'),
    (HEAD + LINES).replace(',', '  '),
    (HEAD + LINES).replace('\n', '\r\n'),
    'run,,,\n'.replace('run,,,', 'params,tokens,loss,') + LINES.replace('\n', ',\n'),
    'params,tokens,loss\n"1,000,000","20,000,000",3.5\n2e6,40M,3.25\n4 000 000,80_000_000,3.125\n',
    'params (M),Tokens (B),loss (nats)\n1,0.02,3.5\n2,0.04,3.25\n4,0.08,3.125\n',
    'N;D in millions;val_loss\n1M;20;3,5\n2M;40;3,25\n4M;80;3,125\n',
    json.dumps({'params': [1e6, 2e6, 4e6], 'D': [2e7, 4e7, 8e7], 'eval': [3.5, 3.25, 3.125]}).replace(
      'eval', 'eval/loss'
    ),
    '\n'.join(json.dumps({'params': n, 'tokens': 20 * n, 'eval': {'loss': x}})
              for n, x in ((1e6, 3.5), (2e6, 3.25), (4e6, 3.125))),
  ],
)  # fmt: skip
def test_every_spelling_of_three_rows_is_those_three_rows(text, tmp_path):
  seen = rows.observe(tables.read(write(tmp_path, 'table', text)).rows)
  np.testing.assert_allclose(seen.params, [1e6, 2e6, 4e6])
  np.testing.assert_allclose(seen.tokens, [2e7, 4e7, 8e7])
  np.testing.assert_allclose(seen.loss, [3.5, 3.25, 3.125])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'is empty'),
    ('\x00\x01\x02', 'is not a table of text'),
    ('params,tokens,loss\n', 'names of columns and no rows'),
    (LINES, 'first row .* holds numbers'),
    ('a,b;c\n1,2;3\n', 'may be separated by commas or by semicolons'),
    (
      'params;tokens;loss\n1e6;2e7;3,50\n1,234.5;2e7;3,5\n',
      'both decimal commas and decimal points',
    ),
    ('{"a": 1', 'is not JSON'),
    ('[{"a": 1, "a": 2}]', "the key 'a' comes twice"),
    ('"never closed', 'no column|is not CSV|no rows'),
  ],
)
def test_what_has_two_readings_or_none_is_refused(text, message, tmp_path):
  with pytest.raises(rows.RowError, match=message):
    rows.observe(tables.read(write(tmp_path, 'table', text)).rows)


def test_a_number_that_may_be_either_is_refused_where_it_is_used(tmp_path):
  path = write(
    tmp_path, 'a.csv', 'params,tokens,loss,note\n1e6,2e7,"3,125","1,234"\n2e6,4e7,3.5,x\n'
  )
  with pytest.raises(rows.RowError, match=r"loss is '3,125', which may be 3125 or 3\.125"):
    rows.observe(tables.read(path).rows)


def test_two_columns_that_may_both_be_meant_must_agree(tmp_path):
  text = 'params,tokens,loss,val_loss\n1e6,2e7,3.5,{}\n2e6,4e7,3.25,3.25\n'
  assert len(rows.observe(tables.read(write(tmp_path, 'a', text.format(3.5))).rows)) == 2
  with pytest.raises(rows.RowError, match=r"'loss' and 'val_loss' may both be the loss.*--loss="):
    rows.observe(tables.read(write(tmp_path, 'b', text.format(3.6))).rows)


def test_blank_cells_are_left_out_and_named(tmp_path):
  text = HEAD + '1e6,2e7,3.5\n2e6,,3.25\n4e6,8e7,n/a\n'
  seen = rows.observe(tables.read(write(tmp_path, 'a.csv', text)).rows)
  assert seen.excluded == (('row 2', 'its tokens is blank'), ('row 3', 'its loss is blank'))
  assert len(seen) == 1


@pytest.mark.parametrize(
  ('cell', 'value'),
  [('125M', 125e6), ('6.9B', 6.9e9), ('16.41B tokens', 16.41e9), ('1e18 FLOPs', 1e18), ('2 PF-days', 1.728e20),
   ('350m', 350e6), ('3.2 TFLOPs', 3.2e12), ('1,234,567', 1234567.0), ('1.234.567,5', 1234567.5), ('.5', 0.5),
   (7, 7.0), (10**400, float('inf')), (np.float32(0.5), 0.5)],
)  # fmt: skip
def test_cells_as_numbers(cell, value):
  assert cells.number(cell) == pytest.approx(value)


@pytest.mark.parametrize(
  'cell', ['big', '12%', '1,2,3', True, None, [1], {}, '1e', '--3', '2024-05-01']
)
def test_what_is_no_number_is_none(cell):
  with pytest.raises(ValueError, match='not a number'):
    cells.number(cell)


@settings(max_examples=60, deadline=None)
@given(
  data=st.binary(max_size=200), name=st.sampled_from(['t.csv', 't.json', 't.jsonl', 't.pq', 't'])
)
def test_no_bytes_make_a_traceback(data, name, tmp_path_factory):
  path = write(tmp_path_factory.getbasetemp(), name, data)
  with contextlib.suppress(rows.RowError):
    rows.observe(tables.read(path).rows)


@settings(max_examples=60, deadline=None)
@given(
  table=st.lists(
    st.lists(st.text('0123456789.,;eE+-"nakMB\t', max_size=6), min_size=3, max_size=4), max_size=4
  )
)
def test_no_cells_make_a_traceback(table, tmp_path_factory):
  text = '\n'.join(','.join(line) for line in [['params', 'tokens', 'loss'], *table])
  try:
    seen = rows.observe(tables.read(write(tmp_path_factory.getbasetemp(), 'c.csv', text)).rows)
    assert (seen.params > 0).all()
  except rows.RowError:
    pass


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--level=2'], '--level=2.0 must be between 0 and 1'),
    (['--bootstrap=0'], '--bootstrap=0 must be from 1'),
    (['--delta=-1'], '--delta=-1.0 must be positive'),
    (['--forecast=-3'], '--forecast=-3.0 must be a positive number'),
    (['--tokens_unit=0'], 'tokens_unit=0.0 must be a positive number'),
    (['--fix=E'], '--fix=E is not NAME=VALUE'),
    (['--where=loss>big'], "'big' is not a number"),
    (['--pick=first'], '--pick=first is none of'),
    (['--rule=magic'], "no rule 'magic'"),
    (['--law=no_such.Law'], "no module 'no_such'"),
    (
      ['--law=AccuracyOfLoss'],
      "no column 'accuracy'; say which it is with --input accuracy=COLUMN",
    ),
    (['--law=Kaplan', '--input', 'x'], '--input=x is not NAME=VALUE'),
  ],
)
def test_wrong_flags_are_one_sentence(flags, message, tmp_path, capsys):
  path = write(tmp_path, 'a.csv', HEAD + LINES)
  assert fit.main([f'--results={path}', *flags]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith('error: ')


def test_lists_need_no_results(capsys):
  assert fit.main(['--law=list']) == 0
  assert 'GammaChinchilla' in capsys.readouterr().out
  assert fit.main(['--rule=list']) == 0
  assert '(default)' in capsys.readouterr().out
  assert fit.main([]) == 2
  assert '--results=FILE is missing' in capsys.readouterr().err
