"""The packages whose Python sources are the corpus that every install has."""

# Installed with every lock of this project on every platform, at least 40 kB of Python each.
# fmt: off
TRAIN_PACKAGES = (
  'absl-py', 'anyio', 'babel', 'charset-normalizer', 'clu', 'contourpy', 'dm-tree', 'filelock',
  'flatbuffers', 'flax', 'fonttools', 'gast', 'gin-config', 'google-pasta',
  'googleapis-common-protos', 'grpcio', 'h11', 'h5py', 'huggingface-hub', 'humanize', 'idna', 'jax',
  'jaxlib', 'keras', 'lxml', 'matplotlib', 'ml-collections', 'narwhals', 'nltk', 'numpy', 'optree',
  'orbax-checkpoint', 'packaging', 'pandas', 'portalocker', 'prometheus-client', 'promise',
  'protobuf', 'psutil', 'pydantic', 'pyglove', 'pygments', 'pyparsing', 'pyyaml', 'regex',
  'rouge-score', 'safetensors', 'scikit-learn', 'scipy', 'setuptools', 'simple-parsing',
  'simplejson', 't5', 'tabulate', 'tensorflow-datasets', 'tensorflow-metadata', 'tensorflow-text',
  'termcolor', 'threadpoolctl', 'tokenizers', 'toml', 'tqdm', 'transformers', 'typer',
  'typing-extensions', 'wheel', 'wrapt',
)


VALIDATION_PACKAGES = (
  'attrs', 'click', 'cloudpickle', 'docstring-parser', 'etils', 'fsspec', 'joblib',
  'markdown-it-py', 'opt-einsum', 'optax', 'pillow', 'pyarrow', 'python-dateutil', 'requests',
  'rich', 'sacrebleu', 'seqio', 'tensorboardx', 'treescope', 'urllib3',
)
# fmt: on
