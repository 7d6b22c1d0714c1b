# TensorRT-LLM 1.2.1 with the server; it compiles engines too.
#   docker build -t enginehouse:1.2.1 .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -p 127.0.0.1:8000:8000 -v "$PWD/engines/mine:/engine:ro" enginehouse:1.2.1
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1

WORKDIR /opt/enginehouse
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY build build
COPY runtime runtime
COPY server server
COPY scripts/regress scripts/regress
COPY scripts/verbs scripts/verbs
COPY configs configs
# What the image has (torch, transformers, TensorRT, xgrammar 0.1.25, numpy 1.26) satisfies our bounds
# and stays as it is: pip is held to every version of it, and to no list that the image brings.
# mpirun starts the ranks of other nodes by ssh (docs/kubernetes.md); no sshd runs unless a pod is one.
# doctor's status 3 is the GPU that no image has while it is built.
RUN python3 -m pip list --format=freeze > /tmp/image.txt \
    && PIP_CONSTRAINT= python3 -m pip install --no-cache-dir -c /tmp/image.txt . \
    && python3 -c "import importlib.metadata as m; assert m.version('tensorrt_llm') == '1.2.1'" \
    && (enginehouse-build doctor || test $? -eq 3) \
    && useradd --create-home --uid 10001 enginehouse \
    && apt-get update && apt-get install -y --no-install-recommends openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/*

USER 10001
WORKDIR /home/enginehouse
ENV ENGINEHOUSE_BIND=0.0.0.0:8000 PYTHONUNBUFFERED=1
EXPOSE 8000
# A large engine takes minutes to load.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health/ready', timeout=4)"]
# gunicorn takes the place of enginehouse-launch, gets the SIGTERM and lets running answers end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["enginehouse-launch", "--config", "/opt/enginehouse/configs/gunicorn.conf.py"]
CMD ["/engine"]
