# cleanscore on a CPU, about 1.5 GB:
#   docker build --tag=cleanscore .
#   docker run --rm --volume="$PWD:/data" cleanscore quickstart.py --outdir=/data/demo
FROM python:3.11-slim

WORKDIR /opt/cleanscore
COPY requirements.txt requirements-cpu.lock ./
# Of the lock, only what the scripts need. The index has PyTorch without CUDA, a tenth of the size.
RUN pip install --no-cache-dir --extra-index-url=https://download.pytorch.org/whl/cpu \
    --requirement=requirements.txt --constraint=requirements-cpu.lock

COPY archives archives
COPY benchmarks benchmarks
COPY cleanscore cleanscore
COPY detection detection
COPY dnnlib dnnlib
COPY examples examples
COPY metrics metrics
COPY recipes recipes
COPY reports reports
COPY sampling sampling
COPY torch_utils torch_utils
COPY training training
COPY *.py LICENSE README.md ./

# Not as root: files in /data belong to who builds with --build-arg=UID=$(id -u).
ARG UID=1000
RUN useradd --create-home --uid=$UID cleanscore
USER cleanscore
VOLUME /data
ENTRYPOINT ["python"]
CMD ["quickstart.py", "--help"]
