# The worker that serves models: `docker build -f openweights/cluster/images/vllm.Dockerfile .` from
# the root of the repository, tagged as `openweights/images.py` says.
#
# The wheels of torch bring CUDA with them, so the base is plain Python; the driver is the host's.
# What is installed stands in pyproject.toml alone; torch is fixed to one release of its range.
FROM python:3.11.14-slim-bookworm

ARG TORCH_VERSION=2.13.0

# gcc: triton compiles its kernels on the machine. openssh-server: development pods. Debian's mirrors
# keep one version of each, so none can be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git openssh-server rsync tini \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    TTL_HOURS=24

WORKDIR /opt/openweights
# Before the code, which changes more often.
RUN pip install --no-cache-dir "torch==${TORCH_VERSION}"
COPY pyproject.toml README.md LICENSE ./
COPY openweights openweights
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[train,vllm,supabase]" \
    && install --mode=0755 openweights/cluster/images/worker.sh /usr/local/bin/ow-pod

WORKDIR /root
# -g: a pod that is taken away gets SIGTERM, and so must the worker, which then saves its job.
ENTRYPOINT ["tini", "-g", "--", "ow-pod"]
