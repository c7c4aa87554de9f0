# syntax=docker/dockerfile:1
# fastbyol for NVIDIA GPUs; `docs/installation.md` has the commands to build and run it.
#
# PyTorch's wheels bring the libraries of CUDA 13.0. The base image adds the check of the driver.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Triton and Inductor compile with a C++ compiler and Python's headers while training starts.
# Ubuntu keeps only the newest version of a package, so its versions cannot be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG UV_VERSION=0.13.9
RUN python3 -m venv /opt/fastbyol && /opt/fastbyol/bin/pip install --no-cache-dir "uv==${UV_VERSION}"
ENV PATH=/opt/fastbyol/bin:$PATH VIRTUAL_ENV=/opt/fastbyol UV_LINK_MODE=copy

# The dependencies are a layer of their own, which a change of the code leaves as it is.
ARG TORCH_VERSION=2.14.1
WORKDIR /src
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirements pyproject.toml --extra dali --extra onnx --extra parquet "torch==${TORCH_VERSION}"

COPY README.md LICENSE ./
COPY kernels kernels
COPY configs configs
COPY fastbyol fastbyol
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps . && rm -rf build ./*.egg-info

# Caches of compiled kernels and downloaded weights outlive a container in a volume. Any user may
# write there, so that `docker run --user` can give the owner of the runs.
ENV HOME=/cache TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor
RUN mkdir --mode=1777 /cache /work
VOLUME /cache
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["fastbyol"]
CMD ["doctor"]
