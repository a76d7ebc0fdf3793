# vlmlab in a container. Two targets; the build needs a package index, the container does not.
#   docker build --target cpu --build-arg TORCH_INDEX=<index of torch's CPU wheels> -t vlmlab:cpu .
#   docker build --target cuda -t vlmlab:cuda .
#   docker run --rm -v "$PWD/outputs:/work/outputs" vlmlab:cpu python train.py budget=test
#   docker run --rm --gpus all -v "$PWD/outputs:/work/outputs" vlmlab:cuda
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /work
COPY pyproject.toml constraints.txt README.md LICENSE train.py evaluate.py ./
COPY conf conf
COPY src src

# torch without CUDA where TORCH_INDEX names the index that has it: a fraction of the size
FROM base AS cpu
ARG TORCH_INDEX=
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt -e ".[parquet]"
CMD ["python", "train.py"]

# the CUDA build of the same version; its libraries come with the wheel, the driver with the host
FROM base AS cuda
RUN pip install -c constraints.txt -e ".[parquet]"
CMD ["python", "train.py"]
