# A machine for batch jobs: docker run -v "$PWD:/job" -v zoo-cache:/cache transformer-zoo train /job/recipe.yaml
#
# BASE needs Python 3.11 or newer. torch is the CPU build; for GPUs: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE cli.py ./
COPY recipes recipes
COPY zoo zoo
RUN python3 -m venv /opt/zoo \
    && /opt/zoo/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" .

FROM ${BASE}
RUN useradd --create-home --uid 1000 zoo && mkdir -p /cache /job && chown zoo:zoo /cache /job
COPY --from=build /opt/zoo /opt/zoo
# models and data are fetched once, into the volume
ENV PATH=/opt/zoo/bin:$PATH HF_HOME=/cache TOKENIZERS_PARALLELISM=false
VOLUME /cache
USER zoo
WORKDIR /job
ENTRYPOINT ["zoo"]
CMD ["--help"]
