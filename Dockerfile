# The environment of the lock, for clusters: docs/fleet.md. TPUs: --build-arg EXTRAS="--extra tpu --extra ray".
FROM python:3.11-slim

# The Ray operator asks a pod's health with wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv

WORKDIR /isoflop
ARG EXTRAS="--extra ray"
# The packages first: they change less often than the code, and Docker keeps them.
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN uv sync --locked --no-dev --no-install-project $EXTRAS
COPY research research
COPY tasks tasks
COPY gin gin
RUN uv sync --locked --no-dev $EXTRAS
ENV PATH=/isoflop/.venv/bin:$PATH
