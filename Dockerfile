# docker build --target cpu  -t fastsafe:cpu  .   then   docker run --rm -v "$PWD/runs:/data/runs" fastsafe:cpu audit organism
# docker build --target cuda -t fastsafe:cuda .   then   docker run --rm --gpus all ... fastsafe:cuda ...
FROM python:3.13-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY fastsafe fastsafe
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim-bookworm AS base
# A run is written below the working directory, as runs/NAME.
RUN useradd --create-home --uid 1000 fastsafe && install --directory --owner=fastsafe /data /data/runs
COPY --from=build /wheels /wheels
WORKDIR /data

FROM base AS cpu
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[hub,judge,metrics,report]"
USER fastsafe
ENTRYPOINT ["fastsafe"]
CMD ["--help"]

# PyPI's Linux build of torch has CUDA's libraries; the host gives the driver. Triton compiles its
# launchers with a C compiler when a kernel first runs.
FROM base AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[gpu,hub,judge,metrics,report]"
USER fastsafe
ENTRYPOINT ["fastsafe"]
CMD ["--help"]
