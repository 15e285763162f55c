"""Every preset has the parameters that its publication has, and the FLOPs are those of the program.

A family is one gin file and one row of a table below. `EXACT` totals are those of the modules of transformers
5.23, built on torch's meta device from the configuration of the released weights, where a row does not say
otherwise. `ROUNDED` are figures of papers, with the digits they print.
"""

import functools
import itertools
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from research import count as command
from research.core import configs, describe
from research.core.errors import UserError
from research.model import mamba, mamba2
from research.model.counts import Counts, abstract, count
from research.parallel.mesh import Mesh
from tests.families import PRESETS, tiny

MODELS = pathlib.Path(__file__).resolve().parent.parent.parent / 'gin' / 'models'

EXACT = {
  't5/1_0_small': 60_506_624,
  't5/1_0_base': 222_903_552,
  't5/1_0_large': 737_668_096,
  't5/1_0_3b': 2_851_598_336,
  't5/1_0_11b': 11_307_321_344,
  't5/1_1_small': 76_961_152,
  't5/1_1_base': 247_577_856,
  't5/1_1_large': 783_150_080,
  't5/1_1_xl': 2_849_757_184,
  't5/1_1_xxl': 11_135_332_352,
  # transformers ties the heads of the next three families; theirs is vocab x embed more.
  'mt5/small': 172_119_424 + 250_112 * 512,
  'mt5/base': 390_315_264 + 250_112 * 768,
  'mt5/large': 973_466_624 + 250_112 * 1024,
  'mt5/xl': 3_230_390_272 + 250_112 * 2048,
  'mt5/xxl': 11_896_598_528 + 250_112 * 4096,
  'byt5/small': 299_072_512 + 384 * 1472,
  'byt5/base': 581_063_424 + 384 * 1536,
  'byt5/large': 1_227_593_728 + 384 * 1536,
  'byt5/xl': 3_736_818_688 + 384 * 2560,
  'byt5/xxl': 12_905_105_280 + 384 * 4672,
  'ul2/20b': 19_459_613_696 + 32_128 * 4096,
  'switch/base_8': 619_339_008,
  'switch/base_16': 1_072_397_568,
  'switch/base_32': 1_978_514_688,
  'switch/base_64': 3_790_748_928,
  'switch/base_128': 7_415_217_408,
  'switch/large_128': 26_309_291_008,
  'gpt2/124m': 124_439_808,
  'gpt2/355m': 354_823_168,
  'gpt2/774m': 774_030_080,
  'gpt2/1_5b': 1_557_611_200,
  'opt/125m': 125_239_296,
  'opt/1_3b': 1_315_758_080,
  'opt/2_7b': 2_651_596_800,
  'opt/6_7b': 6_658_473_984,
  'opt/13b': 12_853_473_280,
  'opt/30b': 29_974_540_288,
  'opt/66b': 65_719_701_504,
  'opt/175b': 174_604_468_224,
  'llama/7b': 6_738_415_616,
  'llama/13b': 13_015_864_320,
  'llama/33b': 32_528_943_616,
  'llama/65b': 65_285_660_672,
  'llama2/7b': 6_738_415_616,
  'llama2/13b': 13_015_864_320,
  'llama2/70b': 68_976_648_192,
  'llama3/8b': 8_030_261_248,
  'llama3/70b': 70_553_706_496,
  'llama3/405b': 405_853_388_800,
  'bloom/560m': 559_214_592,
  'bloom/1b1': 1_065_314_304,
  'bloom/1b7': 1_722_408_960,
  'bloom/3b': 3_002_557_440,
  'bloom/7b1': 7_069_016_064,
  'bloom/176b': 176_247_271_424,
  'falcon/7b': 6_921_720_704,
  'falcon/40b': 41_303_293_952,
  'falcon/180b': 178_557_088_768,
  'glm/4_9b': 9_399_951_360,
  'glm/chatglm2_6b': 6_243_584_000,  # what its released code counts when it loads (both)
  'glm/chatglm3_6b': 6_243_584_000,
  'baichuan/7b': 7_000_559_616,  # both: the table of Baichuan-13B's README
  'baichuan/13b': 13_264_901_120,
  # The same at the vocabulary of Baichuan 2: 125,696 for 64,000 in both tables.
  'baichuan2/7b': 7_000_559_616 + 2 * (125_696 - 64_000) * 4096,
  'baichuan2/13b': 13_264_901_120 + 2 * (125_696 - 64_000) * 5120,
  'qwen/1_8b': 1_836_828_672,  # Qwen 1: transformers' Qwen 2 with as many key heads as heads
  'qwen/7b': 7_721_324_544,
  'qwen/14b': 14_167_290_880,
  'qwen/72b': 72_287_920_128,
  'qwen2/0_5b': 494_032_768,
  'qwen2/1_5b': 1_543_714_304,
  'qwen2/7b': 7_615_616_512,
  'qwen2/72b': 72_706_203_648,
  'qwen2_5/0_5b': 494_032_768,
  'qwen2_5/1_5b': 1_543_714_304,
  'qwen2_5/3b': 3_085_938_688,
  'qwen2_5/7b': 7_615_616_512,
  'qwen2_5/14b': 14_770_033_664,
  'qwen2_5/32b': 32_763_876_352,
  'qwen2_5/72b': 72_706_203_648,
  'qwen3/0_6b': 596_049_920,
  'qwen3/1_7b': 1_720_574_976,
  'qwen3/4b': 4_022_468_096,
  'qwen3/8b': 8_190_735_360,
  'qwen3/14b': 14_768_307_200,
  'qwen3/32b': 32_762_123_264,
  'qwen3/30b_a3b': 30_532_122_624,
  'qwen3/235b_a22b': 235_093_634_560,
  'gemma/2b': 2_506_172_416,
  'gemma/7b': 8_537_680_896,
  'gemma2/2b': 2_614_341_888,
  'gemma2/9b': 9_241_705_984,
  'gemma2/27b': 27_227_128_320,
  'gemma3/270m': 268_098_176,
  'gemma3/1b': 999_885_952,
  'gemma3/4b': 3_880_263_168,
  'gemma3/12b': 11_766_034_176,
  'gemma3/27b': 27_009_346_304,
  'olmo2/1b': 1_484_916_736,
  'olmo2/7b': 7_298_617_344,
  'olmo2/13b': 13_716_198_400,
  'olmo2/32b': 32_234_279_936,
  'bert/base': 109_514_298,
  'bert/large': 335_174_458,
  'deepseek/v2_lite': 15_706_484_224,
  # transformers keeps the bias that chooses experts in a buffer: 58 layers of 256.
  'deepseek/v3': 671_026_404_352 + 58 * 256,
  'jamba/52b': 51_570_323_328,
  'mistral/7b': 7_241_732_096,
  'glm/4_9b_0414': 9_400_279_040,
  'qwen2/57b_a14b': 57_408_658_944,
  'gptj/6b': 6_050_882_784,
  'gpt_neox/20b': 20_554_567_680,
  'mpt/7b': 6_649_286_656,
  'pythia/70m': 70_426_624,  # transformers, and the table of Pythia's README (all)
  'pythia/160m': 162_322_944,
  'pythia/410m': 405_334_016,
  'pythia/1b': 1_011_781_632,
  'pythia/1_4b': 1_414_647_808,
  'pythia/2_8b': 2_775_208_960,
  'pythia/6_9b': 6_857_302_016,
  'pythia/12b': 11_846_072_320,
  'mixtral/8x7b': 46_702_792_704,
  'mixtral/8x22b': 140_620_634_112,
  'mamba/130m': 129_135_360,
  'mamba/370m': 371_516_416,
  'mamba/790m': 793_204_224,
  'mamba/1_4b': 1_372_178_432,
  'mamba/2_8b': 2_768_345_600,
  'mamba2/130m': 128_989_632,
  'mamba2/370m': 368_346_624,
  'mamba2/780m': 780_161_280,
  'mamba2/1_3b': 1_343_757_312,
  'mamba2/2_7b': 2_702_599_680,
}

# preset: (what the paper prints, half a unit of its last digit, which count)
ROUNDED = {
  # Brown et al. 2020, table D.1
  'gpt3/125m': (125e6, 0.5e6, 'params_total'),
  'gpt3/350m': (356e6, 0.5e6, 'params_total'),
  'gpt3/760m': (760e6, 0.5e6, 'params_total'),
  'gpt3/1_3b': (1320e6, 5e6, 'params_total'),
  'gpt3/2_7b': (2650e6, 5e6, 'params_total'),
  'gpt3/6_7b': (6660e6, 5e6, 'params_total'),
  'gpt3/13b': (12850e6, 5e6, 'params_total'),
  'gpt3/175b': (174600e6, 50e6, 'params_total'),
  # Chowdhery et al. 2022, table 1; of 540B it prints 540.35, which is 540.356 cut and not rounded.
  'palm/8b': (8.63e9, 0.005e9, 'params_total'),
  'palm/62b': (62.50e9, 0.005e9, 'params_total'),
  'palm/540b': (540.355e9, 0.005e9, 'params_total'),
  # Rae et al. 2021, table 1, and Hoffmann et al. 2022, table 4
  'gopher/44m': (44e6, 0.5e6, 'params_total'),
  'gopher/117m': (117e6, 0.5e6, 'params_total'),
  'gopher/417m': (417e6, 0.5e6, 'params_total'),
  'gopher/1_4b': (1.4e9, 0.05e9, 'params_total'),
  'gopher/7_1b': (7.1e9, 0.05e9, 'params_total'),
  'gopher/280b': (280e9, 0.5e9, 'params_total'),
  'chinchilla/70b': (70e9, 0.5e9, 'params_total'),
  # Thoppilan et al. 2022, section 3: "137B non-embedding parameters".
  'lamda/137b': (137e9, 0.5e9, 'params_non_embedding'),
}

LENGTHS = {'targets': 2048, 'inputs': 2048}


def load(preset: str, *bindings: str):
  return configs.load(str(MODELS / f'{preset}.gin'), bindings, root='MODEL').tree()


@functools.cache
def counted(preset: str) -> Counts:
  return count(load(preset), LENGTHS)


def one_of_each_family(presets) -> list:
  """The first size of every family now, the others with the slow tests."""
  presets = list(presets)
  first = {preset.split('/')[0]: preset for preset in reversed(presets)}.values()
  return [pytest.param(p, marks=[] if p in first else [pytest.mark.slow]) for p in presets]


@pytest.mark.parametrize('preset', one_of_each_family(EXACT))
def test_published_total(preset):
  assert counted(preset).params_total == EXACT[preset]


@pytest.mark.parametrize('preset', one_of_each_family(ROUNDED))
def test_published_total_within_its_rounding(preset):
  printed, half_unit, name = ROUNDED[preset]
  assert getattr(counted(preset), name) == pytest.approx(printed, abs=half_unit)


def presets() -> list[str]:
  """The gin files that are sizes: not the ones that sizes include, nor the ones for tests and tutorials."""
  paths = (p for p in MODELS.rglob('*.gin') if p.stem != 'tiny' and 'Set: ' not in p.read_text())
  return sorted(str(path.relative_to(MODELS).with_suffix('')) for path in paths)


def test_every_preset_has_a_row():
  assert presets() == sorted([*EXACT, *ROUNDED])


@pytest.mark.parametrize('preset', one_of_each_family([*EXACT, *ROUNDED]))
def test_the_first_line_of_a_preset_gives_its_total(preset):
  first = (MODELS / f'{preset}.gin').read_text().splitlines()[0]
  assert f': {counted(preset).params_total:,} parameters' in first


# Model cards: 46.7B and 12.9B, 141B and 39B, 30.5B and 3.3B (3.353 cut), 235B and 22B, 52B and 12B; and without
# the token vectors, 15.7B and 2.4B (2.451 cut) and 671B and 37B.
@pytest.mark.parametrize(
  ('preset', 'active', 'half_unit', 'token_vectors'),
  [
    ('mixtral/8x7b', 12.9e9, 0.05e9, 0),
    ('mixtral/8x22b', 39e9, 0.5e9, 0),
    ('qwen3/30b_a3b', 3.35e9, 0.05e9, 0),
    ('qwen3/235b_a22b', 22e9, 0.5e9, 0),
    ('jamba/52b', 12e9, 0.5e9, 0),
    ('deepseek/v2_lite', 2.45e9, 0.05e9, 102400 * 2048),
    ('deepseek/v3', 37e9, 0.5e9, 129280 * 7168),
  ],
)
def test_active_parameters(preset, active, half_unit, token_vectors):
  assert counted(preset).params_active - token_vectors == pytest.approx(active, abs=half_unit)


@pytest.mark.parametrize(
  ('preset', 'non_embedding'),
  [('pythia/70m', 18_915_328), ('pythia/410m', 302_311_424), ('pythia/12b', 11_327_027_200)],
)
def test_published_non_embedding(preset, non_embedding):
  """The table of Pythia's README counts as Kaplan et al. do."""
  assert counted(preset).params_non_embedding == non_embedding


def test_non_embedding_and_head():
  gpt2, llama, t5 = counted('gpt2/124m'), counted('llama/7b'), counted('t5/1_1_small')
  assert gpt2.params_total - gpt2.params_non_embedding == (50257 + 1024) * 768
  assert (
    gpt2.params_with_head - gpt2.params_non_embedding == 50257 * 768
  )  # tied, and still a product
  assert llama.params_total - llama.params_non_embedding == 2 * 32000 * 4096
  assert llama.params_with_head - llama.params_non_embedding == 32000 * 4096
  assert t5.params_total - t5.params_non_embedding == 2 * 32128 * 512
  assert llama.flops_6n_non_embedding == 6 * llama.params_non_embedding
  assert llama.flops_6n_with_head == 6 * llama.params_with_head


TINY = ('EMBED=32', 'LAYERS=2', 'HEADS=4', 'HEAD_DIM=16', 'MLP=48', 'VOCAB=96')


def dot_flops(jaxpr) -> int:
  """2 x multiplications of every matrix product in a program, loops and calls unrolled."""
  total = 0
  for equation in jaxpr.eqns:
    trips = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
    if equation.primitive.name == 'dot_general':
      (contract, _), _ = equation.params['dimension_numbers']
      size = math.prod(equation.invars[0].aval.shape[i] for i in contract)
      total += 2 * size * math.prod(equation.outvars[0].aval.shape)
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      total += trips * dot_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


def traced_flops(preset: str, bindings, inputs: int, targets: int) -> tuple[Counts, float]:
  """The counts of a preset made small, and per target token the FLOPs of its forward pass's matrix products."""
  model, batch = load(preset, *bindings), 2
  with Mesh(data=1).use(jax.devices()[:1]):
    module = abstract(model)
    tokens = {f'{name}_input_tokens': jnp.ones((batch, inputs), int) for name in module.inputs}
    tokens['decoder_input_tokens'] = jnp.ones((batch, targets), int)
    jaxpr = jax.make_jaxpr(lambda module, tokens: module(tokens)[0])(module, tokens).jaxpr
  counts = count(model, {'inputs': inputs, 'targets': targets})
  return counts, dot_flops(jaxpr) / (batch * targets)


@pytest.mark.parametrize(
  ('preset', 'more'),
  [
    ('gpt2/124m', ()),
    ('bert/base', ()),
    ('llama3/8b', ('KV_HEADS=2',)),
    ('qwen3/0_6b', ('KV_HEADS=2',)),
    ('olmo2/1b', ()),
    ('palm/8b', ()),
    ('bloom/560m', ()),
    ('falcon/40b', ('KV_HEADS=2',)),
    ('t5/1_0_small', ()),
    ('t5/1_1_small', ()),
  ],
)
def test_flops_are_those_of_the_traced_program(preset, more):
  """Appendix F without its softmax and its one-hot products is every matrix product of the forward pass."""
  inputs, targets, layers = 24, 8, 2
  counts, traced = traced_flops(preset, [*TINY, *more], inputs, targets)
  encoder = preset.startswith('t5')
  pairs = targets + encoder * (inputs * inputs / targets + inputs)  # per target token, in a layer
  softmax = 3 * 4 * layers * pairs
  one_hot = 2 * 96 * 32 * (1 + encoder * inputs / targets)
  assert traced == pytest.approx(counts.flops_chinchilla / 3 - softmax - one_hot, rel=1e-12)


def test_flops_of_latent_attention_are_those_of_the_traced_program():
  sizes = 'VOCAB=96 EMBED=32 DENSE_LAYERS=2 HEADS=4 MLP=48 Stacks.stacks=(@dense/stack.Stack,)'
  counts, traced = traced_flops('deepseek/v3', sizes.split(), 8, 8)
  softmax, one_hot = 3 * 4 * 2 * 8, 2 * 96 * 32
  assert traced == pytest.approx(counts.flops_chinchilla / 3 - softmax - one_hot, rel=1e-12)


def test_flops_of_state_space_duality_are_those_of_the_traced_program():
  sizes = 'VOCAB=96 EMBED=32 LAYERS=2 HEAD_DIM=16 Mamba2.state=8 Mamba2.chunk=4'
  counts, traced = traced_flops('mamba2/130m', sizes.split(), 8, 8)
  convolutions = (
    2 * 4 * (64 + 2 * 8) * 2
  )  # taps x channels x layers, no matrix product in the program
  one_hot = 2 * 96 * 32
  assert traced == pytest.approx(counts.flops_chinchilla / 3 - convolutions - one_hot, rel=1e-12)
  assert counts.flops_attention_causal == counts.flops_attention_full


# What a family computes from its width: (member of the model, its value at a width).
FROM_WIDTH = {
  'gemma': {'embedder.scale': math.sqrt},
  'gemma2': {'embedder.scale': math.sqrt},
  'gemma3': {'embedder.scale': math.sqrt},
  't5_1_0': {'head.scale': lambda embed: embed**-0.5},
  'switch': {'head.scale': lambda embed: embed**-0.5},
  'palm': {'head.scale': lambda embed: embed**-0.5},
  'lamda': {'head.scale': lambda embed: embed**-0.5},
  'mamba': {'inner': lambda embed: 2 * embed, 'rank': lambda embed: math.ceil(embed / 16)},
  'jamba': {'inner': lambda embed: 2 * embed, 'rank': lambda embed: math.ceil(embed / 16)},
  'mamba2': {'inner': lambda embed: 2 * embed},
}


def widths_of(module) -> dict[str, float]:
  """The scales of a model, and the widths inside its state-space parts."""
  found = {'embedder.scale': module.embedder.scale, 'head.scale': getattr(module.head, 'scale', 1)}
  stacks = [getattr(module, name, None) for name in ('stack', 'encoder')]
  for sublayer in next(s for s in stacks if s is not None).__dict__.get('sublayers', ()):
    for part in sublayer.parts:
      if isinstance(part, mamba.Mamba):
        found |= {'inner': part.output.kernel.shape[-2], 'rank': part.step.kernel.shape[-2]}
      if isinstance(part, mamba2.Mamba2):
        found |= {'inner': part.heads * part.head_dim}
  return found


@pytest.mark.parametrize(
  'family',
  [f if f in ('t5_1_0', 'mamba', 'gemma') else pytest.param(f, marks=pytest.mark.slow)
   for f in PRESETS],
)  # fmt: skip
def test_a_ladder_changes_only_the_width(family):
  """At any EMBED the scales and inner sizes are the family's own, and N is a polynomial of its degree."""
  sizes = []
  for embed in (16, 32, 48, 64):
    module = abstract(tiny(family, [f'EMBED={embed}']))
    rules = FROM_WIDTH.get(family, {})
    want = {'embedder.scale': lambda _: 1.0, 'head.scale': lambda _: 1.0} | rules
    found = widths_of(module)
    assert found == {name: pytest.approx(rule(embed)) for name, rule in want.items()}
    sizes.append(sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module))))
  steps = [b - a for a, b in itertools.pairwise(sizes)]
  second = [b - a for a, b in itertools.pairwise(steps)]
  # Matrices of the embedding by something else grow with it; state spaces and BERT's head by its square.
  if family in ('mamba', 'mamba2', 'jamba', 'bert'):
    assert second[0] == second[1] > 0
  else:
    assert steps[0] > 0
    assert second == [0, 0]


@pytest.mark.parametrize('preset', sorted(PRESETS.values()))
def test_no_preset_writes_its_width_twice(preset):
  """A number that is a power of EMBED would be wrong at another width: parts take it as a function."""
  gin = configs.load(str(MODELS / f'{preset}.gin'), root='MODEL')
  text = describe.describe(gin.tree())
  embed = gin.macros['EMBED'].value
  for line in text.splitlines():
    _, _, value = line.strip().partition(' = ')
    if re.fullmatch(r'[0-9.e-]+', value) and '.' in value:
      for power in (0.5, -0.5, -1.0):
        assert float(value) != pytest.approx(embed**power, rel=1e-9), line


@pytest.mark.parametrize('window', [None, 1, 3, 8, 100])
def test_causal_attention_counts_the_pairs_of_the_mask(window):
  bindings = [*TINY, f'Attention.window={window}']
  length, layers = 8, 2
  counts = count(load('llama/7b', *bindings), {'targets': length})
  seen = sum(min(i + 1, window or length) for i in range(length))
  mixing = counts.flops_attention_causal - counts.flops_6n_with_head
  # Two products of head_dim multiplications and additions a pair and head, thrice for the backward pass.
  assert mixing == pytest.approx(3 * 2 * 2 * 16 * 4 * layers * seen / length, rel=1e-12)
  full = counts.flops_attention_full - counts.flops_6n_with_head
  assert full == 3 * 2 * 2 * 16 * 4 * layers * min(window or length, length)


@pytest.mark.parametrize(
  ('layers', 'embed', 'mlp', 'heads', 'head_dim', 'ratio'),
  [
    (10, 640, 2560, 10, 64, 1.03),
    (20, 1024, 4096, 16, 64, 1.10),
    (24, 1280, 5120, 10, 128, 1.08),
    (26, 1792, 7168, 14, 128, 1.04),
    (28, 2048, 8192, 16, 128, 1.03),
    (40, 3584, 14336, 28, 128, 0.99),
  ],
)
def test_chinchilla_convention_gives_the_papers_table(layers, embed, mlp, heads, head_dim, ratio):
  """Hoffmann et al. 2022, table A4: FLOPs of appendix F over 6ND, of layers alone.

  Its N includes embeddings (32,000 x embed) and the projection of relative positions in every layer (embed x
  heads x head_dim), whose FLOPs the appendix does not list.
  """
  sizes = f'EMBED={embed} LAYERS={layers} MLP={mlp} HEADS={heads} HEAD_DIM={head_dim} VOCAB=32000'
  counts = count(load('gpt2/124m', *sizes.split()), {'targets': 2048})
  of_layers = counts.flops_chinchilla - 3 * 2 * 2 * 32000 * embed
  matrices = layers * (4 * embed * heads * head_dim + 2 * embed * mlp)
  n = matrices + layers * embed * heads * head_dim + 32000 * embed
  assert of_layers / (6 * n) == pytest.approx(ratio, abs=0.0051)


@pytest.mark.parametrize(
  ('preset', 'flops', 'tokens'), [('gpt3/175b', 3.14e23, 300e9), ('palm/540b', 2.53e24, 780e9)]
)
def test_published_training_compute(preset, flops, tokens):
  """Brown et al. 2020, table D.1, and 6 x 540.35B x 780B of Chowdhery et al. 2022: 6N with the tied head."""
  assert counted(preset).flops_6n_with_head * tokens == pytest.approx(flops, rel=0.002)


def test_flops_of_experts_are_those_of_the_active_ones():
  counts = counted('mixtral/8x7b')
  assert counts.flops_6n_non_embedding == 6 * (counts.params_active - 2 * 32000 * 4096)


def test_encoder_decoder_of_equal_lengths_costs_half_its_parameters_per_token():
  """Brown et al. 2020, table D.1: of T5's parameters half are active for a token, 3 FLOPs and not 6."""
  counts = counted('t5/1_0_11b')
  per_token_of_either_side = counts.flops_6n_non_embedding / 2
  assert per_token_of_either_side == 3 * counts.params_non_embedding


def test_encoder_decoder_counts_input_tokens_per_target_token():
  short = count(load('t5/1_1_small'), {'inputs': 512, 'targets': 128})
  model = abstract(load('t5/1_1_small'))
  size = lambda module: sum(leaf.size for leaf in jax.tree.leaves(module))
  cross = model.decoder.sublayers[1]
  keys_and_values = size(cross.parts[0].key) + size(cross.parts[0].value)
  want = 4 * (size(model.encoder) + keys_and_values) + size(model.decoder) - keys_and_values
  assert short.flops_6n_non_embedding == 6 * want
  assert short.params_non_embedding == size(model.encoder) + size(model.decoder)


@pytest.mark.parametrize(
  ('preset', 'per_token', 'per_input'),
  [
    ('llama/7b', 2 * 32 * 4096 * 2, 0),  # keys and values of 32 layers, two bytes each
    ('llama3/8b', 2 * 32 * 8 * 128 * 2, 0),
    ('falcon/7b', 2 * 32 * 64 * 2, 0),
    ('deepseek/v3', 61 * (512 + 64) * 2, 0),  # 70 KB, the latent vectors alone
    ('mamba/130m', 0, 0),  # a state of constant size
    ('t5/1_1_xxl', 2 * 24 * 4096 * 2, 2 * 24 * 4096 * 2),
  ],
)
def test_cache_bytes_in_bfloat16(preset, per_token, per_input):
  encoder_decoder = preset.startswith('t5')
  name = 'EncoderDecoder' if encoder_decoder else 'LanguageModel'
  counts = count(load(preset, f"{name}.dtype='bfloat16'"), LENGTHS)
  assert counts.kv_cache_bytes_per_token == per_token
  assert counts.cross_cache_bytes_per_token == per_input


@pytest.mark.parametrize(
  ('preset', 'lengths'),
  [('t5/1_1_small', {}), ('t5/1_1_small', {'targets': 8}), ('t5/1_1_small', {'targets': 8, 'inputs': 0}),
   ('gpt2/124m', {}), ('gpt2/124m', {'targets': 0})],
)  # fmt: skip
def test_missing_length_is_named(preset, lengths):
  with pytest.raises(UserError, match=r"lengths: \w+ needs positive lengths of its '"):
    count(load(preset), lengths)


def test_masked_language_model_has_one_length():
  assert count(load('bert/base'), {'inputs': 512}) == count(load('bert/base'), {'targets': 512})


def run(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'research.count', *flags]
  return subprocess.run(command, cwd=MODELS.parent.parent, text=True, capture_output=True)


def test_command_prints_a_line_for_every_preset():
  lines = run('--presets=gin/models/gpt2/[0-9]*.gin').stdout.splitlines()
  sizes = ('124m', '1_5b', '355m', '774m')
  want = [[f'gin/models/gpt2/{size}.gin', f'{EXACT[f"gpt2/{size}"]:,}'] for size in sizes]
  assert [line.split()[:2] for line in lines[1:]] == want


def test_command_says_a_mistake_in_one_sentence():
  wrong = run('--gin_file=gin/models/gpt2/124m.gin', '--gin.EMBD=64')
  why = '--gin.EMBD=64: nothing in this configuration uses EMBD. Did you mean EMBED?'
  assert (wrong.returncode, wrong.stderr) == (2, f'error: {why}\n')


def test_table_shows_every_count():
  text = command.table(counted('llama/7b'))
  assert '6,738,415,616    6.738B' in text
  assert len(text.splitlines()) == len(Counts.__dataclass_fields__)


def test_counts_are_the_same_within_a_mesh():
  with Mesh(data=2, fsdp=2, tensor=2).use():
    assert count(load('gpt2/124m'), LENGTHS) == counted('gpt2/124m')
