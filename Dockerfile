# One image for every process: the stream, the code server, the daemon, the web server. docs/deploy.md says which is which.
# The Python is that of the tests; the packages are those of requirements.lock.
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements.lock ./
RUN pip install --constraint requirements.lock hatchling && python -m venv /opt/sync-pipeline
COPY pyproject.toml README.md LICENSE ./
COPY sql sql
COPY sync_pipeline sync_pipeline
RUN python -m hatchling build -t wheel -d /dist \
    && /opt/sync-pipeline/bin/pip install --constraint requirements.lock /dist/*.whl \
    && /opt/sync-pipeline/bin/pip uninstall --yes pip setuptools

FROM python:3.11-slim-bookworm
# tini is process 1. With -g it hands SIGTERM to the whole group: a code server alone would wait for the end of its runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin sync-pipeline \
    && install -d -o sync-pipeline /opt/dagster/storage
COPY --from=build /opt/sync-pipeline /opt/sync-pipeline
COPY dagster_home/prod/dagster.yaml deploy/workspace.yaml /opt/dagster/
ENV PATH=/opt/sync-pipeline/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SYNC_CONFIG=/etc/sync-pipeline/sync.yaml \
    DAGSTER_HOME=/opt/dagster
WORKDIR /opt/dagster
USER 10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "-g", "--"]
CMD ["sync-pipeline", "stream"]
