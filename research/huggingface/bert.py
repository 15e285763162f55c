"""BERT: two rows, for a head that is tied to the token vectors and for one that is not."""

from research.huggingface.fields import (
  GELU,
  HEAD_DIM_ONLY_OURS,
  LAYER_NORM_EPS,
  MLP,
  SIZES,
  Family,
  Field,
)
from research.huggingface.heads import MASKED_HEAD
from research.huggingface.tables import transformer

BERT_ATTENTION = {
  'query': 'attention.self.query', 'key': 'attention.self.key', 'value': 'attention.self.value',
  'output': 'attention.output.dense',
}  # fmt: skip
BERT_TOP = {
  'embedder.tokens': 'bert.embeddings.word_embeddings.weight',
  'embedder.positions': 'bert.embeddings.position_embeddings.weight',
  'embedder.types': 'bert.embeddings.token_type_embeddings.weight',
  'embedder.norm': 'bert.embeddings.LayerNorm', 'head.dense': 'cls.predictions.transform.dense',
  'head.norm': 'cls.predictions.transform.LayerNorm', 'head.kernel': 'cls.predictions.decoder.weight',
}  # fmt: skip

BERT = tuple(
  Family(
    'bert', 'BertForMaskedLM', 'gin/models/bert/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, MLP, Field('max_position_embeddings', 'POSITIONS'), MASKED_HEAD,
     Field('type_vocab_size', 'embedder.Embedder.types'), LAYER_NORM_EPS),
    transformer(('attention.output.LayerNorm', 'output.LayerNorm'), 'bert.encoder.layer.{}.',
                BERT_ATTENTION, {'inputs.0': 'intermediate.dense', 'output': 'output.dense'}),
    {**BERT_TOP, 'head.bias': bias},
    {'hidden_act': GELU, 'is_decoder': False, 'add_cross_attention': False, 'tie_word_embeddings': tied},
    (r'.*position_ids', r'cls\.seq_relationship\..*', r'bert\.pooler\..*', *ignore), 'bert.', copies,
  )
  for tied, bias, ignore, copies in (
    (True, 'cls.predictions.bias', (), {'cls.predictions.decoder.bias': 'cls.predictions.bias'}),
    # A head of its own has a bias of its own, and the other one is not used.
    (False, 'cls.predictions.decoder.bias', (r'cls\.predictions\.bias',), {}),
  )
)  # fmt: skip
