# Trainer and eval harness: public packages only.
#
#   docker build -f docker/trainer.Dockerfile -t looper/trainer:0.1.0 .
#   ... --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128     for a GPU

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3.11 -m venv /opt/looper
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /src/
RUN /opt/looper/bin/pip install --no-cache-dir --constraint /src/constraints.txt --index-url "${TORCH_INDEX}" torch==2.13.0
COPY shared_schemas/pyproject.toml shared_schemas/README.md shared_schemas/LICENSE /src/shared_schemas/
COPY shared_schemas/src /src/shared_schemas/src
COPY trainer/pyproject.toml trainer/README.md trainer/LICENSE /src/trainer/
COPY trainer/src /src/trainer/src
COPY eval/pyproject.toml eval/README.md eval/LICENSE /src/eval/
COPY eval/src /src/eval/src
RUN /opt/looper/bin/pip install --no-cache-dir --constraint /src/constraints.txt \
        /src/shared_schemas '/src/trainer[train]' '/src/eval[local]' \
    && /opt/looper/bin/pip uninstall --yes pip setuptools \
    && find /opt/looper -name __pycache__ -prune -exec rm -rf {} +

FROM ${BASE}
COPY --from=build /opt/looper /opt/looper
# hadolint ignore=DL3064
ENV PATH=/opt/looper/bin:$PATH \
    TOKENIZERS_PARALLELISM=false \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /work
HEALTHCHECK NONE
CMD ["looper", "--help"]
