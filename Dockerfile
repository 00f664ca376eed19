# A slim image for the processor. For an NVIDIA GPU:
#   docker build --build-arg TORCH_BACKEND=cu128 -t lowres-ft:cuda .
#   docker run --gpus all -v "$PWD:/work" -v lowres-cache:/cache lowres-ft:cuda recipe sentiment-lora
FROM python:3.11-slim

# Which build of PyTorch, as uv names them: cpu, cu128, cu130, ...
ARG TORCH_BACKEND=cpu

WORKDIR /opt/lowres-ft
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY recipes ./recipes
COPY lowres_ft ./lowres_ft
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend="$TORCH_BACKEND" --constraint constraints.txt .

RUN useradd --create-home --uid 1000 lowres && mkdir -p /work /cache && chown lowres /work /cache
USER lowres
ENV LOWRES_FT_CACHE=/cache/lowres-ft HF_HOME=/cache/huggingface
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["lowres-ft"]
CMD ["--help"]
