# A machine with NVIDIA GPUs and their container toolkit:
#   docker build -t mapet .
#   docker run --gpus all --init --user "$(id -u):$(id -g)" --shm-size 8g -v /data:/data mapet run --images /data/photos --out /data/runs/photos
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
# A home for caches (Hugging Face, matplotlib, compiled kernels) that any --user may write.
ENV HOME=/tmp
WORKDIR /opt/mapet
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[datasets,detection]'
WORKDIR /data
ENTRYPOINT ["mapet"]
CMD ["--help"]
