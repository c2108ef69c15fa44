# The cluster manager, which needs no GPU:
# `docker build -f openweights/cluster/images/manager.Dockerfile .` from the root of the repository.
# Its keys come with the environment when it is started: none is in the image.
FROM python:3.11.14-slim-bookworm

# Debian's mirrors keep one version of each, so none can be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

ENV PYTHONUNBUFFERED=1

WORKDIR /opt/openweights
COPY pyproject.toml README.md LICENSE ./
COPY openweights openweights
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[cluster]" \
    && useradd --create-home --uid 1000 manager

USER 1000
WORKDIR /home/manager
ENTRYPOINT ["tini", "--", "ow", "cluster"]
