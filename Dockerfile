# The project on PyTorch's official image. docs/running.md tells how to build and run it.
#   docker build -t budget-bert .
# CUDA 13.0 is what PyTorch installs by default. --build-arg CUDA=12.6 is for older drivers and for GPUs before Turing.
ARG CUDA=13.0
FROM pytorch/pytorch:2.13.0-cuda${CUDA}-cudnn9-runtime

# torch.compile builds its kernels' launchers where it runs: that takes a compiler and Python's headers.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/budget-bert

# Dependencies come before the code, so that a change of code leaves their layer. The image's torch is the pinned one and
# stays. The image's Python belongs to Ubuntu, which pip respects unless it is told that nobody else uses it.
COPY pyproject.toml constraints.txt README.md ./
RUN python3 -m pip install --no-cache-dir --break-system-packages --constraint constraints.txt .

COPY common common/
COPY data_prep data_prep/
COPY pretrain pretrain/
COPY finetune finetune/
COPY configs configs/
COPY ds_configs ds_configs/
COPY run_pretraining.py run_glue_grid.py ./

# Not root, and any number does with `docker run --user`: a home for caches that all may write to, a name without passwd.
RUN useradd --create-home trainer && chmod 1777 /home/trainer
ENV HOME=/home/trainer USER=trainer PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER trainer

CMD ["python3", "run_pretraining.py", "--help"]
