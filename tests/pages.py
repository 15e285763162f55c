"""A registered seqio task that every host finds with the project: the lines of three pages of docs/."""

import pathlib

import seqio

DOCS = pathlib.Path(__file__).resolve().parent.parent / 'docs'
NAMES = ('align', 'data', 'fleet')

seqio.TaskRegistry.add(
  'pages',
  source=seqio.TextLineDataSource({'train': [str(DOCS / f'{name}.md') for name in NAMES]}),
  preprocessors=[
    lambda lines: lines.map(lambda line: {'targets': line}),
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
  ],
  output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
  shuffle_buffer_size=1000,
)
