"""The present places of the classes and functions of earlier versions.

Gin files, and the `config.gin` and `config.txt` in a run's workdir, name classes by their Python module, and
earlier versions had other modules. With these tables their files can still be read: `research.core.gin_reader`
looks old names up here, and `current_paths` rewrites a `config.txt`.
"""

import re

# Old module -> the module that has most of its content now.
MODULES = {
  'research.chips': 'research.compilation.chips',
  'research.cleaning': 'research.data.cleaning',
  'research.cli': 'research.core.cli',
  'research.configs': 'research.core.configs',
  'research.corpora': 'research.data.corpora',
  'research.distributed': 'research.parallel.processes',
  'research.errors': 'research.core.errors',
  'research.estimate': 'research.sweeps.estimate',
  'research.findings': 'research.sweeps.findings',
  'research.frozen': 'research.data.frozen',
  'research.hlo': 'research.compilation.hlo',
  'research.launchers': 'research.sweeps.launchers.job',
  'research.leases': 'research.sweeps.leases',
  'research.model.flash': 'research.model.kernels.flash',
  'research.model.grouped': 'research.model.kernels.grouped',
  'research.model.hf_config': 'research.huggingface.fields',
  'research.model.hf_families': 'research.huggingface.families',
  'research.model.hf_files': 'research.huggingface.files',
  'research.model.hf_names': 'research.huggingface.names',
  'research.model.ring': 'research.model.kernels.ring',
  'research.model.ssm': 'research.model.recurrence',
  'research.objectives': 'research.data.objectives',
  'research.population': 'research.training.population',
  'research.run': 'research.training.run',
  'research.scaling.answers': 'research.designs.base',
  'research.scaling.charts': 'research.designs.charts',
  'research.scaling.designs': 'research.designs.plan',
  'research.scaling.fits': 'research.scaling.law_fit',
  'research.scaling.grids': 'research.designs.grids',
  'research.scaling.page': 'research.scaling.report.page',
  'research.scaling.plots': 'research.scaling.report.plots',
  'research.sharding': 'research.parallel.mesh',
  'research.shards': 'research.data.shards',
  'research.status': 'research.sweeps.status',
  'research.streams': 'research.data.streams',
  'research.sweep_report': 'research.sweeps.report',
  'research.training.ahead': 'research.training.background_jit',
  'research.training.checkpoints': 'research.checkpoints.manager',
  'research.training.streamed': 'research.checkpoints.streamed',
  'research.vocabularies': 'research.data.vocabularies',
  'research.workers': 'research.sweeps.worker',
}

# New module -> names that came to it from a module that otherwise stayed or moved elsewhere.
_NAMES = {
  'research.data.mixtures': {'research.streams': ('Curriculum', 'Mixture')},
  'research.designs.ablation': {'research.scaling.grids': ('Ablation',)},
  'research.designs.base': {
    'research.scaling.designs': ('Design', 'Sized', 'positive'),
    'research.scaling.grids': ('Picked',),
  },
  'research.designs.branches': {'research.scaling.grids': ('Branches',)},
  'research.designs.isoflop': {'research.scaling.designs': ('IsoFlop',)},
  'research.designs.rates': {
    'research.scaling.answers': ('best_rate',),
    'research.scaling.grids': ('LearningRateBatch',),
  },
  'research.designs.repeats': {'research.scaling.grids': ('Repeats',)},
  'research.designs.shapes': {'research.scaling.grids': ('WidthDepth',)},
  'research.model.embedder': {'research.model.models': ('Embedder', 'inverse_sqrt')},
  'research.model.experts': {'research.model.moe': ('Experts',)},
  'research.model.heads': {
    'research.model.models': ('MaskedHead', 'NormalisedHead', 'TiedHead', 'UntiedHead')
  },
  'research.model.kernels.dot_product': {'research.model.kernels': ('dot_product_attention',)},
  'research.model.latent': {'research.model.attention': ('LatentAttention',)},
  'research.model.mamba': {'research.model.ssm': ('Mamba',)},
  'research.model.mamba2': {'research.model.ssm': ('Mamba2',)},
  'research.model.mlp': {'research.model.layers': ('Mlp',)},
  'research.model.parameters': {'research.model.layers': ('normal',)},
  'research.model.residual': {
    'research.model.stack': (
      'NormAfter',
      'PostNorm',
      'PreNorm',
      'PreNormEach',
      'Residual',
      'SandwichNorm',
    )
  },
  'research.scaling.allocation': {
    'research.scaling.approaches': ('Allocation', 'NoAllocation', 'PowerLaw', 'Profile')
  },
  'research.scaling.cost': {'research.scaling.planning': ('Cost', 'chip_hours', 'fit_cost')},
  'research.scaling.envelope': {'research.scaling.approaches': ('envelope',)},
  'research.scaling.fitted': {'research.scaling.fits': ('Fit', 'Minimum', 'NotIdentifiable')},
  'research.scaling.fitting': {'research.scaling.analysis': ('fit_results',)},
  'research.scaling.next_runs': {'research.scaling.planning': ('next_runs',)},
  'research.sweeps.launchers.cloud': {'research.launchers': ('Gcloud', 'SkyPilot', 'Xpk')},
  'research.sweeps.launchers.local': {'research.launchers': ('Local',)},
  'research.sweeps.launchers.slurm': {'research.launchers': ('Slurm',)},
  'research.sweeps.sweep': {'research.sweep': ('Sweep',)},
  'research.training.loop': {'research.train': ('train',)},
  'research.training.program': {'research.train': ('Program', 'make_program')},
}

# A file that has an old name under the present name of its module, as a file with parts of both layouts may,
# means the same.
NAMES = {
  f'{module}.{name}': f'{new}.{name}'
  for new, modules in _NAMES.items()
  for old, names in modules.items()
  for module in (old, MODULES.get(old, old))
  for name in names
  if module != new
}
PRESENT_MODULES = {*MODULES.values(), *_NAMES}

# Arguments that moved to another class, and what to write instead.
ARGUMENTS = {
  'research.training.run.Run.z_loss': (
    'it is CrossEntropy.z_loss now: bind run.Run.loss = @losses.CrossEntropy() and losses.CrossEntropy.z_loss, '
    'with `from research.training import losses`'
  )
}


def current_path(path: str) -> str:
  """Returns the present dotted path of a module, class or function; `path` itself if it has not moved."""
  parts = path.split('.')
  for count in range(len(parts), 0, -1):
    head = '.'.join(parts[:count])
    new = NAMES.get(head) or MODULES.get(head)
    if new:
      return '.'.join([new, *parts[count:]])
  return path


def current_paths(config_text: str) -> str:
  """Returns the text of a run's `config.txt` with the present module of every class and function.

  Strings that look like a class are not changed.
  """
  # `describe` puts a class or a function alone on a line, or after `name = `.
  line = r'^(\s*(?:\w+ = )?)(research(?:\.\w+)+)$'

  def rewrite(match):
    return match[1] + current_path(match[2])

  return re.sub(line, rewrite, config_text, flags=re.MULTILINE)
