# The private reward service. PRIVATE: push it to no public registry.
#
#   docker build -f docker/reward_service.Dockerfile -t looper/reward-service:0.1.0 .
#   ... --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128     for a GPU
#
# The last stage has an interpreter and the virtual environment: no shell, no package manager, no build tools, no
# source tree. The embedder is in it, so the service needs no way out.

ARG BUILD_BASE=debian:bookworm-slim
ARG FINAL_BASE=gcr.io/distroless/python3-debian12:nonroot

FROM ${BUILD_BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3.11 python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.11 -m venv /opt/looper
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /src/
RUN /opt/looper/bin/pip install --no-cache-dir --constraint /src/constraints.txt --index-url "${TORCH_INDEX}" torch==2.13.0
COPY shared_schemas/pyproject.toml shared_schemas/README.md shared_schemas/LICENSE /src/shared_schemas/
COPY shared_schemas/src /src/shared_schemas/src
COPY reward_service/pyproject.toml reward_service/README.md reward_service/LICENSE /src/reward_service/
COPY reward_service/src /src/reward_service/src
RUN /opt/looper/bin/pip install --no-cache-dir --constraint /src/constraints.txt \
        /src/shared_schemas '/src/reward_service[offline,fast,postgresql]' \
    && /opt/looper/bin/pip uninstall --yes pip setuptools \
    && find /opt/looper -name __pycache__ -prune -exec rm -rf {} + \
    && install --directory --owner 65532 --group 65532 --mode 0700 /state /state/reward

FROM ${FINAL_BASE}
COPY --from=build /opt/looper /opt/looper
COPY --from=build --chown=65532:65532 /state /var/lib/looper
# hadolint ignore=DL3064
ENV REWARD_SERVICE_HOME=/var/lib/looper/reward \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
VOLUME /var/lib/looper/reward
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["/opt/looper/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/livez', timeout=4)"]
ENTRYPOINT ["/opt/looper/bin/python", "-m", "reward_service.cli"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080"]
