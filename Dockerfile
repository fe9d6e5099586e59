# The recipes on NVIDIA GPUs, one or several:
#   docker build -t hf-fsam .
#   mkdir -p outputs
#   docker run --rm --gpus all --ipc=host -v "$PWD/outputs:/app/outputs" -v hf-fsam-cache:/cache \
#     hf-fsam recipes/configs/pretrain_tiny.yaml --max_steps 20
# What changes most often comes last, so that an edit of the sources costs no reinstallation.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# ---- System: Python, certificates for the hub, the compiler and headers that Triton (torch_compile) builds with ----
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# A mounted folder keeps its owner on the host, so the user takes the usual first id: Ubuntu's own user has it. Another
# one: --build-arg UID="$(id -u)".
ARG UID=1000
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --no-log-init --create-home --uid "$UID" fsam \
    && mkdir -p /app/outputs /cache \
    && chown fsam: /app/outputs /cache

# HF_HOME: downloads, prepared data and tokenizers. DS_BUILD_OPS: DeepSpeed without its own CUDA kernels, which would
# need nvcc; ZeRO does without them.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache \
    DS_BUILD_OPS=0 \
    PYTHONUNBUFFERED=1

# ---- Packages: torch, by far the largest, in a layer of its own ----
ARG CONSTRAINTS=docker/constraints-gpu.txt
COPY ${CONSTRAINTS} /opt/constraints.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c /opt/constraints.txt torch

COPY pyproject.toml /src/
RUN python -c "import tomllib; project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *extras['recipes'], *extras['deepspeed'], sep='\n')" > /src/requirements.txt \
    && pip install --no-cache-dir -c /opt/constraints.txt -r /src/requirements.txt

# ---- Sources ----
COPY README.md LICENSE /src/
COPY hf_fsam /src/hf_fsam
RUN pip install --no-cache-dir --no-deps -c /opt/constraints.txt /src \
    && rm -r /src

WORKDIR /app
COPY docker/entrypoint.py docker/
COPY recipes recipes

USER fsam
ENTRYPOINT ["python", "/app/docker/entrypoint.py"]
