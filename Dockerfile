# The recipes on NVIDIA GPUs, one or several, on one node or several: docs/docker.md.
# torch's wheels bring the CUDA libraries, so the base is a plain Ubuntu.
# What changes most often comes last, so that an edit of the sources costs no reinstallation.
FROM ubuntu:24.04@sha256:224a1869083a311ef3f13648a154ba79832fbef6364d31493642ca03082da254

# ---- System: Python, certificates for the hub, the compiler and headers that Triton (torch_compile) builds with, and a
# small init. No versions: Ubuntu's archive has only the newest of each. ----
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# DS_BUILD_OPS: DeepSpeed without its own CUDA kernels, which would need nvcc; ZeRO does without them.
ENV PATH=/opt/venv/bin:$PATH \
    DS_BUILD_OPS=0 \
    PYTHONUNBUFFERED=1

# ---- Packages: every one by its version ----
ARG CONSTRAINTS=docker/constraints-gpu.txt
COPY ${CONSTRAINTS} /opt/constraints.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -r /opt/constraints.txt

# ---- Sources ----
COPY pyproject.toml README.md LICENSE /src/
COPY hf_fsam /src/hf_fsam
RUN pip install --no-cache-dir --no-deps /src \
    && pip check \
    && rm -r /src

WORKDIR /app
COPY docker/entrypoint.py docker/
COPY recipes recipes

# ---- The user: any id will do (docker run --user), with or without a name in /etc/passwd ----
# HF_HOME: downloads, prepared data and tokenizers. TORCH_ELASTIC_SHUTDOWN_TIMEOUT: torchrun waits so many seconds for the
# checkpoints of its processes when the container is stopped, instead of 30.
RUN install -d -m 1777 /app/outputs /cache /home/fsam
ENV HOME=/home/fsam \
    USER=fsam \
    HF_HOME=/cache \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600
USER 1000

# tini is process 1 and hands SIGTERM on; Linux keeps it from a process 1 that does not handle it.
ENTRYPOINT ["tini", "--", "python", "/app/docker/entrypoint.py"]
