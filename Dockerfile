# The studio, or the server: docker build -t apt-diffusion . && docker run -p 127.0.0.1:7860:7860 -v apt:/data apt-diffusion
# docs/server.md has the command for the server. With --gpus all the same image runs on a GPU.

FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE NOTICE ./
COPY train train
COPY apt_diffusion apt_diffusion
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY constraints.txt /tmp/constraints.txt
# The largest layer, which does not change with the code.
RUN pip install --no-cache-dir torch diffusers transformers accelerate "gradio>=6,<7" -c /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir "$(echo /tmp/wheels/*.whl)[demo,serve,peft]" -c /tmp/constraints.txt
RUN useradd --create-home --uid 1000 apt && mkdir /data && chown apt:apt /data
USER apt
WORKDIR /data
VOLUME /data
ENV HF_HOME=/data/huggingface APT_HEALTH=http://127.0.0.1:7860/ PYTHONUNBUFFERED=1
EXPOSE 7860 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['APT_HEALTH'], timeout=5)"]
ENTRYPOINT ["apt-diffusion"]
CMD ["studio", "--listen", "0.0.0.0", "--port", "7860", "--adapters", "/data/adapters"]
